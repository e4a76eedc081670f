"""Against optimum's ORTDiffusionPipeline: the same model, steps, guidance, seed, threads and engine version.

    python benchmarks/vs_optimum.py [--model models/emoji-64] [--steps 20] [--runs 7]

optimum-onnx holds diffusers and transformers back, so it lives in `.venv-optimum`, made here on first use. Cold: a
fresh process until the first image is on disk, the two in turn. Warm: two long-lived processes, image by image in
turn. Both are wall seconds; the page cache is warm for both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save, spread

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv-optimum"
PINS = [
    "torch==2.13.0",
    "optimum-onnx==0.1.0",
    "diffusers==0.39.0",
    "transformers==4.57.6",
    "onnxruntime==1.31.1",
]
PROMPT = "a rooster on a blue background"

OPTIMUM = """
import sys
from optimum.onnxruntime import ORTDiffusionPipeline
import onnxruntime, torch
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = {threads}
pipe = ORTDiffusionPipeline.from_pretrained({folder!r}, session_options=options)
pipe.set_progress_bar_config(disable=True)
def draw(seed):
    return pipe({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}, height={size}, width={size},
                generator=torch.Generator().manual_seed(seed)).images[0]
"""
OURS = """
import sys
from fewstep.runtime import Pipeline
pipe = Pipeline.from_pretrained({folder!r}, threads={threads})
def draw(seed):
    return pipe({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}, height={size}, width={size},
                seed=seed).images[0]
"""
COLD = "draw(0).save({image!r})\n"
WARM = """
import time
draw(0)
print("ready", flush=True)
for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    draw(int(line))
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""


def prepare(model: Path, folder: Path) -> tuple[Path, Path]:
    """Export the model with both tools. Returns (optimum's folder, our bundle)."""
    if not VENV.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([VENV / "bin/pip", "install", "-q", *PINS], check=True)
    theirs, ours = folder / "optimum", folder / "fewstep"
    export = [VENV / "bin/optimum-cli", "export", "onnx", "--model", model, "--task", "text-to-image", theirs]
    subprocess.run(export, check=True, env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    command = [
        sys.executable,
        "-m",
        "fewstep.tools.cli",
        "export",
        model,
        "--target",
        "laptop-cpu",
        "-o",
        ours,
    ]
    subprocess.run(command, check=True)
    return theirs, ours


def cold(code: dict[str, tuple[Path, str]], folder: Path, runs: int) -> dict[str, list[float]]:
    """Wall seconds from process start until the first image is a file."""
    seconds: dict[str, list[float]] = {name: [] for name in code}
    for run in range(runs + 1):
        for name, (python, source) in code.items():
            start = time.perf_counter()
            image = str(folder / f"{name}.png")
            subprocess.run([python, "-c", source + COLD.format(image=image)], check=True, capture_output=True)
            if run:  # the first fills the page cache
                seconds[name].append(time.perf_counter() - start)
    return seconds


def warm(code: dict[str, tuple[Path, str]], runs: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds an image in processes that stay up."""
    workers = {
        name: subprocess.Popen(
            [python, "-c", source + WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name, (python, source) in code.items()
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for worker in workers.values():
        while worker.stdout and worker.stdout.readline().strip() != "ready":
            pass
    for seed in range(runs):
        for name, worker in workers.items():
            assert worker.stdin
            assert worker.stdout
            print(seed, file=worker.stdin, flush=True)
            wall, cpu = map(float, worker.stdout.readline().split())
            samples[name].append((wall, cpu))
    for worker in workers.values():
        worker.communicate()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/emoji-64")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        theirs, ours = prepare(args.model.resolve(), folder)
        given = {"prompt": PROMPT, "steps": args.steps, "guidance": args.guidance, "size": args.size}
        code = {
            "optimum": (
                VENV / "bin/python",
                OPTIMUM.format(folder=str(theirs), threads=args.threads, **given),
            ),
            "fewstep": (Path(sys.executable), OURS.format(folder=str(ours), threads=args.threads, **given)),
        }
        first = cold(code, folder, args.runs)
        images = warm(code, 3 * args.runs)
    ratio = [a / b for a, b in zip(first["optimum"], first["fewstep"], strict=True)]
    each = [a[0] / b[0] for a, b in zip(images["optimum"], images["fewstep"], strict=True)]
    results = {
        "model": args.model.name,
        "settings": {**given, "threads": args.threads, "pins": PINS},
        "first_image_s": {name: spread(s) for name, s in first.items()},
        "first_image_ratio": spread(ratio),
        "image_s": {name: spread([wall for wall, _ in s]) for name, s in images.items()},
        "image_cpu_s": {name: spread([cpu for _, cpu in s]) for name, s in images.items()},
        "image_ratio": spread(each),
    }
    for key in ("first_image_s", "image_s", "image_cpu_s"):
        for name, row in results[key].items():
            print(
                f"{key:15} {name:8} {row['median']:.3f} s ({row['min']:.3f} to {row['max']:.3f}, n {row['n']})"
            )
    print(f"optimum / fewstep, pair by pair: first image {spread(ratio)}, each image {spread(each)}")
    save("vs-optimum", results)


if __name__ == "__main__":
    main()
