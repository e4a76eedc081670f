"""An image on an x86 CPU: ours on both engines against diffusers, optimum and OpenVINO GenAI, and what the CPU can do.

    python benchmarks/x86.py [--source models/emoji-64] [--rounds 3] [--images 2] [--threads 1] [--work DIR]
    python benchmarks/x86.py --ceilings        # only what the processor reaches
    python benchmarks/x86.py --figures         # only the table and the plot, from the results there are

SOURCE is what `fewstep export` takes, or arch:NAME (arch:sd15: about 40 GB of disk and an hour). 4 steps of LCM, no
guidance, one image. Every image is drawn in a process of its own, all of them in turns, round after round. The figure
to compare on a shared machine is core seconds: processor time on one thread. Quantized ones are stand-ins by rounding
to nearest (x86_ours.py): speed, not quality. Writes results/x86.json and results/x86.svg.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import x86_peers
import x86_profile
from common import RESULTS, save, spread
from x86_ours import KINDS

from fewstep.tools.host import fingerprint

ROOT = Path(__file__).parents[1]
OURS, PROFILE = (Path(__file__).with_name(name) for name in ("x86_ours.py", "x86_profile.py"))
DRAWN = {
    "ONNX Runtime float32": ("ONNX Runtime float32", "ONNX Runtime float32"),
    "ONNX Runtime float32, tiny decoder": ("ONNX Runtime float32", "tiny"),
    "ONNX Runtime int8": ("ONNX Runtime int8", "ONNX Runtime int8"),
    "ONNX Runtime int8, tiny decoder": ("ONNX Runtime int8", "tiny"),
    "OpenVINO bfloat16": ("OpenVINO bfloat16", "OpenVINO bfloat16"),
    "OpenVINO int8, bfloat16 decoder": ("OpenVINO int8", "OpenVINO bfloat16"),
    "OpenVINO int8": ("OpenVINO int8", "OpenVINO int8"),
    "OpenVINO int8, tiny decoder": ("OpenVINO int8", "tiny"),
}
"""Ours: name -> KIND of text encoder and denoiser, and of the exact decoder, or tiny."""
BEST_PEER = "OpenVINO GenAI int8"
SIZE = 1536
"""Of the matrices: 7 GFLOP a product, long enough to time and out of the second-level cache."""
IMAGE = (512, 64)
"""Channels and side of the convolution: 19 GFLOP, the widest layer of SD-1.5's decoder at its second smallest size."""
TRIES = 12


