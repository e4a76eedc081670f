"""How close each sampler and time grid comes to 1,000 steps on emoji-64, by network calls, and what the scorer says.

    python benchmarks/sampler_quality.py BUNDLE [--guidance 1 5] [--calls 4 6 10 20] [--captions 32] [--work DIR]
    python benchmarks/sampler_quality.py BUNDLE --own --guidance 1      # the bundle's own plans alone
    python benchmarks/sampler_quality.py BUNDLE --retrieval dpmpp_2m/auto/6 learned-6 --guidance 3

RMSE is of latents, PSNR of decoded pictures, both against dpmpp_2m with 1,000 steps from the same noise; the references
stay in --work. Retrieval is the share of the 255 core captions whose picture the scorer (models/emoji-64-scorer, never
used in training) ranks first, or in the first five, among all captions; it takes sampler/grid/calls, or the name of a
plan of the bundle.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save

from fewstep.runtime import Pipeline, Plan
from fewstep.runtime.errors import PlanError
from fewstep.tools.features import Scorer, open_scorer
from fewstep.tools.samplers import within

CAPTIONS = Path(__file__).parents[1] / "models/emoji-64-scorer/captions.json"

SAMPLERS = ("ddim", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m_exact", "unipc", "unipc_3", "ipndm", "heun")
GRIDS = ("trailing", "logsnr", "karras", "ays_sd15", "ays_sdxl")
REFERENCE_STEPS = 1000
SEED = 5000
BATCH = 32


def core() -> list[str]:
    rows = json.loads(CAPTIONS.read_text(encoding="utf-8"))
    return [row["caption"] for row in rows if row.get("core")]


def spread(captions: list[str], count: int) -> list[str]:
    """Evenly over the list."""
    return [captions[i] for i in np.unique(np.linspace(0, len(captions) - 1, count).astype(int))]


def latents(pipeline: Pipeline, prompts: list[str], table: Plan | None, guidance: float, **how: Any) -> Any:
    out = [
        pipeline(
            prompts[i : i + BATCH],
            guidance_scale=guidance,
            plan=table,
            seed=SEED + i,
            output_type="latent",
            **how,
        )
        for i in range(0, len(prompts), BATCH)
    ]
    return np.concatenate([o.images for o in out])


def reference(pipeline: Pipeline, prompts: list[str], guidance: float, work: Path) -> Any:
    """dpmpp_2m with 1,000 steps, kept on disk: it costs more than everything else together."""
    key = json.dumps([pipeline.manifest.name, prompts, guidance, SEED, REFERENCE_STEPS])
    path = work / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        how = {"num_inference_steps": REFERENCE_STEPS, "sampler": "dpmpp_2m"}
        work.mkdir(parents=True, exist_ok=True)
        np.save(path, latents(pipeline, prompts, None, guidance, **how))
    return np.load(path)


def plans(pipeline: Pipeline, args: argparse.Namespace) -> Iterator[tuple[str, str, Plan]]:
    """(sampler, grid, plan) of everything that is measured."""
    for name in pipeline.manifest.plans:
        if name != "default":
            yield name, "", pipeline.plan(name=name)
    for calls in [] if args.own else args.calls:
        for sampler in SAMPLERS:
            for grid in GRIDS:
                table = within(calls, sampler, lambda name, n: pipeline.plan(n, name, grid))  # noqa: B023
                if table is not None:
                    yield sampler, grid, table


def sweep(pipeline: Pipeline, prompts: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for guidance in args.guidance:
        exact = reference(pipeline, prompts, guidance, args.work)
        pictures = pipeline.decode(exact)
        for sampler, grid, table in plans(pipeline, args):
            found = latents(pipeline, prompts, table, guidance)
            rmse = float(np.sqrt(np.mean((found - exact) ** 2)))
            mse = float(np.mean((pipeline.decode(found) - pictures) ** 2))
            key = {"guidance": guidance, "calls": len(table.calls), "sampler": sampler, "times": grid}
            yield {**key, "rmse": rmse, "psnr_db": 10 * np.log10(1 / mse)}


def merged(name: str, rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows with those of earlier runs that they do not replace."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    found = {tuple(row[key] for key in keys): row for row in [*old, *rows]}
    return [found[key] for key in sorted(found)]


def retrieval(pipeline: Pipeline, scorer: Scorer, what: str, guidance: float) -> dict[str, Any]:
    if "/" in what:
        sampler, grid, calls = what.split("/")
        table = within(int(calls), sampler, lambda name, n: pipeline.plan(n, name, grid))
    else:
        table = pipeline.plan(name=what)
    if table is None:
        raise PlanError(f"no plan {what}", expected="sampler/grid/calls or a plan of the bundle")
    prompts = core()
    images = pipeline.decode(latents(pipeline, prompts, table, guidance))
    ranks = np.array([scorer.rank(picture, prompt) for picture, prompt in zip(images, prompts, strict=True)])
    shares = {"first": float(np.mean(ranks == 0)), "first_five": float(np.mean(ranks < 5))}
    return {"plan": what, "guidance": guidance, "calls": len(table.calls), "captions": len(prompts), **shares}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 5.0])
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 5, 6, 8, 10, 15, 20])
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--own", action="store_true", help="measure the bundle's own plans alone")
    parser.add_argument("--retrieval", nargs="+", metavar="PLAN")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fewstep-sampler-quality")
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.bundle)
    rows = []
    if args.retrieval:
        folder = args.work / "scorer"
        if not folder.exists():
            script = Path(__file__).parents[1] / "models/train/export_scorer.py"
            subprocess.run([sys.executable, str(script), str(folder)], check=True)
        scorer = open_scorer(folder)
        for guidance in args.guidance:
            for what in args.retrieval:
                rows.append(retrieval(pipeline, scorer, what, guidance))
                print(json.dumps(rows[-1]), flush=True)
        save("sampler-retrieval", {"rows": merged("sampler-retrieval", rows, ("guidance", "calls", "plan"))})
        return
    prompts = spread(core(), args.captions)
    for row in sweep(pipeline, prompts, args):
        rows.append(row)
        label = f"{row['sampler']}/{row['times']}" if row["times"] else row["sampler"]
        figures = f"{row['rmse']:.4f}  {row['psnr_db']:.2f} dB"
        print(f"g {row['guidance']:g}  {row['calls']:2} calls  {label:26} {figures}", flush=True)
    rows = merged("sampler-quality", rows, ("guidance", "calls", "sampler", "times"))
    about = {"captions": len(prompts), "reference": f"dpmpp_2m, {REFERENCE_STEPS} steps"}
    save("sampler-quality", {**about, "rows": rows})


if __name__ == "__main__":
    main()
