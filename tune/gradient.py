"""Fitting a learned plan by gradients through the unrolled run, where the denoiser is a torch function.

The same vector and the same sum of squares as fit.py, which needs no gradients but a few hundred calls a round: for
networks at hand as torch modules, or for thousands of starts in minibatches. Adam first, then L-BFGS on all starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..runtime.errors import MissingExtra, PlanError
from ..runtime.process import Array, Process
from .fit import FIRST_DAMPING, GUIDES, Fit, begin
from .learned import Coordinates
from .problem import Problem, spread

__all__ = ["TorchDenoise", "fit_gradient"]

TorchDenoise = Callable[[Any, Any, Array], Any]
"""(x_t, t, which start each sample comes from) -> estimate of x_0; t is a tensor of no dimensions that carries a
gradient, in the process's own time (a discrete network's timestep is t - 1)."""

ADAM_RATE = 0.01
"""Log-SNRs and shares are of order 1; Adam moves each by about this much a step."""


def fit_gradient(
    problem: Problem,
    denoise: TorchDenoise,
    at: Coordinates,
    vector: Array,
    *,
    guides: Sequence[float] = GUIDES,
    adam_steps: int = 100,
    lbfgs_steps: int = 20,
    minibatch: int | None = None,
    seed: int = 0,
) -> Iterator[Fit]:
    """Yields after every stage of Adam and of L-BFGS; the state's `best` is judged by the starts held out.

    minibatch  starts in one step of Adam; None for all that are fitted
    Raises MissingExtra without torch.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingExtra.of("torch", "export") from None
    if problem.trajectory is None:
        guides = (0.0,)
    rng = np.random.default_rng(seed)
    state = begin(problem, at, vector)
    theta = torch.tensor(state.vector, dtype=torch.float64, requires_grad=True)
    for stage, guide in enumerate(guides):
        adam = torch.optim.Adam([theta], lr=ADAM_RATE)
        before = theta.detach().clone()
        for _ in range(adam_steps):
            which = problem.fitted
            if minibatch is not None and minibatch < problem.fit:
                which = np.sort(rng.choice(which, minibatch, replace=False))
            adam.zero_grad()
            loss = unrolled(problem, denoise, at, theta, which, guide)
            loss.backward()
            adam.step()
            _keep_in_order(at, theta, before)
            before = theta.detach().clone()
        state = _judged(problem, at, replace(state, stage=stage, round=adam_steps), theta)
        yield state
        lbfgs = torch.optim.LBFGS(
            [theta], max_iter=lbfgs_steps, line_search_fn="strong_wolfe", tolerance_change=1e-12
        )

        def closure(lbfgs: Any = lbfgs, guide: float = guide) -> Any:
            lbfgs.zero_grad()
            loss = unrolled(problem, denoise, at, theta, problem.fitted, guide)
            if loss.requires_grad:
                loss.backward()
            else:  # times out of order: no gradient, and a line search goes back
                theta.grad = torch.zeros_like(theta)
            return loss

        lbfgs.step(closure)
        _keep_in_order(at, theta, before)
        state = _judged(problem, at, replace(state, stage=stage, done=guide == guides[-1]), theta)
        yield state


def unrolled(
    problem: Problem, denoise: TorchDenoise, at: Coordinates, theta: Any, which: Array, guide: float
) -> Any:
    """The sum of squares of fit.py as a torch scalar; infinite, without a gradient, for times out of order."""
    import torch

    process = at.process
    try:
        times, _ = at.decode(theta.detach().numpy())
    except PlanError:
        return torch.tensor(torch.inf, dtype=torch.float64)
    limits = torch.as_tensor(at.project(np.full(at.size, np.inf))[: at.calls - 1])
    lam = torch.minimum(theta[: at.calls - 1], limits)
    t = [float(times[0]), *(_time(process, value) for value in lam), at.end]
    alpha = [_function(process.alpha, value) for value in t]
    sigma = [_function(process.sigma, value) for value in t]
    free = dict(zip(at.shares, theta[at.calls - 1 :], strict=True))
    x = torch.as_tensor(problem.starts[which]) * spread(process, float(times[0]))
    target = torch.as_tensor(problem.targets[which])
    total: Any = 0.0
    seen: list[Any] = []
    for i in range(at.calls):
        seen.append(denoise(x, torch.as_tensor(t[i], dtype=torch.float64), which))
        kept = sigma[i + 1] / sigma[i]
        row = alpha[i + 1] - alpha[i] * kept
        newest: Any = 1.0
        x = kept * x
        for j in range(max(0, i + 1 - at.history), i):
            x = x + row * free[i, j] * seen[j]
            newest = newest - free[i, j]
        x = x + row * newest * seen[i]
        if i + 1 < at.calls and guide != 0 and problem.trajectory is not None:
            size = (alpha[i + 1] ** 2 + sigma[i + 1] ** 2) ** 0.5
            total = total + guide**2 * ((x / size - _reference(problem, t[i + 1], which)) ** 2).sum()
    return total + ((x - target) ** 2).sum()


def _linear(value: Any, at: Any, slope: Any) -> Any:
    """`value`, as a function with this slope of the tensor `at`: how numpy functions take part in a gradient."""
    import torch

    return torch.as_tensor(np.asarray(value)) + torch.as_tensor(np.asarray(slope)) * (at - at.detach())


def _differences(f: Callable[[float], Any], x: float, h: float) -> tuple[Any, Any]:
    return f(x), (np.asarray(f(x + h)) - np.asarray(f(x - h))) / (2 * h)


def _time(process: Process, lam: Any) -> Any:
    value, slope = _differences(lambda v: float(process.t_of_lam(v)), float(lam.detach()), 1e-6)
    return _linear(value, lam, float(slope))


def _function(f: Callable[[Any], Any], t: Any) -> Any:
    """alpha or sigma at a time that may be a tensor."""
    if isinstance(t, float):
        return float(f(t))
    where = float(t.detach())
    value, slope = _differences(lambda v: float(f(v)), where, 1e-6 * where)
    return _linear(value, t, float(slope))


def _reference(problem: Problem, t: Any, which: Array) -> Any:
    """The reference's state at time t over its spread; it moves with t too."""
    assert problem.trajectory is not None, "asked only where there is one"
    trajectory, where = problem.trajectory, float(t.detach())
    value, slope = _differences(lambda v: trajectory.unit(v, which), where, 1e-5 * where)
    return _linear(value, t, slope)


def _keep_in_order(at: Coordinates, theta: Any, before: Any) -> None:
    """Undo a step that brought times out of order, and hold them within their limit."""
    import torch

    moved = at.project(theta.detach().numpy())
    try:
        at.decode(moved)
    except PlanError:
        moved = before.numpy()
    with torch.no_grad():
        theta.copy_(torch.as_tensor(moved))


def _judged(problem: Problem, at: Coordinates, state: Fit, theta: Any) -> Fit:
    vector = theta.detach().numpy().copy()
    plan = at.plan(problem, vector)
    rmse = problem.score(plan, problem.held_out).rmse
    moved = tuple(vector.tolist())
    fitted = problem.score(plan, problem.fitted).rmse
    state = replace(state, vector=moved, fitted=fitted, damping=FIRST_DAMPING)
    return replace(state, best=moved, held_out=rmse) if rmse < state.held_out else state
