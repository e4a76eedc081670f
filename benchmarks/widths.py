"""Narrower layers and zeros in emoji-64's U-Net: what they cost in its latents and gain on ONNX Runtime.

    .venv/bin/python benchmarks/widths.py quality    error of final latents by criterion, with and without the refit
    .venv/bin/python benchmarks/widths.py speed      time of one call against the uncut U-Net's, in turns
    .venv/bin/python benchmarks/widths.py sparse     gradual pruning and regrowth after a short training

No training but in `sparse`. Error: 10 log10 of the latents' power over the squared difference to the uncut model's, of
16 prompts at 8 steps of the plan that ships, guidance 3.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save

from fewstep.export import onnx as lowering
from fewstep.export.plans import plan_of
from fewstep.model import Context, load
from fewstep.model.structure import network_of
from fewstep.model.training import Latents, Training
from fewstep.model.trajectories import trajectories
from fewstep.prune.flops import multiplications
from fewstep.prune.importance import ADDITIVE, CRITERIA, SEEDS, importance
from fewstep.prune.masks import magnitude_mask, n_of_m_mask
from fewstep.prune.ranking import choose, comparable
from fewstep.prune.refit import eliminate, fold, moments
from fewstep.prune.sparsify import Pattern, Sparsify, sparse_layers, zipped_bytes
from fewstep.prune.width_groups import find_groups
from fewstep.prune.widths import CutWidths, narrowed
from fewstep.targets import load_target

MODEL = Path(__file__).parents[1] / "models" / "emoji-64"
SAMPLES = 16
RATIOS = (0.1, 0.25, 0.5)


def result(work: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


class Bench:
    """The model, its latents, and how far others are from them."""

    def __init__(self, store: Path) -> None:
        self.model = load(MODEL)
        self.plan = plan_of(self.model, "auto", 8)
        self.ctx = Context(load_target("laptop-cpu"), self.plan, store, store)
        self.part = self.model.parts["unet"]
        self.right = self.latents(self.model)

    def latents(self, model: Any) -> np.ndarray[Any, Any]:
        prompts = self.model.prompts[:SAMPLES]
        runs = trajectories(model, self.plan, range(SAMPLES), prompts=prompts, batch=SAMPLES)
        return np.concatenate([run.latent for run in runs])

    def db(self, part: Any) -> float:
        found = self.latents(replace(self.model, parts={**self.model.parts, "unet": part}))
        error = float(np.mean((found - self.right) ** 2))
        return round(10 * float(np.log10(np.mean(self.right**2) / max(error, 1e-30))), 2)


def quality(bench: Bench, criteria: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """rows: of criteria that an earlier run measured."""
    part, network = bench.part, network_of(bench.part)
    groups = find_groups(network)
    saved = {group.name: float(group.weights) for group in groups}
    total, work = part.parameters(), multiplications(part)
    seen = result(moments(bench.model, network, groups, bench.plan, range(SEEDS, SEEDS + SAMPLES), 4))
    rows = [row for row in rows if row["criterion"].partition(",")[0] not in criteria]
    for criterion in criteria:
        file = bench.ctx.store / f"{criterion}.safetensors"
        begun = time.perf_counter()
        scores = result(importance(bench.model, network, groups, criterion, bench.plan, SAMPLES, 0, file))
        seconds = time.perf_counter() - begun
        if criterion not in ADDITIVE:
            scores = comparable(scores)
        tried = {(criterion, False): scores, (criterion, True): scores}
        if criterion in ADDITIVE:
            begun = time.perf_counter()
            tried[f"{criterion}, one by one", True] = {
                g.name: eliminate(g, scores[g.name], seen[g.name], g.widths_kept(8, 0.25)[-1]) for g in groups
            }
            print(f"elimination {time.perf_counter() - begun:.1f} s")
        for (name, refit), values in tried.items():
            for ratio in RATIOS:
                kept = choose(groups, values, saved, ratio * total, floor=0.25, round_to=8)
                inner = copy.deepcopy(network)
                for group in groups if refit else []:
                    fold(inner, group, kept[group.name], seen[group.name])
                smaller = narrowed(part, inner, groups, kept)
                row = {
                    "criterion": name,
                    "refit": refit,
                    "ratio": ratio,
                    "parameters": round(smaller.parameters() / total, 4),
                    "multiplications": round(multiplications(smaller) / work, 4),
                    "latents_db": bench.db(smaller),
                    "importance_s": round(seconds, 1),
                }
                rows.append(row)
                print(row, flush=True)
    return {"rows": rows}


def speed(bench: Bench) -> dict[str, Any]:
    """Every variant exported, then one call of each in turns, one thread, batch 2 as guidance needs it."""
    import onnxruntime

    variants = {"uncut": bench.part}
    for ratio, round_to in ((0.25, 8), (0.5, 8), (0.5, 1)):
        job = CutWidths(ratio=ratio, round_to=round_to, criterion="magnitude", refit=False)
        variants[f"{ratio:.0%} gone, multiples of {round_to}"] = result(job(bench.model, bench.ctx)).parts[
            "unet"
        ]
    module = copy.deepcopy(bench.part.module)
    for layer in sparse_layers(module, Pattern())[0]:
        weight = module.get_parameter(layer)
        weight.data *= magnitude_mask(weight, 0.8)
    variants["80 % zeros"] = replace(bench.part, module=module)
    sessions, times = {}, {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    feeds = {
        "sample": np.random.default_rng(0).standard_normal((2, 4, 16, 16)).astype(np.float32),
        "timestep": np.array([500.0, 500.0], np.float32),
        "encoder_hidden_states": np.random.default_rng(1).standard_normal((2, 32, 192)).astype(np.float32),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, part in variants.items():
            lowering.write(lowering.trace(part), Path(folder), opset=23)
            sessions[name] = onnxruntime.InferenceSession(
                str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
            print("exported", name, flush=True)
    kinds = {i.name: i.type for i in sessions["uncut"].get_inputs()}
    if "int64" in kinds["timestep"]:
        feeds["timestep"] = feeds["timestep"].astype(np.int64)
    for turn in range(50):
        for name, session in sessions.items():
            begun = time.process_time()
            session.run(None, feeds)
            if turn >= 10:
                times.setdefault(name, []).append(time.process_time() - begun)
    base = statistics.median(times["uncut"])
    work = multiplications(bench.part)
    rows = []
    for name, part in variants.items():
        row = {
            "variant": name,
            "core_ms": round(1000 * statistics.median(times[name]), 3),
            "time": round(statistics.median(times[name]) / base, 3),
            "least": round(min(times[name]) / min(times["uncut"]), 3),
            "multiplications": round(multiplications(part) / work, 4),
            "parameters": round(part.parameters() / bench.part.parameters(), 4),
            "zipped_bytes": zipped_bytes(part.module),
        }
        rows.append(row)
        print(row, flush=True)
    return {"rows": rows}


def sparse(bench: Bench, steps: int) -> dict[str, Any]:
    rows = []
    for method, pattern, sparsity in (("gmp", "1x1", 0.8), ("granet", "1x1", 0.8), ("gmp", "2:4", 0.5)):
        module = copy.deepcopy(bench.part.module)
        for layer in sparse_layers(module, Pattern.of(pattern))[0]:
            weight = module.get_parameter(layer)
            weight.data *= n_of_m_mask(weight, 2, 4) if ":" in pattern else magnitude_mask(weight, sparsity)
        job = Sparsify(
            method,
            sparsity,
            pattern,
            every=max(1, steps // 16),
            latents=Latents(number=256),
            training=Training(steps=steps, batch=16, rate=3e-4, warm=10),
        )
        begun = time.perf_counter()
        done = result(job(bench.model, bench.ctx))
        row = {
            "method": method,
            "pattern": pattern,
            "sparsity": sparsity,
            "steps": steps,
            "at_once_db": bench.db(replace(bench.part, module=module)),
            "latents_db": bench.db(done.parts["unet"]),
            "zipped_bytes": done.history[-1]["zipped_bytes"],
            "seconds": round(time.perf_counter() - begun),
        }
        rows.append(row)
        print(row, flush=True)
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("quality", "speed", "sparse"))
    parser.add_argument("--steps", type=int, default=200, help="of the training in sparse")
    parser.add_argument(
        "--criteria", nargs="+", choices=CRITERIA, help="only these in quality; others are kept"
    )
    chosen = parser.parse_args()
    kept = []
    if chosen.what == "quality" and chosen.criteria and (file := RESULTS / "widths_quality.json").exists():
        kept = json.loads(file.read_text())["rows"]
    with tempfile.TemporaryDirectory() as store:
        bench = Bench(Path(store))
        found = {
            "quality": lambda: quality(bench, chosen.criteria or list(CRITERIA), kept),
            "speed": lambda: speed(bench),
            "sparse": lambda: sparse(bench, chosen.steps),
        }[chosen.what]()
    save(f"widths_{chosen.what}", found)


if __name__ == "__main__":
    main()
