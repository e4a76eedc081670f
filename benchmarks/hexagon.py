"""Hexagon bundles in QNN's emulator: what the gate saw, sizes of contexts, and what the emulator itself gets wrong.

    python benchmarks/hexagon.py bundles LABEL=BUNDLE ...    of a snapdragon target
    python benchmarks/hexagon.py norms                       a layer norm of 1 to 1024 rows before a rounding to 16 bits
    python benchmarks/hexagon.py sd15 PART                   SD-1.5 in float16: text_encoder, vae_decoder or unet
    python benchmarks/hexagon.py arm64 LABEL=BUNDLE ...      ONNX Runtime bundles on ARM64 Linux under emulation

Times are those of the emulator and the compiler on this host's processor: they say nothing of a device's.
Figures go into benchmarks/results/hexagon.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from common import RESULTS, save
from onnx import TensorProto, helper, numpy_helper

from fewstep.export import gate, parts, qnn
from fewstep.export import onnx as translation
from fewstep.model.load import sketch
from fewstep.runtime.backends import qnn as backend
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.manifest import PartSpec
from fewstep.targets import load_target

TESTS = Path(__file__).parents[1] / "tests" / "runtime"
TARGET = load_target("snapdragon-8-gen3")
ROWS = (1, 2, 4, 8, 12, 15, 16, 17, 20, 24, 31, 32, 33, 48, 64, 77, 256, 1024)


def compiled(graph: Path) -> dict[str, Any]:
    """Core seconds, bytes and operators of the context of one graph; it is thrown away."""
    options = qnn.options_of(TARGET)
    with tempfile.TemporaryDirectory() as work:
        context, began = Path(work) / "context.onnx", time.process_time()
        backend.compile_context(
            graph, context, backend.devices()[:1], backend.Soc(options.soc_model, options.htp_arch)
        )
        nodes = onnx.load(context).graph.node
        return {
            "compile_core_s": round(time.process_time() - began, 2),
            "context_bytes": context.stat().st_size,
            "nodes": [node.op_type for node in nodes],
        }


def bundles(given: dict[str, Path]) -> dict[str, Any]:
    """Gate figures as the manifest has them; each part compiled, and one run of it timed."""
    found: dict[str, Any] = {}
    for label, path in given.items():
        bundle = Bundle.open(path, check="size")
        manifest, each = bundle.manifest, dict[str, Any]()
        for name, part in manifest.parts.items():
            graph = bundle.file(part.graph)
            here = qnn.stand_in(part, TARGET)
            session = here.opener(graph, part)
            rng = np.random.default_rng(0)
            case = {
                tensor.name: np.ones(tensor.shape, tensor.dtype)
                if tensor.dtype.startswith("int")
                else rng.standard_normal(tensor.shape).astype(tensor.dtype)
                for tensor in part.inputs
            }
            began = time.process_time()
            session.run(case)
            ran = round(time.process_time() - began, 2)
            session.close()
            each[name] = {
                "executed": part.executed,
                "snr_db": manifest.quality["parts"][name]["snr_db"],
                "graph_bytes": manifest.files[part.graph].bytes,
                "emulated_run_core_s": ran,
                **compiled(graph),
            }
        found[label] = {
            "target": manifest.target["id"],
            "parts": each,
            "pipeline": manifest.quality["pipeline"],
        }
    return found


def norms() -> dict[str, Any]:
    """Decibels of the emulator against ONNX Runtime on the same graph: LayerNormalization, 16-bit codes, MatMul."""
    rng, wide, found = np.random.default_rng(0), 192, {}
    constants = {
        "scale": np.float32(10 / 65535),
        "zero": np.uint16(32768),
        "weight": np.ones(wide, np.float32),
        "codes": rng.integers(-127, 128, (wide, wide)).astype(np.int8),
        "steps": np.full(wide, 1e-3, np.float32),
        "last": np.float32(5e-4),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "weight"], ["norm"], axis=-1),
        helper.make_node("QuantizeLinear", ["norm", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["codes", "steps"], ["w"], axis=1),
        helper.make_node("MatMul", ["d", "w"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "last", "zero"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "last", "zero"], ["y"]),
    ]
    options = qnn.options_of(TARGET)
    for rows in ROWS:
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, rows, wide)) for name in "xy"]
        graph = helper.make_graph(
            nodes,
            "norm",
            ends[:1],
            ends[1:],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        with tempfile.TemporaryDirectory() as work:
            file = Path(work) / "model.onnx"
            onnx.save(model, file)
            x = {"x": rng.standard_normal((1, rows, wide)).astype(np.float32)}
            cpu = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            part = PartSpec("qnn", "norm/model.onnx", (), ())
            session = qnn.open_emulated(file, part, soc_model=options.soc_model, htp_arch=options.htp_arch)
            error, _ = gate.relative_error(cpu.run(None, x)[0], session.run(x)["y"])
        found[str(rows)] = round(gate.decibels(error), 1)
    return found


def sd15(name: str) -> dict[str, Any]:
    """One part of SD-1.5 (random weights) lowered and compiled."""
    part = parts.fixed(sketch("arch:sd15")).parts[name]
    torch.manual_seed(0)
    part.module.to_empty(device="cpu")  # the other parts never have memory
    for tensor in (*part.module.parameters(), *part.module.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
        else:
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))  # position_ids
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / name
        began = time.process_time()
        qnn.lower(translation.trace(part), folder, TARGET)
        lowered = round(time.process_time() - began, 1)
        size = sum(file.stat().st_size for file in folder.iterdir())
        result = {"lower_core_s": lowered, "graph_bytes": size, **compiled(folder / "model.onnx")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return result | {"peak_rss_bytes": peak}


def arm64(given: dict[str, Path]) -> dict[str, Any]:
    """Largest difference of a pixel, in levels, between this processor's picture and the emulated one's."""
    spec = importlib.util.spec_from_file_location("arm64", TESTS / "arm64.py")
    assert spec is not None
    assert spec.loader is not None
    emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulator)
    script, found = TESTS / "arm64_draw.py", {}
    for label, path in given.items():
        with tempfile.TemporaryDirectory() as work:
            here, there = Path(work) / "here.npz", Path(work) / "there.npz"
            subprocess.run([sys.executable, script, path, here], check=True, capture_output=True)
            done = emulator.python(script, path, there)
            assert done.returncode == 0, done.stderr
            with np.load(here) as one, np.load(there) as two:
                error = one["image"].astype(np.float64) - two["image"]
                levels = np.abs(np.round(255 * one["image"]) - np.round(255 * two["image"]))
                found[label] = {
                    "noise_equal": bool((one["noise"] == two["noise"]).all()),
                    "largest_difference": float(f"{np.abs(error).max():.2g}"),
                    "levels": int(levels.max()),
                    "psnr_db": round(-10 * np.log10(float(np.mean(error**2))), 1),
                }
    return {"cpu": emulator.CPU, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("bundles", "norms", "sd15", "arm64"))
    parser.add_argument("given", nargs="*")
    arguments = parser.parse_args()
    named = {
        label: Path(path) for label, _, path in (text.partition("=") for text in arguments.given) if path
    }
    if arguments.what == "bundles":
        found = bundles(named)
    elif arguments.what == "norms":
        found = norms()
    elif arguments.what == "arm64":
        found = arm64(named)
    else:
        found = {arguments.given[0]: sd15(arguments.given[0])}
    keep(arguments.what, found)


def keep(section: str, found: dict[str, Any]) -> None:
    """Beside what other runs found."""
    file = RESULTS / "hexagon.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    before = {key: value for key, value in before.items() if key != "host"}
    merged = {**before.get(section, {}), **found}
    print(json.dumps(found, indent=1))
    save("hexagon", {**before, section: merged})


if __name__ == "__main__":
    main()
