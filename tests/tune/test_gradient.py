"""Gradients through the unrolled plan and differences around it minimise the same function."""

import sys

import numpy as np
import pytest

from fewstep.runtime import EDM, RectifiedFlow, plan
from fewstep.runtime.errors import MissingExtra
from fewstep.tune.fit import begin, fit, loss, normal_equations
from fewstep.tune.gradient import fit_gradient, unrolled
from fewstep.tune.learned import Coordinates, table_of

from .mixture import MEANS, SD15, SPREADS, WEIGHTS, mixture_problem

torch = pytest.importorskip("torch")


def torch_denoiser(process):
    """tests/tune/mixture.py's denoiser; alpha and sigma as functions of t with their slopes."""
    mu, spread, weights = (torch.as_tensor(v) for v in (MEANS, SPREADS, WEIGHTS))

    def scalar(f, t):
        where, h = float(t.detach()), 1e-6 * max(float(t.detach()), 1e-3)
        slope = (float(f(where)) - float(f(where - h))) / h
        return float(f(where)) + slope * (t - t.detach())

    def denoise(x, t, which):
        alpha, sigma = scalar(process.alpha, t), scalar(process.sigma, t)
        v = alpha**2 * spread**2 + sigma**2
        d = x[..., None] - alpha * mu
        p = torch.softmax(weights.log() - 0.5 * v.log() - 0.5 * d**2 / v, -1)
        return (p * (mu + alpha * spread**2 / v * d)).sum(-1)

    return denoise


@pytest.mark.parametrize("process", [SD15, EDM(), RectifiedFlow()], ids=["vp", "edm", "flow"])
def test_both_see_the_same_loss_and_the_same_slope(process):
    problem = mixture_problem(process, starts=8, fit=6, reference=60)
    at = Coordinates(process, 4, 4)
    vector = at.encode(*table_of(plan("dpmpp_2m", 4, process), process))
    theta = torch.tensor(vector, requires_grad=True)
    total = unrolled(problem, torch_denoiser(process), at, theta, problem.fitted, 0.3)
    total.backward()
    _, slope, ours = normal_equations(problem, at, vector, 0.3)
    assert float(total.detach()) == pytest.approx(ours, rel=1e-9)
    assert theta.grad.numpy() == pytest.approx(2 * slope, rel=2e-3, abs=2e-3 * np.abs(slope).max())


def test_both_find_the_same_minimum():
    problem = mixture_problem(SD15, starts=12, fit=9, reference=60)
    at = Coordinates(SD15, 3, 3)
    vector = at.encode(*table_of(plan("dpmpp_2m", 3, SD15), SD15))
    *_, free = fit(problem, at, begin(problem, at, vector), (1.0,))
    *_, steep = fit_gradient(problem, torch_denoiser(SD15), at, vector, guides=(1.0,), lbfgs_steps=60)
    a, b = loss(problem, at, np.array(free.vector), 1.0)[0], loss(problem, at, np.array(steep.vector), 1.0)[0]
    assert b == pytest.approx(a, rel=0.02)
    assert steep.fitted == pytest.approx(free.fitted, rel=0.05)


def test_minibatches_lower_the_error_too():
    problem = mixture_problem(SD15, starts=24, fit=18, reference=60)
    at = Coordinates(SD15, 4, 4)
    vector = at.encode(*table_of(plan("ddim", 4, SD15), SD15))
    first = begin(problem, at, vector).held_out
    states = list(fit_gradient(problem, torch_denoiser(SD15), at, vector, guides=(1.0, 0.1), minibatch=6))
    assert states[-1].held_out < first / 2
    assert states[-1].done


def test_without_torch_the_extra_is_named(monkeypatch):
    problem = mixture_problem(SD15, starts=4, fit=3)
    at = Coordinates(SD15, 2, 2)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"fewstep\[export\]"):
        next(fit_gradient(problem, None, at, at.encode(*table_of(plan("ddim", 2, SD15), SD15))))
