"""CLIP's tokenizer through Hugging Face's tokenizers library.

tokenizer.json is a small program: it names components, patterns and sizes. Before the Rust parser sees it, only the
components CLIP needs are let through, because others have aborted the process or run for ever (padding to 2^40
entries, patterns that backtrack, ids of 2^32 - 1; spec/bundle.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ..errors import BadInput, BundleError
from ..manifest import TokenizerSpec
from ..strictjson import MAX_BYTES, loads

__all__ = ["TokenIds", "Tokenizer", "library_version", "open_tokenizer"]

MAX_TOKENS = 1 << 20
"""CLIP has 49,408; ids beyond a million would only make tables large."""
MAX_TOKEN = 512
"""Characters of one token; CLIP's longest has 20."""
MAX_ADDED = 10_000
"""Added tokens: two specials and what textual inversion added."""

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PATTERNS = {
    r"\s+",
    _WORD,  # openai/clip-vit-large-patch14/tokenizer.json
    r"<\|startoftext\|>|<\|endoftext\|>|" + _WORD,  # transformers 5, CLIPTokenizer
}
"""Regular expressions that are let through, none of which can backtrack without end."""

# component -> its other fields and what they may hold; None stands for a value checked by hand
BOOL = (True, False)
COMPONENTS: Mapping[str, Mapping[str, Mapping[str, tuple[Any, ...] | None]]] = {
    "normalizer": {
        "Sequence": {"normalizers": None},
        "NFC": {},
        "Lowercase": {},
        "Replace": {"pattern": None, "content": (" ",)},
    },
    "pre_tokenizer": {
        "Sequence": {"pretokenizers": None},
        "Split": {"pattern": None, "behavior": ("Removed", "Isolated"), "invert": BOOL},
        "ByteLevel": {"add_prefix_space": (False,), "trim_offsets": BOOL, "use_regex": BOOL},
    },
    "post_processor": {
        "RobertaProcessing": {"sep": None, "cls": None, "trim_offsets": BOOL, "add_prefix_space": BOOL},
    },
}
MODEL = {
    "dropout": (None,),
    "unk_token": None,
    "continuing_subword_prefix": ("", None),
    "end_of_word_suffix": ("</w>", "", None),
    "fuse_unk": BOOL,
    "byte_fallback": BOOL,
    "ignore_merges": BOOL,
    "vocab": None,
    "merges": None,
}
ADDED = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")


def library_version() -> str:
    return str(tokenizers.__version__)


@dataclass(frozen=True)
class TokenIds:
    ids: NDArray[np.int64]
    """[max_length]: start, the prompt, end, padding."""
    truncated: int
    """Tokens of the prompt that did not fit and were cut off its end; 0 when all of it counts."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids as transformers' CLIPTokenizer with padding="max_length" and truncation=True gives them."""

    spec: TokenizerSpec
    start: int
    end: int
    _engine: Any

    def encode(self, text: str) -> TokenIds:
        """Raises BadInput for what is not text, or holds half a surrogate pair (no UTF-8 can carry it)."""
        if not isinstance(text, str):
            raise BadInput(f"a prompt of type {type(text).__name__}", expected="text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"character {error.start} of the prompt is half a surrogate pair",
                expected="valid Unicode",
                fix="decode the prompt as UTF-8, or remove that character",
            ) from None
        words = _rust("the prompt", lambda: self._engine.encode(text, add_special_tokens=False).ids)
        room = self.spec.max_length - 2
        ids = np.full(self.spec.max_length, self.spec.pad_id, dtype=np.int64)
        kept = [self.start, *words[:room], self.end]
        ids[: len(kept)] = kept
        return TokenIds(ids, max(0, len(words) - room))


def open_tokenizer(path: Path | str, spec: TokenizerSpec) -> Tokenizer:
    """Read a tokenizer.json of CLIP's kind; its own padding and truncation give way to `spec`.

    Raises BundleError naming the file and the component for anything else.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        data = loads(path.read_bytes(), path.name) if size <= MAX_BYTES else None
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}", fix="download or export the bundle again") from None
    if data is None:
        raise BundleError(
            f"{path.name}: {size:,} bytes", expected=f"at most {MAX_BYTES:,}", fix="export it again"
        )
    start, end, size = _check(data, path.name)
    if not 0 <= spec.pad_id < size:
        raise BundleError(
            f"{path.name} has {size} tokens, the manifest pads with {spec.pad_id}", fix="export it again"
        )
    data |= {"padding": None, "truncation": None, "decoder": None}
    engine = _rust(path.name, lambda: tokenizers.Tokenizer.from_str(json.dumps(data)))
    return Tokenizer(spec, start, end, engine)


def _rust(where: str, call: Any) -> Any:
    """Run `call`, turning whatever Rust throws into a BundleError; a panic is a BaseException, not an Exception."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BundleError(
            f"{where}: tokenizers {tokenizers.__version__} cannot take it ({reason})",
            fix="export the bundle again, or update tokenizers",
        ) from None


