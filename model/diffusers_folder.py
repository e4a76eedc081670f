"""A diffusers folder as a Model: read by its model_index.json, without guessing and without running its code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.errors import BadInput, CheckpointError
from ..runtime.manifest import NAME
from .checks import check_finite, read_header, read_json, read_prompts, weight_files
from .families import FAMILIES, from_pipeline
from .libraries import diffusers, library, quiet, torch, transformers
from .model import Model
from .save import GUIDANCE_KEY, HISTORY_KEY, PROMPTS_FILE, STEPS_KEY
from .structure import KEY, Structure, restructure

__all__ = ["Index", "load_folder", "read_index"]

COMPONENTS: Mapping[tuple[str, str], str] = {
    ("diffusers", "UNet2DConditionModel"): "network",
    ("diffusers", "UNet2DModel"): "network",
    ("diffusers", "DiTTransformer2DModel"): "network",
    ("diffusers", "Transformer2DModel"): "network",
    ("diffusers", "AutoencoderKL"): "network",
    ("transformers", "CLIPTextModel"): "network",
    ("transformers", "CLIPTokenizer"): "tokenizer",
    ("transformers", "CLIPTokenizerFast"): "tokenizer",
}
"""Library and class that model_index.json may name -> what it is. Nothing else is ever imported for a checkpoint:
naming a class there is how a checkpoint would run code (diffusers GHSA-4prv-5hj7-c2xr)."""

MAX_STEPS = 1000
"""Levels of the usual noise schedules: no plan has more calls."""

AGAIN = "download the model again, or write it again with fewstep prune"

IGNORED = {"safety_checker", "feature_extractor", "image_encoder", "watermark"}
"""Components a bundle has no use for."""


@dataclass(frozen=True)
class Index:
    """model_index.json, checked."""

    folder: Path
    pipeline: str
    components: Mapping[str, tuple[str, str]]
    """Component -> library and class, without those that are null or ignored."""
    data: Mapping[str, Any]
    """Everything the file says."""

    def networks(self) -> list[str]:
        return [name for name, pair in self.components.items() if COMPONENTS.get(pair) == "network"]

    def files(self, component: str) -> list[Path]:
        return weight_files(self.folder / component)


def read_index(folder: Path) -> Index:
    """Read and check model_index.json and that every component it names is there.

    Raises CheckpointError naming the file, what it says, what can be read, and the remedy.
    """
    file = folder / "model_index.json"
    if not file.exists() or (folder / NAME).exists():  # bundles have an index for optimum's sake
        raise _not_a_checkpoint(folder)
    data = read_json(file)
    pipeline = data.get("_class_name")
    if pipeline not in FAMILIES:
        raise CheckpointError(
            f"{file}: pipeline {str(pipeline)[:80]}",
            expected=" or ".join(FAMILIES),
            fix="for another model, wrap its network with Model.from_module (docs/your-own-model.md)",
        )
    components: dict[str, tuple[str, str]] = {}
    for name, pair in data.items():
        if name.startswith("_") or name in IGNORED or not isinstance(pair, list) or pair == [None, None]:
            continue
        known = len(pair) == 2 and all(isinstance(item, str) for item in pair)
        if not known or not (tuple(pair) in COMPONENTS or (pair[0] == "diffusers" and name == "scheduler")):
            raise CheckpointError(
                f"{file}: {name} is {str(pair)[:120]}",
                expected=f"one of {', '.join('.'.join(known) for known in COMPONENTS)}",
                fix="only these classes are loaded; a checkpoint with code of its own is never run",
            )
        components[name] = (pair[0], pair[1])
    for name in (*FAMILIES[pipeline].needs, "scheduler"):
        if name not in components:
            raise CheckpointError(
                f"{file} names no {name}, which a {pipeline} needs", fix="download the model again"
            )
    for name in components:
        if not (folder / name).is_dir():
            raise CheckpointError(
                f"{folder / name} is missing, which {file.name} names",
                fix="download the model again, with every file",
            )
    return Index(folder, pipeline, components, data)


def _not_a_checkpoint(folder: Path) -> CheckpointError:
    """Say what a folder is instead of a diffusers checkpoint."""
    if (folder / NAME).exists():
        return CheckpointError(
            f"{folder} is a bundle already, quantized perhaps: graphs of an engine and no checkpoint",
            expected="the checkpoint it was made from",
            fix=f"export that, or use the bundle: fewstep run {folder}",
        )
    names = sorted(entry.name for entry in folder.iterdir())
    if "config.json" in names:
        fix = "pass the pipeline's folder, one up, or wrap the network with Model.from_module (docs/your-own-model.md)"
        return CheckpointError(
            f"{folder} is one component, not a pipeline: it has no model_index.json", fix=fix
        )
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return CheckpointError(
        f"{folder} has no model_index.json, only: {shown or 'nothing'}",
        expected="a diffusers folder",
        fix="save the model with pipe.save_pretrained(folder)",
    )


def load_folder(folder: Path, name: str = "", *, empty: bool = False) -> Model:
    """Check everything cheap, then every weight, then build the modules in float32. Raises CheckpointError.

    empty  no weight is read: the modules' tensors have shapes and no memory
    """
    index = read_index(folder)
    scheduler = _scheduler(index)
    for component in index.networks():
        read_json(folder / component / "config.json")
        if not empty:
            check_finite(index.files(component))
    make = _empty_network if empty else _network
    parts = {component: make(index, component) for component in index.networks()}
    if "tokenizer" in index.components:
        parts["tokenizer"] = _tokenizer(index)
    with quiet():
        pipeline = FAMILIES[index.pipeline].build(diffusers(), {**parts, "scheduler": scheduler}, index.data)
    model = from_pipeline(pipeline, name or folder.resolve().name, folder)
    if model.tokenizer is not None and (folder / PROMPTS_FILE).exists():
        model = replace(model, prompts=tuple(read_prompts(folder / PROMPTS_FILE)))
    return _with_ours(model, folder / "model_index.json", index.data)


def _with_ours(model: Model, file: Path, data: Mapping[str, Any]) -> Model:
    """The model with what our own keys of model_index.json say."""

    def refused(key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: {key} is {str(data[key])[:80]!r}", expected=expected, fix="correct or remove it"
        )

    scale, steps, history = data.get(GUIDANCE_KEY), data.get(STEPS_KEY), data.get(HISTORY_KEY)
    if scale is not None and model.guidance.kind != "none":
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise refused(GUIDANCE_KEY, "a number")
        model = replace(model, guidance=replace(model.guidance, scale=float(scale)))
    if steps is not None:
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            raise refused(STEPS_KEY, f"1 to {MAX_STEPS}")
        model = replace(model, steps=steps)
    if history is not None:
        named = isinstance(history, list) and all(
            isinstance(record, dict) and isinstance(record.get("pass"), str) for record in history
        )
        if not named:
            raise refused(HISTORY_KEY, "a list of passes")
        model = replace(model, history=tuple(history))
    return model


def _network(index: Index, component: str) -> Any:
    origin, kind = index.components[component]
    if KEY in read_json(index.folder / component / "config.json"):
        return _pruned(index, component)
    source = diffusers() if origin == "diffusers" else transformers()
    fp16 = all(".fp16." in file.name for file in index.files(component))
    try:
        with quiet():
            module, report = getattr(source, kind).from_pretrained(
                str(index.folder / component),
                use_safetensors=True,
                local_files_only=True,
                variant="fp16" if fp16 else None,
                output_loading_info=True,
            )
    except Exception as error:  # the libraries raise anything from KeyError to RuntimeError on odd folders
        raise CheckpointError(
            f"{index.folder / component} cannot be loaded as {kind} ({type(error).__name__}: {_line(error)})",
            fix="download the model again, or save it again with the installed diffusers",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # the libraries only warn, and go on with random numbers
        raise CheckpointError(
            f"{index.folder / component} lacks {len(missing)} weights of its {kind}, first {missing[0]}",
            fix="download the model again, or correct config.json",
        )
    return module.float().eval()


def _empty_network(index: Index, component: str) -> Any:
    """The network of a component on torch's device "meta"."""
    origin, kind = index.components[component]
    config = read_json(index.folder / component / "config.json")
    with torch().device("meta"):
        if KEY in config:
            return _restructured(index, component, _shapes(index, component)).eval()
        try:
            with quiet():
                if origin == "diffusers":
                    return getattr(diffusers(), kind).from_config(config).eval()
                made = getattr(transformers(), kind)
                return made(made.config_class.from_dict(config)).eval()
        except Exception as error:  # whatever a constructor makes of odd numbers
            raise CheckpointError(
                f"{index.folder / component / 'config.json'}: {kind} refuses it ({_line(error)})", fix=AGAIN
            ) from error


