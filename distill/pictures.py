"""Real pictures to distil on: a folder or a zip of them, cut to the model's size, as latents with what they show.

Layouts, as the `datasets` library reads them (its imagefolder): a folder a class; or pictures with captions, each in a
.txt beside its picture or all in a captions.jsonl or metadata.jsonl, {"file_name": "a.png", "text": "a cat"} a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.fingerprint import model_fingerprint
from ..model.libraries import torch
from ..model.model import Model
from ..model.shards import read_shard, write_shard
from ..runtime.errors import BadInput
from ..runtime.files import output_errors
from ..runtime.progress import Progress
from .picture_files import KINDS, Files, Unreadable, open_files, pixels_of

__all__ = ["Encoded", "Pictures", "encode_pictures", "pictures_for", "read_pictures"]

Array = NDArray[Any]

TABLES = ("captions.jsonl", "metadata.jsonl")
CAPTION_KEYS = ("text", "caption")
SHARD = 256
"""Pictures encoded between two looks at the disk."""
SHOWN = 5
"""Names listed in an error."""


@dataclass(frozen=True)
class Pictures:
    """What was found, in the order of the names; pixels are read when they are asked for."""

    source: Path
    """A folder or a .zip."""
    names: tuple[str, ...]
    """Paths inside it, with "/"."""
    subjects: tuple[Any, ...]
    """What each shows: a label, a caption, or None for a model that takes neither."""
    size: tuple[int, int]
    """Height and width they are cut to."""
    skip_unreadable: bool
    key: str
    """Of the files, so that work done on them is found again."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Array | str]]:
        """(number, uint8 [height, width, 3]) of each picture from begin to end; (number, why) for one to be skipped.

        Scaled with Lanczos' filter until it covers the size, centred, and cut; turned as its EXIF data says;
        transparent parts become white. Raises BadInput naming the file that cannot be read, unless skip_unreadable.
        """
        with open_files(self.source) as files:
            for number in range(begin, len(self) if end is None else min(end, len(self))):
                name = self.names[number]
                try:
                    yield number, pixels_of(files.read(name), self.size)
                except Unreadable as error:
                    if not self.skip_unreadable:
                        raise BadInput(
                            f"{self.source}: picture {name} cannot be read ({error})",
                            expected="a whole PNG, JPEG or WebP file",
                            fix="take it out, or set skip_unreadable",
                        ) from None
                    yield number, str(error)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Pictures as clean latents; model.training.given_samples takes the first two."""

    latents: Array
    """float32 [n, channels, height, width], in the denoiser's scale; mirror images, where asked for, come after."""
    subjects: tuple[Any, ...]
    """[n]: label, caption or None."""
    skipped: tuple[str, ...]
    """Names of the pictures that could not be read."""


def pictures_for(model: Model, source: Path, *, skip_unreadable: bool = False) -> Pictures:
    """`read_pictures` with the model's size and what it is conditioned on: captions, its classes, or neither."""
    size = (model.sample.height, model.sample.width)
    classes = None if model.classes is None else _class_names(model)
    captions = model.tokenizer is not None
    return read_pictures(source, size, classes=classes, captions=captions, skip_unreadable=skip_unreadable)


def read_pictures(
    source: Path,
    size: tuple[int, int],
    *,
    classes: Mapping[str, int] | int | None = None,
    captions: bool = False,
    skip_unreadable: bool = False,
) -> Pictures:
    """The pictures of a folder or a .zip, with all that can be checked before pixels are read.

    size      height and width
    classes   name -> label, a name being that of a folder; or how many labels the model has, which are the folders
              then, sorted
    captions  whether each picture needs one
    Raises BadInput for a source that is missing, holds no pictures or names that lead out of it, and for pictures
    without the label or the caption they need.
    """
    if classes is not None and captions:
        raise BadInput("pictures with both classes and captions", expected="one of them")
    with open_files(source) as files:
        names = files.pictures()
        if not names:
            raise BadInput(
                f"{source} holds no pictures",
                expected=f"files that end in {', '.join(KINDS)}",
                fix="check the path",
            )
        subjects: tuple[Any, ...] = (None,) * len(names)
        if classes is not None:
            subjects = _labels(source, names, classes)
        elif captions:
            subjects = _captions(source, names, files)
        digest = hashlib.blake2b(digest_size=8)
        for name, subject in zip(names, subjects):
            digest.update(repr((name, files.stamp(name), subject)).encode())
    return Pictures(Path(source), names, subjects, size, skip_unreadable, digest.hexdigest())


