"""Token ids equal transformers' CLIPTokenizer, and a hostile tokenizer.json never reaches the Rust parser."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.runtime.errors import BadInput, BundleError
from fewstep.runtime.manifest import TokenizerSpec

pytest.importorskip("tokenizers")
from fewstep.runtime.backends import tokenizers as backend
from fewstep.runtime.backends.tokenizers import Tokenizer, open_tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
MERGES = [
    "t h",
    "th e</w>",
    "c a",
    "ca t</w>",
    "a n",
    "an d</w>",
    "d o",
    "do g</w>",
    "Ã ©</w>",
    "' s</w>",
    "! !</w>",
]


def byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, encoder.py, bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(rest))]


def vocabulary() -> dict[str, int]:
    tokens = byte_characters()
    tokens += [token + "</w>" for token in tokens]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    return {token: i for i, token in enumerate([*tokens, START, END])}


VOCAB = vocabulary()
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPEC = TokenizerSpec("tokenizer/tokenizer.json", LENGTH, VOCAB[END])


def added(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": VOCAB[token], "content": token, **flags, "special": True}


DATA: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [added(START), added(END)],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "post_processor": {
        "type": "RobertaProcessing",
        "sep": [END, VOCAB[END]],
        "cls": [START, VOCAB[START]],
        "trim_offsets": False,
        "add_prefix_space": False,
    },
    "decoder": None,
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": END,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>",
        "fuse_unk": False,
        "vocab": VOCAB,
        "merges": [merge.split(" ") for merge in MERGES],
    },
}

PROMPTS = {
    "plain": "The cat and the dog",
    "punctuation": "a cat's dog!! it's, you'll; we've -- they'd 've",
    "numbers": "2026 cats, 3.14",
    "empty": "",
    "spaces": " \t\n  a \u00a0 b\u2003c\u200bd ",
    "emoji": "🐱👨‍👩‍👧‍👦🏳️‍🌈 a 🐶",
    "accents": "CAFÉ cafe\u0301 Ångström ß ẞ İstanbul",
    "right to left": "قطة تجلس على سجادة חתול",
    "CJK": "一只猫坐在垫子上",
    "NUL": "a\0cat\0",
    "control": "a\x07\x1b[31mcat\x7f",
    "specials in the text": f"a {END} cat {START}{END}",
    "specials in capitals": "<|ENDOFTEXT|> <|StartOfText|>",
    "end of word": "the</w> </w>",
    "long word": "a" * 5000,
    "10,000 words": "the cat " * 5000,
    "beyond the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "exactly full": "cat " * (LENGTH - 2),
    "one too many": "cat " * (LENGTH - 1),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH
    )
    tokenizer(
        "warm", padding="max_length", truncation=True
    )  # puts padding and truncation into tokenizer.json
    tokenizer.save_pretrained(folder)
    tokenizer.folder = folder
    return tokenizer


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Any], Tokenizer]:
    def run(data: Any) -> Tokenizer:
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        return open_tokenizer(tmp_path / "tokenizer.json", SPEC)

    return run


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_ids_equal_transformers(theirs: Any, prompt: str) -> None:
    ours = open_tokenizer(theirs.folder / "tokenizer.json", SPEC).encode(prompt)
    expected = theirs(prompt, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    assert ours.ids.tolist() == expected
    assert ours.truncated == max(
        0, len(theirs(prompt, truncation=False, padding=False)["input_ids"]) - LENGTH
    )


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_older_form_of_the_file_gives_the_same_ids(theirs: Any, make: Any, prompt: str) -> None:
    old = copy.deepcopy(DATA)
    old["model"]["merges"] = MERGES
    expected = theirs(prompt, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    if "ENDOFTEXT" not in prompt:  # only the newer pattern keeps these together
        assert make(old).encode(prompt).ids.tolist() == expected


def test_ids_are_int64_of_the_full_length(make: Any) -> None:
    ids = make(DATA).encode("the cat").ids
    assert (ids.dtype, ids.shape) == ("int64", (LENGTH,))
    assert ids.tolist() == [VOCAB[START], VOCAB["the</w>"], VOCAB["cat</w>"], *[VOCAB[END]] * (LENGTH - 3)]


def test_what_is_cut_is_counted(make: Any) -> None:
    assert make(DATA).encode("cat " * LENGTH).truncated == 2
    assert make(DATA).encode("cat").truncated == 0


def test_another_padding_id_is_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(DATA))
    ids = open_tokenizer(tmp_path / "tokenizer.json", TokenizerSpec("", 8, 0)).encode("cat").ids
    assert ids.tolist() == [VOCAB[START], VOCAB["cat</w>"], VOCAB[END], 0, 0, 0, 0, 0]


@pytest.mark.parametrize("prompt", ["\ud83d", "cat \udc00", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_refused_with_its_place(make: Any, prompt: str) -> None:
    with pytest.raises(BadInput, match=r"character \d of the prompt is half a surrogate pair"):
        make(DATA).encode(prompt)


@pytest.mark.parametrize("prompt", [None, 7, b"cat", ["cat"]])
def test_a_prompt_that_is_no_text_is_refused(make: Any, prompt: Any) -> None:
    with pytest.raises(BadInput, match="expected text"):
        make(DATA).encode(prompt)


def test_a_padding_bomb_in_the_file_has_no_effect(make: Any) -> None:
    bomb = {
        "strategy": {"Fixed": 2**40},
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    assert make({**DATA, "padding": bomb}).encode("cat").ids.shape == (LENGTH,)


def set_at(*path: Any) -> Callable[[dict[str, Any]], None]:
    """set_at("model", "type", "Unigram") puts the last into place."""

    def edit(data: Any) -> None:
        *keys, last, value = path
        for key in keys:
            data = data[key]
        data[last] = value

    return edit


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another model": set_at("model", "type", "Unigram"),
    "a regex bomb in the splitter": set_at(
        "pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "(a+)+$"}
    ),
    "a regex bomb in the normalizer": set_at("normalizer", "normalizers", 1, "pattern", {"Regex": "(a+)+$"}),
    "a pattern as text": set_at("normalizer", "normalizers", 1, "pattern", {"String": "a"}),
    "a replacement bomb": set_at("normalizer", "normalizers", 1, "content", "a" * 1000),
    "an unknown normalizer": set_at("normalizer", "normalizers", 0, {"type": "Precompiled"}),
    "an unknown pre-tokenizer": set_at("pre_tokenizer", {"type": "Metaspace"}),
    "another post-processor": set_at("post_processor", {"type": "TemplateProcessing"}),
    "no normalizer": set_at("normalizer", None),
    "an unknown field": set_at("plugin", "/tmp/x.so"),
    "an unknown field of a component": set_at("normalizer", "normalizers", 0, "file", "x"),
    "another version": set_at("version", "2.0"),
    "dropout": set_at("model", "dropout", 0.1),
    "a prefix": set_at("model", "continuing_subword_prefix", "##"),
    "a huge id": set_at("model", "vocab", "a", 2**32 - 1),
    "a negative id": set_at("model", "vocab", "a", -1),
    "an id that is no number": set_at("model", "vocab", "a", "7"),
    "an id given twice": set_at("model", "vocab", "a", 0),
    "a gap": lambda d: d["model"]["vocab"].pop("Z"),
    "a long token": set_at("model", "vocab", "a" * 600, len(VOCAB)),
    "an empty token": set_at("model", "vocab", "", len(VOCAB)),
    "a vocabulary that is a list": set_at("model", "vocab", []),
    "an added token with another id": set_at("added_tokens", 0, "id", 3),
    "an added token with a wild flag": set_at("added_tokens", 0, "lstrip", "yes"),
    "added tokens that are no list": set_at("added_tokens", {}),
    "an unknown unk_token": set_at("model", "unk_token", "?!"),
    "a merge without a space": set_at("model", "merges", 0, "th"),
    "a merge of three": set_at("model", "merges", 0, ["t", "h", "e"]),
    "a merge of unknown tokens": set_at("model", "merges", 0, ["zz", "h"]),
    "a merge into an unknown token": set_at("model", "merges", 0, ["z", "z"]),
    "merges that are no list": set_at("model", "merges", "t h"),
    "an unknown end token": set_at("post_processor", "sep", ["?!", 3]),
    "another id for the end token": set_at("post_processor", "sep", [END, 3]),
    "deep sequences": set_at(
        "normalizer", "normalizers", 0, {"type": "Sequence", "normalizers": [DATA["normalizer"]] * 2}
    ),
    "a model that is missing": lambda d: d.pop("model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_before_the_library_sees_it(
    make: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(backend.tokenizers, "Tokenizer", None)
    data = copy.deepcopy(DATA)
    HOSTILE[name](data)
    with pytest.raises(BundleError, match=r"tokenizer\.json: .*fix: export") as caught:
        make(data)
    assert "cannot take it" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "x", 7, {}])
def test_json_that_is_no_tokenizer_is_refused(make: Any, data: Any) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        make(data)


@pytest.mark.parametrize("text", ["", "{", '{"version": NaN}', "[" * 100_000])
def test_text_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path / "tokenizer.json", SPEC)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json: No such file"):
        open_tokenizer(tmp_path / "tokenizer.json", SPEC)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="at most 16,777,216"):
        open_tokenizer(tmp_path / "tokenizer.json", SPEC)


def test_a_padding_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(DATA))
    with pytest.raises(BundleError, match="pads with 9999"):
        open_tokenizer(tmp_path / "tokenizer.json", TokenizerSpec("", 77, 9999))


def test_a_panic_of_the_library_is_a_bundle_error(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):  # pyo3's PanicException is no Exception either
        pass

    class Broken:
        @staticmethod
        def from_str(text: str) -> Any:
            raise Panic("index out of bounds")

    monkeypatch.setattr(backend.tokenizers, "Tokenizer", Broken)
    with pytest.raises(BundleError, match="cannot take it .index out of bounds"):
        make(DATA)
