"""emoji-64 with a smaller denoiser beside its own: what is recognised, and what it costs.

    python benchmarks/stitching.py SMALL_MODEL [--shares 0 0.4 1] [--steps 20] [--rest]
    python benchmarks/stitching.py SMALL_MODEL --speed
    python benchmarks/stitching.py STUDENT --route [--rate 0.3]

The first: the small model draws a share of the calls (T-Stitch, arXiv:2402.14167), guided, by DPM-Solver++ 2M; --rest
adds the same share with a solver that forgets what the small network said. The second: a few-step student draws all
pictures; those that a score judges worst, a share of `rate`, are noised half-way and drawn on by the teacher
(AdaptiveTS, arXiv:2312.10835). The score is the likeness of picture and caption by a network that took no part in any
training, and it is the judge of the share too: the gain is what a perfect oracle would have, not what a user would see.
255 core captions; torch in bfloat16 (the decoder in float32), one thread; intervals are Wilson's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, save
from students import BATCH, TEACHER, embedded, judge, pictures, reference, sharpness, trainers

from fewstep.export.plans import plan_of
from fewstep.export.quality import frechet_distance, share_interval
from fewstep.model import Model, load
from fewstep.model.pairs import with_small
from fewstep.model.training.samples import in_precision
from fewstep.model.trajectories import trajectories
from fewstep.runtime.plan import Plan, plan
from fewstep.runtime.two_graphs import cutoff_for_rate, refining, stitched

SAMPLER = "dpmpp_2m"
REFINING = 4
ROUNDS = 5


def pair(small: Path) -> Model:
    return with_small(in_precision(load(TEACHER), "bfloat16"), in_precision(load(small), "bfloat16"))


def drawn(model: Model, table: Plan, captions: list[str], guidance: float | None = None) -> tuple[Any, float]:
    """Latents, and core milliseconds a latent."""
    began = time.process_time()
    runs = trajectories(
        model, table, range(len(captions)), prompts=captions, guidance=guidance, batch=BATCH, calls=False
    )
    latents = np.concatenate([run.latent for run in runs])
    return latents, 1000 * (time.process_time() - began) / len(captions)


def shown(ranks: Any, seen: torch.Tensor) -> dict[str, Any]:
    """As students.recognised has them."""
    theirs, laplacian = reference()
    first = int((ranks < 1).sum())
    low, high = share_interval(first, len(ranks))
    return {
        "recognised": round(first / len(ranks), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "frechet": round(frechet_distance(theirs, embedded(seen)), 4),
        "sharpness": round(sharpness(seen) / laplacian, 3),
    }


def stitch(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    scorer, _ = trainers()
    model = pair(args.small)
    rows, network, captions = judge()
    core = [i for i, row in enumerate(rows) if row["core"]]
    whole = plan(SAMPLER, args.steps, model.process, prediction=model.prediction, grid=model.grid)
    times = [call.t for call in whole.calls] + [0.0]
    for share in args.shares:
        tables = {"kept": stitched(whole, share)}
        count = sum(call.graph == "small" for call in tables["kept"].calls)
        if args.rest and 0 < count < args.steps:
            rest = plan(
                SAMPLER, args.steps - count, model.process, times[count:], prediction=model.prediction
            )
            tables["anew"] = stitched(whole, share, rest=rest)
        for history, table in tables.items():
            latents, spent = drawn(model, table, [rows[i]["caption"] for i in core])
            seen = pictures(model, latents)
            ranks = scorer.ranks(network, captions, seen, torch.tensor(core))
            row = {"small": str(args.small), "share": share, "history": history, "steps": args.steps}
            yield row | {**shown(ranks, seen), "latent_core_ms": round(spent, 1)}


def speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Core milliseconds a latent by share, in turns, since other work on this host slows whatever runs beside it."""
    model, (rows, *_) = pair(args.small), judge()
    words = [row["caption"] for row in rows[:BATCH]]
    whole = plan(SAMPLER, 5, model.process, prediction=model.prediction, grid=model.grid)
    drawn(model, stitched(whole, 0.4), words)  # both networks once
    turns = [[drawn(model, stitched(whole, s), words)[1] for s in args.shares] for _ in range(ROUNDS)]
    for share, spent in zip(args.shares, np.array(turns).T, strict=True):
        ratio = spent / np.array(turns)[:, 0]
        row = {
            "small": str(args.small),
            "share": share,
            "steps": 5,
            "ratio": round(float(np.median(ratio)), 3),
        }
        yield row | {"ratios": [round(float(r), 3) for r in ratio], "core_ms": np.round(spent, 1).tolist()}


