"""The teacher's step that consistency methods learn from: along its probability flow, or with noise as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model.libraries import torch
from ..model.training import Denoising, Turn
from ..runtime.errors import BadInput

__all__ = ["Solver", "stepped", "teacher_step"]

Tensor = Any


@dataclass(frozen=True)
class Solver:
    """How the teacher goes from one time of a grid to the next: a table of a recipe, [pcm.solver] for instance."""

    eta: float = 0.0
    """Noise put in on the way: 0 is DDIM, the flow of LCM and PCM; 1 is ancestral sampling. SCott (Liu et al. 2024,
    arXiv:2403.01505) takes such a stochastic solver as its teacher."""
    substeps: int = 1
    """Steps between the two times, even in time: calls of the teacher that a turn costs."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise BadInput(f"eta of a solver: {self.eta}", expected="from 0, no noise, to 1")
        if self.substeps < 1:
            raise BadInput(f"substeps of a solver: {self.substeps}", expected="at least 1")


def teacher_step(
    turn: Turn,
    denoising: Denoising,
    teacher: Any,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Mapping[str, Tensor],
    guidance: float | Tensor,
    solver: Solver,
) -> Tensor:
    """x_s from x_t by the guided teacher, without gradients. t, s are [batch] times, s below t."""
    th = torch()
    with th.no_grad():
        for k in range(solver.substeps):
            begin, end = (t + (s - t) * n / solver.substeps for n in (k, k + 1))
            x = stepped(turn, denoising, teacher, x, begin, end, condition, guidance, solver.eta)
    return x


def stepped(
    turn: Turn,
    denoising: Denoising,
    teacher: Any,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Mapping[str, Tensor],
    guidance: float | Tensor,
    eta: float,
) -> Tensor:
    """One step of DDIM with noise (Song et al. 2020, arXiv:2010.02502, equations 12 and 16), for any alpha and sigma.

    tau^2 = eta^2 sigma_s^2 / sigma_t^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) is the variance put in.
    """
    here = denoising.guided(teacher, x, t, condition, turn.batch.nothing, guidance)
    if not eta:
        return denoising.ddim(here, s)
    (_, sigma_t), (alpha_s, sigma_s) = denoising.signal(t), denoising.signal(s)
    _, fresh = denoising.onward(s, t)
    tau = eta * sigma_s / sigma_t * fresh
    kept = (sigma_s.square() - tau.square()).clamp(min=0).sqrt()
    return alpha_s * here.x0 + kept * here.noise + tau * turn.normal(x)
