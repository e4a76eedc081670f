"""The TypeScript runtime in Node against the Python one: golden files, pictures, what its loop costs, its size.

    make web
    python benchmarks/web_node.py

emoji-64 in float32 and int8, and cifar-dit, are exported with 8 steps and drawn by both, one thread each. "overhead" is
the time of a picture outside ONNX Runtime's own calls, over the time inside them. Takes about three minutes.
"""

from __future__ import annotations

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
CASES = {
    "emoji-64 float32": ("emoji-64", None, [{"prompt": p, "seed": i} for i, p in enumerate(PROMPTS)]),
    "emoji-64 int8": ("emoji-64", "w8a8", [{"prompt": p, "seed": i} for i, p in enumerate(PROMPTS)]),
    "cifar-dit float32": ("cifar-dit", None, [{"classLabel": i, "seed": i} for i in range(8)]),
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
    shares = [run["totalMs"] / run["engineMs"] - 1 for run in timed["runs"]]
    totals = [run["totalMs"] for run in timed["runs"]]
    return {
        "pictures": len(requests),
        **pictures(bundle, requests, folder),
        "load_ms": timed["loadMs"],
        "picture_ms": spread(totals),
        "overhead": spread(shares),
    }


def main() -> None:
    subprocess.run(["node", "build.mjs", "--tests"], cwd=ROOT / "runtime/web", check=True)
    results = node()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "recipe.toml").write_text(f"steps = {STEPS}\n")
        for name, (model, quantize, requests) in CASES.items():
            bundle, out = folder / name, folder / f"{name} drawn"
            out.mkdir()
            source, recipe = ROOT / "models" / model, folder / "recipe.toml"
            *_, _ = export_bundle(
                source, "laptop-cpu", bundle, recipe=recipe, quantize=quantize, measure_speed=False
            )
            results[name] = measure(bundle, requests, out)
            print(name, json.dumps(results[name], indent=1))
    save("web_node", {"steps": STEPS, "threads": 1, **results})


if __name__ == "__main__":
    main()
