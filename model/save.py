"""A Model as a diffusers folder: what diffusers and `load` read, pruned and distilled denoisers included."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import BadInput, OutputError
from ..runtime.files import atomic_write, output_errors, remove, remove_stale, rename_folder, temporary_name
from .libraries import quiet, torch
from .model import Model
from .structure import KEY, network_of, structure_of

__all__ = ["GUIDANCE_KEY", "HISTORY_KEY", "PROMPTS_FILE", "STEPS_KEY", "save_folder"]

GUIDANCE_KEY = "_guidance_scale"
"""Ours, in model_index.json: the guidance a model draws best with. diffusers ignores keys that begin with "_", and has
one default for all Stable Diffusion pipelines, 7.5."""

STEPS_KEY = "_steps"
"""Ours, there: how many steps a few-step model was made for."""

HISTORY_KEY = "_history"
"""Ours, there: every pass that made the model what it is, with all of its fields."""

PROMPTS_FILE = "prompts.txt"
"""Ours, beside model_index.json: prompts the model draws well, one a line."""

PRECISIONS = ("float16", "bfloat16", "float32")


def save_folder(model: Model, out: Path | str, precision: str = "float16", overwrite: bool = False) -> Path:
    """Write a model that came from a diffusers pipeline as a diffusers folder; returns where.

    precision  of the stored weights: float16, bfloat16 or float32
    overwrite  replace a folder that holds a checkpoint or nothing
    Nothing appears at `out` before everything is written. A folder whose denoiser was cut in ways that diffusers has
    no configuration for is read by `load`; diffusers alone would build it whole and miss weights.
    Raises BadInput for a model without a pipeline, or one whose parts a diffusers folder cannot hold, weights that are
    not finite in that precision, and OutputError where it cannot be written.
    """
    out = Path(out)
    _check(model, precision)
    pipeline, network = model.original, network_of(model.parts[model.denoiser])
    if (out.exists() or out.is_symlink()) and not _replaceable(out, overwrite):
        raise OutputError(
            f"{out} exists already",
            expected="a path that does not exist, or with overwrite a checkpoint to replace",
            fix="pick another path, or pass --overwrite",
        )
    remove_stale(out)
    folder = temporary_name(out)
    size = 2 * sum(part.parameters() for part in model)
    try:
        with output_errors(out, size=size):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            with quiet():
                pipeline.save_config(folder)
                for name, component in pipeline.components.items():
                    if isinstance(component, torch().nn.Module):
                        _save_network(
                            network if name == model.denoiser else component, folder / name, precision
                        )
            _write_rest(model, folder)
            rename_folder(folder, out)
    finally:
        remove(folder)
    return out


def _check(model: Model, precision: str) -> None:
    if precision not in PRECISIONS:
        raise BadInput(f"precision {precision!r} of a folder", expected=" or ".join(PRECISIONS))
    if not hasattr(model.original, "save_config"):
        raise BadInput(
            f"{model.name} came from no diffusers pipeline", expected="a model of a diffusers folder"
        )
    fix = "leave that to the export: put the pass into its recipe"
    for part in model:
        if part.quantized is not None:
            raise BadInput(
                f"{part.name} is quantized", expected="float weights in a diffusers folder", fix=fix
            )
    decoder = model.parts.get("vae_decoder")
    if decoder is not None and getattr(decoder.module, "decoder", None) is not model.original.vae.decoder:
        raise BadInput("vae_decoder is not the pipeline's", expected="the VAE it came with", fix=fix)


def _replaceable(out: Path, overwrite: bool) -> bool:
    """Whether what lies there may go: nothing, or when asked to, a checkpoint; never anything else."""
    if out.is_symlink() or not out.is_dir():
        return False
    return not any(out.iterdir()) or (overwrite and (out / "model_index.json").is_file())


def _save_network(network: Any, folder: Path, precision: str) -> None:
    th = torch()
    # a network in float16 of its own; the state alone would do, but safe_open's writer wants the module's names
    stored = copy.deepcopy(network).to(getattr(th, precision))
    for name, tensor in stored.state_dict().items():
        if not bool(th.isfinite(tensor).all()):
            raise BadInput(
                f"{folder.name}: {name} is not finite in {precision}",
                expected="finite weights",
                fix="--precision float32, or take an earlier checkpoint of the training",
            )
    stored.save_pretrained(folder, safe_serialization=True)
    config = folder / "config.json"
    data = json.loads(config.read_text(encoding="utf-8"))
    data.pop("_name_or_path", None)  # says where it was made
    if hasattr(network, "register_to_config"):
        structure = structure_of(network)
        data.pop(KEY, None)
        if structure.to_json() != type(structure)().to_json():
            data[KEY] = structure.to_json()
    _write_json(config, data)


def _write_rest(model: Model, folder: Path) -> None:
    """Scheduler, tokenizer, index, prompts, licences."""
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index.pop("_name_or_path", None)
    scheduler = dict(model.scheduler or {})
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if model.guidance.kind != "none":
        index[GUIDANCE_KEY] = model.guidance.scale
    if model.steps is not None:
        index[STEPS_KEY] = model.steps
    if model.history:
        index[HISTORY_KEY] = list(model.history)
    _write_json(index_file, index)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if model.tokenizer is not None:
        shutil.copytree(model.tokenizer.folder, folder / "tokenizer", dirs_exist_ok=True)
    if model.prompts:
        atomic_write(folder / PROMPTS_FILE, ("\n".join(model.prompts) + "\n").encode())
    for file in model.license_files:
        shutil.copyfile(file, folder / file.name)
    if model.license and not model.license.startswith("see "):  # as `load` reads it from a model card
        card = f"---\nlicense: {model.license}\n---\n\n{model.name}, written by fewstep.\n"
        atomic_write(folder / "README.md", card.encode())


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    atomic_write(file, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
