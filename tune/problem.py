"""What a plan is fitted to: where the model's own long trajectories end, from a few starts.

Whatever the model became on its way to the device (quantized, pruned, guided) is inside `denoise`, so a plan that is
searched after all that makes up for it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ..runtime.errors import PlanError
from ..runtime.plan import Call, Plan, Time
from ..runtime.process import Array, Process
from ..runtime.samplers import Step, ddim

__all__ = ["Predict", "Problem", "Score", "Trajectory", "long_run", "spread"]

Predict = Callable[[Array, Call, Array], Array]
"""(x_t, the row of the plan that asks, which start each sample comes from) -> estimate of x_0. Searches send perturbed
copies of a start in one batch; the last argument, [batch] whole numbers, tells which prompt belongs to each."""


@dataclass(frozen=True)
class Score:
    """How far final states are from the reference's."""

    rmse: float
    psnr_db: float
    """With the distance from the reference's smallest to its largest value as the peak."""

    def to_json(self) -> dict[str, float]:
        return {"rmse": self.rmse, "psnr_db": self.psnr_db}


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Reference states at some times, and by interpolation between them.

    A state over its spread, x / sqrt(alpha^2 + sigma^2), is cos(angle) x0 + sin(angle) noise with
    tan(angle) = sigma / alpha: smooth in that angle from pure noise to clean data, so it is interpolated there.
    """

    process: Process
    times: Array
    """[m] decreasing."""
    states: Array
    """[m, n, ...]"""

    def unit(self, t: float, which: Array) -> Array:
        """The states of these starts at time t over their spread, by the cubic through the four nearest knots."""
        knots, angle = self._angle(self.times), float(self._angle(np.array([t]))[0])
        first = int(np.clip(np.searchsorted(-knots, -angle) - 2, 0, max(len(knots) - 4, 0)))
        near = np.arange(first, min(first + 4, len(knots)))
        total: Array = np.zeros_like(self.states[0][which])
        for k in near:
            others = knots[near[near != k]]
            weight = np.prod((angle - others) / (knots[k] - others))
            total += self.states[k][which] * float(weight / spread(self.process, self.times[k]))
        return total

    def _angle(self, t: Array) -> Array:
        return np.asarray(np.arctan2(self.process.sigma(t), self.process.alpha(t)))


def spread(process: Process, t: float) -> float:
    """sqrt(alpha^2 + sigma^2): how large states at time t are."""
    return float(np.hypot(process.alpha(t), process.sigma(t)))


@dataclass(frozen=True, eq=False)
class Problem:
    """Starts, where the reference takes them, and the denoiser; the first `fit` starts are for searching, the others
    for judging."""

    process: Process
    predict: Predict
    starts: Array
    """[n, ...] standard normal noise, as `Plan.start` takes it."""
    targets: Array
    """[n, ...] the clean samples they lead to."""
    fit: int
    """How many of the starts a search may look at."""
    prediction: str = ""
    """What the network outputs; empty for the process's usual one."""
    whole_timesteps: bool = False
    """The network takes whole numbers as its time: every timestep of a plan is rounded."""
    trajectory: Trajectory | None = None
    """The reference's states on the way, where a search wants them."""
    batch: int = 256
    """Samples handed to `predict` at a time, at most."""

    def __post_init__(self) -> None:
        if self.starts.shape != self.targets.shape:
            raise PlanError(f"starts of shape {self.starts.shape}", expected=f"{self.targets.shape}")
        if not 1 <= self.fit < len(self.starts):
            raise PlanError(
                f"{self.fit} of {len(self.starts)} starts to fit on",
                expected="at least one to fit on and one to judge by",
                fix="take more noises",
            )

    @property
    def fitted(self) -> Array:
        """Which starts a search may look at."""
        return np.arange(self.fit)

    @property
    def held_out(self) -> Array:
        """Which starts it is judged by."""
        return np.arange(self.fit, len(self.starts))

    def rows(self, times: ArrayLike) -> tuple[Call, ...]:
        """The network call at each of these times but the last, whatever sampler makes it."""
        return self.shipped(Plan.trace(ddim, self.process, times, prediction=self.prediction)).calls

    def shipped(self, plan: Plan) -> Plan:
        """The plan as this network can run it: with whole timesteps where it takes no others."""
        if not self.whole_timesteps:
            return plan
        return replace(plan, calls=tuple(replace(c, timestep=float(np.rint(c.timestep))) for c in plan.calls))

    def x0(self, x: Array, call: Call, which: Array) -> Array:
        """`predict`, a batch at a time."""
        parts = [slice(i, i + self.batch) for i in range(0, len(x), self.batch)]
        found = [self.predict(x[part], call, which[part]) for part in parts]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def run(self, plan: Plan, which: Array) -> Iterator[Step]:
        """Sample these starts with a plan."""

        def denoise(x: Array, t: float) -> Array:
            assert isinstance(t, Time), "Plan.run hands over its rows"
            return self.x0(x, t.call, which)

        return plan.run(denoise, plan.start(self.starts[which]))

    def score(self, plan: Plan, which: Array) -> Score:
        """How far the plan ends from the reference. Raises PlanError for a plan that needs fresh noise."""
        *_, last = self.run(plan, which)
        return self.distance(last.x, which)

    def distance(self, x: Array, which: Array) -> Score:
        target = self.targets[which].astype(np.float64)
        rmse = float(np.sqrt(np.mean(np.square(x - target))))
        peak = float(target.max() - target.min())
        return Score(
            rmse, 20 * math.log10(peak / rmse) if rmse > 0 and peak > 0 else 300.0
        )  # as export's gate


def long_run(problem: Problem, plan: Plan, knots: int = 65) -> Problem:
    """The problem with the trajectories of a long plan as its reference's; with at most this many states kept."""
    times = np.array([call.t for call in plan.calls if call.next is not None] + [0.0])
    keep = set(np.unique(np.linspace(0, len(times) - 1, knots).astype(int)).tolist())
    everyone = np.arange(len(problem.starts))
    states = [plan.start(problem.starts)]
    states += [step.x for step in problem.run(plan, everyone) if step.index + 1 in keep]
    return replace(problem, trajectory=Trajectory(problem.process, times[sorted(keep)], np.stack(states)))
