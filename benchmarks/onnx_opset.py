"""Which ONNX operators run fastest on ONNX Runtime's CPU: what targets/laptop-cpu.toml and export/clean.py rest on.

    python benchmarks/onnx_opset.py [MODEL] [--runs 25]

One U-Net is exported in several spellings and run in turns on one thread, at batch 2. CPU time of the process, which
other programs disturb less than the clock. Writes results/onnx_opset.json.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save

from fewstep.export import clean, onnx
from fewstep.export.gate import relative_error
from fewstep.model import Part, load
from fewstep.model.trajectories import run_part
from fewstep.runtime.backends import open_session

ROOT = Path(__file__).parents[1]


def spellings(part: Part, folder: Path) -> dict[str, Path]:
    """Name -> folder of the exported graph."""
    traced = onnx.trace(part)
    onnx.write_plain(traced, folder / "opset 20, as torch writes it")
    keep = clean.spell_out_group_norm
    clean.spell_out_group_norm = lambda model: 0
    onnx.write(traced, folder / "opset 23", opset=23, fuse_attention=False)
    onnx.write(traced, folder / "opset 23, fused attention", opset=23)
    clean.spell_out_group_norm = keep
    onnx.write(traced, folder / "opset 23, fused attention, group norm spelled out", opset=23)
    sizes = part.example.default_sizes()
    fixed = replace(
        part,
        inputs=tuple(replace(s, shape=tuple(sizes.get(str(a), a) for a in s.shape)) for s in part.inputs),
        outputs=tuple(replace(s, shape=tuple(sizes.get(str(a), a) for a in s.shape)) for s in part.outputs),
        example=replace(part.example, sizes={axis: (size,) for axis, size in sizes.items()}),
    )
    onnx.write(onnx.trace(fixed), folder / "the same, all sizes fixed", opset=23)
    onnx.write(onnx.trace(half(part)), folder / "the same, float16", opset=23)
    return {path.name: path for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_ctime)}


def half(part: Part) -> Part:
    """The part in float16, inputs included."""
    specs = {
        side: tuple(replace(s, dtype="float16") for s in getattr(part, side))
        for side in ("inputs", "outputs")
    }
    return replace(part, module=copy.deepcopy(part.module).half(), **specs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(ROOT / "models/emoji-64"))
    parser.add_argument("--runs", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load(args.model)
    part = model.parts[model.denoiser]
    results: dict[str, Any] = {
        "model": model.name,
        "parameters": part.parameters(),
        "runs": args.runs,
        "sizes": {},
    }
    with tempfile.TemporaryDirectory() as name:
        graphs = spellings(part, Path(name))
        for scale in (1, 2):
            sizes = part.example.default_sizes()
            sizes |= {axis: size * scale for axis, size in sizes.items() if axis != "batch"}
            feeds = part.example.feeds(part.inputs, sizes, seed=0)
            right = run_part(part, feeds)["out_sample"]
            spec = onnx.PartSpec("onnxruntime", "", part.inputs, part.outputs)
            sessions = {
                name: open_session(graph / "model.onnx", spec, threads=1)
                for name, graph in graphs.items()
                if scale == 1 or "fixed" not in name
            }
            given = {
                name: {k: v.astype(np.float16) for k, v in feeds.items()} if "float16" in name else feeds
                for name in sessions
            }
            cpu: dict[str, list[float]] = {name: [] for name in sessions}
            errors = {
                name: relative_error(right, session.run(given[name])["out_sample"])[0]
                for name, session in sessions.items()
            }
            for _ in range(args.runs):
                for name, session in sessions.items():
                    start = time.process_time()
                    session.run(given[name])
                    cpu[name].append((time.process_time() - start) * 1e3)
            label = " x ".join(str(sizes[axis]) for axis in ("height", "width"))
            first = float(np.median(cpu["opset 20, as torch writes it"]))
            results["sizes"][label] = {
                name: {
                    "median_ms": round(float(np.median(times)), 2),
                    "quartiles_ms": [round(float(q), 2) for q in np.quantile(times, [0.25, 0.75])],
                    "speedup": round(first / float(np.median(times)), 3),
                    "relative_error": float(f"{errors[name]:.2g}"),
                }
                for name, times in cpu.items()
            }
            for name, found in results["sizes"][label].items():
                print(f"{label}  {name:52} {found['median_ms']:8.2f} ms  x{found['speedup']:.2f}")
            for session in sessions.values():
                session.close()
    save("onnx_opset", results)


if __name__ == "__main__":
    main()
