"""Starting from an image instead of noise: image to image, inpainting, inversion and edits with two prompts.

Inversion to noise by the sampler itself is ddim_inversion and bdia's, in samplers/: a plan over rising times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from .errors import PlanError
from .manifest import GridSpec
from .plan import Plan, Time
from .policy import predict
from .process import Array, Process
from .samplers import Sampler, ddim
from .step import Denoise, Noise, Step
from .times import Grid
from .tracing import choose

__all__ = ["Inverted", "ddcm", "edit_friendly", "from_image", "implicit_inversion", "keep"]


def from_image(
    sampler: str | Sampler,
    steps: int,
    process: Process,
    times: str | Grid | ArrayLike = "auto",
    *,
    strength: float = 0.8,
    prediction: str = "",
    grid: GridSpec = GridSpec(),  # noqa: B008
) -> Plan:
    """SDEdit, as diffusers' img2img: noise an image part of the way and sample from there. Meng et al. 2021
    <arXiv:2108.01073>.

    strength  how much of the grid is run: its last int(steps * strength) steps, 1 for all; 0.8 is diffusers' default
    The other arguments are `plan`'s. The clean image (latent) is the last given array of the plan: 0, or 1 beside an
    observation. Multistep samplers start anew on the part of the grid that is run.
    """
    chosen, name, times = choose(sampler, steps, process, times, grid)
    count = int(steps * strength + 1e-9) if 0 < strength <= 1 else 0
    if count == 0:
        raise PlanError(
            f"strength {strength!r} of {steps} steps",
            expected=f"above 0, at most 1, and a step: {1 / steps:g} or more",
        )
    table = Plan.trace(chosen, process, times[-count - 1 :], prediction=prediction, name=name)
    t, image = times[-count - 1], int(hasattr(process, "gamma"))
    return replace(table, init=(("z", 0, float(process.sigma(t))), ("y", image, float(process.alpha(t)))))


def keep(denoise: Denoise, known: Array, mask: Array) -> Denoise:
    """Inpainting: the network's guess of the clean sample, with `known` where mask is 1 (0 where to paint).

    known and mask broadcast against the sample. Every sampler that ends on clean data then ends on `known` exactly, and
    has its exact noisy version on the way: there the data is one point. What is painted follows by what the network
    sees of it step by step, which is near the conditional distribution, not exactly it.
    """
    known, mask = np.asarray(known), np.asarray(mask)

    def held(x: Array, t: float) -> Array:
        x0 = denoise(x, t)
        return np.asarray(np.where(mask == 1, known, x0 + mask * (known - x0)), dtype=x0.dtype)

    return held


@dataclass(frozen=True)
class Inverted:
    """A run that ends on a given image: replay it with another prompt to edit the image."""

    plan: Plan
    """The plan inverted, with what its last row misses as one more given array."""
    start: Array
    noises: tuple[Array, ...]
    given: tuple[Array, ...]

    def replay(self, denoise: Denoise) -> Iterator[Step]:
        noises = iter(self.noises)
        return self.plan.run(denoise, self.start, lambda: next(noises), self.given)


def edit_friendly(
    plan: Plan, process: Process, denoise: Denoise, x0: Array, noise: Noise, given: tuple[Array, ...] = ()
) -> Inverted:
    """Edit-friendly DDPM inversion. Huberman-Spiegelglas et al. 2023, algorithm 1 <arXiv:2304.06140>.

    Noisy versions of x0 are drawn independently for every state's time, then each row is solved for the noise that
    leads from one to the next. For any traced plan with fresh noise in each row but the last; what a last row without
    noise misses is given back to it. Memory: one latent a step.
    Raises PlanError for a row without noise of its own, or one that does not begin at the state's time.
    """

    def noisy(t: float) -> Array:
        return np.asarray(float(process.alpha(t)) * x0 + float(process.sigma(t)) * noise())

    start = noisy(plan.calls[0].t)
    values: dict[tuple[str, int], Array] = {("x", 0): start}
    values.update({("y", i): array for i, array in enumerate(given)})
    noises: dict[int, Array] = {}
    calls, index = list(plan.calls), 0

    def combine(terms: tuple[tuple[str, int, float], ...]) -> Array:
        for kind, i, _ in terms:
            if kind == "n" and i not in noises:
                noises[i] = values["n", i] = noise()
        return np.sum([c * values[kind, i] for kind, i, c in terms], axis=0, dtype=x0.dtype)  # type: ignore[no-any-return]

    for k, call in enumerate(calls):
        values["d", k], scale = predict(call, combine(call.input), denoise)
        if call.next is None:
            continue
        index += 1
        fresh = [(i, c) for kind, i, c in call.next if kind == "n" and i not in noises and c != 0]
        if k + 1 == len(calls):
            missed = x0 - combine(call.next)
            calls[k] = replace(call, next=(*call.next, ("y", len(given), 1.0)))
            break
        after = calls[k + 1]
        if not fresh or [term for term in after.input if term[0] != "y"] != [("x", index, 1.0)]:
            what = "no fresh noise" if not fresh else "a next call that is not at its state"
            raise PlanError(f"{plan.sampler}: call {k} has {what}", expected="an ancestral sampler, say ddpm")
        i, c = fresh[-1]
        rest = combine(tuple(term for term in call.next if term[:2] != ("n", i)))
        values["x", index] = noisy(after.t)
        values["n", i] = (values["x", index] - rest) / c
        noises[i] = values["n", i] / scale
    table = replace(plan, calls=tuple(calls))
    silent = np.zeros_like(start)
    return Inverted(table, start, tuple(noises.get(i, silent) for i in range(table.noises)), (*given, missed))


def ddcm(
    process: Process,
    times: ArrayLike,
    source: Denoise,
    target: Denoise,
    x0: Array,
    noise: Noise,
    *,
    prediction: str = "",
) -> Iterator[Step]:
    """InfEdit: editing without inversion. Xu et al. 2023, algorithm 2 <arXiv:2312.04965>.

    source, target  the network under the prompt that describes the image, and under the one that describes the edit
    times           [steps + 1] decreasing, such as a latent consistency model's; 4 to 12 steps are enough
    prediction      what the network outputs, as in Plan.trace

    The paper's noise, eps(target) - eps(source) + the noise that is consistent with x0, makes the new clean sample
    x0 + D(target) - D(source) in data predictions. Both branches share their noise.
    """
    if hasattr(process, "gamma"):
        raise PlanError("ddcm on a process with an observation", expected="an ordinary process")
    calls = Plan.trace(ddim, process, times, prediction=prediction).calls
    edited = x0
    for i, call in enumerate(calls):
        z, alpha, sigma = noise(), float(process.alpha(call.t)), float(process.sigma(call.t))
        x_source, x_target = alpha * x0 + sigma * z, alpha * edited + sigma * z
        edited = x0 + target(x_target, Time(call)) - source(x_source, Time(call))
        yield Step(i, edited, edited)


def implicit_inversion(
    process: Process, times: ArrayLike, *, iterations: int = 3, prediction: str = ""
) -> Plan:
    """DDIM inversion that DDIM undoes: each step solves for the state whose own prediction leads back.

    times       [steps + 1] rising, also from sigma 0; sample back with ddim on the same times reversed
    iterations  calls a step: fixed-point iteration, each call gaining about the same factor. RNRI (Samuel et al. 2023,
                arXiv:2312.12540) takes Newton's steps on this equation, for which a runtime has no gradients.
    Given array 0 is the clean sample.
    """

    def inverse(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
        alpha, sigma = process.alpha(times), process.sigma(times)
        for i, t in enumerate(times[1:].tolist()):
            a, s, a_next, s_next = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
            z = a_next / a * x
            for _ in range(iterations):
                x0 = denoise(z, t)
                eps = (z - a_next * x0) / s_next
                z = a_next / a * x + (s_next - s * a_next / a) * eps
            x = z
            yield Step(i, x, x0)

    if hasattr(process, "gamma"):
        raise PlanError("inversion of a process with an observation", expected="one without")
    table = Plan.trace(inverse, process, times, prediction=prediction, name="implicit_inversion")
    return replace(table, init=(("y", 0, 1.0),))
