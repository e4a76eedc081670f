"""A problem whose exact solution is known: independent coordinates of a one-dimensional mixture."""

import math

import numpy as np

from fewstep.runtime import DiscreteVP, plan
from fewstep.tune.problem import Problem, long_run, spread

SD15 = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
MEANS, SPREADS, WEIGHTS = np.array([-1.1, 0.2, 1.3]), np.array([0.3, 0.2, 0.4]), np.array([0.3, 0.3, 0.4])
WIDTH = 3


def denoise(process, x, t):
    """E[x0 | x_t = x], elementwise."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    v = alpha**2 * SPREADS**2 + sigma**2
    d = x[..., None] - alpha * MEANS
    log_p = np.log(WEIGHTS) - 0.5 * np.log(v) - 0.5 * d**2 / v
    p = np.exp(log_p - log_p.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return (p * (MEANS + alpha * SPREADS**2 / v * d)).sum(-1)


def _cdf(x, alpha, sigma):
    z = (x[..., None] - alpha * MEANS) / np.sqrt(2 * (alpha**2 * SPREADS**2 + sigma**2))
    return (WEIGHTS * 0.5 * (1 + np.vectorize(math.erf)(z))).sum(-1)


def exact(process, x):
    """Where the probability flow takes x from t_max to clean: quantiles go onto quantiles."""
    target = _cdf(x, float(process.alpha(process.t_max)), float(process.sigma(process.t_max)))
    low, high = np.full_like(x, -9.0), np.full_like(x, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = _cdf(middle, 1.0, 0.0) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def mixture_problem(process, starts=16, fit=None, reference=0, seed=0):
    """`reference`: steps of the long run whose trajectories the problem keeps; 0 for none."""
    noise = np.random.default_rng(seed).standard_normal((starts, WIDTH))
    targets = exact(process, noise * spread(process, process.t_max))
    problem = Problem(
        process, lambda x, call, which: denoise(process, x, call.t), noise, targets, fit or starts // 2
    )
    return long_run(problem, plan("dpmpp_2m", reference, process)) if reference else problem
