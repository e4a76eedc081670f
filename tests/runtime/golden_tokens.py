"""Make runtime/web/tests/fixtures/tokens.json: python tests/runtime/golden_tokens.py

Prompts and the ids that Hugging Face's tokenizers gives them, through runtime/backends/tokenizers.py: of emoji-64's
tokenizer, and of small ones that differ from it in each way a bundle's tokenizer.json may.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.runtime.backends.tokenizers import open_tokenizer
from fewstep.runtime.manifest import TokenizerSpec

from .test_tokenizer import DATA, END, PROMPTS, START, VOCAB

ROOT = Path(__file__).parents[2]
FILE = ROOT / "runtime/web/tests/fixtures/tokens.json"
EMOJI = "models/emoji-64/tokenizer/tokenizer.json"
LENGTH = 32

LATIN = "a the red apple rooster octopus café naïve Straße ﬁre x² 3.14 1,000 it's we'll 'quoted' don't"
SCRIPTS = "e\u0301 n\u0303 ΣΊΣΥΦΟΣ İstanbul 한국어 ひらがな カタカナ 漢字 हिन्दी ไทย עברית العربية Русский ǅ ß ẞ ŉ ..."
SYMBOLS = "🐓 🐙 👨‍👩‍👧 🏳️‍🌈 👍🏽 ☃️ ❤ ❤️ © ™ ½ ① Ⅷ ٣ ४ !!! ?! -- — “ ” … <> </w> \\ / _ # @home a_b x-y"
MARKS = (START, END, "<|startoftext|", END.upper(), f"{END}{START}", f"a{END}b", "<|endoftext|> ")
WORDS = (*LATIN.split(), *SCRIPTS.split(), *SYMBOLS.split(), *MARKS)
SPACES = (
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\u0085",
    "\ufeff",
    "\u2028",
    "",
)


def prompts(count: int) -> Iterator[str]:
    """Words of many scripts joined by many kinds of space, and random characters known since Unicode 3.2."""
    yield from (prompt for prompt in PROMPTS.values() if len(prompt) < 400)
    rng = random.Random(0)
    old = [chr(i) for i in range(0xFFFF) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]
    for i in range(count):
        if i % 4:
            parts = [rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randint(1, 9))]
            yield "".join(parts)
        else:
            yield "".join(rng.choice(old) for _ in range(rng.randint(1, 12)))


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, and the changed tokenizer.json."""

    def changed(name: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        data = copy.deepcopy(DATA)
        for path, value in changes.items():
            *place, last = path.split("__")
            at: Any = data
            for key in place:
                at = at[int(key)] if key.isdigit() else at[key]
            at[last] = value
        return name, data

    yield changed("the small one")
    split = "pre_tokenizer__pretokenizers__0__"
    yield changed(
        "special tokens are normalized", added_tokens__0__normalized=True, added_tokens__1__normalized=True
    )
    yield changed(
        "special tokens take the space around them",
        added_tokens__0__lstrip=True,
        added_tokens__1__rstrip=True,
    )
    yield changed(
        "special tokens are words", added_tokens__0__single_word=True, added_tokens__1__single_word=True
    )
    yield changed("what is between words stays", **{f"{split}behavior": "Isolated"})
    yield changed("words are removed", **{f"{split}invert": False})
    yield changed("bytes are not split again", pre_tokenizer__pretokenizers__1__use_regex=False)
    yield changed("no end of a word", model__end_of_word_suffix=None)
    yield changed("words of the vocabulary are not merged", model__ignore_merges=True)
    small = {token: i for i, token in enumerate(t for t in VOCAB if "Ł" not in t and "ð" not in t)}
    marks = {name: [token, small[token]] for name, token in (("cls", START), ("sep", END))}
    base: dict[str, Any] = {
        "model__vocab": small,
        "post_processor__cls": marks["cls"],
        "post_processor__sep": marks["sep"],
        "added_tokens__0__id": small[START],
        "added_tokens__1__id": small[END],
    }
    yield changed("unknown bytes", **base)
    yield changed("unknown bytes are one", **base, model__fuse_unk=True)
    yield changed("unknown bytes are left out", **base, model__unk_token=None)
    hexadecimal = {**small, **{f"<0x{i:02X}>": len(small) + i for i in range(256)}}
    yield changed(
        "unknown bytes are spelled", **{**base, "model__vocab": hexadecimal}, model__byte_fallback=True
    )


def encode(path: Path, pad_id: int, texts: list[str]) -> list[Any]:
    """For each text its ids up to the end mark, and how many tokens did not fit."""
    tokenizer = open_tokenizer(path, TokenizerSpec(path.name, LENGTH, pad_id))
    found = []
    for text in texts:
        token = tokenizer.encode(text)
        ids = token.ids.tolist()
        while len(ids) > 2 and ids[-1] == ids[-2] == pad_id:
            ids.pop()
        found.append([ids, token.truncated])
    return found


def make() -> dict[str, Any]:
    many = list(prompts(400))
    few = many[:60]
    emoji = json.loads((ROOT / EMOJI).read_text(encoding="utf-8"))
    cases: list[dict[str, Any]] = []
    pad = emoji["post_processor"]["sep"][1]
    ids = encode(ROOT / EMOJI, pad, many)
    cases.append({"name": "emoji-64", "tokenizer": EMOJI, "pad_id": pad, "prompts": many, "tokens": ids})
    with tempfile.TemporaryDirectory() as folder:
        for name, data in variants():
            path = Path(folder) / "tokenizer.json"
            path.write_text(json.dumps(data))
            pad = data["post_processor"]["sep"][1]
            ids = encode(path, pad, few)
            cases.append({"name": name, "tokenizer": data, "pad_id": pad, "prompts": few, "tokens": ids})
    return {"max_length": LENGTH, "cases": cases}


def main() -> None:
    data = make()
    cases = ",\n".join(json.dumps(case, separators=(",", ":")) for case in data["cases"])  # a case a line
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(f'{{"max_length": {LENGTH}, "cases": [\n{cases}\n]}}\n', encoding="utf-8")
    print(f"{len(data['cases'])} tokenizers, {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