def _shapes(index: Index, component: str) -> dict[str, tuple[int, ...]]:
    """Of a component's weights, by their files' headers."""
    headers = [tensor for file in index.files(component) for tensor in read_header(file)]
    return {tensor.name: tensor.shape for tensor in headers}


def _pruned(index: Index, component: str) -> Any:
    """A network that diffusers cannot build from its configuration alone: blocks are gone, or layers are narrower."""
    files = index.files(component)
    fp16 = all(".fp16." in file.name for file in files)
    weights: dict[str, Any] = {}
    for file in files:
        if (".fp16." in file.name) == fp16:
            weights |= library("safetensors.torch").load_file(str(file))
    network = _restructured(index, component, {name: tuple(t.shape) for name, t in weights.items()})
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return network.requires_grad_(True).eval()


def _restructured(index: Index, component: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The network by its configuration, cut as that says; its weights are not read yet."""
    folder, kind = index.folder / component, index.components[component][1]
    config = read_json(folder / "config.json")
    try:
        structure = Structure.from_json(config[KEY])
    except BadInput as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: {error.found}", expected=error.expected, fix=AGAIN
        ) from None
    try:
        with quiet():
            network = getattr(diffusers(), kind).from_config(
                {key: value for key, value in config.items() if key != KEY}
            )
    except Exception as error:  # whatever a constructor makes of odd numbers
        raise CheckpointError(
            f"{folder / 'config.json'}: {kind} refuses it ({_line(error)})", fix=AGAIN
        ) from error
    try:
        restructure(network, structure, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.found}", expected=error.expected, fix=error.fix) from None
    network.register_to_config(**{KEY: structure.to_json()})
    return network


def _tokenizer(index: Index) -> Any:
    folder = index.folder / "tokenizer"
    try:
        with quiet():
            return transformers().CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder} cannot be loaded as a CLIP tokenizer ({type(error).__name__}: {_line(error)})",
            expected="tokenizer.json, or vocab.json and merges.txt",
            fix="download the model again, with every file",
        ) from error


def _scheduler(index: Index) -> Any:
    file = index.folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    name = index.components["scheduler"][1]
    with quiet():
        kind: Any = getattr(diffusers(), name, None)
    if not name.endswith("Scheduler") or not hasattr(kind, "from_config") or not hasattr(kind, "step"):
        raise CheckpointError(
            f"{index.folder / 'model_index.json'}: scheduler {name} is not in diffusers {diffusers().__version__}",
            expected="DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, ...",
            fix="name a scheduler of diffusers there and in scheduler_config.json",
        )
    try:
        return kind.from_config(config)
    except Exception as error:
        raise CheckpointError(
            f"{file}: {name} refuses it ({_line(error)})", fix="correct the configuration"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
