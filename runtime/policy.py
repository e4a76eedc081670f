"""What a row of a plan may do that is not linear, by name: small, documented, the same in every port.

A policy belongs to one network call. Those on the prediction (Clip, Threshold) run after guidance, on x0; TimeShift
chooses, before the call, which time the network is told; LearnedVariance scales the noise that follows the call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import PlanError
from .process import Array

if TYPE_CHECKING:
    from .plan import Call, Plan
    from .process import Process

__all__ = [
    "Clip",
    "LearnedVariance",
    "Policy",
    "Threshold",
    "TimeShift",
    "policies_from_json",
    "predict",
    "with_learned_variance",
    "with_policies",
    "with_time_shift",
]


@dataclass(frozen=True, slots=True)
class Clip:
    """x0 limited to [-limit, limit]: static thresholding, for pixel models (Ho et al. 2020, diffusers' clip_sample)."""

    limit: float = 1.0

    def apply(self, x0: Array) -> Array:
        return np.clip(x0, -self.limit, self.limit)

    def to_json(self) -> dict[str, Any]:
        return {"name": "clip", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Threshold:
    """Dynamic thresholding, for pixel models. Saharia et al. 2022, section 2.3 <arXiv:2205.11487>.

    Per sample, s is the ratio-quantile of |x0| (linear between order statistics), held within [1, limit]; x0 is limited
    to [-s, s] and divided by s.
    """

    ratio: float = 0.995
    limit: float = 1.0

    def apply(self, x0: Array) -> Array:
        flat = np.abs(x0.reshape(len(x0), -1))
        s = np.clip(np.quantile(flat, self.ratio, axis=1), 1.0, self.limit).astype(x0.dtype)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return np.asarray(np.clip(x0, -s, s) / s)

    def to_json(self) -> dict[str, Any]:
        return {"name": "threshold", **asdict(self)}


@dataclass(frozen=True, slots=True)
class TimeShift:
    """The network is told the time whose noise level the sample really has. Li et al. 2023 <arXiv:2305.15583>.

    Each candidate is (timestep, variance, a, b, c): the variance of a sample at that time, and the conversion
    x0 = a x + b output + c y that goes with it. Per sample, over all its elements, the candidate nearest in variance
    wins, the earlier one of two at equal distance. The update of the state stays on the grid.
    """

    candidates: tuple[tuple[float, float, float, float, float], ...]

    def choose(self, x: Array) -> Array:
        """[batch] index of the candidate of each sample."""
        variance = np.var(x.reshape(len(x), -1).astype(np.float64), axis=1)
        distance = np.abs(np.array([c[1] for c in self.candidates]) - variance[:, None])
        return np.asarray(distance.argmin(axis=1))

    def to_json(self) -> dict[str, Any]:
        return {"name": "time_shift", "candidates": [list(c) for c in self.candidates]}


@dataclass(frozen=True, slots=True)
class LearnedVariance:
    """The row's fresh noise, elementwise, times exp(v log_ratio / 2), with v in [0, 1] from the network's second half
    of channels o: v = (o + 1) / 2. Nichol and Dhariwal 2021, equation 15 <arXiv:2102.09672>.

    The row itself has the noise of the smaller variance; log_ratio is log(beta / beta tilde) of the step.
    """

    log_ratio: float

    def scale(self, variance: Array | None) -> Array:
        if variance is None:
            raise PlanError(
                "a plan with learned variance on a network without one",
                expected="an output with twice the sample's channels",
                fix="use ddpm without it",
            )
        return np.asarray(np.exp((variance + 1) * (self.log_ratio / 4)))

    def to_json(self) -> dict[str, Any]:
        return {"name": "learned_variance", **asdict(self)}


Policy = Clip | Threshold | TimeShift | LearnedVariance


def predict(call: Call, x: Array, denoise: Callable[[Array, float], Array]) -> tuple[Array, Array | float]:
    """One network call under its policies: x0, and the scale of the noise that follows.

    Samples that shift to different times cost a call for each time.
    """
    from .plan import Time

    x0: Array | None = None
    time = Time(call)
    for policy in call.policies:
        if isinstance(policy, TimeShift):
            chosen = policy.choose(x)
            x0 = np.empty_like(x)
            for i in np.unique(chosen):
                timestep, _, *conversion = policy.candidates[i]
                shifted = replace(call, timestep=timestep, x0=tuple(conversion))
                x0[chosen == i] = denoise(x, Time(shifted))[chosen == i]
    if x0 is None:
        x0 = denoise(x, time)
    scale: Array | float = 1.0
    for policy in call.policies:
        if isinstance(policy, LearnedVariance):
            scale = policy.scale(time.variance)
        elif not isinstance(policy, TimeShift):
            x0 = policy.apply(x0)
    return x0, scale


def with_policies(table: Plan, *policies: Policy) -> Plan:
    """The same plan with these policies on every call, after those it has."""
    calls = tuple(replace(call, policies=(*call.policies, *policies)) for call in table.calls)
    return replace(table, calls=calls)


def with_time_shift(table: Plan, process: Process, *, window: float = 30.0, cutoff: float = 300.0) -> Plan:
    """The plan with TimeShift on every call but the first whose timestep is above the cutoff.

    window   width of the interval of timesteps around the grid's own, in steps of the trained schedule
    cutoff   timestep below which there is no shift: there the data, not the noise, makes the variance
    30 and 300 are the paper's values for few-step solvers (its repository: 10 and 900 for DEIS, 5 and 550 for PNDM).
    Raises PlanError for a process without whole-numbered timesteps.
    """
    from .process import DiscreteVP
    from .tracing import x0_conversion

    if not isinstance(process, DiscreteVP):
        raise PlanError("a time shift on a continuous process", expected="a discrete model")
    calls = [table.calls[0]]
    for call in table.calls[1:]:
        if call.timestep > cutoff:
            low, high = math.ceil(call.timestep - window / 2), math.floor(call.timestep + window / 2)
            timesteps = np.arange(max(low, 0), min(high, int(process.t_max) - 1) + 1)
            candidates = []
            for timestep in sorted({*timesteps.tolist(), call.timestep}, reverse=True):
                alpha, sigma = float(process.alpha(timestep + 1)), float(process.sigma(timestep + 1))
                a, b = x0_conversion(table.prediction, alpha, sigma)
                candidates.append((float(timestep), sigma**2, a, b, 0.0))
            call = replace(call, policies=(*call.policies, TimeShift(tuple(candidates))))
        calls.append(call)
    return replace(table, calls=tuple(calls))


def with_learned_variance(table: Plan, process: Process) -> Plan:
    """A plan of `ddpm` whose noise has the variance the network learned, on the plan's own subset of times.

    Raises PlanError for a plan without fresh noise.
    """
    if not table.noises:
        raise PlanError(f"learned variance for {table.sampler}, which draws no noise", expected="ddpm")
    times = [call.t for call in table.calls]
    calls = list(table.calls)
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        # beta / beta tilde of the step t -> s is (1 - abar_t) / (1 - abar_s)
        log_ratio = 2 * (math.log(float(process.sigma(t))) - math.log(float(process.sigma(s))))
        calls[i] = replace(calls[i], policies=(*calls[i].policies, LearnedVariance(log_ratio)))
    return replace(table, calls=tuple(calls))


def policies_from_json(data: Any, where: str) -> tuple[Policy, ...]:
    """Read what `to_json` wrote. Raises PlanError naming the row at fault."""
    if not isinstance(data, list) or len(data) > len(POLICIES):
        raise PlanError(f"{where} has policies that are not a short list")
    return tuple(_policy(item, where) for item in data)


POLICIES: dict[str, type[Policy]] = {
    "clip": Clip,
    "threshold": Threshold,
    "time_shift": TimeShift,
    "learned_variance": LearnedVariance,
}

MAX_CANDIDATES = 1000
"""One for each trained level of the usual schedules."""


def _policy(item: Any, where: str) -> Policy:
    kind = POLICIES.get(str(item.get("name"))) if isinstance(item, Mapping) else None
    if kind is None:
        raise PlanError(f"{where} has an unknown policy {item!r}", expected=f"one of {', '.join(POLICIES)}")
    names = [field.name for field in fields(kind)]
    if set(item) != {"name", *names}:
        raise PlanError(f"{where}: policy {item['name']}", expected=f"the fields name, {', '.join(names)}")
    if kind is TimeShift:
        rows = item["candidates"]
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_CANDIDATES:
            raise PlanError(f"{where}: time_shift", expected=f"1 to {MAX_CANDIDATES} candidates")
        if not all(isinstance(row, list) and len(row) == 5 and all(map(_finite, row)) for row in rows):
            raise PlanError(f"{where}: time_shift", expected="candidates of five finite numbers")
        return TimeShift(tuple((float(t), float(v), float(a), float(b), float(c)) for t, v, a, b, c in rows))
    values = {name: item[name] for name in names}
    if not all(_finite(v) and v > 0 for v in values.values()) or values.get("ratio", 0.5) > 1:
        raise PlanError(
            f"{where}: policy {item['name']} with {values}", expected="positive numbers, ratio at most 1"
        )
    made: Policy = kind(**values)
    return made


def _finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
