"""Learn the small CLIP-style byte-pair tokenizer from composed captions and write `tokenizer/`."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import render
from captions import load_emoji
from common import MODEL, config
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's own word pattern: contractions, letters, single digits, other symbols.
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def corpus(size: int) -> list[str]:
    """Captions to learn from: every name and synonym, and the words that place and colour them."""
    lines = []
    for item in load_emoji():
        lines += [item.caption] * 3 + list(item.synonyms)
    extra = [
        f"a small large {place} and on a an {colour} background"
        for place in render.PLACES
        for colour in render.COLOURS
    ]
    return (lines + extra * 3)[:size]


def learn(vocab_size: int, lines: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte pairs in CLIP's layout: 256 bytes, the same bytes ending a word, merges, two specials."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 512, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    learned = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" "))
        for m in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(letters + [letter + "</w>" for letter in letters])}
    for left, right in learned:
        vocab.setdefault(left + right, len(vocab))
    for special in (START, END):
        vocab[special] = len(vocab)
    return vocab, learned


def write() -> None:
    """Train and save vocab.json, merges.txt and tokenizer.json."""
    cfg = config()["tokenizer"]
    vocab, merges = learn(cfg["vocab_size"], corpus(cfg["corpus"]))
    folder = MODEL / "tokenizer"
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=cfg["length"],
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    print(f"{len(vocab)} tokens, {len(merges)} merges -> {folder}")


@lru_cache(maxsize=1)
def load() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODEL / "tokenizer")


def encode(captions: list[str]) -> np.ndarray:
    """Token ids, padded to the model's length."""
    length = config()["tokenizer"]["length"]
    return load()(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    ).input_ids


if __name__ == "__main__":
    write()
