"""What cutting blocks costs and saves: criteria at equal ratio on emoji-64, BK-SDM's cuts of the SD-1.5 architecture.

    python benchmarks/pruning.py criteria [--ratio 0.5] [--steps 8] [--samples 8] [--store DIR]
    python benchmarks/pruning.py sd15 [--rounds 2]     # 8 GB of memory, minutes

criteria  error of final latents of held-out seeds, against the whole model's, before training; chance: three draws
sd15      parameters, multiplications, bytes in float16 and core seconds of a U-Net call at 512x512 in torch float32,
          whole and cut in turns; predicted from the multiplications alone
Writes results/pruning_criteria.json and results/pruning_sd15.json.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import save, spread

from fewstep.export.plans import plan_of
from fewstep.model import Context, Model, load
from fewstep.model.save import save_folder
from fewstep.model.trajectories import run_part
from fewstep.prune.criteria import final_latents, latent_distance, paired_distance
from fewstep.prune.cut_blocks import CutBlocks
from fewstep.prune.flops import multiplications
from fewstep.targets import load_target

ROOT = Path(__file__).parents[1]
HELD_OUT = 3_000_000
"""The first seed cuts are judged on; criteria look at others."""
PUBLISHED_M = {"bk_sdm_base": 579.4, "bk_sdm_small": 482.3, "bk_sdm_tiny": 323.4}
"""Millions of parameters of the U-Nets (Kim et al. 2023, arXiv:2305.15798, table 1; 859.5 before)."""


def finished(work: Any) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def criteria(args: argparse.Namespace) -> None:
    model = load(ROOT / "models/emoji-64")
    plan = plan_of(model, "model", args.steps)
    with tempfile.TemporaryDirectory() as scratch:
        store = args.store or Path(scratch)
        context = Context(load_target("laptop-cpu"), plan, Path(scratch), store)
        seeds = range(HELD_OUT, HELD_OUT + 2 * args.samples)
        right = final_latents(model, plan, seeds)
        job = CutBlocks(ratio=args.ratio, samples=args.samples)
        jobs = {
            name: replace(job, criterion=name) for name in ("laptop", "ld_pruner", "by_hand", "magnitude")
        }
        jobs |= {f"random, draw {seed}": replace(job, criterion="random", seed=seed) for seed in range(3)}
        rows = {}
        for name, each in jobs.items():
            began = time.process_time()
            smaller: Model = finished(each(model, context))
            spent = time.process_time() - began
            moved = final_latents(smaller, plan, seeds)
            record = smaller.history[-1]
            rows[name] = {
                "parameters_left": record["parameters"][1] / record["parameters"][0],
                "multiplications_left": record["multiplications"][1] / record["multiplications"][0],
                "final_db": -10 * math.log10(paired_distance(right, moved)),
                "latent_distance": latent_distance(right, moved),
                "scoring_core_s": spent,
                **{key: record.get(key) for key in ("removed", "predicted", "measured")},
            }
            print(
                f"{name:18} {rows[name]['parameters_left']:.3f} of parameters {rows[name]['final_db']:6.2f} dB"
            )
        save(
            "pruning_criteria", {"ratio": args.ratio, "steps": args.steps, "seeds": len(seeds), "rows": rows}
        )


def sd15(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    model = load("arch:sd15")
    part = model.parts["unet"]
    feeds = part.example.feeds(part.inputs, part.example.default_sizes() | {"batch": 1}, seed=0)
    whole = multiplications(part)
    plan = plan_of(model, "model", 4)
    rows: dict[str, Any] = {}
    run_part(part, feeds)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(load_target("laptop-cpu"), plan, Path(scratch), Path(scratch))
        for name, published in PUBLISHED_M.items():
            smaller: Model = finished(CutBlocks(criterion=name)(model, context))
            cut = smaller.parts["unet"]
            row: dict[str, Any] = {
                "parameters_m": cut.parameters() / 1e6,
                "published_m": published,
                "parameters_ratio": cut.parameters() / part.parameters(),
                "multiplications_ratio": multiplications(cut) / whole,
            }
            print(name, row, flush=True)
            assert round(cut.parameters() / 1e6, 1) == published
            times: dict[str, list[float]] = {"before": [], "after": []}
            run_part(cut, feeds)
            for _ in range(args.rounds):
                for side, each in (("before", part), ("after", cut)):
                    began = time.process_time()
                    run_part(each, feeds)
                    times[side].append(time.process_time() - began)
            row |= {f"{side}_core_s": spread(values) for side, values in times.items()}
            row["measured_ratio"] = row["after_core_s"]["median"] / row["before_core_s"]["median"]
            row["measured_over_predicted"] = row["measured_ratio"] / row["multiplications_ratio"]
            folder = save_folder(smaller, Path(scratch) / name)
            row["unet_bytes"] = sum(file.stat().st_size for file in (folder / "unet").iterdir())
            row["size_ratio"] = row["unet_bytes"] / (2 * part.parameters())
            shutil.rmtree(folder)
            rows[name] = row
            print(name, row, flush=True)
            del smaller, cut
    result = {"parameters_m": part.parameters() / 1e6, "multiplications": whole, "cuts": rows}
    save("pruning_sd15", result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("criteria")
    one.add_argument("--ratio", type=float, default=0.5)
    one.add_argument("--steps", type=int, default=8)
    one.add_argument("--samples", type=int, default=8)
    one.add_argument("--store", type=Path)
    one.set_defaults(run=criteria)
    two = commands.add_parser("sd15")
    two.add_argument("--rounds", type=int, default=2)
    two.set_defaults(run=sd15)
    chosen = parser.parse_args()
    chosen.run(chosen)
