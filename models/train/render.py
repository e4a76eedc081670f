"""Render captioned 64x64 emoji compositions; everything is a pure function of a seed."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from captions import Emoji, load_emoji
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CONFIG = Path(__file__).parent / "config.toml"
SIZE = 64
STANDARD = 56  # drawn width of one emoji when the caption names no scale or place
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 215, 70),
    "green": (60, 160, 80),
    "blue": (50, 100, 210),
    "purple": (130, 70, 180),
    "pink": (250, 165, 195),
    "brown": (125, 80, 50),
    "grey": (150, 152, 156),
    "light blue": (160, 210, 245),
}
PLACES: dict[str, tuple[float, float]] = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "in the top left corner": (0.27, 0.27),
    "in the top right corner": (0.73, 0.27),
    "in the bottom left corner": (0.27, 0.73),
    "in the bottom right corner": (0.73, 0.73),
}
# Emoji drawn alike up to this mean absolute difference (0..255, over 64x64x3) count as one picture.
SAME_PICTURE = 1.0


@dataclass(frozen=True)
class Sample:
    """A picture (uint8, 64x64x3), its caption, and which emoji it shows."""

    image: np.ndarray
    caption: str
    emoji: tuple[int, ...]


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT), 109)


def draw_glyph(char: str) -> Image.Image | None:
    """The emoji's own 136x128 bitmap with alpha, or None where the font has no such glyph."""
    font = _font()
    canvas = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
    box = font.getbbox(char)
    if box[2] <= box[0] or box[3] <= box[1]:
        return None
    ImageDraw.Draw(canvas).text((-box[0], -box[1]), char, font=font, embedded_color=True)
    return canvas if canvas.getextrema()[3][1] > 0 else None


class Catalogue:
    """All usable emoji with their glyph bitmaps (blank and look-alike glyphs dropped)."""

    def __init__(self) -> None:
        self.emoji: list[Emoji] = []
        self.glyphs: list[Image.Image] = []
        self.dropped: list[tuple[str, str]] = []
        everything = load_emoji()
        kept = np.zeros((len(everything), SIZE, SIZE, 3), np.int16)
        for item in everything:
            glyph = draw_glyph(item.char)
            if glyph is None:
                self.dropped.append((item.caption, "blank"))
                continue
            small = np.asarray(
                _paste(_background((255, 255, 255)), _resized(glyph, STANDARD), 0.5, 0.5), np.int16
            )
            if self.emoji:
                gap = np.abs(kept[: len(self.emoji)] - small).mean(axis=(1, 2, 3))
                if gap.min() < SAME_PICTURE:
                    self.dropped.append((item.caption, self.emoji[int(gap.argmin())].caption))
                    continue
            kept[len(self.emoji)] = small
            self.emoji.append(item)
            self.glyphs.append(glyph)

    def __len__(self) -> int:
        return len(self.emoji)

    @property
    def core(self) -> tuple[int, ...]:
        """Numbers of the emoji named in config.toml as the core."""
        names = set(tomllib.loads(CONFIG.read_text())["core"]["names"])
        return tuple(i for i, item in enumerate(self.emoji) if item.name in names)

    @property
    def captions(self) -> list[str]:
        return [item.caption for item in self.emoji]


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """The one shared catalogue (reading the font takes a few seconds)."""
    return Catalogue()


def _background(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), colour)


def _resized(glyph: Image.Image, width: int) -> Image.Image:
    return glyph.resize((width, round(width * glyph.height / glyph.width)), Image.Resampling.LANCZOS)


@lru_cache(maxsize=20_000)
def _sprite(index: int, width: int) -> Image.Image:
    """An emoji at a drawn width; resizing is most of the cost of a picture, and few widths occur."""
    return _resized(catalogue().glyphs[index], width)


def _paste(base: Image.Image, sprite: Image.Image, cx: float, cy: float) -> Image.Image:
    """Draw a sprite with its centre at the given fraction of the picture."""
    base.paste(sprite, (round(cx * SIZE - sprite.width / 2), round(cy * SIZE - sprite.height / 2)), sprite)
    return base


def canonical(index: int) -> np.ndarray:
    """The picture that the plain caption asks for: white, centred, standard size."""
    return np.asarray(_paste(_background((255, 255, 255)), _sprite(index, STANDARD), 0.5, 0.5))


