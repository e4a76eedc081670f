"""UniPC: a predictor, and a corrector of one order more that costs no network call; with DC-Solver's compensation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..errors import PlanError
from ..process import Array, Process
from .dpmpp import midpoint
from .exponential import Integrator, Point, Rule, choose, first, taylor
from .step import Denoise, Noise, Step


def bh1(lam_t: float, lam: Sequence[float]) -> Array:
    """Two points, their difference weighted by B(h)/2 with B(h) = h."""
    h = lam_t - lam[0]
    r = (lam[1] - lam[0]) / h
    m0, m1 = np.eye(2)
    return np.asarray(-np.expm1(-h) * m0 + h / 2 * (m1 - m0) / r)


VARIANTS: dict[str, Rule] = {"bh1": bh1, "bh2": midpoint}
"""By B(h); with the data prediction's B(h) = e^-h - 1, bh2 is DPM-Solver++'s midpoint."""


def unipc(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    disable_corrector: Collection[int] = (),
    lower_order_final: bool = True,
    noise_prediction: bool = False,
    ratios: Sequence[float] = (),
) -> Iterator[Step]:
    """UniPC, multistep. Zhao et al. 2023, algorithms 1 and 2 <arXiv:2302.04867>.

    order     of the predictor, 1 to 3; the corrector has one more. The paper takes 2 with guidance, 3 without
    variant   "bh1" or "bh2", the function B(h). It matters with two points alone, where the paper fixes the coefficient
              at 1/2; with more points B(h) cancels, and the weights are the Taylor ones
    corrector, disable_corrector   switch the correction off, for all or the given steps: the first ones under strong
              guidance (diffusers)
    lower_order_final   the order at most the number of steps left
    ratios    DC-Solver's, one a step: see dc_solver

    A step yields what the network sees next, the state before its correction: x + S (w_c - w_p) m takes it to the
    corrected one, which is where the next step starts. A step of infinite length is not corrected.
    """
    if order not in (1, 2, 3):
        raise PlanError(f"UniPC of order {order}", expected="1, 2 or 3")
    two = choose("variant", variant, VARIANTS)
    if ratios and len(ratios) != len(times) - 1:
        raise PlanError(f"{len(ratios)} ratios", expected=f"{len(times) - 1}, one for each step")
    rules = (first, two, taylor, taylor)
    integrator = Integrator.of(process, times, noise_prediction=noise_prediction)
    past: list[Point] = []
    p = 0
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        new = integrator.point(i, x, x0)
        if corrector and i > 0 and i - 1 not in disable_corrector and integrator.finite(i - 1, i):
            corrected = integrator.weights(i, [*past[:p], new], rules[p])
            predicted = [*integrator.weights(i, past[:p], rules[p - 1]), 0.0]
            for w_c, w_p, point in zip(corrected, predicted, [*past[:p], new], strict=True):
                x = x + (w_c - w_p) * point.q
        past = [new, *past][:3]
        if ratios and ratios[i] != 1:
            past[0] = compensated(past, times, ratios[i])
        p = integrator.points(i, order, lower_order_final)
        x = integrator.step(x, i + 1, past[:p], rules[p - 1], noise)
        yield Step(i, x, x0)


def unipc_3(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, variant: str = "bh1"
) -> Iterator[Step]:
    """UniPC with a predictor of order 3, the paper's choice without guidance; see unipc."""
    return unipc(denoise, process, x, times, noise, order=3, variant=variant)


def compensated(past: Sequence[Point], times: Array, ratio: float) -> Point:
    """The newest prediction replaced by where a parabola in t through the last three has it, at
    t' = t_prev + ratio (t_last - t_prev). Zhao et al. 2024 <arXiv:2409.03755>."""
    if len(past) < 3:
        raise PlanError(
            "a ratio other than 1 in the first two steps", expected="three predictions to draw on"
        )
    t = [float(times[point.i]) for point in past]
    at = t[1] + ratio * (t[0] - t[1])
    weights = [np.prod([(at - b) / (a - b) for b in t if b != a]) for a in t]
    x0, q = (
        weights[0] * a + weights[1] * b + weights[2] * c
        for a, b, c in ([point.x0 for point in past], [point.q for point in past])
    )
    return Point(past[0].i, x0, q)


def dc_solver(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    guidance: float = 7.5,
    ratios: Sequence[float] | None = None,
    order: int = 2,
    variant: str = "bh2",
    disable_corrector: Collection[int] = (0,),
) -> Iterator[Step]:
    """DC-Solver: UniPC with dynamic compensation. Zhao et al. 2024 <arXiv:2409.03755>.

    The corrected state and the prediction made before the correction do not belong together; each step's prediction is
    moved by a ratio before it is used and remembered. A moved prediction rests on the moved ones before it, so that
    rows grow by a term a step; ratios of 1 move nothing.

    guidance  of the sampling, to look up the ratios fitted for Stable Diffusion 2.1 in dc_ratios
    ratios    one a step, for instance searched for the model at hand; the first two are 1
    """
    ratios = dc_ratios(guidance, len(times) - 1) if ratios is None else ratios
    return unipc(
        denoise,
        process,
        x,
        times,
        noise,
        order=order,
        variant=variant,
        disable_corrector=disable_corrector,
        ratios=ratios,
    )


def dc_ratios(guidance: float, calls: int) -> tuple[float, ...]:
    """Compensation ratios by cascade polynomial regression. Zhao et al. 2024 <arXiv:2409.03755>.

    A cubic in step/calls, whose coefficients are quadratics in guidance/12, whose coefficients are quadratics in
    calls/50; fitted for 5 to 25 calls. More calls get none, ratio 1; the polynomial is held within [0.3, 1.7], since it
    runs away.
    """
    if calls > 25:
        return (1.0,) * calls
    powers = np.array([2, 1, 0])
    step = np.arange(1, calls + 1) / calls
    by_guidance = _CPR_SD21 @ ((calls / 50) ** powers) @ ((guidance / 12) ** powers)
    found = np.clip(np.polynomial.polynomial.polyval(step, by_guidance), 0.3, 1.7)
    return (1.0,) * min(calls, 2) + tuple(found[2:].tolist())


# Coefficients of dc_ratios for Stable Diffusion 2.1, from the authors' cpr_coeffs_path/sd2.1.npy: [power of step/calls,
# power 2 to 0 of guidance/12, power 2 to 0 of calls/50].
_CPR_SD21 = np.array(
    [
        [1523.67661966, -1111.47464508, 198.38349618],
        [-1346.08900228, 1007.19494126, -186.25475774],
        [168.39730243, -128.03894894, 24.88478975],
        [-8140.64401858, 5906.74827912, -1035.99411231],
        [6941.4138994, -5193.98065982, 950.3205653],
        [-848.21046751, 650.69033333, -121.28674277],
        [13309.27038462, -9616.67032053, 1668.76859621],
        [-11037.10779439, 8256.66668566, -1503.79920359],
        [1293.97404351, -999.56293282, 188.22170414],
        [-6747.42182161, 4853.15305335, -835.51167928],
        [5489.11518378, -4096.89721821, 743.09534131],
        [-619.56127633, 480.14971466, -90.89633129],
    ]
).reshape(4, 3, 3)