def encode_pictures(
    model: Model, pictures: Pictures, store: Path | None = None, *, mirrored: bool = False, batch: int = 16
) -> Generator[Progress, None, Encoded]:
    """Each picture as the mean of its latents, by the encoder of the model's original VAE.

    store     a folder in which what was encoded is kept, by a key of the files and the model: an interrupted run goes
              on there
    mirrored  whether the mirror image of every picture is encoded as well
    A model without a VAE gets the pixels themselves, in -1..1. Raises BadInput for a model whose encoder is gone or
    takes no RGB, latents that are not finite, a picture that cannot be read, and where none can.
    """
    encode = _encoder(model, pictures.size)
    key = hashlib.blake2b(
        repr((pictures.key, pictures.size, pictures.skip_unreadable, mirrored)).encode(), digest_size=8
    )
    key.update(model_fingerprint(model).encode())
    folder = None if store is None else store / f"pictures-{key.hexdigest()}"
    if folder is not None:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    shards: list[Mapping[str, Array]] = []
    for begin in range(0, len(pictures), SHARD):
        file = None if folder is None else folder / f"{begin // SHARD:05d}.safetensors"
        shard: Mapping[str, Array] | None = None if file is None else read_shard(file)
        if shard is None:
            yield Progress("pictures", begin / len(pictures), f"{begin} of {len(pictures)}")
            shard = _shard(encode, pictures, begin, mirrored, batch)
            if file is not None:
                write_shard(file, shard)
        shards.append(shard)
    number = np.concatenate([shard["number"] for shard in shards])
    if not len(number):
        raise BadInput(
            f"none of the {len(pictures)} pictures of {pictures.source} can be read",
            expected="whole PNG, JPEG or WebP files",
        )
    sides = ("latent", "mirrored") if mirrored else ("latent",)
    latents = np.concatenate([shard[side] for side in sides for shard in shards if len(shard["number"])])
    if not np.isfinite(latents).all():
        raise BadInput(
            f"{model.name}: its encoder makes NaN or infinity of {pictures.source}'s pictures",
            expected="finite latents",
            fix="look at the VAE's weights; SDXL's overflows in float16",
        )
    kept = set(number.tolist())
    subjects = tuple(pictures.subjects[i] for i in number.tolist()) * len(sides)
    skipped = tuple(name for i, name in enumerate(pictures.names) if i not in kept)
    yield Progress(
        "pictures", 1.0, f"{len(number)} pictures" + (f", {len(skipped)} skipped" if skipped else "")
    )
    return Encoded(latents, subjects, skipped)


def _shard(encode: Any, pictures: Pictures, begin: int, mirrored: bool, batch: int) -> dict[str, Array]:
    """Pictures begin to begin + SHARD: `number` of those that could be read, and their latents."""
    read = [(i, pixels) for i, pixels in pictures.read(begin, begin + SHARD) if not isinstance(pixels, str)]
    sides = {"latent": False, "mirrored": True} if mirrored else {"latent": False}
    parts: dict[str, list[Array]] = {side: [] for side in sides}
    for first in range(0, len(read), batch):
        pixels = np.stack([picture for _, picture in read[first : first + batch]])
        for side, turned in sides.items():
            parts[side].append(encode(pixels[:, :, ::-1] if turned else pixels))
    number = np.array([i for i, _ in read], dtype=np.int64)
    return {"number": number} | {side: np.concatenate(part) for side, part in parts.items() if part}


