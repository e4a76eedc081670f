"""What a decoder costs: the VAE's own, the tiny one in its place, and windows. `python benchmarks/decoders.py --help`

    speed MODEL            core-seconds a picture of both decoders on every engine, interleaved, one thread
    memory MODEL PIXELS    peak resident memory on ONNX Runtime, a process each: whole, and in windows
    tiling MODEL PIXELS    decibels of a picture decoded in windows against the whole one

MODEL is emoji-64 (trained) or sd15 (the architecture at full size, random weights: speed and memory are real, pictures
are not). Figures go into benchmarks/results/decoders.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.export import parts
from fewstep.runtime.backends import open_session
from fewstep.runtime.manifest import SampleSpec
from fewstep.runtime.tiling import tiling
from fewstep.targets import load_target

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "decoders.json"
MODELS = HERE.parent / "models"
ROUNDS = {"emoji-64": 40, "sd15": 2}
ENGINES = (("laptop-cpu", "float32"), ("intel-cpu", "float32"), ("intel-cpu", "bfloat16"))
KINDS = ("full", "tiny")


def decoder(model: str, kind: str) -> tuple[Any, SampleSpec]:
    """A vae_decoder part: the model's own or its tiny one."""
    from fewstep.distill.tiny_files import read_network, tiny_config
    from fewstep.distill.tiny_network import TinyNetwork, TinyShape
    from fewstep.model import Model, families, load
    from fewstep.model.builders import SD15_VAE, _random
    from fewstep.model.libraries import diffusers
    from fewstep.runtime.process import DiscreteVP

    if model == "emoji-64":
        whole = load(MODELS / "emoji-64")
        part = whole.parts["vae_decoder"]
        network = read_network(MODELS / "emoji-64" / "vae_tiny", whole)[0] if kind == "tiny" else None
    else:
        # only its VAE: the U-Net of 3.4 GB has no part in this
        sample = SampleSpec(512, 512, 4, 8, 64, scaling_factor=SD15_VAE["scaling_factor"])
        part = families._decoder(_random(lambda: diffusers().AutoencoderKL.from_config(SD15_VAE), 0), sample)
        process = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)
        whole = Model("sd15", "unconditional", "unet", {part.name: part}, process, "epsilon", sample)
        network = TinyNetwork(TinyShape((64,) * 4, (3, 3, 3, 1), 8, 4, 3), sample.scaling_factor)  # TAESD's
    if kind == "tiny":
        network.eval().requires_grad_(False)
        config = tiny_config(network.shape, whole)
        part = replace(part, module=network, config=config, margin=network.shape.margin)
    return part, whole.sample


def write(model: str, kind: str, target: str, folder: Path) -> tuple[Any, Path, SampleSpec, int]:
    part, sample = decoder(model, kind)
    lowered = parts.lower(part, folder / kind / target / part.name, load_target(target), folder, None)
    return lowered.spec, folder / kind / target / lowered.spec.graph, sample, part.parameters()


def latent(sample: SampleSpec, pixels: int) -> Any:
    """What the decoder is fed for a picture of that size."""
    cells = pixels // sample.factor
    z = np.random.default_rng(0).standard_normal((1, sample.channels, cells, cells))
    return (z / sample.scaling_factor + sample.shift_factor).astype(np.float32)


