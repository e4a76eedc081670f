"""Predicted against measured: size, memory and time of bundles on this machine, by rates found on other networks.

    python benchmarks/preflight.py [--work DIR] [--only TEXT] [--no-wasm] [--keep-rates]

Rates of every engine are fitted to networks of random weights (preflight_networks.py), measured one call at a time.
Then whole bundles of models/ are foreseen with those rates, as `fewstep export --dry-run` does, and measured as
`fewstep bench` does: processor time of a picture on one thread, and the peak memory of a process that drew one. No
bundle is among the networks. Stable Diffusion 1.5's figures are those of results/x86.json (benchmarks/x86.py). With
--work, graphs and bundles that are there are taken. Writes results/preflight.json; tables in [profile] of targets/
come from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import preflight_networks
import x86_ours
from common import RESULTS, save

from fewstep.export import onnx
from fewstep.export.foresee import foresee, planned, sketched
from fewstep.export.formats import format_of
from fewstep.export.predict import demand_of
from fewstep.export.work import count
from fewstep.quant.scheme import parse_scheme
from fewstep.targets import Profile, Rates, Target, load_target
from fewstep.targets.profile import Demand
from fewstep.tools.measure import Job, Worker
from fewstep.tools.profile import fit, fit_memory

ROOT = Path(__file__).parents[1]
CALL = Path(__file__).with_name("preflight_call.py")
WASM = Path(__file__).with_name("preflight_wasm.mjs")
SECONDS = 0.3
"""Of calls of one graph: the quickest quarter of them is undisturbed even beside other programs."""
PICTURES = 6
FEW = ("unet 64", "unet 96", "decoder 24", "decoder 64", "transformer 384", "encoder 256")
"""Networks for what takes long to convert, or to run."""
STEPS = 4
"""Of a picture: the time of a call is what is foreseen."""
QUICK = """
[quantize]
rounding = "nearest"
smooth = false
samples = 1

