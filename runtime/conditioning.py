"""What a denoiser is conditioned on: prompts, by way of tokenizer and text encoder, and class labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Session
from .denoiser import network_inputs
from .errors import MissingExtra
from .manifest import Manifest, PartSpec, TokenizerSpec
from .process import Array
from .request import check

__all__ = ["conditions", "encode_text", "open_tokenizer", "token_ids"]

Encode = Callable[[Sequence[str]], Mapping[str, Array]]


def conditions(
    manifest: Manifest,
    prompts: list[str] | None,
    negative: str | None,
    labels: list[int] | None,
    n: int,
    encode: Encode,
    *,
    guided: bool,
) -> tuple[dict[str, Array], dict[str, Array] | None]:
    """What the network is conditioned on, and the same for nothing in particular where guidance needs it.

    encode  each distinct prompt to [1, tokens, features]
    """
    wanted = network_inputs(manifest.parts[manifest.denoiser])
    condition: dict[str, Array] = {}
    empty: dict[str, Array] = {}
    if prompts is not None and "encoder_hidden_states" in wanted:
        states = encode(prompts)
        condition["encoder_hidden_states"] = np.concatenate([states[p] for p in prompts])
        if guided:
            nothing = encode([negative or ""])[negative or ""]
            empty["encoder_hidden_states"] = np.repeat(nothing, n, axis=0)
    if labels is not None and "class_labels" in wanted:
        condition["class_labels"] = np.asarray(labels, dtype=np.int64)
        # the label after the last means "no class" (DiT, Peebles and Xie 2022, arXiv:2212.09748)
        empty["class_labels"] = np.full(n, manifest.classes, dtype=np.int64)
    return condition, empty if guided and empty else None


def token_ids(tokenizer: Any, spec: TokenizerSpec, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Each distinct prompt to [max_length] ids. Raises BadInput for one that does not fit."""
    found = {prompt: tokenizer.encode(prompt) for prompt in prompts}
    for prompt, token in found.items():
        check(
            not token.truncated,
            f"a prompt of {spec.max_length + token.truncated} tokens ({prompt[:40]!r}...)",
            f"at most {spec.max_length} with begin and end marks",
            f"shorten it by {token.truncated} tokens",
        )
    return {prompt: token.ids for prompt, token in found.items()}


def encode_text(
    session: Session, part: PartSpec, tokens: Mapping[str, NDArray[np.int64]]
) -> dict[str, Array]:
    """Each prompt's ids to float [1, tokens, features]."""
    name, out, dtype = part.inputs[0].name, part.outputs[0].name, part.inputs[0].dtype
    return {
        prompt: session.run({name: ids[None].astype(dtype)}, [out])[out] for prompt, ids in tokens.items()
    }


def open_tokenizer(file: Path, spec: TokenizerSpec) -> Any:
    """A backends.tokenizers.Tokenizer. Raises MissingExtra where its library is not installed."""
    try:
        return import_module(".backends.tokenizers", __package__).open_tokenizer(file, spec)
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise MissingExtra.of("tokenizers", "onnx") from None
