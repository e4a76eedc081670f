"""Fused attention in the browser: emoji-64's U-Net by onnxruntime-web, on WebAssembly and on WebGPU in software.

    make web; .venv/bin/python benchmarks/web_attention.py > benchmarks/results/web_attention.json

Says why the target web-webgpu leaves attention as it is. Times are of WebAssembly alone: a software adapter has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fewstep.export import onnx
from fewstep.model import load
from fewstep.model.trajectories import run_part

ROOT = Path(__file__).parents[1]
OPSET = 23  # of both targets


def main() -> None:
    part = load(ROOT / "models" / "emoji-64").parts["unet"]
    feeds = part.example.feeds(part.inputs, part.example.default_sizes() | {"batch": 2}, seed=0)
    feeds["timestep"] = np.full(2, 500, np.float32)
    wanted = run_part(part, feeds)
    traced = onnx.trace(part)
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for name, fuse in (("fused", True), ("as it is", False)):
            spec = onnx.write(traced, Path(folder) / name / part.name, opset=OPSET, fuse_attention=fuse)
            graphs[name] = f"{name}/{spec.graph}"
        case = {
            "graphs": graphs,
            "feeds": {
                name: {"dims": value.shape, "data": value.ravel().tolist()} for name, value in feeds.items()
            },
            "wanted": {name: value.ravel().tolist() for name, value in wanted.items()},
        }
        (Path(folder) / "case.json").write_text(json.dumps(case))
        script = Path(__file__).with_suffix(".mjs")
        done = subprocess.run(["node", script, folder], check=True, stdout=subprocess.PIPE, text=True)
    json.dump(json.loads(done.stdout), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
