"""Data whose ideal denoiser and exact probability flow are known, so that every error measured is the sampler's own."""

import math
from dataclasses import dataclass

import numpy as np

from fewstep.runtime import DiscreteVP, plan
from fewstep.runtime.process import lam

SD15 = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)


@dataclass(frozen=True)
class Mixture:
    """A one-dimensional Gaussian mixture. The probability flow moves quantiles onto quantiles, which makes it exact."""

    means: tuple[float, ...] = (-1.1, 0.2, 1.3)
    spreads: tuple[float, ...] = (0.5, 0.4, 0.6)
    weights: tuple[float, ...] = (0.3, 0.3, 0.4)

    def denoiser(self, process):
        """(x, t) -> E[x0 | x_t = x], elementwise."""
        mu, s2, w = (np.array(v) for v in (self.means, np.square(self.spreads), self.weights))

        def denoise(x, t):
            alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
            v = alpha**2 * s2 + sigma**2
            d = np.asarray(x)[..., None] - alpha * mu
            log_p = np.log(w) - 0.5 * np.log(v) - 0.5 * d**2 / v
            p = np.exp(log_p - log_p.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            return (p * (mu + alpha * s2 / v * d)).sum(-1)

        return denoise

    def _cdf(self, process, x, t):
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        z = [
            (np.asarray(x) - alpha * m) / math.sqrt(2 * (alpha**2 * s * s + sigma**2))
            for m, s in zip(self.means, self.spreads, strict=True)
        ]
        erf = np.vectorize(math.erf)
        return sum(w * 0.5 * (1 + erf(v)) for w, v in zip(self.weights, z, strict=True))

    def flow(self, process, x, t0, t1):
        """Where the probability flow takes x from time t0 to time t1, to 1e-14."""
        target = self._cdf(process, x, t0)
        low, high = np.full_like(x, -400.0), np.full_like(x, 400.0)
        for _ in range(90):
            middle = (low + high) / 2
            below = self._cdf(process, middle, t1) < target
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


GAUSSIAN = Mixture((0.3,), (0.6,), (1.0,))
MIXTURE = Mixture()


def even_in_lam(process, low, high):
    """times(steps) from `high` to `low`, even in log-SNR."""
    ends = lam(process, np.array([high, low]))
    return lambda steps: process.t_of_lam(np.linspace(*ends, steps + 1))


def errors(sampler, process, times_of, steps, data=MIXTURE):
    """RMS error at the last time for each number of steps, from a few starts."""
    denoise, found = data.denoiser(process), []
    for n in steps:
        times = times_of(n)
        spread = float(np.hypot(process.alpha(times[0]), process.sigma(times[0])))
        start = spread * np.array([-1.7, -0.6, 0.1, 0.9, 1.5])
        *_, last = plan(sampler, n, process, times).run(denoise, start, lambda: np.zeros(5))
        exact = data.flow(process, start, float(times[0]), float(times[-1]))
        found.append(float(np.sqrt(np.mean((last.x - exact) ** 2))))
    return found


def order(sampler, process, times_of, steps=(160, 320), data=MIXTURE):
    """The measured order of accuracy: how many halvings of the error a halving of the step brings."""
    coarse, fine = errors(sampler, process, times_of, steps, data)
    return math.log(coarse / fine) / math.log(steps[1] / steps[0])