def route(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    scorer, _ = trainers()
    model, student = in_precision(load(TEACHER), "bfloat16"), load(args.small)
    rows, network, captions = judge()
    core = torch.tensor([i for i, row in enumerate(rows) if row["core"]])
    words = [rows[i]["caption"] for i in core]
    quick = plan_of(student, "model", student.steps or args.steps)
    latents, student_ms = drawn(in_precision(student, "bfloat16"), quick, words)
    seen = pictures(model, latents)
    with torch.no_grad():
        texts = network.embed_tokens(torch.from_numpy(scorer.tokenizer.encode(words).astype(np.int64)))
        scores = (network.embed_images(seen) * texts).sum(1).numpy()
    before = scorer.ranks(network, captions, seen, core)
    bad = np.flatnonzero(scores < cutoff_for_rate(scores.tolist(), args.rate))
    table = refining("dpmpp_2m", REFINING, model.process, prediction=model.prediction, grid=model.grid)
    refined, teacher_ms = refine(model, table, latents[bad], [words[i] for i in bad])
    latents[bad] = refined
    mended = pictures(model, latents)
    after = scorer.ranks(network, captions, mended, core)
    for name, ranks, drew, rate in (
        ("student", before, seen, 0.0),
        ("routed", after, mended, args.rate),
    ):
        row = {"small": str(args.small), "what": name, "steps": quick.steps, "rate": rate}
        row |= shown(ranks, drew)
        yield row | {"latent_core_ms": round(student_ms + rate * teacher_ms, 1)}


def refine(model: Model, table: Plan, latents: Any, words: list[str]) -> tuple[Any, float]:
    """The teacher from given latents on: what Pipeline does with `image` and a plan, on the torch module."""
    from fewstep.model.trajectories import conditions_of, run_part
    from fewstep.runtime.denoiser import Denoiser
    from fewstep.runtime.manifest import PartSpec
    from fewstep.runtime.noise import Noise
    from fewstep.runtime.two_graphs import FRESH

    part = model.parts[model.denoiser]

    class Torch:
        def run(self, feeds: Any, outputs: Any = None) -> Any:
            return run_part(part, feeds)

        def close(self) -> None:
            pass

    spec, done, began = PartSpec("torch", "", part.inputs, part.outputs), [], time.process_time()
    for begin in range(0, len(words), BATCH):
        x0 = latents[begin : begin + BATCH]
        condition, nothing = conditions_of(model, words[begin : begin + BATCH])
        assert nothing is not None
        empty = {name: np.repeat(array, len(x0), axis=0) for name, array in nothing.items()}
        noise = np.stack([Noise(FRESH + begin + i).randn(x0.shape[1:]) for i in range(len(x0))])
        denoise = Denoiser(Torch(), spec, condition, empty, model.guidance.scale)
        *_, last = table.run(denoise, table.start(noise, (x0,)), given=(x0,))
        done.append(last.x)
    return np.concatenate(done), 1000 * (time.process_time() - began) / len(words)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("small", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.4, 1.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rest", action="store_true")
    parser.add_argument("--route", action="store_true")
    parser.add_argument("--speed", action="store_true", help="by the first of the shares, in turns")
    parser.add_argument("--rate", type=float, default=0.3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    work, name = stitch, "stitching"
    if args.route or args.speed:
        work, name = (route, "routing") if args.route else (speed, "stitching_speed")
    file = RESULTS / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for row in work(args):
        print(json.dumps(row), flush=True)
        rows.append(row)  # each takes minutes
        save(name, {"command": "python benchmarks/stitching.py " + " ".join(sys.argv[1:]), "rows": rows})


if __name__ == "__main__":
    main()