def speed(model: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs, z = {}, None
        for kind in KINDS:
            for target in dict.fromkeys(target for target, _ in ENGINES):
                spec, graph, sample, count = write(model, kind, target, Path(folder))
                z = latent(sample, sample.height)
                for engine, precision in ENGINES:
                    if engine == target:
                        session = open_session(graph, replace(spec, precision=precision), threads=1)
                        key = f"{kind} {spec.engine} {precision}"
                        runs[key], rows[key] = session, {"parameters": count}
        taken: dict[str, list[float]] = {key: [] for key in runs}
        for number in range(ROUNDS[model] + 1):
            for key, session in runs.items():
                begin = time.process_time()
                session.run({"latent_sample": z})
                if number:  # the first one prepares
                    taken[key].append(time.process_time() - begin)
        for key, seconds in taken.items():
            low, middle, high = np.percentile(seconds, [25, 50, 75])
            rows[key] |= {
                "core_s": float(f"{middle:.4g}"),
                "quartiles": [float(f"{low:.4g}"), float(f"{high:.4g}")],
            }
    return rows


def memory(model: str, pixels: int, tiles: list[int], kinds: list[str]) -> dict[str, Any]:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            spec, graph, sample, _ = write(model, kind, "laptop-cpu", Path(folder))
            for tile in tiles:
                code = [
                    sys.executable,
                    __file__,
                    "child",
                    str(graph),
                    str(pixels),
                    str(tile),
                    str(spec.margin or 0),
                ]
                code += [json.dumps({"f": sample.factor, "s": sample.scaling_factor})]
                done = subprocess.run(code, capture_output=True, text=True)
                rows[f"{kind} {tile or 'whole'}"] = json.loads(done.stdout or '"failed"')
                print(kind, tile, done.stdout, done.stderr[-300:], flush=True)
    return rows


def child(graph: str, pixels: int, tile: int, margin: int, about: dict[str, Any]) -> None:
    """One decoding in a process that imports no torch; prints what it took."""
    from fewstep.runtime.manifest import PartSpec

    session = open_session(Path(graph), PartSpec("onnxruntime", "", (), ()), threads=1)
    z = latent(SampleSpec(0, 0, 4, about["f"], scaling_factor=about["s"]), pixels)
    begin = time.process_time()

    def run(one: Any) -> Any:
        return session.run({"latent_sample": one})["sample"]

    _ = run(z) if not tile else tiling(tile, about["f"], margin or None).decode(run, z, about["f"])
    seconds = time.process_time() - begin
    # not getrusage: its maximum is inherited from the process that started this one
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) // 1024
    print(json.dumps({"peak_mib": peak, "core_s": round(seconds, 2)}))


def tiled(model: str, pixels: int, tiles: list[int], kinds: list[str]) -> dict[str, Any]:
    """emoji-64: pictures the model drew, laid side by side; sd15: noise."""
    rows = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            spec, graph, sample, _ = write(model, kind, "laptop-cpu", Path(folder))
            session = open_session(graph, spec)
            seen = [latent(sample, pixels)] if model == "sd15" else list(_sheets(sample, pixels))

            def run(one: Any, session: Any = session) -> Any:
                return session.run({"latent_sample": one})["sample"]

            whole = [run(z).clip(-1, 1) for z in seen]
            for tile in tiles:
                try:
                    windows = tiling(tile, sample.factor, spec.margin)
                except ValueError as error:
                    rows[f"{kind} {tile}"] = str(error)
                    continue
                cut = [windows.decode(run, z, sample.factor).clip(-1, 1) for z in seen]
                error = np.mean([np.mean(((a - b) / 2) ** 2) for a, b in zip(whole, cut)])
                rows[f"{kind} {tile}"] = {
                    "psnr_db": round(float(-10 * np.log10(max(error, 1e-15))), 1),
                    "max_abs": float(max(np.abs(a - b).max() for a, b in zip(whole, cut))),
                }
    return rows


def _sheets(sample: SampleSpec, pixels: int) -> Any:
    """Four latents of pictures of emoji-64, laid out as one."""
    from fewstep.export.plans import plan_of
    from fewstep.model import load
    from fewstep.model.trajectories import trajectories

    model, side = load(MODELS / "emoji-64"), pixels // sample.height
    plan = plan_of(model, "model", 8)
    for run in trajectories(model, plan, range(4 * side**2), batch=side**2):
        z = run.latent / sample.scaling_factor + sample.shift_factor
        rows = [np.concatenate(list(z[i * side : (i + 1) * side]), axis=2) for i in range(side)]
        yield np.concatenate(rows, axis=1)[None].astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "memory", "tiling"))
    parser.add_argument("model", choices=tuple(ROUNDS))
    parser.add_argument("pixels", type=int, nargs="?", default=0)
    parser.add_argument("--tiles", type=int, nargs="+", default=[0], help="pixels; 0: whole")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    if args.what == "speed":
        found, key = speed(args.model), f"speed {args.model}"
    else:
        work = memory if args.what == "memory" else tiled
        found, key = (
            work(args.model, args.pixels, args.tiles, args.kinds),
            f"{args.what} {args.model} {args.pixels}",
        )
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, key: {**known.get(key, {}), **found}}, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], *(int(value) for value in sys.argv[3:6]), json.loads(sys.argv[6]))
    else:
        main()
