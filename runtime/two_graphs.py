"""Two denoisers of one latent space: plans that change from the small to the large one, and pictures that do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .errors import PlanError
from .linear import Terms
from .manifest import GridSpec
from .noise import Noise
from .plan import Plan
from .process import Array, DiscreteVP, Process

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["SMALL", "Routed", "cutoff_for_rate", "refining", "route", "stitched"]

SMALL = "small"
"""The graph, and the part, of the smaller denoiser."""
SHARE = 0.4
"""T-Stitch's default: where its quality is still that of the large network."""
ROLLBACK = 0.55
"""Noise level to refine from; AdaptiveTS takes 0.5 to 0.6 of the range."""
FRESH = 2**31
"""Added to a seed for the noise to refine from: the student has seen that of the seed."""


def stitched(table: Plan, share: float = SHARE, *, rest: Plan | None = None, graph: str = SMALL) -> Plan:
    """The plan with the first `share` of its calls given to a smaller network. T-Stitch, Pan et al. 2024
    <arXiv:2402.14167>.

    A step of several calls is not divided. Solvers remember predictions of clean data, which mean the same from both
    networks, so by default what they remember is kept across the change.
    rest  a plan over the times from the change on: it takes the place of those calls, and remembers nothing
    Raises PlanError for a share outside 0 to 1, or a rest that begins at another time.
    """
    if not 0 <= share <= 1:
        raise PlanError(f"{share!r} of the calls", expected="a share from 0 to 1")
    count = round(share * len(table.calls))
    while 0 < count < len(table.calls) and table.calls[count - 1].next is None:
        count += 1
    first, later = table.calls[:count], table.calls[count:]
    small = replace(table, calls=tuple(replace(call, graph=graph) for call in first))
    if rest is not None:
        if not later or rest.calls[0].t != later[0].t:
            begin = f"time {later[0].t:g}, where the graphs change" if later else "none: no call is left"
            raise PlanError(f"a rest that begins at time {rest.calls[0].t:g}", expected=begin)
        shift = {"x": small.states, "d": count, "n": small.noises, "y": 0}

        def moved(terms: Terms) -> Terms:
            return tuple((kind, i + shift[kind], c) for kind, i, c in terms)

        later = tuple(
            replace(call, input=moved(call.input), next=None if call.next is None else moved(call.next))
            for call in rest.calls
        )
    return replace(small, calls=small.calls + later)


def refining(
    sampler: str,
    steps: int,
    process: Process,
    *,
    level: float = ROLLBACK,
    prediction: str = "",
    grid: GridSpec = GridSpec(),  # noqa: B008
) -> Plan:
    """A plan that noises a given clean sample to `level` and takes `steps` even steps back to data.

    level  sigma / sqrt(alpha^2 + sigma^2), above 0 and below 1
    """
    from .editing import from_image  # with the samplers it needs, for those who make plans

    if not 0 < level < 1:
        raise PlanError(f"noise level {level!r} to refine from", expected="above 0, below 1")
    begin = float(process.t_of_lam(0.5 * math.log(1 / level**2 - 1)))
    discrete = isinstance(process, DiscreteVP)
    times = np.linspace(begin, 1.0 if discrete and grid.final != "clean" else 0.0, steps + 1)
    times = np.round(times) if discrete else times
    return from_image(sampler, steps, process, times, strength=1.0, prediction=prediction)


def cutoff_for_rate(scores: Sequence[float], rate: float) -> float:
    """The cut-off below which that share of these scores lies: what the student reached elsewhere sets it."""
    if not 0 <= rate <= 1 or not len(scores):
        raise PlanError(f"rate {rate!r} of {len(scores)} scores", expected="a share from 0 to 1, and scores")
    count = round(rate * len(scores))
    return math.inf if count == len(scores) else float(sorted(scores)[count])


@dataclass(frozen=True)
class Routed:
    images: Array
    """float32 [n, height, width, 3] in 0..1."""
    scores: tuple[float, ...]
    """Of the student's pictures."""
    refined: tuple[bool, ...]
    student: float
    """Seconds a picture."""
    teacher: float
    """Seconds a refined picture; 0 where there is none."""

    @property
    def rate(self) -> float:
        return sum(self.refined) / len(self.refined)

    @property
    def cost(self) -> float:
        """Seconds a picture, of student and teacher together."""
        return self.student + self.rate * self.teacher


def route(
    pipeline: Pipeline,
    score: Callable[[Array, int], float],
    cutoff: float,
    *,
    prompt: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    student: str = "student",
    refine: str = "refine",
) -> Routed:
    """Draw every picture in the student's few steps; what scores below `cutoff` is noised half-way and drawn on by the
    teacher. Adaptive teacher-student collaboration, Starodubcev et al. 2023 <arXiv:2312.10835>.

    score            (picture [height, width, 3] in 0..1, its number in this call) -> how good it is
    student, refine  plans of the bundle: of the student, and one that starts from a given sample
    Raises what Pipeline raises.
    """

    def draw(
        plan: str, which: Sequence[int], image: Array | None, noise: Array | None
    ) -> tuple[Array, float]:
        out = pipeline(
            None if prompt is None else [prompt[i] for i in which],
            class_labels=None if class_labels is None else [class_labels[i] for i in which],
            guidance_scale=guidance_scale,
            seed=seed,
            plan=plan,
            image=image,
            latents=noise,
            output_type="latent",
        )
        return out.images, out.timings["denoise"] / len(which)

    everyone = range(len(prompt or class_labels or [None]))
    x, student_s = draw(student, everyone, None, None)
    images = pipeline.decode(x)
    scores = tuple(float(score(image, i)) for i, image in enumerate(images))
    bad, teacher_s = [i for i in everyone if not scores[i] >= cutoff], 0.0
    if bad:
        noise = np.stack([Noise(seed + FRESH + i).randn(x.shape[1:]) for i in bad])
        x, teacher_s = draw(refine, bad, x[bad], noise)
        images[bad] = pipeline.decode(x)
    return Routed(images, scores, tuple(i in bad for i in everyone), student_s, teacher_s)
