"""Samplers, grids and learned plans against the exact probability flow of a Gaussian mixture.

    python benchmarks/mixture.py [--calls 4 5 6 8 10 15 20] [--starts 32 64 128] [--diffusers]

Eight Gaussians in 16 dimensions, noised with Stable Diffusion's betas: the ideal denoiser is a formula, and the flow is
solved by 4,000 Runge-Kutta steps from 256 starts. Every figure is the RMS error over those starts (learned plans: over
the ones they were not fitted on) after a number of network calls. --diffusers measures diffusers' schedulers again;
otherwise its figures are the ones recorded in results/mixture.json by the last run that did.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save

from fewstep.runtime import SAMPLERS, DiscreteVP, Plan, plan
from fewstep.runtime.errors import PlanError
from fewstep.runtime.times import GRIDS
from fewstep.tools.samplers import within
from fewstep.tune.fit import GUIDES, begin, fit
from fewstep.tune.learned import Coordinates, table_of
from fewstep.tune.methods import METHODS
from fewstep.tune.problem import Problem, long_run
from fewstep.tune.search import Found, Search

PROCESS = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)  # Stable Diffusion 1.x
SEED, DIMENSIONS, COMPONENTS, STARTS = 20261120, 16, 8, 256
CLOSE = 1.1
"""A default within a tenth of the best needs no searching for."""
SEARCHED = (6, 10)
"""Numbers of calls at which the other searches are run too."""
LONG_HISTORY = 10
"""Up to so many calls a learned plan may use every earlier prediction; beyond, five."""


@dataclass(frozen=True)
class Mixture:
    means: Any
    variances: Any
    weights: Any

    def x0(self, x: Any, alpha: float, sigma: float) -> Any:
        """E[x0 | alpha x0 + sigma noise = x]"""
        v = alpha**2 * self.variances + sigma**2
        distance = (x**2).sum(1)[:, None] - 2 * alpha * x @ self.means.T
        distance += alpha**2 * (self.means**2).sum(1)
        log_p = np.log(self.weights) - 0.5 * x.shape[1] * np.log(v) - 0.5 * distance / v
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gain = alpha * self.variances / v
        return (p * (1 - alpha * gain)) @ self.means + (p @ gain)[:, None] * x

    def flow(self, noise: Any) -> Any:
        """Where the probability flow takes the noise: x / alpha by classical Runge-Kutta in log(sigma / alpha)."""
        first = -float(np.log(PROCESS.alpha(1000.0) / PROCESS.sigma(1000.0)))
        c = np.exp(np.linspace(first, np.log(1e-4), 4001))

        def slope(y: Any, c: float) -> Any:
            alpha = 1 / np.sqrt(1 + c * c)
            return (y - self.x0(alpha * y, alpha, alpha * c)) / c

        y = noise * np.sqrt(1 + c[0] ** 2)
        for a, b in pairwise(c):
            h = b - a
            k1 = slope(y, a)
            k2 = slope(y + h / 2 * k1, a + h / 2)
            k3 = slope(y + h / 2 * k2, a + h / 2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, b))
        return y


def build() -> tuple[Mixture, Problem]:
    rng = np.random.default_rng(SEED)
    mixture = Mixture(
        rng.normal(size=(COMPONENTS, DIMENSIONS)),
        rng.uniform(0.02, 0.2, size=COMPONENTS),
        rng.dirichlet(np.ones(COMPONENTS) * 5),
    )
    noise = rng.normal(size=(STARTS, DIMENSIONS))

    def predict(x: Any, call: Any, which: Any) -> Any:
        return mixture.x0(x, float(PROCESS.alpha(call.t)), float(PROCESS.sigma(call.t)))

    return mixture, Problem(PROCESS, predict, noise, mixture.flow(noise), STARTS // 2, batch=10**6)


def fixed(problem: Problem, calls: int) -> list[dict[str, Any]]:
    """Every deterministic sampler on every grid, best first."""
    rows, everyone = [], np.arange(STARTS)
    for grid in GRIDS:
        for name in SAMPLERS:
            made = within(calls, name, lambda sampler, steps, grid=grid: plan(sampler, steps, PROCESS, grid))
            if made is None or made.noises or made.givens:
                continue
            with np.errstate(all="ignore"):
                *_, last = problem.run(made, everyone)
            rmse = float(np.sqrt(np.mean((last.x - problem.targets) ** 2)))
            if np.isfinite(rmse):
                rows.append({"sampler": name, "grid": grid, "calls": len(made.calls), "rmse": rmse})
    return sorted(rows, key=lambda row: row["rmse"])


def beginnings(ranked: list[dict[str, Any]], calls: int, count: int = 4) -> list[Plan]:
    """The best fixed plans that a learned one can begin as: each on another grid, a sampler at most twice."""
    found: dict[str, Plan] = {}
    for row in ranked:
        made = plan(row["sampler"], _steps(row, calls), PROCESS, row["grid"])
        try:
            table_of(made, PROCESS)
        except PlanError:
            continue
        used = sum(plan.sampler == made.sampler for plan in found.values())
        if len(made.calls) == calls and row["grid"] not in found and used < 2:
            found[row["grid"]] = made
    return list(found.values())[:count]


def learn(problem: Problem, ranked: list[dict[str, Any]], calls: int, starts: int) -> dict[str, Any]:
    """Fit on three quarters of the starts, choose by the last quarter, test on all others."""
    clock = time.perf_counter()
    mine = _mine(problem, starts)
    at = Coordinates(PROCESS, calls, calls if calls <= LONG_HISTORY else 5)
    states = []
    for first in beginnings(ranked, calls):
        *_, state = fit(mine, at, begin(mine, at, at.encode(*table_of(first, PROCESS))))
        states.append(state)
        *_, state = fit(mine, at, begin(mine, at, np.array(state.best)), GUIDES[-1:])  # as learned_plan ends
        states.append(state)
    state = min(states, key=lambda state: state.held_out)
    unseen = np.arange(starts, STARTS)
    learned = at.plan(mine, np.array(state.best))
    best = min(
        problem.score(plan(row["sampler"], _steps(row, calls), PROCESS, row["grid"]), unseen).rmse
        for row in ranked[:20]
    )
    rmse = problem.score(learned, unseen).rmse
    return {
        "calls": calls,
        "starts": starts,
        "rmse": rmse,
        "best_fixed_on_the_same": best,
        "ratio": rmse / best,
        "parameters": at.size,
        "seconds": time.perf_counter() - clock,
        "times": [call.t for call in learned.calls],
    }


def searched(problem: Problem, calls: int, starts: int) -> list[dict[str, Any]]:
    """Every search of `fewstep tune plan` as the command runs it, on the first starts, tested on the others."""
    mine, rows, unseen = _mine(problem, starts), [], np.arange(starts, STARTS)
    for name, method in METHODS.items():
        clock = time.perf_counter()
        *_, found = method(Search(mine, calls))
        assert isinstance(found, Found), "the last event of a search"
        rmse = problem.score(found.plan, unseen).rmse
        seconds = time.perf_counter() - clock
        rows.append({"method": name, "calls": calls, "starts": starts, "rmse": rmse, "seconds": seconds})
    return rows


def _mine(problem: Problem, starts: int) -> Problem:
    """The first starts alone, three quarters of them to fit on, with the trajectories of a long run."""
    mine = replace(
        problem, starts=problem.starts[:starts], targets=problem.targets[:starts], fit=starts * 3 // 4
    )
    return long_run(mine, plan("dpmpp_2m", 200, PROCESS, "logsnr"))


def _steps(row: dict[str, Any], calls: int) -> int:
    made = within(calls, row["sampler"], lambda sampler, steps: plan(sampler, steps, PROCESS, row["grid"]))
    assert made is not None
    return made.steps


def defaults(tables: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each sampler and grid with its worst ratio to the best over all numbers of calls, least bad first."""
    ratios: dict[tuple[str, str], dict[int, float]] = {}
    for calls, rows in tables.items():
        for row in rows:
            ratios.setdefault((row["sampler"], row["grid"]), {})[calls] = row["rmse"] / rows[0]["rmse"]
    found = [
        {
            "sampler": sampler,
            "grid": grid,
            "worst_ratio": max(by.values()),
            "close_at": [calls for calls, ratio in by.items() if ratio <= CLOSE],
            "ratios": by,
        }
        for (sampler, grid), by in ratios.items()
        if len(by) == len(tables)
    ]
    return sorted(found, key=lambda row: float(row["worst_ratio"]))