[quality.int8]
part_relative_error = 1.0
part_snr_db = 0.0
pipeline_psnr_db = 0.0
"""
"""Integers of whatever quality: their number and their kernels are those of any others."""
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Kind:
    """One engine in one precision."""

    target: str
    precision: str
    weights: str
    integers: bool
    known: Rates
    """What a fit starts from, of no weight where networks say more: round numbers for this class of processor."""
    wasm: bool = False

    def at(self, profile: Profile | None = None) -> Target:
        target = load_target(self.target)
        recipe = replace(target.recipe, precision=self.precision, weights=self.weights, passes=())
        target = replace(target, recipe=recipe, profile=profile or target.profile)
        return target.with_pass("quantize", scheme="w8a8") if self.integers else target

    @property
    def table(self) -> str:
        return "int8" if self.integers else self.precision


FLOAT = Rates(250, 230, 150, 20, 0, 0, 25, 80, 2, 20, 1.5, 2, 5, 5)
HALF = Rates(450, 450, 200, 20, 0, 0, 25, 80, 2, 40, 2, 2, 100, 20)
BYTES = Rates(800, 800, 150, 20, 10, 4, 25, 80, 3, 20, 1, 3, 5, 5)
SLOW = Rates(30, 30, 20, 5, 0, 0, 5, 10, 5, 20, 1.5, 2, 5, 2)
KINDS = {
    "ONNX Runtime float32": Kind("laptop-cpu", "float32", "float32", False, FLOAT),
    "ONNX Runtime int8": Kind("laptop-cpu", "float32", "float32", True, BYTES),
    "OpenVINO float32": Kind("intel-cpu", "float32", "float32", False, replace(FLOAT, operator_kib=100.0)),
    "OpenVINO bfloat16": Kind("intel-cpu", "bfloat16", "float16", False, HALF),
    "OpenVINO int8": Kind("intel-cpu", "bfloat16", "float16", True, replace(HALF, convolution_gops=900.0)),
    "LiteRT float32": Kind("android-cpu", "float32", "float32", False, FLOAT),
    "LiteRT int8": Kind("android-cpu", "float32", "float32", True, BYTES),
    "wasm float32": Kind("web-wasm", "float32", "float32", False, SLOW, wasm=True),
    "wasm int8": Kind(
        "web-wasm", "float32", "float32", True, replace(SLOW, gathered_gb_s=5.0, spilled_gb_s=2.0), wasm=True
    ),
}
MODELS = ("emoji-64", "emoji-64-fast", "cifar-dit")
SD15 = {
    "ONNX Runtime float32": "fewstep ONNX Runtime float32",
    "ONNX Runtime int8": "fewstep ONNX Runtime int8",
    "OpenVINO bfloat16": "fewstep OpenVINO bfloat16",
    "OpenVINO int8": "fewstep OpenVINO int8",
}
"""Kind -> its name in results/x86.json: 4 steps, no guidance, doublings split."""


def ran(command: list[Any]) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def batches(name: str, target: Target) -> tuple[int, ...]:
    """Sizes a network is called in: with guidance a denoiser takes two samples, but not where sizes are fixed."""
    return (1, 2) if name.startswith(DENOISERS) and target.limits.dynamic_shapes else (1,)


def lowered(name: str, kind: Kind, work: Path) -> tuple[Path, Demand]:
    """The graph of a network, made unless it is there, and what it asks for."""
    target = kind.at()
    label = f"{target.backend.engine} {kind.precision} {'int8' if kind.integers else 'float'}"
    folder, described = work / "networks" / label / name, None
    part = _part(name, work, fixed=not target.limits.dynamic_shapes)
    scheme = parse_scheme("w8a8") if kind.integers else None
    demand, _ = demand_of(part, count(part), target, scheme)
    if not (folder / "spec.json").exists():
        if kind.integers:
            sizes = part.example.default_sizes()
            described = x86_ours._stand_in(part, part.example.feeds(part.inputs, sizes, seed=0))
        traced = onnx.trace(part)
        spec = format_of(target.backend.engine).lower(
            onnx.Traced(replace(part, quantized=described), traced.program), folder, target
        )
        one = [{**asdict(end), "shape": [1 if a == "batch" else a for a in end.shape]} for end in spec.inputs]
        said = {
            "engine": spec.engine,
            "graph": Path(spec.graph).name,
            "precision": spec.precision,
            "feeds": one,
        }
        said |= {
            key: [asdict(end) for end in ends]
            for key, ends in (("inputs", spec.inputs), ("outputs", spec.outputs))
        }
        (folder / "spec.json").write_text(json.dumps(said, default=list))
    return folder, demand


_PARTS: dict[tuple[str, bool], Any] = {}


def _part(name: str, work: Path, *, fixed: bool) -> Any:
    """The network with its feeds stored for each batch; `fixed`: one sample a call."""
    if (name, fixed) in _PARTS:
        return _PARTS[name, fixed]
    part = preflight_networks.network(name)
    work.mkdir(parents=True, exist_ok=True)
    for batch in (1, 2):
        sizes = part.example.default_sizes() | {"batch": batch}
        np.savez(work / f"{name} {batch}.npz", **part.example.feeds(part.inputs, sizes, seed=0))
    if fixed:
        ends = (
            tuple(
                replace(end, shape=tuple(1 if axis == "batch" else axis for axis in end.shape))
                for end in side
            )
            for side in (part.inputs, part.outputs)
        )
        inputs, outputs = ends
        example = replace(part.example, sizes={"batch": (1,)})
        part = replace(part, inputs=inputs, outputs=outputs, example=example)
    _PARTS[name, fixed] = part
    return part


def calibrated(
    label: str, work: Path, bases: dict[str, float], apart: float
) -> tuple[Profile, dict[str, Any]]:
    """The profile of a kind, and how far it is off on the very networks it was fitted to."""
    kind, target = KINDS[label], KINDS[label].at()
    calls, sizes, rows = [], [], {}
    base = 0.0 if kind.wasm else _base(target.backend.engine, bases)
    slow = kind.wasm or target.backend.engine == "litert"
    for name in FEW if slow else preflight_networks.NAMES:
        try:
            folder, demand = lowered(name, kind, work)
        except Exception as error:
            print(f"{label}, {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        for batch in (1,) if kind.wasm else batches(name, target):
            if kind.wasm:
                got = ran(["node", WASM, SECONDS, folder])
                core, peak = got["calls"][str(folder)]["core_ms"], got["heap_bytes"]
            else:
                got = ran([sys.executable, CALL, folder, work / f"{name} {batch}.npz", SECONDS])
                core, peak = got["core_ms"], got["peak_rss_bytes"]
            mine = demand.at(batch)
            calls.append((mine, core / 1e3))
            sizes.append((mine, peak - demand.parsed))
            rows[f"{name}, {batch}"] = {"core_ms": core, "memory_bytes": peak}
    rates = fit_memory(sizes, fit(calls, kind.known), base)
    # with one part a process what a part takes and what an engine takes once it has any are not told apart: bundles say
    # it is the engine
    base, rates = base + rates.part_mib * 2**20, replace(rates, part_mib=0.0)
    table = {kind.table: rates}
    profile = replace(
        target.profile, base_mib=round(base / 2**20, 1), between_us=0.0 if kind.wasm else apart, rates=table
    )
    for (mine, _), (what, row) in zip(calls, rows.items(), strict=True):
        row["predicted_ms"] = profile.seconds(mine, kind.table, 1) * 1e3
        row["predicted_bytes"] = base + mine.parsed + profile.memory(mine, kind.table)
        print(
            f"  {label}, {what}: {_off(row['predicted_ms'], row['core_ms'])} time, "
            f"{_off(row['predicted_bytes'], row['memory_bytes'])} memory",
            flush=True,
        )
    print(f"{label}: {rates}", flush=True)
    return profile, {
        "base_mib": profile.base_mib,
        "between_us": profile.between_us,
        "rates": asdict(rates),
        "networks": rows,
    }


def between(work: Path) -> float:
    """Of the runtime for each call, in microseconds: of a bundle so small that little else is left."""
    from fewstep.model.builders import tiny_sd

    out = work / "tiny"
    if not out.exists():
        words = [
            "export",
            tiny_sd(work / "tiny-sd"),
            "--target",
            "laptop-cpu",
            "--steps",
            8,
            "--no-speed",
            "-o",
            out,
        ]
        _fewstep(words)
    return float(ran([sys.executable, CALL, out])["between_us"])


def _fewstep(words: list[Any]) -> None:
    command = [sys.executable, "-m", "fewstep.tools.cli", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _base(engine: str, known: dict[str, float]) -> float:
    if engine not in known:
        known[engine] = float(ran([sys.executable, CALL, engine])["peak_rss_bytes"])
    return known[engine]


def _off(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.0%}"


def bundle(model: str, kind: Kind, work: Path) -> Path:
    """The bundle by `fewstep export`, made unless it is there."""
    target = "laptop-cpu" if kind.wasm else kind.target  # whose graphs a browser is given
    label = f"{target} {kind.precision} {'int8' if kind.integers else 'float'}"
    out = work / "bundles" / label / model
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        recipe = out.parent / "recipe.toml"
        passes = '["quantize"]' if kind.integers else "[]"
        text = f'precision = "{kind.precision}"\nweights = "{kind.weights}"\npasses = {passes}\n'
        recipe.write_text(text + (QUICK if kind.integers else ""))
        words = ["export", ROOT / "models" / model, "--target", target, "--recipe", recipe]
        words += ["--steps", STEPS, "--no-speed", "-o", out]
        _fewstep(words)
    return out


def compared(model: str, label: str, profile: Profile, work: Path) -> dict[str, Any]:
    """One bundle: foreseen and measured."""
    kind = KINDS[label]
    target = kind.at(replace(profile, cores=1))
    drawn, plan = planned(sketched(ROOT / "models" / model), target, steps=STEPS)
    foreseen = foresee(drawn, plan, target)
    assert foreseen is not None
    path, found = bundle(model, kind, work), foreseen.forecast
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if kind.wasm:
        core, memory, stages = _in_wasm(path, found)
    else:
        with Worker(label, path, 1) as worker:
            job = Job({label: path}, ("a red apple",))
            first = worker.image("a red apple", 0, job)
            images = [worker.image("a red apple", seed, job) for seed in range(1, 1 + PICTURES)]
        core, memory = median(image["cpu"] for image in images), first["peak_rss_bytes"]
        stages = {
            k: median(image["timings"][k] for image in images)
            for k in ("text", "denoise", "decode")
            if k in first["timings"]
        }
    predicted = {
        "picture_s": found.picture_s,
        "memory_bytes": found.memory_bytes,
        "size_bytes": found.size_bytes,
        "parts_s": {name: part.calls * part.call_s for name, part in found.parts.items()},
    }
    return {
        "predicted": predicted,
        "measured": {"picture_s": core, "memory_bytes": memory, "size_bytes": size, "stages_wall_s": stages},
    }


def _in_wasm(path: Path, found: Any) -> tuple[float, int, dict[str, float]]:
    """The calls of a picture, in one heap. The JavaScript between them is not counted."""
    manifest = json.loads((path / "manifest.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        folders = {}
        for part, spec in manifest["parts"].items():
            folders[part] = folder = Path(name) / part
            folder.mkdir()
            for file in (path / spec["graph"]).parent.glob("model.onnx*"):
                (folder / file.name).symlink_to(file.resolve())
            wide = (
                2
                if part in DENOISERS
                and manifest["guidance"]["kind"] != "none"
                and manifest["guidance"]["scale"] != 1
                else 1
            )
            sizes = {"batch": wide, **_latent(manifest)}
            feeds = [
                {**end, "shape": [a if isinstance(a, int) else sizes[a] for a in end["shape"]]}
                for end in spec["inputs"]
            ]
            (folder / "spec.json").write_text(json.dumps({"graph": Path(spec["graph"]).name, "feeds": feeds}))
        got = ran(["node", WASM, SECONDS, *folders.values()])
        each = {
            part: got["calls"][str(folder)]["core_ms"] / 1e3 * found.parts[part].calls
            for part, folder in folders.items()
        }
    return sum(each.values()), got["heap_bytes"], each


def _latent(manifest: dict[str, Any]) -> dict[str, int]:
    sample = manifest["sample"]
    return {"height": sample["height"] // sample["factor"], "width": sample["width"] // sample["factor"]}


def full_size(label: str, profile: Profile) -> dict[str, Any] | None:
    """Stable Diffusion 1.5, against the images of benchmarks/x86.py."""
    kind, file = KINDS[label], RESULTS / "x86.json"
    drawn = json.loads(file.read_text())["images"].get("sd15", {}) if file.exists() else {}
    measured = drawn.get(SD15.get(label, ""))
    if measured is None:
        return None
    target = kind.at(replace(profile, cores=1))
    target = replace(
        target, recipe=replace(target.recipe, passes=("split_upsampling", *target.recipe.passes))
    )
    model, plan = planned(sketched("arch:sd15"), target, steps=4)
    foreseen = foresee(replace(model, guidance=replace(model.guidance, kind="none")), plan, target)
    assert foreseen is not None
    found = foreseen.forecast
    seconds = {name: part.call_s * (4 if name == "unet" else 1) for name, part in found.parts.items()}
    stages = {k: v["median"] for k, v in measured["stages_core_s"].items()}
    return {
        "predicted": {
            "picture_s": sum(seconds.values()),
            "memory_bytes": found.memory_bytes,
            "parts_s": seconds,
        },
        "measured": {
            "picture_s": sum(stages.values()),
            "memory_bytes": measured["peak_rss_bytes"],
            "stages_core_s": stages,
        },
    }


def table(results: dict[str, Any]) -> Iterator[str]:
    columns = ("bundle", "engine", "picture, core ms", "predicted", "off", "memory, MiB", "predicted", "off")
    yield f"| {' | '.join((*columns, 'on disk, MiB', 'off'))} |"
    yield "|---" * 10 + "|"
    for label, found in results["bundles"].items():
        for model, one in found.items():
            p, m = one["predicted"], one["measured"]
            cells = [
                f"{1e3 * m['picture_s']:.4g}",
                f"{1e3 * p['picture_s']:.4g}",
                _off(p["picture_s"], m["picture_s"]),
            ]
            cells += [
                f"{m['memory_bytes'] / 2**20:.0f}",
                f"{p['memory_bytes'] / 2**20:.0f}",
                _off(p["memory_bytes"], m["memory_bytes"]),
            ]
            disk = m.get("size_bytes")
            cells += [f"{disk / 2**20:.1f}", _off(p["size_bytes"], disk)] if disk else ["", ""]
            yield f"| {model} | {label} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, help="keep graphs and bundles here, and take those that are there"
    )
    parser.add_argument("--only", action="append", default=[], help="kinds whose name contains this")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument(
        "--keep-rates", action="store_true", help="take the rates that results/preflight.json has"
    )
    parser.add_argument("--no-wasm", action="store_true")
    args = parser.parse_args()
    file = RESULTS / "preflight.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results.pop("host", None)
    bases: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="preflight-") as name:
        work = args.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        apart = round(between(work), 1)
        for label, kind in KINDS.items():
            if (args.only and not any(part in label for part in args.only)) or (kind.wasm and args.no_wasm):
                continue
            began = time.perf_counter()
            if args.keep_rates and label in results.get("rates", {}):
                kept = results["rates"][label]
                own = kind.at().profile
                rates = {kind.table: Rates(**kept["rates"])}
                profile = replace(own, base_mib=kept["base_mib"], between_us=kept["between_us"], rates=rates)
            else:
                profile, results.setdefault("rates", {})[label] = calibrated(label, work, bases, apart)
            found = results.setdefault("bundles", {}).setdefault(label, {})
            for model in args.models:
                try:
                    found[model] = compared(model, label, profile, work)
                except Exception as error:
                    print(f"{label}, {model}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            big = full_size(label, profile)
            if big is not None:
                found["SD-1.5, 4 steps"] = big
            print(f"{label}: {time.perf_counter() - began:.0f} s", flush=True)
            save("preflight", results)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
