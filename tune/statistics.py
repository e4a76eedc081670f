"""DPM-Solver-v3's model statistics, measured on any denoiser with network calls alone.

Zheng et al. 2023 <arXiv:2310.13268>, with scalars where the paper has arrays, and without its bias. With y = x / alpha,
dy/dlam = x0 - y along the flow and k = 1 - l, the quantities of runtime/samplers/dpm_solver_v3.py are

    k = alpha E[diag d x0/dx],  f = k y - x0,  df/dlam = k' y + k (x0 - y) - x0',  s = E[f df/dlam] / E[f^2]

k comes from Hutchinson's probes (E[z J z] is J's trace for signs z), x0' = d x0/dlam from a step along the flow to
either side, all by differences. A knot keeps its second moments, so that s follows once every k is known.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import BadInput, FewstepError, PlanError
from ..runtime.files import atomic_write
from ..runtime.grids.levels import lowest
from ..runtime.process import Array
from ..runtime.process import lam as log_snr
from ..runtime.progress import Progress
from ..runtime.samplers.dpm_solver_v3 import Statistics
from .problem import Problem, spread
from .search import recall, remember

__all__ = ["Measurement", "load", "measure", "save"]

MIN_STARTS = 4
"""Enough for images, whose elements share in every mean; samples of few elements want dozens."""

LEAST_LAM = -5.0
"""Below there is only noise, and l is 1: EDM begins at -4.4, Stable Diffusion at -2.7."""


@dataclass(frozen=True)
class Measurement:
    """How closely to look."""

    knots: int = 24
    """Values of lam, evenly spaced. Plans made with 16 are as good as with 200 on benchmarks/mixture.py."""
    probes: int = 1
    """Of the Jacobian for each start; samples of few elements want more."""
    starts: int = 64
    """Fitted starts to use, at most."""
    seed: int = 0
    """Of the probes."""

    def __post_init__(self) -> None:
        limits = {"knots": (5, 1000), "probes": (1, 1000), "starts": (MIN_STARTS, 4096)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise BadInput(f"{getattr(self, name)} {name}", expected=f"{low} to {high}")


@dataclass(frozen=True)
class Knot:
    """Means over starts and elements at one time: k, and the moments of x0, y and the total derivative of x0."""

    lam: float
    k: float
    x0_x0: float
    x0_y: float
    y_y: float
    x0_slope: float
    y_slope: float


def measure(
    problem: Problem, how: Measurement = Measurement(), state: Path | None = None
) -> Iterator[Progress | Statistics]:
    """The statistics along the reference's trajectories from the fitted starts: last of the events.

    state  a file that keeps every finished knot, so that an interrupted measurement goes on
    Costs knots * starts * (3 + 2 probes) samples through the network. Raises PlanError without trajectories or with
    too few starts, BadInput for a state of something else, FewstepError where the network gives NaN.
    """
    which = problem.fitted[: how.starts]
    if problem.trajectory is None:
        raise PlanError("a problem without its reference's trajectories", fix="make it with long_run")
    if len(which) < MIN_STARTS:
        raise PlanError(
            f"{len(which)} starts to measure on", expected=f"at least {MIN_STARTS}", fix="take more noises"
        )
    states = np.ascontiguousarray(problem.trajectory.states[:, which])
    depends = {**asdict(how), "trajectories": hashlib.sha256(states.tobytes()).hexdigest()}
    known = recall(state)
    if known and known.get("measurement") != depends:
        raise BadInput(f"{state} was measured on something else", fix="delete it to begin again")
    try:
        found = [Knot(**knot) for knot in known.get("knots", [])]
    except TypeError:
        raise BadInput(f"{state} holds no measurement", fix="delete it to begin again") from None
    signs = np.random.default_rng(how.seed).choice([-1.0, 1.0], size=(how.probes, *states.shape[1:]))
    times = _times(problem, how.knots)
    for t in times[len(found) :]:
        found.append(_knot(problem, t, which, signs))  # the same signs everywhere keep l smooth
        remember(state, {"measurement": depends, "knots": [asdict(knot) for knot in found]})
        note = f"lam {found[-1].lam:.2f}: l {1 - found[-1].k:.4f}"
        yield Progress("statistics", len(found) / len(times), note)
    yield _statistics(found, _step(problem) ** 2)


def _step(problem: Problem) -> float:
    """How far differences reach, as a share of sigma and in lam: truncation is a sixth of its square at most, and
    rounding (float32, or a network in less) stays far below it."""
    return 1e-3 if problem.starts.dtype == np.float64 else 0.05


def _times(problem: Problem, knots: int) -> list[float]:
    """From noise to clean; whole where the network takes no others. Room for a step is left at both ends."""
    process, d = problem.process, _step(problem)
    low = max(float(log_snr(process, process.t_max)), LEAST_LAM) + d
    times = process.t_of_lam(np.linspace(low, float(log_snr(process, lowest(process))) - d, knots))
    if problem.whole_timesteps:
        times = np.unique(np.clip(np.rint(times), lowest(process) + 1, process.t_max - 1))[::-1]
    return [float(t) for t in times]


def _beside(problem: Problem, t: float) -> list[float]:
    """A time on either side, a step away or, where times are whole, a level at least."""
    lam = float(log_snr(problem.process, t))
    beside = [float(problem.process.t_of_lam(lam + d)) for d in (-_step(problem), _step(problem))]
    if not problem.whole_timesteps:
        return beside
    return [max(t + 1, float(np.rint(beside[0]))), min(t - 1, float(np.rint(beside[1])))]


def _knot(problem: Problem, t: float, which: Array, signs: Array) -> Knot:
    process, trajectory = problem.process, problem.trajectory
    assert trajectory is not None, "checked by measure"
    alpha, lam = float(process.alpha(t)), float(log_snr(process, t))
    x = trajectory.unit(t, which) * spread(process, t)
    d = _step(problem) * float(process.sigma(t))
    x0, *probed = _ask(problem, t, [x, *(x + sign * d * z for z in signs for sign in (1, -1))], which)
    rises = [z * (up - down) for z, up, down in zip(signs, probed[::2], probed[1::2], strict=True)]
    k = alpha * float(np.mean(rises)) / (2 * d)
    y = x.astype(np.float64) / alpha
    slope, beside = np.zeros_like(y), _beside(problem, t)
    h = [float(log_snr(process, side)) - lam for side in beside]
    for side, own, other in zip(beside, h, h[::-1], strict=True):
        # a straight step leaves the flow by a term even in h, which both sides together remove
        [there] = _ask(problem, side, [float(process.alpha(side)) * (y + own * (x0 - y))], which)
        slope += (there - x0) * (-other / (own * (own - other)))
    pairs = ((x0, x0), (x0, y), (y, y), (x0, slope), (y, slope))
    return Knot(lam, k, *(float(np.mean(a * b)) for a, b in pairs))


def _ask(problem: Problem, t: float, x: Sequence[Array], which: Array) -> list[Array]:
    """x0 in float64 of each state of these starts at time t."""
    [row] = problem.rows([t, 0.0])
    states = np.concatenate(x).astype(problem.starts.dtype)
    x0 = problem.x0(states, row, np.tile(which, len(x)))
    if not np.isfinite(x0).all():
        raise FewstepError(
            f"timestep {row.timestep:g}: the network's output holds NaN or infinity",
            fix="a layer overflows in this precision; export that part in float32",
        )
    return np.split(x0.astype(np.float64), len(x))


def _statistics(knots: Sequence[Knot], error: float) -> Statistics:
    """error: the share of x0 below which f is rounding and truncation, with no slope of its own."""
    lam, k, xx, xy, yy, xd, yd = np.array([list(asdict(knot).values()) for knot in knots]).T
    a = _bend(lam, k) - k  # df/dlam = a y + k x0 - x0'
    ff = k**2 * yy - 2 * k * xy + xx
    slope = k * a * yy + (k**2 - a) * xy - k * yd - k * xx + xd
    s = slope / (ff + error**2 * xx + np.finfo(float).tiny)
    return Statistics(tuple(lam.tolist()), tuple((1 - k).tolist()), tuple(s.tolist()))


def _bend(lam: Array, k: Array) -> Array:
    """dk/dlam. l falls like q = 1/(1 + e^(2 lam)), which it is for data of unit variance, so differences (of the
    polynomial through the five nearest knots) are left with l/q."""
    q, slope = 1 / (1 + np.exp(2 * lam)), np.zeros_like(lam)
    for i in range(len(lam)):
        near = slice(start := max(0, min(i - 2, len(lam) - 5)), start + 5)
        slope[i] = np.polyfit(lam[near] - lam[i], ((1 - k) / q)[near], len(lam[near]) - 1)[-2]
    return np.asarray(2 * (1 - k) * (1 - q) - q * slope)


def save(path: Path, statistics: Statistics) -> None:
    """Raises OutputError where it cannot be written."""
    atomic_write(path, json.dumps(asdict(statistics)).encode())


def load(path: Path) -> Statistics:
    """Raises BadInput for anything but what `save` wrote."""
    data = recall(path)
    columns: list[Any] = [data.get(name) for name in ("lam", "l", "s")]
    for column in columns:
        if not isinstance(column, list) or not all(type(v) is float and math.isfinite(v) for v in column):
            raise BadInput(f"{path} holds no statistics", expected="lists of finite numbers lam, l and s")
    return Statistics(*map(tuple, columns))
