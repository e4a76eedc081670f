"""Low-rank adapters on any network: put on, merged into plain weights, written as diffusers reads them.

Hu et al. 2021, "LoRA" <arXiv:2106.09685>; the library is peft.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..model.libraries import library, torch
from ..runtime.errors import BadInput, OutputError
from ..runtime.files import atomic_write, output_errors

__all__ = ["ADAPTER_FILE", "adapted", "check_adapter", "merged", "write_adapter"]

Module = Any

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""Ends of the names of layers that get an adapter, as in diffusers' training script of LCM-LoRA: everything in the
blocks of a U-Net, and the attention and hidden layers of a transformer."""
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers' load_lora_weights looks for in a folder."""
MADE = "fewstep"
"""Key of the file's metadata: what it was made of."""


def adapted(network: Module, weights: Module, rank: int, seed: int) -> Module:
    """The network with adapters, which alone are trained; as it begins it answers as before.

    weights  the network this one is a copy of: the two share its parameters from now on, so that a large network lies
             in memory once
    Raises BadInput for a network in which nothing is called like those layers.
    """
    th = torch()
    for name, tensor in weights.requires_grad_(False).named_parameters():
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, tensor)
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, th.nn.Linear | th.nn.Conv2d)
        and f".{name}".endswith(tuple(f".{end}" for end in TARGETS))
    ]
    if not names:
        raise BadInput(
            f"a {type(network).__name__} without layers for adapters",
            expected=f"layers called {', '.join(TARGETS)}, as in diffusers",
            fix="lcm in place of lcm_lora: it trains all weights",
        )
    peft = library("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights="gaussian")
    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed)
        return peft.inject_adapter_in_model(config, network)


def merged(network: Module) -> Module:
    """A plain network that answers as the adapted one: W + B A. The adapted one, and what it shares, stay."""
    layers = library("peft.tuners.tuners_utils").BaseTunerLayer
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_modules()):
        if isinstance(module, layers):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, module.get_base_layer())
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def check_adapter(folder: Path, made_of: str) -> None:
    """Raises OutputError where the folder holds another adapter than one made of `made_of`."""
    file = folder / ADAPTER_FILE
    if not file.exists():
        return
    try:
        with library("safetensors").safe_open(str(file), "pt") as opened:
            same = (opened.metadata() or {}).get(MADE) == made_of
    except Exception:  # whatever it is, it is not ours
        same = False
    if not same:
        raise OutputError(
            f"{file} exists already", expected="a folder without an adapter", fix="name another folder"
        )


def write_adapter(network: Module, folder: Path, part: str, made_of: str) -> None:
    """The adapters of a denoiser as a file for diffusers' load_lora_weights, in half precision.

    part  what diffusers calls the network in a pipeline: unet or transformer
    Raises OutputError where it cannot be written.
    """
    tensors = {
        f"{part}.{name.removeprefix('network.')}".replace(".default.", "."): tensor.half().contiguous()
        for name, tensor in network.state_dict().items()
        if ".lora_" in name
    }
    data = library("safetensors.torch").save(tensors, {MADE: made_of, "format": "pt"})
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / ADAPTER_FILE, data)
