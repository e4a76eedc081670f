"""What other tools need beside the graphs: the files diffusers and optimum look for, the tokenizer, the licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.libraries import quiet, transformers
from ..model.model import Model
from ..runtime.errors import CheckpointError
from ..runtime.manifest import TokenizerSpec

__all__ = ["write_sidefiles"]

LIBRARY_CLASSES: Mapping[str, tuple[str, str]] = {
    "unet": ("diffusers", "OnnxRuntimeModel"),
    "transformer": ("diffusers", "OnnxRuntimeModel"),
    "vae_decoder": ("diffusers", "OnnxRuntimeModel"),
    "vae_encoder": ("diffusers", "OnnxRuntimeModel"),
    "text_encoder": ("diffusers", "OnnxRuntimeModel"),
}
"""How diffusers' own ONNX export and optimum name a part in model_index.json."""


def write_sidefiles(model: Model, folder: Path) -> TokenizerSpec | None:
    """Write model_index.json, scheduler/, config.json of every part, tokenizer/ and the licence files into `folder`."""
    if model.original is not None and model.scheduler is not None:
        index: dict[str, Any] = {
            "_class_name": type(model.original).__name__,
            "_diffusers_version": str(model.scheduler.get("_diffusers_version", "")),
            "scheduler": ["diffusers", model.scheduler["_class_name"]],
            **{name: list(LIBRARY_CLASSES[name]) for name in model.parts if name in LIBRARY_CLASSES},
        }
        if model.tokenizer is not None:
            index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        _write(folder / "model_index.json", index)
        _write(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    for part in model:
        if part.config:
            _write(folder / part.name / "config.json", part.config)
    for file in model.license_files:
        shutil.copyfile(file, folder / file.name)
    return None if model.tokenizer is None else _write_tokenizer(model, folder / "tokenizer")


def _write_tokenizer(model: Model, folder: Path) -> TokenizerSpec:
    """tokenizer.json in one spelling, whichever files the checkpoint has, and the configuration beside it."""
    files = model.tokenizer
    assert files is not None
    try:
        with quiet():
            tokenizer = transformers().CLIPTokenizer.from_pretrained(str(files.folder), local_files_only=True)
            data = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:
        raise CheckpointError(f"{files.folder} cannot be read as a CLIP tokenizer ({error})") from error
    data["padding"] = data["truncation"] = None  # the runtime pads and cuts, as the manifest says
    _write(folder / "tokenizer.json", data, indent=None)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": files.max_length,
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
    }
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "vocab.json", data["model"]["vocab"], indent=None)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return TokenizerSpec("tokenizer/tokenizer.json", files.max_length, files.pad_id)


def _write(file: Path, data: Mapping[str, Any], indent: int | None = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=indent, sort_keys=indent is not None, ensure_ascii=False, default=list)
    file.write_text(text + "\n", encoding="utf-8")
