"""Where the time of benchmarks/x86.py goes: classes of operators, their work, and the share of the ceiling they reach.

python benchmarks/x86_profile.py WORK KIND ENGINE PRECISION THREADS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TURNS, SECONDS = 4, 2.0
"""At least so many calls, and for so long: each operator's shortest time counts, other programs interrupt the rest."""


def turns() -> Iterator[int]:
    began, turn = time.perf_counter(), 0
    while turn < TURNS or time.perf_counter() - began < SECONDS:
        yield turn
        turn += 1


def work(part: Any, feeds: dict[str, Any]) -> dict[str, float]:
    """10^9 operations of one call by class: two for each product of a convolution, a linear layer or attention."""
    import torch

    done = {"convolution": 0.0, "linear": 0.0, "attention": 0.0}
    attention = torch.nn.functional.scaled_dot_product_attention

    def layer(module: Any, _: Any, output: Any) -> None:
        kind = "linear" if isinstance(module, torch.nn.Linear) else "convolution"
        products = module.weight[0].numel() * output.numel()
        done[kind] += 2 * products / 1e9

    def counted(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        done["attention"] += 2 * query.numel() * key.shape[-2] * 2 / 1e9
        return attention(query, key, value, *args, **options)

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    hooks = [each.register_forward_hook(layer) for each in part.module.modules() if isinstance(each, kinds)]
    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        with torch.no_grad():
            part.module(*(torch.from_numpy(feeds[spec.name]) for spec in part.inputs))
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
        for hook in hooks:
            hook.remove()
    return {kind: round(amount, 4) for kind, amount in done.items()}


def profile(
    work: Path, kind: str, engine: str, precision: str, threads: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Part -> class of operator -> wall seconds of one call, from the engine's own profiler, and how many there are.

    Only shares of these are worth anything on a machine that others use as well.
    """
    found = {}
    for name in ("unet", "vae_decoder", "tiny_decoder", "text_encoder"):
        feeds = {k: x for k, x in np.load(work / f"{name}.npz").items() if not k.startswith("wanted.")}
        said = json.loads((work / kind / name / "spec.json").read_text())
        graph = work / kind / name / said["graph"]
        rows = _openvino_rows if engine == "openvino" else _onnxruntime_rows
        classes: dict[str, dict[str, float]] = {}
        for label, seconds in rows(graph, feeds, precision, threads):
            one = classes.setdefault(label, {"s": 0.0, "n": 0})
            one["s"], one["n"] = one["s"] + seconds, one["n"] + 1
        found[name] = classes
    return found


def _openvino_rows(
    graph: Path, feeds: dict[str, Any], precision: str, threads: int
) -> Iterator[tuple[str, float]]:
    import openvino

    from fewstep.runtime.backends.openvino import HINTS

    model = openvino.Core().read_model(str(graph))
    model.reshape({name: list(x.shape) for name, x in feeds.items()})
    hint = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERF_COUNT": True}
    compiled = openvino.Core().compile_model(model, "CPU", hint | {"INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()
    least: dict[str, Any] = {}
    for _ in turns():
        request.infer(feeds)
        for node in request.get_profiling_info():
            before = least.get(node.node_name)
            if before is None or node.real_time < before.real_time:
                least[node.node_name] = node
    for node in least.values():
        kind, how = node.node_type, node.exec_type
        seconds = node.real_time.total_seconds()
        if not seconds:
            continue
        if "scaled_dot_product_attention" in node.node_name or "ttention" in node.node_name:
            label = "attention"
        elif kind.startswith("Convolution"):
            label = f"convolution {'int8' if how.endswith('I8') else how.rpartition('_')[2]}"
        elif kind.startswith(("FullyConnected", "MatMul")):
            label = f"linear {'int8' if how.endswith('I8') else how.rpartition('_')[2]}"
        else:
            label = (
                "layout" if kind in ("Reorder", "Transpose", "Split", "Concat") else "elementwise and norms"
            )
        yield label, seconds


def _onnxruntime_rows(
    graph: Path, feeds: dict[str, Any], precision: str, threads: int
) -> Iterator[tuple[str, float]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    options.profile_file_prefix = str(graph.parent / "profile")
    session = onnxruntime.InferenceSession(str(graph), options)
    for _ in turns():
        session.run(None, feeds)
    file = Path(session.end_profiling())
    rows = json.loads(file.read_text())
    file.unlink()
    least: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("cat") != "Node" or not row["name"].endswith("kernel_time"):
            continue
        if row["name"] not in least or row["dur"] < least[row["name"]]["dur"]:
            least[row["name"]] = row
    for row in least.values():
        kind = row["args"]["op_name"]
        if "Attention" in kind:
            label = "attention"
        elif "Conv" in kind:
            label = "convolution float32" if kind in ("Conv", "FusedConv") else "convolution int8"
        elif kind == "MatMulIntegerToFloat":
            label = "linear and convolution int8"
        elif "MatMul" in kind or "Gemm" in kind:
            label = "linear float32"
        elif kind in (
            "Transpose",
            "Reshape",
            "Concat",
            "Split",
            "Gather",
            "Pad",
            "ReorderInput",
            "ReorderOutput",
        ):
            label = "layout"
        else:
            label = "elementwise and norms"
        yield label, row["dur"] / 1e6


def reached(results: dict[str, Any], model: str) -> list[str]:
    """Markdown rows: class of operator, core seconds of an image, and the share of the ceiling of its numbers' type.

    The profiler's wall seconds give the shares of a stage, the drawn images its core seconds.
    """
    lines = []
    ceilings = results["gflop_per_core_s"]
    for kind, profile in results["profile"][model].items():
        drawn = results["images"][model].get(f"fewstep {kind}", {}).get("stages_core_s")
        for part, stage, calls in (("unet", "unet", 4), ("vae_decoder", "decoder", 1)):
            if drawn is None:
                continue
            total = sum(one["s"] for one in profile[part].values())
            gflop = results["gflop"][model][part]["lowered"]
            for label, one in sorted(profile[part].items(), key=lambda item: -item[1]["s"]):
                core = drawn[stage]["median"] * one["s"] / total
                number = "int8" if label.endswith("int8") else KEPT[kind.partition(" ")[0] == "OpenVINO"]
                classes = [name for name in gflop if name in label]
                done = calls * sum(gflop[name] for name in classes)
                # beside integers, what computes in floats is a first layer or two of a large class
                rest = "int8" in kind and not label.endswith("int8") and label != "attention"
                share = f"{done / core / ceilings[number]:.0%} of {number}" if done and not rest else ""
                lines.append(f"| {kind} | {part} | {label} | {core:.3g} | {one['s'] / total:.0%} | {share} |")
    return lines


KEPT = ("float32", "bfloat16")
"""What ONNX Runtime, and OpenVINO, compute in where it is not integers."""


def main() -> None:
    folder, kind, engine, precision, threads = sys.argv[1:]
    print(json.dumps(profile(Path(folder), kind, engine, precision, int(threads))))


if __name__ == "__main__":
    main()