def _check(data: Any, where: str) -> tuple[int, int, int]:
    """Refuse a tokenizer.json that is not CLIP's kind. Returns the start id, the end id and the number of tokens."""

    def refuse(found: str, expected: str = "what CLIP's tokenizer needs") -> NoReturn:
        raise BundleError(f"{where}: {found}", expected=expected, fix="export the bundle again")

    def keys(what: str, found: Any, known: set[str], needed: set[str]) -> None:
        if not isinstance(found, dict):
            refuse(f"{what} is {str(found)[:40]!r}", "an object")
        if wrong := sorted((found.keys() - known) | (needed - found.keys())):
            refuse(f"{what}: unknown or missing field {wrong[0][:40]!r}")

    def component(role: str, found: Any, depth: int = 0) -> None:
        kind = found.get("type") if isinstance(found, dict) else None
        if not isinstance(kind, str) or kind not in COMPONENTS[role] or depth > 2:
            refuse(f"{role} {str(kind)[:40]!r}", ", ".join(COMPONENTS[role]))
        fields = COMPONENTS[role][kind]
        keys(
            f"{role} {kind}", found, {"type", *fields}, {"type", *fields} - {"use_regex"}
        )  # not in files before 2022
        for name, allowed in fields.items():
            value = found[name]
            if allowed is not None and not any(value is option or value == option for option in allowed):
                refuse(f"{role} {kind}: {name} is {str(value)[:40]!r}")
            if name == "pattern" and not (
                isinstance(value, dict) and value.keys() == {"Regex"} and value["Regex"] in PATTERNS
            ):
                refuse(f"{role} {kind}: pattern {str(value)[:80]!r}", "one of CLIP's patterns")
            if name in ("normalizers", "pretokenizers"):
                if not isinstance(value, list) or len(value) > 8:
                    refuse(f"{role} {kind} of {str(value)[:40]!r}", "a short list")
                for part in value:
                    component(role, part, depth + 1)

    top = {
        "version",
        "truncation",
        "padding",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
    }
    top |= {"decoder", "model"}
    keys("the file", data, top, top - {"truncation", "padding", "decoder"})
    if data["version"] != "1.0":
        refuse(f"version {str(data['version'])[:40]!r}", "1.0")
    for role in COMPONENTS:
        component(role, data[role])

    model = data["model"]
    keys("model", model, {"type", *MODEL}, {"vocab", "merges"})
    if model.get("type", "BPE") != "BPE":
        refuse(f"model {str(model['type'])[:40]!r}", "BPE")
    for name, options in MODEL.items():
        if name in model and options is not None and model[name] not in options:
            refuse(f"model: {name} is {str(model[name])[:40]!r}")

    ids = dict(model["vocab"]) if isinstance(model["vocab"], dict) else refuse("vocab is no object")
    added = data["added_tokens"]
    if not isinstance(added, list) or len(added) > MAX_ADDED:
        refuse("added_tokens", f"a list of at most {MAX_ADDED:,}")
    for token in added:
        keys("an added token", token, set(ADDED), set(ADDED))
        content = token["content"]
        if not isinstance(content, str) or ids.setdefault(content, token["id"]) != token["id"]:
            refuse(f"added token {str(content)[:40]!r} has another id in the vocabulary")
        if not all(type(token[flag]) is bool for flag in ADDED[2:]):
            refuse(f"added token {content[:40]!r}", "true or false for its flags")
    if not 0 < len(ids) <= MAX_TOKENS or not all(type(i) is int for i in ids.values()):
        refuse(f"{len(ids):,} tokens, or ids that are no whole numbers", f"1 to {MAX_TOKENS:,}")
    if sorted(ids.values()) != list(range(len(ids))):
        refuse(f"the ids of {len(ids):,} tokens", "each id from 0 on exactly once")
    if long := next((token for token in ids if not 0 < len(token) <= MAX_TOKEN), None):
        refuse(f"a token of {len(long):,} characters", f"1 to {MAX_TOKEN}")
    if "" in ids:
        refuse("an empty token")
    if (unknown := model.get("unk_token")) is not None and (
        not isinstance(unknown, str) or unknown not in ids
    ):
        refuse(f"unk_token {str(unknown)[:40]!r} is not in the vocabulary")
    _check_merges(model["merges"], ids, refuse)

    ends = []
    for name in ("cls", "sep"):
        pair = data["post_processor"][name]
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not isinstance(pair[0], str)
            or ids.get(pair[0]) != pair[1]
        ):
            refuse(f"post_processor {name} is {str(pair)[:60]!r}", "a token of the vocabulary and its id")
        ends.append(int(pair[1]))
    return ends[0], ends[1], len(ids)


def _check_merges(merges: Any, ids: Mapping[str, int], refuse: Any) -> None:
    """Each merge joins two tokens into a third: ["th", "e</w>"], or "th e</w>" in older files."""
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        refuse("merges", "a list")
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            refuse(f"merge {i} is {str(merge)[:60]!r}", "two tokens")
        for token in (*pair, "".join(pair)):
            if token not in ids:
                refuse(f"merge {i} needs {token[:40]!r}, which is not in the vocabulary")
