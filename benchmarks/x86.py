"""What an x86 CPU reaches: matrix products in each precision, and one U-Net call on each engine.

    python benchmarks/x86.py [SOURCE ...] [--threads 1] [--rounds 3] [--runs 5] [--work DIR]

SOURCE is what `fewstep export` takes, or arch:NAME; the default is emoji-64. Every engine runs in a process of its own,
in turns. The figure to compare on a shared machine is core seconds: processor time of one call on one thread. Errors
are against torch in float32. Writes results/x86.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import save, spread

from fewstep.export import gate, onnx, openvino, parts
from fewstep.model import load
from fewstep.runtime.backends import open_session, runs_in
from fewstep.runtime.manifest import PartSpec, TensorSpec
from fewstep.tools.host import peak_rss_bytes

ROOT = Path(__file__).parents[1]
SIZE = 1536
"""Of the matrices: 7 GFLOP a product, long enough to time and out of the second-level cache."""


def ceilings() -> dict[str, float]:
    """The best of 12 products of two SIZE x SIZE matrices on one thread, in 10^9 operations per core second."""
    import torch

    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(SIZE, SIZE, generator=rng)
    whole = torch.randint(-8, 8, (SIZE, SIZE), generator=rng, dtype=torch.int8)
    halves = real.bfloat16()
    found = {}
    for name, product in (
        ("float32", lambda: real @ real),
        ("bfloat16", lambda: halves @ halves),
        ("int8", lambda: torch._int_mm(whole, whole)),
    ):
        times = []
        for _ in range(12):
            began = time.process_time()
            product()
            times.append(time.process_time() - began)
        found[name] = round(2 * SIZE**3 / min(times) / 1e9, 1)
        print(f"{name:10} {found[name]:8.1f} GFLOP per core second", flush=True)
    return found


LARGE = 1 << 30
"""Bytes of weights above which only the default size is lowered: tracing free sizes takes minutes."""


def lower(source: str, work: Path) -> None:
    """The denoiser for each engine, and what torch says of it at the default size, one sample."""
    model = load(source)
    if model.parts[model.denoiser].weight_bytes() > LARGE:
        model = parts.fixed(model)
    part = model.parts[model.denoiser]
    traced = onnx.trace(part)
    onnx.write(traced, work / "onnx", opset=23)
    openvino.write(traced, work / "openvino", opset=23, weights="float16")
    feeds = part.example.feeds(part.inputs, part.example.default_sizes() | {"batch": 1}, seed=0)
    np.savez(work / "feeds.npz", **feeds)
    np.savez(work / "wanted.npz", **gate.reference(part, feeds))


def forward(work: Path, engine: str, precision: str, free: bool, threads: int, runs: int) -> dict[str, Any]:
    """One engine's calls, in this process: seconds of compiling and of each call, and the error against torch.

    free  compile for all sizes, as the runtime does from the second size on
    """
    feeds, wanted = (dict(np.load(work / name)) for name in ("feeds.npz", "wanted.npz"))
    graph = work / ("onnx/model.onnx" if engine == "onnxruntime" else "openvino/openvino_model.xml")
    ends = {"inputs": _specs(feeds), "outputs": _specs(wanted)}
    spec = PartSpec(engine, graph.name, **ends, precision=precision)
    began = time.perf_counter()
    session = open_session(graph, spec, threads=threads)
    if free:
        session._requests[(("another size", ()),)] = None  # type: ignore[attr-defined]
    got = session.run(feeds)
    first = time.perf_counter() - began
    wall, core = [], []
    for _ in range(runs):
        cpu, clock = time.process_time(), time.perf_counter()
        session.run(feeds)
        core.append(time.process_time() - cpu)
        wall.append(time.perf_counter() - clock)
    name = next(iter(wanted))
    return {
        "computed_in": runs_in(spec),
        "first_s": first,
        "wall_s": wall,
        "core_s": core,
        "relative_error": gate.relative_error(wanted[name], got[name])[0],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _specs(arrays: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(TensorSpec(name, array.dtype.name, array.shape) for name, array in arrays.items())


ENGINES = {
    "ONNX Runtime float32": ("onnxruntime", "float32", False),
    "OpenVINO float32": ("openvino", "float32", False),
    "OpenVINO bfloat16": ("openvino", "bfloat16", False),
    "OpenVINO bfloat16, sizes free": ("openvino", "bfloat16", True),
}


def alone(function: str, *args: Any) -> Any:
    """lower or forward in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps([function, *args])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(source: str, work: Path, threads: int, rounds: int, runs: int) -> dict[str, Any]:
    if not (work / "wanted.npz").exists():
        alone("lower", source, str(work))
    names = list(ENGINES)
    if (work / "onnx/model.onnx_data").exists() and (work / "onnx/model.onnx_data").stat().st_size > LARGE:
        names.remove("OpenVINO bfloat16, sizes free")
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seen[name].append(alone("forward", str(work), *ENGINES[name], threads, runs))
    found = {}
    for name, each in seen.items():
        found[name] = {
            "core_s": spread([t for one in each for t in one["core_s"]]),
            "wall_s": spread([t for one in each for t in one["wall_s"]]),
            "first_s": spread([one["first_s"] for one in each]),
            "computed_in": each[0]["computed_in"],
            "relative_error": each[0]["relative_error"],
            "peak_rss_bytes": max(one["peak_rss_bytes"] for one in each),
        }
    base = found["ONNX Runtime float32"]["core_s"]["median"]
    for name, one in found.items():
        one["times_onnxruntime"] = round(base / one["core_s"]["median"], 2)
        print(
            f"{Path(source).name:10} {name:30} {one['core_s']['median'] * 1e3:10.2f} ms of core time a call, "
            f"{one['times_onnxruntime']:.2f} x, error {one['relative_error']:.1e}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", default=[str(ROOT / "models/emoji-64")])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep the graphs here, and take those that are there")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        function, *rest = json.loads(args.job)
        if function == "lower":
            print(json.dumps(lower(rest[0], Path(rest[1]))))
        else:
            print(json.dumps(forward(Path(rest[0]), *rest[1:])))
        return
    results: dict[str, Any] = {"threads": args.threads, "gflop_per_core_s": ceilings(), "unet_call": {}}
    with tempfile.TemporaryDirectory(prefix="x86-") as name:
        for source in args.sources:
            label = Path(source.removeprefix("arch:")).name
            work = (args.work or Path(name)) / label
            work.mkdir(parents=True, exist_ok=True)
            results["unet_call"][label] = compare(source, work, args.threads, args.rounds, args.runs)
    save("x86", results)


if __name__ == "__main__":
    main()
