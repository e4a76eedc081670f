"""Engines of every part, built ahead of time without a GPU by TensorRT for RTX: seconds, sizes, memory, warnings.

    python benchmarks/tensorrt_engines.py models/emoji-64 [--keep DIR]
    python benchmarks/tensorrt_engines.py arch:sd15
    python benchmarks/tensorrt_engines.py arch:bk-sdm-tiny --parts vae_decoder text_encoder --into sd15

The third line does SD-1.5's smaller parts without loading its U-Net: they are the same in both architectures.
For compute capabilities 8.6, 8.9 and 12.0, in float16 and in int8 with Q/DQ around float16. Each engine is built in a
process of its own. Weights are rounded to nearest and inputs at ranges of noise: what matters here is whether engines
are built, not what they draw. Writes results/tensorrt_NAME.json, part by part over what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, save

from fewstep.export import child, onnx, parts
from fewstep.export import tensorrt as lowering
from fewstep.export.halves import halve
from fewstep.export.qdq import TENSORRT
from fewstep.model import load
from fewstep.model.model import Part
from fewstep.model.quantized import Activations, Layer, Quantized
from fewstep.quant.simulate import quantizable
from fewstep.quant.weights import nearest
from fewstep.runtime.backends import tensorrt

CAPABILITIES = ("8.6", "8.9", "12.0")
OPSET = 23


def in_integers(part: Part) -> Part:
    """Every layer with int8 weights, and inputs at +-8 where it is no table."""
    modules = dict(part.module.named_modules())
    layers = {}
    for name in quantizable(part):
        weights = nearest(modules[name].weight.detach().numpy(), 8, name=name)
        table = type(modules[name]).__name__ == "Embedding"
        layers[name] = Layer(weights, None if table else Activations(scale=8 / 128, zero=128))
    return replace(part, quantized=lowering.as_it_takes(Quantized(layers), part))


def lower(part: Part, folder: Path) -> Path:
    """The graph as export writes it, without the check."""
    return onnx.write_graph(onnx.trace(part), folder, opset=OPSET, convention=TENSORRT, rewrite=halve)


def build(graph: Path, capability: str) -> dict[str, Any]:
    began, spent = time.perf_counter(), time.process_time()
    before = child.peak_rss_bytes()
    log: list[str] = []
    size = len(tensorrt.build_engine(graph, capability, log))
    return {
        "engine_bytes": size,
        "wall_s": round(time.perf_counter() - began, 2),
        "core_s": round(time.process_time() - spent, 2),
        "rss_before_bytes": before,
        "warnings": sorted(set(log)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--keep", type=Path, help="leave the graphs here")
    parser.add_argument("--parts", nargs="*", help="these alone")
    parser.add_argument("--into", help="NAME of the results; otherwise the source's")
    parser.add_argument("--only", choices=("float16", "int8"), help="one of the two")
    args = parser.parse_args()
    import tensorrt_engines as this  # a process of its own looks `build` up by a name it can import

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    name = f"tensorrt_{args.into or Path(args.source.replace('arch:', '')).name}"
    before = RESULTS / f"{name}.json"
    known = json.loads(before.read_text())["parts"] if before.exists() else {}
    results: dict[str, Any] = {"library": tensorrt.library_version(), "opset": OPSET, "parts": known}
    with tempfile.TemporaryDirectory(prefix="trt-") as folder:
        work = args.keep or Path(folder)
        model = parts.fixed(load(args.source if args.source.startswith("arch:") else Path(args.source)))
        for part in model:
            if args.parts and part.name not in args.parts:
                continue
            for kind in (args.only,) if args.only else ("float16", "int8"):
                graph = lower(in_integers(part) if kind == "int8" else part, work / kind / part.name)
                found: dict[str, Any] = {
                    "graph_bytes": sum(file.stat().st_size for file in graph.parent.iterdir())
                }
                for capability in CAPABILITIES:
                    done = child.call(this.build, graph, capability, work=work / "work")
                    found[capability] = {**done.value, "peak_rss_bytes": done.peak_rss_bytes}
                    print(part.name, kind, capability, found[capability], flush=True)
                results["parts"][f"{part.name} {kind}"] = found
                save(name, results)


if __name__ == "__main__":
    main()
