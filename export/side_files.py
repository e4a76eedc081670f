"""What other tools and people expect in a bundle beside the graphs: tokenizer, configurations, licences.

Names and folders are diffusers' and optimum's, so that `ORTDiffusionPipeline.from_pretrained(bundle)` opens it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.libraries import quiet
from ..model.model import Model
from ..runtime.errors import CheckpointError
from ..runtime.manifest import TokenizerSpec

__all__ = ["write_configs", "write_licenses", "write_tokenizer"]

PIPELINES = {"text-to-image": "StableDiffusionPipeline"}
"""Task -> the diffusers class whose model_index.json optimum reads."""


def write_tokenizer(model: Model, folder: Path) -> TokenizerSpec | None:
    """tokenizer/tokenizer.json for our runtime; vocab.json, merges.txt and tokenizer_config.json for others."""
    if model.tokenizer is None:
        return None
    tokenizer = model.original.tokenizer
    target = folder / "tokenizer"
    with quiet():
        tokenizer.save_pretrained(target)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["padding"] = data["truncation"] = None  # the manifest says how long prompts are, not this file
    if data["model"].get("type") != "BPE":
        raise CheckpointError(
            f"a tokenizer of type {data['model'].get('type')}", expected="byte-level BPE, as in CLIP"
        )
    _write(target / "tokenizer.json", data)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    _write(target / "vocab.json", data["model"]["vocab"])
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in (
        "name_or_path",
        "_name_or_path",
        "local_files_only",
    ):  # where the model lay is nobody's business
        config.pop(key, None)
    config["tokenizer_class"] = "CLIPTokenizer"
    _write(target / "tokenizer_config.json", config)
    return TokenizerSpec("tokenizer/tokenizer.json", model.tokenizer.max_length, model.tokenizer.pad_id)


def write_configs(model: Model, folder: Path) -> None:
    """model_index.json, scheduler/scheduler_config.json and a config.json for every part."""
    for part in model:
        if part.config:
            config = {key: value for key, value in part.config.items() if key != "_name_or_path"}
            _write(folder / part.name / "config.json", config)
    if model.scheduler is not None:
        _write(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    if model.task not in PIPELINES or model.scheduler is None:
        return
    index: dict[str, Any] = {"_class_name": PIPELINES[model.task], "_diffusers_version": "0.39.0"}
    index |= {part.name: ["diffusers", "OnnxRuntimeModel"] for part in model}
    index |= {
        "scheduler": ["diffusers", model.scheduler["_class_name"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    _write(folder / "model_index.json", index)


def write_licenses(model: Model, folder: Path) -> None:
    for file in model.license_files:
        shutil.copyfile(file, folder / file.name)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")
