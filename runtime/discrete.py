"""Forward processes over tokens: masked, uniform and discretised Gaussian. Samplers are in tokens.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BadInput
from .process import Array

__all__ = ["Gaussian", "Masked", "Tokens", "Uniform", "Uniforms"]

Tokens = NDArray[np.int64]
Uniforms = Callable[[tuple[int, ...]], Array]
"""shape -> float64 in [0, 1): `Noise(seed).rand` for one."""

MAX_LEVELS = 10_000
"""More trained levels than any published model has."""


@dataclass(frozen=True)
class Masked:
    """A token is kept with probability alpha(t) and is [MASK] otherwise. MDLM, Sahoo et al. 2024 <arXiv:2406.07524>.

    linear: alpha = 1 - t (MDLM). cosine: 1 - cos(pi (1 - t) / 2) (MD4, Shi et al. 2024, arXiv:2406.04329).
    """

    mask: int
    """The id of [MASK], which the network's prediction may or may not have a logit for."""
    schedule: str = "linear"
    kind: ClassVar[str] = "masked"
    t_max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        need(type(self.mask) is int and self.mask >= 0, f"mask {self.mask!r}", "a token id")
        need(self.schedule in ("linear", "cosine"), f"schedule {self.schedule!r}", "linear or cosine")

    def alpha(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return 1 - t if self.schedule == "linear" else np.asarray(1 - np.cos(np.pi / 2 * (1 - t)))

    def t_of_masked(self, share: ArrayLike) -> Array:
        """When the share 1 - alpha is masked."""
        share = np.asarray(share, dtype=np.float64)
        return share if self.schedule == "linear" else np.asarray(1 - np.arccos(share) * 2 / np.pi)

    def start(self, shape: tuple[int, ...], uniform: Uniforms) -> Tokens:
        return np.full(shape, self.mask, dtype=np.int64)


@dataclass(frozen=True)
class Uniform:
    """A token is kept with probability alpha(t) = 1 - t, else drawn anew. Austin et al. 2021, arXiv:2107.03006."""

    vocabulary: int
    kind: ClassVar[str] = "uniform"
    t_max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        need(
            type(self.vocabulary) is int and self.vocabulary >= 2,
            f"vocabulary {self.vocabulary!r}",
            "2 or more",
        )

    def alpha(self, t: ArrayLike) -> Array:
        return np.asarray(1 - np.asarray(t, dtype=np.float64))

    def start(self, shape: tuple[int, ...], uniform: Uniforms) -> Tokens:
        return np.asarray(np.floor(uniform(shape) * self.vocabulary), dtype=np.int64)

    def posterior(self, tokens: Tokens, p: Array, t: float, s: float) -> Array:
        """p(x_s | x_t), the Bayes posterior q(x_s | x_t, x_0) averaged over the prediction p of x_0. Equation 3."""
        k, a_t, a_s = self.vocabulary, float(self.alpha(t)), float(self.alpha(s))
        here = tokens[..., None] == np.arange(k)
        weight = p / (a_t * here + (1 - a_t) / k)  # p(x_0) / q(x_t | x_0)
        from_x0 = a_s * weight + (1 - a_s) / k * weight.sum(-1, keepdims=True)
        return np.asarray((a_t / a_s * here + (1 - a_t / a_s) / k) * from_x0)


@dataclass(frozen=True)
class Gaussian:
    """Ordinal tokens (pixels) that move to near values. Austin et al. 2021, appendix A.2.3 <arXiv:2107.03006>.

    t counts levels 1 to `levels`, betas linear as in Ho et al. 2020; the network is fed t - 1.
    """

    vocabulary: int = 256
    levels: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    kind: ClassVar[str] = "gaussian"
    _products: dict[tuple[int, int], Array] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        whole = type(self.vocabulary) is int and type(self.levels) is int
        need(
            whole and 2 <= self.vocabulary <= 4096 and 2 <= self.levels <= MAX_LEVELS,
            f"{self!r}",
            "2 to 4096 tokens",
        )
        need(0 < self.beta_start <= self.beta_end < math.inf, f"{self!r}", "betas above 0 that rise")

    @property
    def t_max(self) -> float:
        return float(self.levels)

    def step(self, level: int) -> Array:
        """Q_level [vocabulary, vocabulary]: symmetric, rows sum to 1."""
        k = self.vocabulary
        beta = self.beta_start + (self.beta_end - self.beta_start) * (level - 1) / (self.levels - 1)
        n = np.arange(-(k - 1), k)
        w = np.exp(-4.0 * n**2 / ((k - 1) ** 2 * beta))
        q = (w / w.sum())[np.abs(np.subtract.outer(np.arange(k), np.arange(k))) + k - 1]
        np.fill_diagonal(q, 0.0)
        np.fill_diagonal(q, 1 - q.sum(1))
        return np.asarray(q)

    def between(self, s: int, t: int) -> Array:
        """Q_{s+1} ... Q_t; remembered, and built on what is remembered."""
        done = max((u for r, u in self._products if r == s and u <= t), default=s)
        q = self._products[s, done] if done > s else np.eye(self.vocabulary)
        for level in range(done + 1, t + 1):
            q = q @ self.step(level)
        self._products[s, t] = q
        return q

    def start(self, shape: tuple[int, ...], uniform: Uniforms) -> Tokens:
        return np.asarray(np.floor(uniform(shape) * self.vocabulary), dtype=np.int64)

    def posterior(self, tokens: Tokens, p: Array, t: float, s: float) -> Array:
        bar_s, step = self.between(0, round(s)), self.between(round(s), round(t))
        weight = p / (bar_s @ step).T[tokens]
        return np.asarray(step.T[tokens] * (weight @ bar_s))


def need(good: Any, found: str, expected: str) -> None:
    if not good:
        raise BadInput(found, expected=expected)
