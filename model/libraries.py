"""The heavy libraries of the toolchain, imported when first used; a missing one is an error with its pip command."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..runtime.errors import MissingExtra

__all__ = ["diffusers", "hush", "library", "quiet", "torch", "transformers"]


EXTRAS = {
    "peft": "train",
    "coremltools": "coreml",
    "ai_edge_litert": "litert",
    "ai_edge_quantizer": "litert",
    "litert_torch": "litert",
    "onnxruntime_qnn": "qnn",
    "tensorrt_rtx": "tensorrt",
}
"""Library -> the extra of fewstep that installs it; all others are of export."""


NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""LiteRT brings torchao, diffusers and coremltools import it, and all warn of what only a GPU has use for."""


def hush() -> None:
    """Before such an import: those loggers speak of errors alone, where nobody has told them what to speak of."""
    for name in NOISY:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)


def library(name: str) -> Any:
    """Import a library of the `export` extra, or one of EXTRAS. Raises MissingExtra with the pip command."""
    hush()
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise MissingExtra.of(error.name, EXTRAS.get(error.name, "export")) from None


def torch() -> Any:
    return library("torch")


def diffusers() -> Any:
    torch()  # diffusers imports without it, and fails much later
    return library("diffusers")


def transformers() -> Any:
    return library("transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers, transformers and torch neither warn nor draw progress bars: what matters, we say."""
    names = ("diffusers", "transformers", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars = [library(name).utils.logging for name in ("diffusers", "transformers")]
    shown = [bar.is_progress_bar_enabled() for bar in bars]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for bar in bars:
            bar.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for bar, on in zip(bars, shown, strict=True):
            if on:
                bar.enable_progress_bar()
