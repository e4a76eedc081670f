"""USF: every choice of an exponential integrator made anew at each step, for a search to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import PlanError
from ..process import Array, Process
from .exponential import Integrator, Point, Rule, pseudo, taylor
from .step import Denoise, Noise, Step


@dataclass(frozen=True, slots=True)
class Decision:
    """What one step does. Its time, the other thing to decide, is in the grid."""

    order: int = 2
    """Points the Taylor expansion rests on, 1 to 4; fewer while there are fewer."""
    noise_prediction: bool = False
    """Whether the expansion is of the noise, or of the data prediction."""
    low_order: bool = False
    """Whether each derivative is taken from as few points as it needs, or all from all."""
    back: int = 0
    """The step starts this many states before the latest; less than the order."""
    corrector: int = 0
    """Points of the corrector, the new one included; 0 for none, at most order + 1."""

    def __post_init__(self) -> None:
        allowed = 1 <= self.order <= 4 and 0 <= self.back < self.order
        if not (allowed and (self.corrector == 0 or 2 <= self.corrector <= self.order + 1)):
            raise PlanError(f"{self}", expected="order 1 to 4, back below it, corrector 0 or 2 to order + 1")


def usf(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    decisions: Sequence[Decision] = (Decision(),),
) -> Iterator[Step]:
    """The unified sampling framework, of which S3 is the search. Liu et al. 2023 <arXiv:2312.07243>.

    decisions  one a step; the last one holds for the steps that are left
    """
    if not decisions:
        raise PlanError("no decisions", expected="at least one")
    kinds = [Integrator.of(process, times, noise_prediction=kind) for kind in (False, True)]
    seen: list[list[Point]] = []
    states: list[Array] = []
    points: list[Point] = []
    d, integrator = decisions[0], kinds[0]
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        seen.append([kind.point(i, x, x0) for kind in kinds])
        if i > 0 and d.corrector and integrator.finite(points[0].i, i):
            corrected = [*points[: d.corrector - 1], seen[i][d.noise_prediction]]
            for sign, rule, used in ((1, taylor, corrected), (-1, _rule(d), points)):
                for w, point in zip(integrator.weights(i, used, rule), used, strict=True):
                    x = x + sign * w * point.q
        states.append(x)
        d = decisions[min(i, len(decisions) - 1)]
        integrator = kinds[d.noise_prediction]
        p = integrator.points(i, d.order, lower_final=False)
        s = i - min(d.back, p - 1)
        points = [seen[j][d.noise_prediction] for j in (s, *(j for j in range(i, i - p, -1) if j != s))]
        x = integrator.step(states[s], i + 1, points, _rule(d), noise)
        yield Step(i, x, x0)


def _rule(d: Decision) -> Rule:
    return pseudo if d.low_order else taylor