def ceilings() -> dict[str, float]:
    """The most any of three libraries' kernels reaches on one thread, in 10^9 operations per core second.

    torch's products of two matrices alone would understate it: on an AMD processor they reach half in float32.
    """
    import openvino
    import torch
    from openvino import opset13 as ops

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.standard_normal((SIZE, SIZE)).astype(np.float32))
    whole = torch.from_numpy(rng.integers(-8, 8, (SIZE, SIZE)).astype(np.int8))
    halves = real.bfloat16()
    found: dict[str, float] = {}

    def record(name: str, work: int, call: Callable[[], object]) -> None:
        times = []
        for _ in range(TRIES):
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
        found[name] = max(found.get(name, 0.0), round(work / min(times) / 1e9, 1))

    record("float32", 2 * SIZE**3, lambda: real @ real)
    record("bfloat16", 2 * SIZE**3, lambda: halves @ halves)
    record("int8", 2 * SIZE**3, lambda: torch._int_mm(whole, whole))
    channels, side = IMAGE
    weights = rng.integers(-127, 128, (channels, channels, 3, 3)).astype(np.int8)
    x = rng.standard_normal((1, channels, side, side)).astype(np.float32)
    for name in ("float32", "bfloat16", "int8"):
        image = ops.parameter([1, channels, side, side], np.float32)
        ends = [np.float32(end) for end in (-4, 4, -4, 4)]
        rounded = ops.fake_quantize(image, *ends, 256) if name == "int8" else image
        integers = ops.convert(ops.constant(weights), np.float32)
        kernel: Any = ops.constant(weights.astype(np.float32))
        if name == "int8":
            kernel = ops.multiply(integers, np.full((channels, 1, 1, 1), 0.01, np.float32))
        seen = ops.convolution(rounded, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
        hint = {
            "INFERENCE_NUM_THREADS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if name == "bfloat16" else "f32",
        }
        request = (
            openvino.Core()
            .compile_model(openvino.Model([ops.tanh(seen)], [image]), "CPU", hint)
            .create_infer_request()
        )
        work = 2 * 9 * channels**2 * side**2
        record(name, work, lambda request=request: request.infer([x]))  # type: ignore[misc]
    big = np.zeros(1 << 27)
    record("copy_gb", 16 << 27, big.copy)  # bytes read and written
    for name, value in found.items():
        print(f"{name:10} {value:8.1f} 10^9 per core second", flush=True)
    return found


def ran(command: list[str]) -> Any:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(source: str, work: Path) -> tuple[int, int]:
    """Our graphs and the peers' in `work`; returns the side of the image and of the latent."""
    import torch
    from diffusers import LCMScheduler

    from fewstep.model import load

    model = load(source)
    sample = model.sample
    text = next(spec for spec in model.parts[model.denoiser].inputs if spec.name == "encoder_hidden_states")
    if not (work / "source").exists():
        pipeline = model.original
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        pipeline.save_pretrained(work / "source.new")
        assert model.tokenizer is not None
        for name in (
            "vocab.json",
            "merges.txt",
            "tokenizer_config.json",
        ):  # the classic files: peers read no others
            if (model.tokenizer.folder / name).exists():
                shutil.copy(model.tokenizer.folder / name, work / "source.new/tokenizer")
        (work / "source.new").rename(work / "source")
    sizes = sample.height // sample.factor, int(text.shape[2]), int(text.shape[1])
    del model, torch
    if not (work / "lowered").exists():
        subprocess.run([sys.executable, OURS, "lower", source, work], check=True)
        (work / "lowered").touch()
    x86_peers.prepare(work, *sizes)
    return sample.height, sizes[0]


def images(work: Path, size: int, rounds: int, each: int, threads: int, only: list[str]) -> dict[str, Any]:
    """Name -> core seconds, wall seconds, stages, load and memory of an image, medians with spread."""
    commands = {
        name: [sys.executable, str(OURS), "draw", str(work), kind, decoder, "4", str(each), str(threads)]
        for name, (kind, decoder) in DRAWN.items()
    }
    commands = {f"fewstep {name}": command for name, command in commands.items()}
    commands |= {name: x86_peers.command(name, work, size, 4, each, threads) for name in x86_peers.PEERS}
    names = [name for name in commands if not only or any(part in name for part in only)]
    kept = work / "runs.json"
    seen: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            runs = seen.setdefault(name, [])
            if isinstance(runs, str) or len(runs) > number:  # it cannot, or it has before we were cut off
                continue
            try:
                runs.append(ran(commands[name]))
                print(
                    f"round {number + 1} {name:45} {runs[-1]['images'][-1]['core_s']:9.3f} core s", flush=True
                )
            except subprocess.CalledProcessError as error:
                seen[name] = f"the process ended with code {error.returncode}"
                print(f"{name}: {seen[name]}", flush=True)
            kept.write_text(json.dumps(seen))
    return {name: summary(runs) for name, runs in seen.items()}


def summary(runs: list[dict[str, Any]] | str) -> dict[str, Any]:
    """Medians with spread over all images of all processes."""
    if isinstance(runs, str):
        return {"cannot": runs}
    drawn = [image for run in runs for image in run["images"]]
    stages = {stage for image in drawn for stage in image["stages_core_s"]}
    return {
        **{key: spread([image[key] for image in drawn]) for key in ("core_s", "wall_s")},
        "stages_core_s": {
            stage: spread([image["stages_core_s"].get(stage, 0.0) for image in drawn])
            for stage in sorted(stages)
        },
        "load_core_s": spread([run["load"]["core_s"] for run in runs]),
        "load_wall_s": spread([run["load"]["wall_s"] for run in runs]),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a row each, and how many times the best peer's speed it has."""
    lines = []
    for model, every in results["images"].items():
        found = {name: one for name, one in every.items() if "cannot" not in one}
        best = found.get(BEST_PEER, {}).get("core_s", {}).get("median")
        lines += [
            f"{model}: 4 steps, no guidance, one image, one thread",
            "",
            f"| | core s an image | range | times {BEST_PEER} | U-Net calls | decoder | load, core s | peak RSS |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, one in sorted(found.items(), key=lambda item: item[1]["core_s"]["median"]):
            core, stages = one["core_s"], one["stages_core_s"]
            times = f"{best / core['median']:.2f}" if best else ""
            unet, decoder = (stages.get(stage, {}).get("median", 0.0) for stage in ("unet", "decoder"))
            lines.append(
                f"| {name} | {core['median']:.3g} | {core['min']:.3g} to {core['max']:.3g} | {times} | {unet:.3g} "
                f"| {decoder:.3g} | {one['load_core_s']['median']:.3g} | {one['peak_rss_bytes'] / 2**30:.2f} GiB |"
            )
        lines += [f"{name}: {one['cannot']}" for name, one in every.items() if "cannot" in one]
        lines.append("")
        if model in results.get("profile", {}):
            lines += ["| | part | operators | core s an image | of the part | share of the ceiling |"]
            lines += ["|---|---|---|---|---|---|", *x86_profile.reached(results, model), ""]
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> str:
    """Stages of an image, a bar each, as one SVG that stands alone."""
    colours = {"text": "#8a8f98", "unet": "#3366aa", "decoder": "#dd8833"}
    rows, top, marks = 26, 0, []
    for model, every in results["images"].items():
        found = {name: one for name, one in every.items() if "cannot" not in one}
        longest = max(one["core_s"]["median"] for one in found.values())
        marks.append(f'<text x="0" y="{top + 18}" font-weight="bold">{model}: core seconds an image</text>')
        top += rows
        for name, one in sorted(found.items(), key=lambda item: item[1]["core_s"]["median"]):
            x = 300.0
            marks.append(f'<text x="292" y="{top + 16}" text-anchor="end">{name}</text>')
            for stage, colour in colours.items():
                width = 380 * one["stages_core_s"].get(stage, {}).get("median", 0.0) / longest
                marks.append(
                    f'<rect x="{x:.1f}" y="{top + 4}" width="{width:.1f}" height="16" fill="{colour}">'
                    f"<title>{stage}</title></rect>"
                )
                x += width
            marks.append(f'<text x="{x + 6:.1f}" y="{top + 16}">{one["core_s"]["median"]:.3g}</text>')
            top += rows
        top += rows // 2
    for number, (stage, colour) in enumerate(colours.items()):
        marks.append(f'<rect x="{300 + 110 * number}" y="{top}" width="12" height="12" fill="{colour}"/>')
        marks.append(f'<text x="{318 + 110 * number}" y="{top + 11}">{stage}</text>')
    # grey text is read on light pages and on dark ones
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{top + rows}" font-family="sans-serif"'
    )
    return f'{head} font-size="13" fill="#777">{"".join(marks)}</svg>\n'


def figures(results: dict[str, Any]) -> None:
    (RESULTS / "x86.svg").write_text(plot(results))
    print(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default=str(ROOT / "models/emoji-64"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2, help="drawn by each process, after a shorter one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep the graphs here, and take those that are there")
    parser.add_argument("--only", action="append", default=[], help="names that contain this")
    parser.add_argument("--ceilings", action="store_true")
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    file = RESULTS / "x86.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results.pop("host", None)
    label = Path(args.source.removeprefix("arch:")).name
    if args.ceilings or not args.figures:
        results["gflop_per_core_s"] = ceilings()
    if not (args.ceilings or args.figures):
        with tempfile.TemporaryDirectory(prefix="x86-") as name:
            work = (args.work or Path(name)) / label
            work.mkdir(parents=True, exist_ok=True)
            size, _ = prepare(args.source, work)
            load = fingerprint()["load_average"]
            found = images(work, size, args.rounds, args.images, args.threads, args.only)
            results.setdefault("images", {}).setdefault(label, {}).update(found)
            settings = {
                "steps": 4,
                "guidance": 1,
                "size": size,
                "threads": args.threads,
                "load_average": load,
            }
            results.setdefault("settings", {})[label] = settings
            for kind, (engine, precision, _) in [] if args.only else KINDS.items():
                command = [sys.executable, PROFILE, work, kind, engine, precision, args.threads]
                profiles = results.setdefault("profile", {}).setdefault(label, {})
                profiles[kind] = ran([str(word) for word in command])
            results.setdefault("gflop", {})[label] = {
                file.stem: json.loads(file.with_suffix(".json").read_text())
                for file in sorted(work.glob("*.npz"))
            }
    if not args.figures:
        save("x86", results)
    if results.get("images"):
        figures(results)


if __name__ == "__main__":
    main()
