"""The U-Net as Apple's Swift package calls it, and the folder that package loads.

Checked against apple/ml-stable-diffusion, swift/StableDiffusion/pipeline: Unet.swift feeds `sample` [2, channels,
height, width], `timestep` [2] and `encoder_hidden_states` [2, width, 1, length] and takes the one output there is;
chunks get the inputs again, with what the chunk before put out. TextEncoder.swift feeds the ids under the only input's
name and reads `last_hidden_state`; Decoder.swift takes the only output as the picture. Nothing of it was run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from ..model.model import Part
from ..runtime.bundle import Bundle
from ..runtime.errors import BadInput, OutputError
from ..runtime.files import output_errors
from ..runtime.strictjson import loads

__all__ = ["lay_out", "swift_layout"]


def swift_layout(part: Part) -> Part:
    """A text-conditioned U-Net of two samples whose text has its channels first. Raises BadInput for other parts."""
    names = [spec.name for spec in part.inputs]
    if names != ["sample", "timestep", "encoder_hidden_states"]:
        raise BadInput(
            f"{part.name} takes {', '.join(names)}",
            expected="sample, timestep, encoder_hidden_states, which is what Apple's Swift package feeds",
            fix='layout = "diffusers" under [backend.options]',
        )
    from .coreml_attention import SwiftDenoiser

    sample, timestep, states = part.inputs
    _, length, width = states.shape
    inputs = (
        replace(sample, shape=(2, *sample.shape[1:])),
        replace(timestep, shape=(2,)),
        replace(states, shape=(2, width, 1, length)),
    )
    outputs = tuple(replace(spec, shape=(2, *spec.shape[1:])) for spec in part.outputs)
    return replace(part, module=SwiftDenoiser(part.module.network).eval(), inputs=inputs, outputs=outputs)


def lay_out(bundle: Bundle, folder: Path) -> list[Path]:
    """Copy what Apple's Swift package loads out of a Core ML bundle into a new folder; returns what lies there.

    The packages, to be compiled by `xcrun coremlcompiler compile X.mlpackage .`, and the tokenizer as vocab.json and
    merges.txt. Raises BadInput for a bundle that package could not run, OutputError where the folder exists.
    """
    parts = bundle.manifest.parts
    shapes = {spec.name: spec.shape for spec in parts["unet"].inputs} if "unet" in parts else {}
    if {part.engine for part in parts.values()} != {"coreml"} or "encoder_hidden_states" not in shapes:
        raise BadInput(
            f"{bundle.path} is no text-to-image bundle for Core ML", fix="export for such a target"
        )
    if shapes["sample"][0] != "batch":
        raise BadInput(
            f"the U-Net of {bundle.path} is not laid out for Apple's Swift package",
            fix='export with layout = "swift" under [backend.options]',
        )
    if bundle.manifest.tokenizer is None:
        raise BadInput(f"{bundle.path} has no tokenizer", expected="that of CLIP")
    vocabulary = loads(bundle.file(bundle.manifest.tokenizer.file).read_bytes(), "tokenizer.json")["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in vocabulary["merges"]]
    if folder.exists():
        raise OutputError(f"{folder} exists", fix="pick another path")
    with output_errors(folder):
        folder.mkdir(parents=True)
        for name, part in parts.items():
            for package in sorted((bundle.path / part.graph).parents[1].glob("*.mlpackage")):
                assert package.is_dir(), name
                shutil.copytree(package, folder / package.name)
        text = json.dumps(vocabulary["vocab"], ensure_ascii=False)
        (folder / "vocab.json").write_text(text, encoding="utf-8")
        # its reader skips the first line, which names the version of the format
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return sorted(folder.iterdir())