def _encoder(model: Model, size: tuple[int, int]) -> Any:
    """uint8 [n, height, width, 3] -> float32 latents in the denoiser's scale."""
    sample = model.sample
    if any(pixels % sample.factor for pixels in size):
        raise BadInput(
            f"pictures of {size[0]}x{size[1]} for {model.name}", expected=f"multiples of {sample.factor}"
        )
    vae = getattr(model.original, "vae", None)
    if "vae_decoder" not in model.parts:
        if sample.channels != 3 or sample.factor != 1:
            raise BadInput(f"pictures for {model.name}, which draws none", expected="a model of RGB pictures")
        return lambda pixels: _as_input(pixels)
    if vae is None or getattr(vae, "encoder", None) is None:
        raise BadInput(
            f"{model.name} came without its VAE's encoder",
            expected="a model loaded from a diffusers checkpoint",
            fix="train on the model's own latents",
        )
    if vae.config.in_channels != 3:
        raise BadInput(f"{model.name}: its VAE takes {vae.config.in_channels} channels", expected="3, RGB")
    th = torch()
    weight = next(vae.parameters())

    def encode(pixels: Array) -> Array:
        with th.no_grad():
            images = th.from_numpy(_as_input(pixels)).to(weight.device, weight.dtype)
            mean = vae.encode(images).latent_dist.mode()
        latents = (mean.float().cpu().numpy() - sample.shift_factor) * sample.scaling_factor
        return np.asarray(latents, dtype=np.float32)

    return encode


def _as_input(pixels: Array) -> Array:
    """uint8 [n, height, width, 3] -> float32 [n, 3, height, width] in -1..1."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1


def _class_names(model: Model) -> Mapping[str, int] | int:
    """The names of the model's labels, where its checkpoint says them; else how many there are."""
    assert model.classes is not None
    return getattr(model.original, "labels", None) or model.classes  # what DiTPipeline makes of id2label


def _labels(source: Path, names: Sequence[str], classes: Mapping[str, int] | int) -> tuple[int, ...]:
    """Each picture's label, by the folder it lies in."""
    folders = [PurePosixPath(name).parent.name for name in names]
    if loose := [name for name, folder in zip(names, folders) if not folder]:
        raise BadInput(
            f"{source}: {_some(loose)} without a class",
            expected="every picture in a folder named after its class",
        )
    found = sorted(set(folders))
    if isinstance(classes, int):
        if len(found) != classes:
            raise BadInput(
                f"{source} holds {len(found)} folders of pictures ({_some(found)})",
                expected=f"{classes}, one for each of the model's classes: its checkpoint does not name them",
            )
        return tuple(found.index(folder) for folder in folders)
    known = {_plain(name): label for name, label in classes.items()}
    if strange := [folder for folder in found if _plain(folder) not in known]:
        raise BadInput(
            f"{source}: {_some(strange)} {'is' if len(strange) == 1 else 'are'} none of the model's classes",
            expected=f"folders named {_some(list(classes))}",
        )
    return tuple(known[_plain(folder)] for folder in folders)


def _captions(source: Path, names: Sequence[str], files: Files) -> tuple[str, ...]:
    """Each picture's caption, from the .txt beside it or from a table."""
    told: dict[str, str] = {}
    for table in files.others(TABLES):
        folder = PurePosixPath(table).parent
        for number, line in enumerate(files.text(table).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = next(row[key] for key in CAPTION_KEYS if key in row)
                told[(folder / row["file_name"]).as_posix()] = text.strip()
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
                raise BadInput(
                    f"{source}: line {number} of {table} is {line[:80]!r}",
                    expected='{"file_name": "...", "text": "..."}',
                ) from None
    for note in files.others((".txt",)):
        stem = note.removesuffix(".txt")
        told |= {stem + kind: files.text(note).strip() for kind in (*KINDS, *map(str.upper, KINDS))}
    if bare := [name for name in names if not told.get(name)]:
        raise BadInput(
            f"{source}: {_some(bare)} without a caption ({len(bare)} of {len(names)} pictures)",
            expected=f"a .txt beside each picture, or {' or '.join(TABLES)}",
        )
    return tuple(told[name] for name in names)


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
