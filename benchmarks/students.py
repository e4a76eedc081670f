"""Pruned and few-step students of emoji-64: the share of pictures that are recognised, and what they cost.

    python benchmarks/students.py share FOLDER[:STEPS[:GUIDANCE]] ... [--sampler NAME] [--seeds 2]
    python benchmarks/students.py baselines [--seeds 2]

Recognised: the scorer of models/emoji-64-scorer, which took no part in any training, ranks the caption a picture was
drawn from first among all 1,355. 255 core captions, `seeds` noises each, torch in bfloat16 (the decoder in float32),
one thread; intervals are Wilson's. Blurred pictures are recognised, too, the teacher's in one unguided call at 98 %:
the share alone tells students badly apart. Beside it: the Frechet distance of the scorer's embeddings to those of
1,020 pictures the teacher drew from other noise (16 steps of DPM-Solver++(2M), guided), `frechet`, to compare at equal
numbers of pictures with the teacher's own; and `sharpness`, the mean square of the Laplacian over that of those.

`share` draws with each folder's own scheduler, `baselines` the teacher at few calls with every sampler that could be
best there, guided (two calls a step) and not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, from_models, save

from fewstep.export.plans import plan_of
from fewstep.export.quality import frechet_distance, share_interval
from fewstep.model import Model, load
from fewstep.model.training import Latents, prepare_samples
from fewstep.model.training.samples import in_precision
from fewstep.model.trajectories import trajectories
from fewstep.runtime.plan import plan

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "models" / "emoji-64"
STORE = Path(tempfile.gettempdir()) / "fewstep-students"
"""Where the reference's latents are kept: 2 core minutes."""
BATCH = 32
SAMPLERS = ("ddim", "dpmpp_2m", "unipc")
CALLS = (1, 2, 4, 8)


def recognised(
    model: Model, steps: int, guidance: float | None = None, sampler: str = "model", seeds: int = 1
) -> dict[str, Any]:
    """Share of pictures ranked first, and in the first five."""
    scorer, _ = trainers()
    rows, network, captions = judge()
    core = [i for i, row in enumerate(rows) if row["core"]] * seeds
    if sampler == "model":
        way = plan_of(model, "model", steps)
    else:
        way = plan(sampler, steps, model.process, prediction=model.prediction, grid=model.grid)
    began = time.process_time()
    drawn = trajectories(
        in_precision(model, "bfloat16"),
        way,
        range(len(core)),
        prompts=[rows[i]["caption"] for i in core],
        guidance=guidance,
        batch=BATCH,
        calls=False,
    )
    latents = np.concatenate([one.latent for one in drawn])
    spent = time.process_time() - began
    drawn_pictures = pictures(model, latents)
    ranks = scorer.ranks(network, captions, drawn_pictures, torch.tensor(core))
    theirs, laplacian = reference()
    first = int((ranks < 1).sum())
    low, high = share_interval(first, len(core))
    return {
        "steps": steps,
        "sampler": way.sampler,
        "guidance": model.guidance.scale if guidance is None else guidance,
        "share": round(first / len(core), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "top5": round(int((ranks < 5).sum()) / len(core), 4),
        "frechet": round(frechet_distance(theirs, embedded(drawn_pictures)), 4),
        "sharpness": round(sharpness(drawn_pictures) / laplacian, 3),
        "pictures": len(core),
        "latent_core_ms": round(1000 * spent / len(core), 2),
    }


def trainers() -> tuple[Any, Any]:
    """models/train's scorer and render."""
    return from_models("scorer", "train"), from_models("render", "train")


@cache
def judge() -> tuple[list[dict[str, Any]], Any, Any]:
    scorer, _ = trainers()
    rows = json.loads((ROOT / "models" / "emoji-64-scorer" / "captions.json").read_text())
    return rows, *scorer.load()


@cache
def reference() -> tuple[Any, float]:
    """Embeddings of the teacher's pictures of the core captions from other noise, and their sharpness."""
    rows, _, _ = judge()
    teacher = load(TEACHER)
    core = tuple(row["caption"] for row in rows if row["core"])
    work = prepare_samples(teacher, Latents(number=4 * len(core), prompts=core), STORE)
    while True:
        try:
            next(work)
        except StopIteration as end:
            drawn = pictures(teacher, end.value.latents)
            return embedded(drawn), sharpness(drawn)


@torch.no_grad()
def embedded(images: torch.Tensor) -> Any:
    _, network, _ = judge()
    return torch.cat([network.embed_images(part) for part in images.split(256)]).double().numpy()


@torch.no_grad()
def sharpness(images: torch.Tensor) -> float:
    """Mean square of the discrete Laplacian of the grey picture."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return float(torch.nn.functional.conv2d(images.mean(1, keepdim=True), kernel).square().mean())


@torch.no_grad()
def pictures(model: Model, latents: Any) -> torch.Tensor:
    _, render = trainers()
    decoder, sample = model.parts["vae_decoder"].module, model.sample
    found = []
    for begin in range(0, len(latents), BATCH):
        seen = latents[begin : begin + BATCH] / sample.scaling_factor + sample.shift_factor
        drawn = decoder(torch.from_numpy(seen).float())
        found.append(((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return torch.from_numpy(render.as_model_input(np.concatenate(found)))


def share(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for what in args.folders:
        name, _, rest = what.partition(":")
        steps, _, guidance = rest.partition(":")
        model = load(Path(name))
        count = int(steps or model.steps or 50)
        row = {"model": name, "parameters": model.parts[model.denoiser].parameters()}
        row |= recognised(model, count, float(guidance) if guidance else None, args.sampler, args.seeds)
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def baselines(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The teacher alone: 50 guided steps, then as few calls as students make."""
    model = load(TEACHER)
    found = [{"calls": 100, **recognised(model, 50, seeds=args.seeds)}]
    print(json.dumps(found[0]), flush=True)
    for calls in CALLS:
        for sampler in SAMPLERS:
            for scale, each in ((1.0, 1), (model.guidance.scale, 2)):
                a_step = each * (2 if sampler == "heun" else 1)
                if calls % a_step:
                    continue
                row = {"calls": calls, **recognised(model, calls // a_step, scale, sampler, args.seeds)}
                found.append(row)
                print(json.dumps(row), flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("share", "baselines"))
    parser.add_argument("folders", nargs="*", metavar="FOLDER[:STEPS[:GUIDANCE]]")
    parser.add_argument("--sampler", default="model")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--save", metavar="NAME", help="append to benchmarks/results/NAME.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = share(args) if args.what == "share" else baselines(args)
    name = args.save or ("students_baselines" if args.what == "baselines" else "")
    if name:
        file = RESULTS / f"{name}.json"
        before = json.loads(file.read_text())["rows"] if file.exists() and args.what == "share" else []
        save(
            name,
            {"command": "python benchmarks/students.py " + " ".join(sys.argv[1:]), "rows": [*before, *rows]},
        )


if __name__ == "__main__":
    main()