def diffusers_best(mixture: Mixture, problem: Problem, counts: list[int]) -> dict[int, dict[str, Any]]:
    """The best of diffusers' schedulers at each number of calls, with epsilon from the exact denoiser."""
    best: dict[int, dict[str, Any]] = {}
    for name, make, twice in _schedulers():
        for calls in counts:
            try:
                error, used = _sample(mixture, problem, make(), (calls + 1) // 2 if twice else calls)
            except (ValueError, IndexError, AssertionError, RuntimeError):
                continue  # a combination that diffusers itself refuses
            if used <= calls and error < best.get(calls, {"rmse": np.inf})["rmse"]:
                best[calls] = {"scheduler": name, "calls": used, "rmse": error}
    return best


def _schedulers() -> list[tuple[str, Callable[[], Any], bool]]:
    """name, constructor, whether a step makes two calls."""
    import diffusers

    betas = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    found: list[tuple[str, Callable[[], Any], bool]] = []

    def add(cls: str, twice: bool = False, **options: Any) -> None:  # diffusers' own options, by their names
        said = ", ".join(f"{key} {value}" for key, value in options.items())
        found.append((f"{cls} {said}", lambda: getattr(diffusers, cls)(**betas, **options), twice))

    for spacing in ("linspace", "trailing", "leading"):
        add("DDIMScheduler", clip_sample=False, timestep_spacing=spacing)
        add("EulerDiscreteScheduler", timestep_spacing=spacing)
        add("HeunDiscreteScheduler", True, timestep_spacing=spacing)
        grids: list[dict[str, Any]] = [{}]
        if spacing == "linspace":
            grids += [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
        for order in (2, 3):
            for grid in grids:
                common = {"timestep_spacing": spacing, "solver_order": order, **grid}
                add("DPMSolverMultistepScheduler", **common, final_sigmas_type="zero")
                minimum = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
                add("DPMSolverMultistepScheduler", **common, **minimum)
                add("UniPCMultistepScheduler", **common)
                add("DEISMultistepScheduler", **common)
            if spacing == "linspace":
                add(
                    "DPMSolverMultistepScheduler",
                    timestep_spacing=spacing,
                    solver_order=order,
                    use_lu_lambdas=True,
                )
    add("PNDMScheduler", skip_prk_steps=True)
    add("LMSDiscreteScheduler")
    add("KDPM2DiscreteScheduler", True)
    return found


def _sample(mixture: Mixture, problem: Problem, scheduler: Any, steps: int) -> tuple[float, int]:
    import torch

    level = np.log(np.sqrt(1 - PROCESS.alphas_cumprod) / np.sqrt(PROCESS.alphas_cumprod))
    scheduler.set_timesteps(steps)
    x = torch.tensor(problem.starts)
    if hasattr(scheduler, "sigmas") and float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        x = x * float(scheduler.sigmas.max() ** 2 + 1) ** 0.5  # schedulers on x / alpha
    calls = 0
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t).numpy()
        c = float(np.exp(np.interp(float(t), np.arange(1000), level)))
        alpha = 1 / np.sqrt(1 + c * c)
        eps = (seen - alpha * mixture.x0(seen, alpha, alpha * c)) / (alpha * c)
        x = scheduler.step(torch.tensor(eps), t, x).prev_sample
        calls += 1
    return float(np.sqrt(np.mean((x.numpy() - problem.targets) ** 2))), calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 5, 6, 8, 10, 15, 20])
    parser.add_argument("--starts", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--diffusers", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    mixture, problem = build()
    tables = {}
    for calls in args.calls:
        tables[calls] = fixed(problem, calls)
        best = tables[calls][0]
        print(f"{calls:2} calls  {best['rmse']:.4f}  {best['sampler']} on {best['grid']}", flush=True)
    if args.diffusers:
        theirs = {str(n): row for n, row in diffusers_best(mixture, problem, args.calls).items()}
    else:
        path = RESULTS / "mixture.json"
        theirs = json.loads(path.read_text())["diffusers"] if path.exists() else {}
    learned = []
    for calls in args.calls:
        for starts in args.starts:
            row = learn(problem, tables[calls], calls, starts)
            learned.append(row)
            print(
                f"{calls:2} calls  {row['rmse']:.4f}  learned on {starts}: {row['ratio']:.2f} of the best fixed",
                flush=True,
            )
    ranked = defaults(tables)
    other = [row for calls in SEARCHED for row in searched(problem, calls, 128)] if args.starts else []
    for row in other:
        print(f"{row['calls']:2} calls  {row['rmse']:.4f}  --method {row['method']}", flush=True)
    results = {
        "searched": other,
        "diffusers": theirs,
        "fixed": {str(calls): rows[:20] for calls, rows in tables.items()},
        "learned": learned,
        "defaults": ranked[:20],
    }
    save("mixture", results)
    (RESULTS / "mixture.md").write_text(report(tables, theirs, learned, other, ranked))
    print(f"wrote {Path(RESULTS / 'mixture.md')}")


def report(
    tables: dict[int, list[dict[str, Any]]],
    theirs: dict[str, Any],
    learned: list[dict[str, Any]],
    other: list[dict[str, Any]],
    ranked: list[dict[str, Any]],
) -> str:
    sizes = sorted({row["starts"] for row in learned})
    lines = [
        "# RMS error on the mixture, by network calls",
        "",
        "Written by `benchmarks/mixture.py`, which says what is measured. Learned plans were fitted on the first",
        "starts and tested on the others; beside each, its share of the best fixed error on the same starts.",
        "",
        "| calls | best of diffusers | best fixed | which | "
        + " | ".join(f"learned on {n}" for n in sizes)
        + " |",
        "|---|---|---|---|" + "---|" * len(sizes),
    ]
    for calls, rows in tables.items():
        peer = theirs.get(str(calls))
        cells = [f"{peer['rmse']:.4f}" if peer else "", f"{rows[0]['rmse']:.4f}"]
        cells.append(f"{rows[0]['sampler']} on {rows[0]['grid']}")
        for n in sizes:
            [row] = [row for row in learned if (row["calls"], row["starts"]) == (calls, n)]
            cells.append(f"{row['rmse']:.4f} ({row['ratio']:.2f})")
        lines.append(f"| {calls} | " + " | ".join(cells) + " |")
    if other:
        lines += ["", "## Every search of `fewstep tune plan`, on 128 starts", ""]
        lines += ["| method | " + " | ".join(f"{calls} calls" for calls in SEARCHED) + " |"]
        lines += ["|---|" + "---|" * len(SEARCHED)]
        for name in METHODS:
            cells = [f"{row['rmse']:.4f}" for row in other if row["method"] == name]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## One default for all",
        "",
        "Worst ratio to the best fixed error over all numbers of calls, and where it is within a tenth of it.",
        "",
        "| sampler | grid | worst | " + " | ".join(str(calls) for calls in tables) + " |",
        "|---|---|---|" + "---|" * len(tables),
    ]
    for row in ranked[:12]:
        ratios = " | ".join(f"{row['ratios'][calls]:.2f}" for calls in tables)
        lines.append(f"| {row['sampler']} | {row['grid']} | {row['worst_ratio']:.2f} | {ratios} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