def _colour(rng: np.random.Generator) -> str:
    return list(COLOURS)[int(rng.integers(len(COLOURS)))]


def _name_of(item: Emoji, rng: np.random.Generator) -> str:
    """Mostly the canonical caption, now and then a synonym."""
    if item.synonyms and rng.random() < 0.07:
        return item.synonyms[int(rng.integers(len(item.synonyms)))]
    return item.caption


def _backdrop(colour: str) -> str:
    return f" on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


def _scaled(caption: str, word: str) -> str:
    """Insert "small"/"large" after the article ("an owl" -> "a small owl")."""
    first, _, rest = caption.partition(" ")
    return f"a {word} {rest}" if first in {"a", "an"} else f"{word} {caption}"


@dataclass(frozen=True)
class Plan:
    """What to draw, before drawing it: equal plans give equal pictures, so latents can be shared."""

    emoji: tuple[int, ...]
    rgb: tuple[int, int, int]
    width: int
    centres: tuple[tuple[float, float], ...]

    @property
    def is_canonical(self) -> bool:
        """Whether this is what a plain caption asks for."""
        return self.rgb == COLOURS["white"] and self.width == STANDARD and self.centres == ((0.5, 0.5),)


def plan(seed: int, pool: tuple[int, ...] | None = None) -> tuple[Plan, str]:
    """The picture and the caption that a seed stands for, of any emoji or of those in the pool."""
    rng = np.random.default_rng(seed)
    cat = catalogue()
    pool = pool or range(len(cat))
    index = pool[int(rng.integers(len(pool)))]
    name, kind = _name_of(cat.emoji[index], rng), rng.random()
    # Some disorder keeps the model from drawing one fixed grid; too much of it would blur the pictures.
    dx, dy = rng.normal(0, 0.012, 2).clip(-0.03, 0.03).tolist() if rng.random() < 0.1 else (0.0, 0.0)
    width = STANDARD + (int(rng.integers(-2, 3)) if rng.random() < 0.05 else 0)
    colour, centre = "white", (0.5 + dx, 0.5 + dy)
    caption = name
    if 0.47 <= kind < 0.76:  # named background
        colour = _colour(rng)
        caption += _backdrop(colour)
    elif 0.76 <= kind < 0.86:  # place or scale, half of the time on a named background
        if rng.random() < 0.6:
            place = list(PLACES)[int(rng.integers(len(PLACES)))]
            (px, py), width = PLACES[place], 32
            centre, caption = (px + dx, py + dy), f"{name} {place}"
        else:
            word, width = (("small", 34), ("large", 66))[int(rng.integers(2))]
            caption = _scaled(name, word)
    elif kind >= 0.86:  # two emoji side by side
        other = pool[int(rng.integers(len(pool)))]
        caption = f"{name} and {_name_of(cat.emoji[other], rng)}"
    if kind >= 0.76 and rng.random() < 0.5:
        colour = _colour(rng)
        caption += _backdrop(colour)
    if kind >= 0.86:
        return Plan((index, other), COLOURS[colour], 31, ((0.25, 0.5 + dy), (0.75, 0.5 + dy))), caption
    return Plan((index,), COLOURS[colour], width, (centre,)), caption


def draw(what: Plan) -> np.ndarray:
    """The picture of a plan: uint8, 64x64x3."""
    base = _background(what.rgb)
    for index, (cx, cy) in zip(what.emoji, what.centres, strict=True):
        _paste(base, _sprite(index, what.width), cx, cy)
    return np.asarray(base)


def compose(seed: int, pool: tuple[int, ...] | None = None) -> Sample:
    """One training composition; the same seed always gives the same picture and caption."""
    what, caption = plan(seed, pool)
    return Sample(draw(what), caption, what.emoji)


def as_model_input(images: np.ndarray) -> np.ndarray:
    """uint8 NHWC -> float32 NCHW in [-1, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1.0


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Tile uint8 pictures into one image, row by row."""
    rows = -(-len(images) // columns)
    out = np.full((rows * SIZE, columns * SIZE, 3), 255, np.uint8)
    for i, picture in enumerate(images):
        y, x = divmod(i, columns)
        out[y * SIZE : (y + 1) * SIZE, x * SIZE : (x + 1) * SIZE] = picture
    return Image.fromarray(out)
