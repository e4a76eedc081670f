"""The TypeScript runtime in Node against the Python one: golden files, pictures, what its loop costs, its size.

    make web
    python benchmarks/web_node.py --keep FOLDER

emoji-64 in float32 and int8, and cifar-dit, are exported with 8 steps and drawn by both on one thread. An overhead is
what a picture takes outside ONNX Runtime's own calls, over what it takes inside them: of CPU time too, because on a
busy machine the clock also counts the waiting. Exports take two minutes, and those in FOLDER are used again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import save, spread

from fewstep.export import export_bundle
from fewstep.runtime import Pipeline

ROOT = Path(__file__).parents[1]
STEPS = 8
REPEATS = 30
PROMPTS = (
    "a rooster",
    "a red apple",
    "an octopus",
    "a yellow car",
    "a house",
    "a blue fish",
    "a tree",
    "a smiling face",
)
WORDS = [{"prompt": prompt, "seed": i} for i, prompt in enumerate(PROMPTS)]
CASES = {
    "emoji-64-float32": ("emoji-64", "laptop-cpu", WORDS),
    "emoji-64-int8": ("emoji-64", "web-wasm", WORDS),
    "cifar-dit-float32": ("cifar-dit", "laptop-cpu", [{"classLabel": i, "seed": i} for i in range(8)]),
}


def node(*arguments: str | Path) -> Any:
    command = ["node", ROOT / "benchmarks/web_node.mjs", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def pictures(bundle: Path, requests: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """How far Node's pictures are from Python's, in levels of 255, and its latents, over the latent's peak."""
    levels, changed, latent = 0, [], 0.0
    names = {"classLabel": "class_labels"}
    with Pipeline.from_pretrained(bundle, threads=1) as pipeline:
        for i, request in enumerate(requests):
            x = pipeline(**{names.get(k, k): v for k, v in request.items()}, output_type="latent").images
            expected = np.rint(pipeline.decode(x)[0] * 255)
            found = np.fromfile(folder / f"{i}.rgba", np.uint8).reshape(*expected.shape[:2], 4)[:, :, :3]
            levels = max(levels, int(np.abs(found - expected).max()))
            changed.append(float((found != expected).mean()))
            other = np.fromfile(folder / f"{i}.latents", np.float32).reshape(x.shape)
            latent = max(latent, float(np.abs(other - x).max() / np.abs(x).max()))
    return {
        "largest_difference_levels": levels,
        "share_that_differs": float(np.mean(changed)),
        "latent_error": latent,
    }


def measure(bundle: Path, requests: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    timed = node(bundle, folder, str(REPEATS), *map(json.dumps, requests))
    runs = timed["runs"]
    return {
        "pictures": len(requests),
        **pictures(bundle, requests, folder),
        "load_ms": timed["loadMs"],
        "picture_ms": spread([run["totalMs"] for run in runs]),
        "picture_cpu_ms": spread([run["cpuMs"] for run in runs]),
        "overhead_of_time": spread([run["totalMs"] / run["engineMs"] - 1 for run in runs]),
        "overhead_of_cpu_time": spread([run["cpuMs"] / run["engineCpuMs"] - 1 for run in runs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="where bundles are kept for the next run")
    arguments = parser.parse_args()
    subprocess.run(["node", "build.mjs", "--tests"], cwd=ROOT / "runtime/web", check=True)
    results = node()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        for name, (model, target, requests) in CASES.items():
            bundle, out = folder / name, Path(scratch) / f"{name} drawn"
            out.mkdir()
            if not bundle.exists():
                *_, _ = export_bundle(
                    ROOT / "models" / model, target, bundle, steps=STEPS, measure_speed=False
                )
            results[name] = {"target": target, **measure(bundle, requests, out)}
            print(name, json.dumps(results[name], indent=1))
    save("web_node", {"steps": STEPS, "threads": 1, **results})


if __name__ == "__main__":
    main()
