"""A tiny decoder on disk: config.json and model.safetensors in a folder; and the folders diffusers writes of TAESD."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.checks import read_json
from ..model.libraries import library, torch
from ..model.model import Model
from ..runtime.errors import BadInput
from ..runtime.files import atomic_write, output_errors

__all__ = ["read_network", "tiny_config", "write_network"]

OURS, THEIRS = "TinyDecoder", "AutoencoderTiny"
FILES = {OURS: "model.safetensors", THEIRS: "diffusion_pytorch_model.safetensors"}


def write_network(model: Model, folder: Path) -> None:
    """Write the model's tiny decoder, weights in float16, with what its record in history says about it.

    Raises BadInput for a model whose decoder is no tiny one.
    """
    network = model.parts["vae_decoder"].module
    records = [record for record in model.history if record["pass"] == OURS]
    if not records or not hasattr(network, "shape"):
        raise BadInput(f"the decoder of {model.name} is no tiny one", fix="run the pass TinyDecoder first")
    shape, record = network.shape, records[-1]
    config = {
        "_class_name": OURS,
        **{"widths": list(shape.widths), "blocks": list(shape.blocks), "factor": shape.factor},
        **{"latent_channels": shape.latent_channels, "channels": shape.channels},
        **{name: record[name] for name in ("psnr_db", "psnr_db_worst")},
        "teacher": _teacher(model.original.vae) if hasattr(model.original, "vae") else "",
    }
    weights = {name: tensor.detach().half().contiguous() for name, tensor in network.state_dict().items()}
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / FILES[OURS], library("safetensors.torch").save(weights))
    atomic_write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def read_network(folder: Path, model: Model) -> tuple[Any, Mapping[str, Any]]:
    """The network of a folder, and its config.json. Raises BadInput where it is none, or was made for another model."""
    from .tiny_network import TinyNetwork, TinyShape

    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in FILES:
        raise BadInput(f"{folder} holds a {kind}", expected=f"{OURS} or {THEIRS}")
    sample, old = model.sample, model.parts["vae_decoder"]
    wanted = (sample.factor, old.inputs[0].shape[1], old.outputs[0].shape[1])
    try:
        if kind == OURS:
            shape = TinyShape(
                tuple(config["widths"]),
                tuple(config["blocks"]),
                *(config[name] for name in ("factor", "latent_channels", "channels")),
            )
        else:
            widths = tuple(config["decoder_block_out_channels"])
            found = 2 ** (len(widths) - 1), config["latent_channels"], config["out_channels"]
            shape = TinyShape(widths, tuple(config["num_decoder_blocks"]), *found)
        network = TinyNetwork(shape, sample.scaling_factor, sample.shift_factor)
        tensors = library("safetensors.torch").load((folder / FILES[kind]).read_bytes())
        if kind == THEIRS:
            begin = "decoder."
            tensors = {n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)}
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise BadInput(f"{folder} cannot be read as a {kind} ({type(error).__name__}: {line})") from None
    if (shape.factor, shape.latent_channels, shape.channels) != wanted:
        raise BadInput(
            f"{folder}: {shape.factor} pixels a cell, {shape.latent_channels} latent channels, {shape.channels} colors",
            expected="{}, {} and {}, as {}'s own decoder".format(*wanted, model.name),
        )
    if not all(bool(torch().isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise BadInput(f"{folder}: weights with NaN or infinity", fix="train it again")
    made_for, vae = config.get("teacher", ""), getattr(model.original, "vae", None)
    if made_for and vae is not None and made_for != _teacher(vae):
        raise BadInput(
            f"{folder} was taught by another VAE than {model.name}'s",
            expected="a decoder of the same latents",
            fix="train one for this model: tiny_decoder without weights",
        )
    return network, config


def tiny_config(shape: Any, model: Model) -> dict[str, Any]:
    """config.json beside the graph, in the words of diffusers' AutoencoderTiny, which other tools read the factor and
    the scale of latents from: its length of block_out_channels gives the one, scaling_factor the other.
    """
    old = model.parts["vae_decoder"].config
    doublings = shape.factor.bit_length() - 1
    return {
        "_class_name": THEIRS,
        "_diffusers_version": old.get("_diffusers_version", ""),
        "act_fn": "relu",
        # one entry a doubling, and one: stages that a rearrangement stands for are as wide as the last real one
        "block_out_channels": [*shape.widths, *shape.widths[-1:] * (doublings + 1 - len(shape.widths))],
        "latent_channels": shape.latent_channels,
        "out_channels": shape.channels,
        # the graph takes what AutoencoderKL's decoder takes
        "scaling_factor": model.sample.scaling_factor,
        "shift_factor": model.sample.shift_factor,
        "sample_size": old.get("sample_size", model.sample.height),
    }


def _teacher(vae: Any) -> str:
    """Of the decoder's weights, whatever the version of diffusers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.decoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()[:32]
