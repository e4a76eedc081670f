"""LiteRT beside ONNX Runtime on this host: time by part and by image, and how far their pictures are apart.

    python benchmarks/litert.py bundles NAME LABEL=BUNDLE ...   bundles of one model, the first is compared with
    python benchmarks/litert.py sd15 PART FORM                  SD-1.5: unet or vae_decoder, float or w8a8

One thread, all bundles in turns in one run, a sample a call; core milliseconds, as other programs run here too.
Figures go into benchmarks/results/litert.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save, spread

from fewstep.runtime import Pipeline
from fewstep.runtime.backends import open_session
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput

ROUNDS, IMAGES = 60, 7
PROMPT, LABEL, SEED = "a red apple", 3, 7


def feeds(spec: Any) -> dict[str, Any]:
    """One sample of each input of fixed sizes: 1 for whole numbers and times, normal for the rest."""
    rng, made = np.random.default_rng(0), {}
    for tensor in spec.inputs:
        if tensor.dtype.startswith("int") or tensor.name == "timestep":
            made[tensor.name] = np.ones(tensor.shape, tensor.dtype)
        else:
            made[tensor.name] = rng.standard_normal(tensor.shape).astype(tensor.dtype)
    return made


def bundles(name: str, given: dict[str, Path]) -> dict[str, Any]:
    opened = {label: Bundle.open(path, check="size") for label, path in given.items()}
    found: dict[str, Any] = {"bytes": {}, "part_core_ms": {}, "image": {}, "levels": {}}
    for label, bundle in opened.items():
        found["bytes"][label] = sum(
            bundle.manifest.files[p.graph].bytes for p in bundle.manifest.parts.values()
        )
    first = next(iter(opened.values())).manifest
    every = [bundle.manifest for bundle in opened.values()]
    fixed = next(manifest for manifest in every if manifest.parts[manifest.denoiser].engine == "litert")
    for part in first.parts:
        case = feeds(fixed.parts[part])
        sessions = {}
        for label, bundle in opened.items():
            spec = bundle.manifest.parts[part]
            own = {tensor.name: case[tensor.name].astype(tensor.dtype) for tensor in spec.inputs}
            sessions[label] = open_session(bundle.file(spec.graph), spec, threads=1), own
        times: dict[str, list[float]] = {label: [] for label in sessions}
        for number in range(ROUNDS + 3):
            for label, (session, own) in sessions.items():
                began = time.process_time()
                session.run(own)
                if number >= 3:
                    times[label].append(1e3 * (time.process_time() - began))
        found["part_core_ms"][part] = {label: spread(each) for label, each in times.items()}
        for session, _ in sessions.values():
            session.close()
    asked = {"prompt": PROMPT} if first.tokenizer is not None else {"class_labels": LABEL}
    pipelines = {label: Pipeline.from_pretrained(path, threads=1) for label, path in given.items()}
    images: dict[str, Any] = {}
    walls: dict[str, list[float]] = {label: [] for label in given}
    cores: dict[str, list[float]] = {label: [] for label in given}
    for number in range(IMAGES + 1):
        for label, pipeline in pipelines.items():
            began, spent = time.perf_counter(), time.process_time()
            images[label] = pipeline(**asked, seed=SEED, output_type="np").images
            if number:
                walls[label].append(1e3 * (time.perf_counter() - began))
                cores[label].append(1e3 * (time.process_time() - spent))
    found["image"] = {
        label: {"wall_ms": spread(walls[label]), "core_ms": spread(cores[label])} for label in given
    }
    right = levels(next(iter(images.values())))
    for label, got in images.items():
        apart = np.abs(levels(got) - right)
        found["levels"][label] = {"most": int(apart.max()), "share_differing": float((apart > 0).mean())}
    print(json.dumps(found, indent=1))
    return found


def levels(images: Any) -> Any:
    """Of 8-bit pixels, as a PNG has them."""
    return np.round(np.clip(images, 0, 1) * 255).astype(int)


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def sd15(name: str, form: str) -> dict[str, Any]:
    """Full size, random weights, int8 by nearest rounding: time, memory and whether it fits; not quality."""
    import torch

    from fewstep.export import gate, litert, onnx, parts
    from fewstep.model import load
    from fewstep.model.quantized import Activations, Layer, Quantized
    from fewstep.model.trajectories import run_part
    from fewstep.quant.simulate import quantizable
    from fewstep.quant.weights import nearest
    from fewstep.targets import load_target

    torch.set_num_threads(1)
    part = parts.fixed(load("arch:sd15")).parts[name]
    found: dict[str, Any] = {"parameters": part.parameters(), "float_refused": None}
    try:
        litert.check(part)
    except BadInput as error:
        found["float_refused"] = str(error)
        if form == "float":
            return found
    if form == "w8a8":
        layers = {
            key: Layer(nearest(module.weight.detach().numpy(), bits=8), Activations(1.0, 128))
            for key, module in quantizable(part).items()
        }
        part = replace(part, quantized=Quantized(layers))
    case = part.example.feeds(part.inputs, part.example.default_sizes(), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        spec = litert.lower(onnx.Traced(part, None), Path(folder), load_target("android-cpu"))
        found |= {"lower_core_s": round(time.process_time() - began, 1), "lower_peak_gib": peak_gib()}
        file = Path(folder) / litert.GRAPH
        found["bytes"] = file.stat().st_size
        wanted = run_part(part, case)
        del part
        session, took = open_session(file, spec, threads=1), []
        for _ in range(3):
            began = time.process_time()
            got = session.run(case)
            took.append(time.process_time() - began)
        found["run_core_s"] = spread(took)
        found["relative_error"] = {key: gate.relative_error(wanted[key], got[key])[0] for key in wanted}
    print(json.dumps(found, indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawn = commands.add_parser("bundles")
    drawn.add_argument("name")
    drawn.add_argument("bundle", nargs="+", metavar="LABEL=BUNDLE")
    full = commands.add_parser("sd15")
    full.add_argument("part")
    full.add_argument("form", choices=("float", "w8a8"))
    asked = parser.parse_args()
    file = RESULTS / "litert.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if asked.command == "bundles":
        pairs = (text.partition("=") for text in asked.bundle)
        known[asked.name] = bundles(asked.name, {label: Path(path) for label, _, path in pairs})
    else:
        known[f"sd15 {asked.part} {asked.form}"] = sd15(asked.part, asked.form)
    known.pop("host", None)
    save("litert", known)


if __name__ == "__main__":
    main()
