"""From whatever names a model to a Model: a folder, a file, a hub id, an architecture."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..runtime.errors import CheckpointError
from .builders import ARCHITECTURES, build_pipeline, count_weights
from .checks import read_header
from .diffusers_folder import Index, load_folder, read_index
from .families import FAMILIES, from_pipeline
from .libraries import library
from .model import Model
from .single_file import configuration_of, load_single_file, summarize_single_file

__all__ = ["Summary", "load", "sketch", "summarize"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name, as huggingface.co writes it."""

ARCH = "arch:"

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

HUB_FILES = [
    *("model_index.json", "*/*.json", "*/*.safetensors", "*/merges.txt", "*/vocab.txt"),
    *("LICENSE*", "README.md", "NOTICE*", "prompts.txt"),
]
"""What is fetched of a hub repository: no code, no pickles, no pictures."""


@dataclass(frozen=True)
class Summary:
    """What can be said of a model without loading it."""

    name: str
    task: str
    scheduler: str
    weights: Mapping[str, int]
    """Part of the bundle -> elements of its weights."""
    steps: int | None = None
    """How many it was made for, where it was."""


def load(source: str | Path, *, allow_download: bool = False, config: Path | None = None) -> Model:
    """Load a model for export, every check first.

    source          a diffusers folder; a .safetensors file; a hub id "owner/name"; "arch:sd15", "arch:bk-sdm-small" or
                    "arch:bk-sdm-tiny" for that architecture with random weights
    allow_download  fetch a hub id that is not in the local cache; without it nothing touches the network
    config          for a .safetensors file: a diffusers folder of the same family, for its configuration and tokenizer
    Raises CheckpointError saying what was found, what was expected and what to do; MissingExtra without torch.
    """
    text = str(source)
    if text.startswith(ARCH):
        return _architecture(text)
    path = _resolve(source, allow_download)
    if path.is_file():
        return load_single_file(path, config)
    return load_folder(path, name=path.resolve().name if Path(source).exists() else text.rpartition("/")[2])


def sketch(source: str | Path, *, allow_download: bool = False, config: Path | None = None) -> Model:
    """The model that `load` returns, but for its weights, which have shapes and no memory: in seconds at any size.

    Arguments and errors are those of `load`; what only shows in a weight is not checked. A file without a folder of its
    family beside it raises CheckpointError as well.
    """
    text = str(source)
    if text.startswith(ARCH):
        return _architecture(text, empty=True)
    path = _resolve(source, allow_download)
    if path.is_file():
        folder = configuration_of(path, config)
        return replace(load_folder(folder, empty=True), name=path.stem)
    name = path.resolve().name if Path(source).exists() else text.rpartition("/")[2]
    return load_folder(path, name=name, empty=True)


def summarize(source: str | Path, *, allow_download: bool = False) -> Summary:
    """Name, task and sizes, from configuration and file headers alone; the checks that need no weights are done."""
    text = str(source)
    if text.startswith(ARCH):
        name = _known_architecture(text)
        return Summary(name, "text-to-image", "DDIMScheduler", count_weights(name))
    path = _resolve(source, allow_download)
    if path.is_file():
        return Summary(path.stem, "text-to-image", "DDIMScheduler", summarize_single_file(path))
    index = read_index(path)
    weights = {_part(component): _count(index, component) for component in index.networks()}
    task, scheduler = FAMILIES[index.pipeline].task, index.components["scheduler"][1]
    return Summary(path.resolve().name, task, scheduler, weights)


def _resolve(source: str | Path, allow_download: bool) -> Path:
    """A folder or a .safetensors file that exists. Raises CheckpointError."""
    path, text = Path(source), str(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in PICKLES:
            raise CheckpointError(
                f"{path} is a pickle, which can run code",
                expected="a .safetensors file or a diffusers folder",
                fix="convert it on a machine you can lose, or take the model's .safetensors",
            )
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is no model file", expected="a .safetensors file or a diffusers folder"
            )
        return path
    if HUB_ID.fullmatch(text):
        return _from_hub(text, allow_download)
    raise CheckpointError(
        f"{text[:200]} does not exist",
        expected="a diffusers folder, a .safetensors file, owner/name on huggingface.co or arch:sd15",
        fix="check the path",
    )


def _from_hub(name: str, allow_download: bool) -> Path:
    """A hub repository's folder in the usual cache (HF_HOME), fetched only when asked to."""
    hub = library("huggingface_hub")
    try:
        folder = hub.snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=not allow_download)
    except Exception as error:  # a dozen types, from requests' to its own
        why = (
            f"cannot be fetched ({type(error).__name__})"
            if allow_download
            else "is neither a folder nor cached"
        )
        raise CheckpointError(
            f"{name} {why}",
            expected="a folder, or a model of huggingface.co",
            fix="check the name and the network"
            if allow_download
            else "check the path, or fetch it with --download",
        ) from error
    return Path(folder)


def _known_architecture(source: str) -> str:
    name = source.removeprefix(ARCH)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCH + known for known in ARCHITECTURES)
        raise CheckpointError(
            f"unknown architecture {source[:80]!r}", expected=known, fix="pass one of these"
        )
    return name


def _architecture(source: str, *, empty: bool = False) -> Model:
    name = _known_architecture(source)
    folder = Path(tempfile.mkdtemp(prefix="fewstep-tokenizer-"))
    pipeline = build_pipeline(name, folder, None) if empty else build_pipeline(name, folder)
    weakref.finalize(
        pipeline, shutil.rmtree, folder, ignore_errors=True
    )  # read again when the bundle is written
    return from_pipeline(pipeline, f"{name}-random")


def _part(component: str) -> str:
    return "vae_decoder" if component == "vae" else component


def _count(index: Index, component: str) -> int:
    """Elements of a component's weights that go into the bundle; of a VAE only the decoder does."""
    tensors = [tensor for file in index.files(component) for tensor in read_header(file)]
    if component == "vae":
        tensors = [t for t in tensors if t.name.startswith(("decoder.", "post_quant_conv."))]
    return sum(tensor.count() for tensor in tensors)
