"""Learned plans: all times and all weights on earlier predictions free, fitted to where the model's own long runs end.

A plan of K calls has K - 1 inner times and K (K - 1) / 2 free weights, so a few dozen starts determine it. fit.py and
gradient.py move them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..runtime.errors import PlanError
from ..runtime.grids.levels import lowest
from ..runtime.plan import Plan
from ..runtime.process import Array, Process
from ..runtime.process import lam as log_snr
from ..runtime.samplers import Denoise, Noise, Step
from .problem import Problem

__all__ = ["Coordinates", "learned", "row_sums", "table_of"]

MIN_GAP = 1e-3
"""Log-SNR between two calls at the clean end; a tenth of a trained level of the usual schedules."""


def learned(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, weights: Array
) -> Iterator[Step]:
    """x_{i+1} = (sigma_{i+1} / sigma_i) x_i + sum_j weights[i, j] x0_j: every deterministic multistep sampler there is.

    weights  [calls, calls], lower triangular; row i sums to alpha_{i+1} - alpha_i sigma_{i+1} / sigma_i, which keeps
             the state's noise level and a constant prediction's share in it exactly where the process has them
    """
    sigma, seen = process.sigma(times), []
    for i, t in enumerate(times[:-1]):
        seen.append(denoise(x, float(t)))
        x0 = seen[-1]
        x = x * (sigma[i + 1] / sigma[i])
        for j, earlier in enumerate(seen):
            if weights[i, j] != 0 or j == i:
                x = x + earlier * weights[i, j]
        yield Step(i, x, x0)


def row_sums(process: Process, times: Array) -> Array:
    """[calls] what each row of the weights sums to; see `learned`."""
    alpha, sigma = process.alpha(times), process.sigma(times)
    return np.asarray(alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1])


@dataclass(frozen=True)
class Coordinates:
    """A table of times and weights as a vector without constraints, and back.

    First the log-SNR of the inner times; then, row after row, each weight but the newest prediction's as a share of
    its row's sum. The newest one's share is what is left to 1.
    """

    process: Process
    calls: int
    history: int
    """Predictions a step may use, the newest included."""
    end: float = 0.0

    @property
    def size(self) -> int:
        return self.calls - 1 + len(self.shares)

    @property
    def shares(self) -> list[tuple[int, int]]:
        """(row, column) of each free weight."""
        return [(i, j) for i in range(self.calls) for j in range(max(0, i + 1 - self.history), i)]

    def first(self, k: int) -> int:
        """The first state that parameter k changes."""
        return k + 1 if k < self.calls - 1 else self.shares[k - self.calls + 1][0] + 1

    def decode(self, vector: Array) -> tuple[Array, Array]:
        """times [calls + 1] and weights [calls, calls]. Raises PlanError for times out of order."""
        inner = self.process.t_of_lam(self.project(vector)[: self.calls - 1])
        times = np.concatenate([[self.process.t_max], inner, [self.end]])
        if not np.all(np.diff(times) < 0):
            raise PlanError("a learned plan whose times are out of order")
        shares = np.zeros((self.calls, self.calls))
        for (i, j), value in zip(self.shares, vector[self.calls - 1 :], strict=True):
            shares[i, j] = value
        np.fill_diagonal(shares, 1 - shares.sum(axis=1))
        return times, shares * row_sums(self.process, times)[:, None]

    def project(self, vector: Array) -> Array:
        """The nearest vector with all times below the cleanest one a network is asked about, so that a step may run
        along that limit."""
        last = float(log_snr(self.process, lowest(self.process)))
        inner = vector[: self.calls - 1]
        inner = np.minimum(inner, last - MIN_GAP * np.arange(len(inner))[::-1])
        return np.concatenate([inner, vector[self.calls - 1 :]])

    def encode(self, times: Array, weights: Array) -> Array:
        """The vector of a table; what lies beyond `history` is dropped."""
        shares = weights / row_sums(self.process, times)[:, None]
        free = [shares[i, j] for i, j in self.shares]
        return np.concatenate([log_snr(self.process, times[1:-1]), free])

    def plan(self, problem: Problem, vector: Array) -> Plan:
        times, weights = self.decode(vector)
        sampler = partial(learned, weights=weights)
        traced = Plan.trace(sampler, self.process, times, prediction=problem.prediction, name="learned")
        return problem.shipped(traced)


def table_of(plan: Plan, process: Process, end: float = 0.0) -> tuple[Array, Array]:
    """times and weights of a fixed sampler's plan, with which `learned` does the same steps.

    Raises PlanError where it does not fit: fresh noise, or times that repeat (two calls at one noise level).
    """
    times = np.array([call.t for call in plan.calls] + [end])
    if plan.noises or plan.givens or not np.all(np.diff(times) < 0):
        raise PlanError(f"{plan.sampler} as a starting point", expected="a deterministic multistep sampler")
    n = len(plan.calls)
    # every state as its shares of the start and of each prediction
    states = [np.eye(1, n + 1)[0] * plan.init[0][2]]

    def expand(terms: Sequence[tuple[str, int, float]]) -> Array:
        total = np.zeros(n + 1)
        for kind, i, c in terms:
            total += c * (states[i] if kind == "x" else np.eye(1, n + 1, i + 1)[0])
        return total

    levels = []
    for call in plan.calls:
        levels.append(expand(call.input))
        if call.next is not None:
            states.append(expand(call.next))
    levels.append(states[-1])
    sigma = process.sigma(times)
    weights = np.zeros((n, n))
    for i in range(n):
        row = levels[i + 1] - levels[i] * (sigma[i + 1] / sigma[i])
        weights[i] = row[1:]
        if abs(row[0]) > 1e-6 * abs(levels[i][0]) or np.any(np.abs(row[i + 2 :]) > 0):
            raise PlanError(f"{plan.sampler} as a starting point", expected="a sampler on the noise level")
    return times, weights
