"""Forward processes with an observation y: restoration, enhancement, bridges, priors made from the data.

x_t = alpha(t) x_0 + gamma(t) y + sigma(t) noise, where y is what the caller has (a degraded image, noisy speech), in
the network's own space. Plan.trace lets every sampler work on x_t - gamma y, an ordinary process; y is given array 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .errors import BadInput
from .process import Array, DiscreteVP, Process, lam, process_from_json

Coefficients = tuple[Array, Array, Array]


class Conditional(Protocol):
    """What conditional processes share; each gives its coefficients."""

    kind: ClassVar[str]
    """Its name in JSON."""
    discrete: ClassVar[bool] = True
    """Only whole times are trained levels."""
    first: ClassVar[float] = 1.0
    """The time whose network timestep is 0."""
    additive: ClassVar[bool] = False
    """The process's own Markov chain adds to the state; the others shrink it, as alpha says."""

    def __post_init__(self) -> None:
        _check(self)

    def coefficients(self, t: Array) -> Coefficients:
        """(alpha, gamma, sigma) at t."""
        ...

    def decay(self, t: ArrayLike) -> Array:
        """What is left at t of a change made at time 0, in the process's own Markov chain."""
        return self.alpha(t) ** (not self.additive)

    @property
    def t_max(self) -> float:
        return float(getattr(self, "levels", 1))

    def alpha(self, t: ArrayLike) -> Array:
        return np.asarray(self.coefficients(np.asarray(t, dtype=np.float64))[0])

    def gamma(self, t: ArrayLike) -> Array:
        return np.asarray(self.coefficients(np.asarray(t, dtype=np.float64))[1])

    def sigma(self, t: ArrayLike) -> Array:
        return np.asarray(self.coefficients(np.asarray(t, dtype=np.float64))[2])

    def t_of_lam(self, lam: ArrayLike) -> Array:
        return _t_of_lam(self, lam)

    def timestep(self, t: ArrayLike) -> Array:
        return np.asarray(np.asarray(t, dtype=np.float64) - self.first)

    def input_scale(self, t: ArrayLike) -> Array:
        return np.ones_like(np.asarray(t, dtype=np.float64))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]


@dataclass(frozen=True)
class ResidualShift(Conditional):
    """ResShift: N(x0 + eta (y - x0), kappa^2 eta I). Yue et al. 2023 <arXiv:2307.12348>.

    The root of eta rises geometrically in a warped time, from min(min_noise / kappa, min_noise) to root_end; between
    levels it is linear in t, down to 0 at clean. The defaults are the authors' four-step model.
    """

    levels: int = 4
    kappa: float = 2.0
    power: float = 0.3
    root_end: float = 0.99
    min_noise: float = 0.2
    kind: ClassVar[str] = "residual_shift"
    additive: ClassVar[bool] = True

    @cached_property
    def _roots(self) -> Array:
        first = min(self.min_noise / self.kappa, self.min_noise)
        warped = np.linspace(0, 1, self.levels) ** self.power
        return np.concatenate([[0.0], first * (self.root_end / first) ** warped])

    def coefficients(self, t: Array) -> Coefficients:
        root = np.interp(t, np.arange(self.levels + 1), self._roots)
        return 1 - root**2, root**2, self.kappa * root

    def input_scale(self, t: ArrayLike) -> Array:
        return np.asarray(1 / np.hypot(self.sigma(t), 1.0))


@dataclass(frozen=True)
class ResidualDenoising(Conditional):
    """RDDM: x0 + a (y - x0) + b noise. Liu et al. 2023 <arXiv:2308.13712>.

    a sums weights that fall linearly with the level, b^2 weights that rise, to sum_scale at the end (0.01 for
    restoration; 1 for generation, where y is 0). Of a network with two heads the residual's is the output.
    """

    levels: int = 1000
    sum_scale: float = 0.01
    kind: ClassVar[str] = "residual_denoising"
    additive: ClassVar[bool] = True

    def coefficients(self, t: Array) -> Coefficients:
        total, left = self.levels * (self.levels + 1), self.levels - t
        sigma = np.sqrt(self.sum_scale * t * (t + 1) / total)
        return left * (left + 1) / total, t * (t + 1 + 2 * left) / total, sigma


@dataclass(frozen=True)
class Resfusion(Conditional):
    """Resfusion: a DDPM on x - R, with R = y - x0. Shi et al. 2023 <arXiv:2311.14900>, equations 20 and 24.

    With s the DDPM's alpha, x_t = s x0 + (1 - s) R + sqrt(1 - s^2) noise. Where s is 1/2, x0 is gone from the mean: the
    chain starts there. steps is the length of the full schedule of betas, 0.1/steps to 20/steps; 12 leaves 5 levels,
    20 leaves 8. The authors leave a last s that is less than 0.01 below 1/2; here it is moved onto 1/2 as well.
    """

    steps: int = 12
    kind: ClassVar[str] = "resfusion"

    @cached_property
    def _vp(self) -> DiscreteVP:
        beta = np.linspace(0.1 / self.steps, 20 / self.steps, self.steps)
        total = np.cumprod(np.maximum(1 - beta, 0.0))
        top = int(np.argmax(total <= 0.25))
        above, below = np.sqrt(total[top - 1]) - 0.5, 0.5 - np.sqrt(total[top])
        if above < below <= 0.01:  # the level before is nearer to 1/2, and the authors start there
            return DiscreteVP(total[:top])
        return DiscreteVP(np.append(total[:top], 0.25))

    @property
    def t_max(self) -> float:
        return self._vp.t_max

    def coefficients(self, t: Array) -> Coefficients:
        s = self._vp.alpha(t)
        return np.maximum(2 * s - 1, 0.0), 1 - s, self._vp.sigma(t)

    def decay(self, t: ArrayLike) -> Array:
        return self._vp.alpha(t)

    def resnoise(self, t: float) -> tuple[float, float, float]:
        """(a, b, c) with x0 = a x + b output + c y for a network trained on equation 24, noise + k R."""
        alpha, gamma, sigma = (float(c) for c in self.coefficients(np.asarray(t)))
        # the level's own alpha, its root
        root = math.exp(self._vp.log_alpha(t) - self._vp.log_alpha(max(t - 1, 0.0)))
        k = sigma / (1 + root)  # (1 - root) sigma / beta, with beta = 1 - root^2
        total = alpha + sigma * k
        return 1 / total, -sigma / total, (sigma * k - gamma) / total


@dataclass(frozen=True)
class MeanReverting(Conditional):
    """IR-SDE: mean y + (x0 - y) a, variance spread^2 (1 - a^2). Luo et al. 2023 <arXiv:2301.11699>.

    a falls from 1 to `end`; its logarithm follows the authors' cosine schedule. The network is fed levels from 1 up.
    """

    levels: int = 100
    spread: float = 10 / 255
    """Standard deviation in the end; the authors' 10 of 255 grey levels, for images in 0..1."""
    end: float = 0.005
    """The authors' eps."""
    kind: ClassVar[str] = "mean_reverting"
    first: ClassVar[float] = 0.0

    @cached_property
    def _log_alpha(self) -> Array:
        # 0.008: Nichol and Dhariwal 2021, equation 17; the authors drop the first and the last of levels + 3 knots
        c = np.cos((np.arange(self.levels + 3) / (self.levels + 2) + 0.008) / 1.008 * np.pi / 2) ** 2
        theta = np.cumsum(1 - c[1:-1] / c[0])
        return np.asarray((theta - theta[0]) / (theta[-1] - theta[0]) * math.log(self.end))

    def coefficients(self, t: Array) -> Coefficients:
        log_alpha = np.interp(t, np.arange(self.levels + 1), self._log_alpha)
        return np.exp(log_alpha), -np.expm1(log_alpha), self.spread * np.sqrt(-np.expm1(2 * log_alpha))


@dataclass(frozen=True)
class OUVE(Conditional):
    """SGMSE: drift stiffness (y - x), rising noise. Richter et al. 2022 <arXiv:2208.05830>.

    t in [0, 1]. StoRM (Lemercier et al. 2022, arXiv:2212.11851) gives its predictor's estimate as y.
    """

    stiffness: float = 1.5
    sigma_min: float = 0.05
    sigma_max: float = 0.5
    kind: ClassVar[str] = "ouve"
    discrete: ClassVar[bool] = False
    first: ClassVar[float] = 0.0

    def coefficients(self, t: Array) -> Coefficients:
        drift, log_r = self.stiffness * t, math.log(self.sigma_max / self.sigma_min)
        rate = self.stiffness + log_r
        grown = np.exp(-2 * drift) * np.expm1(2 * rate * t)  # r^2t - exp(-2 drift), exact for small t too
        return np.exp(-drift), -np.expm1(-drift), self.sigma_min * np.sqrt(grown * log_r / rate)


@dataclass(frozen=True)
class SchroedingerBridge(Conditional):
    """Bridge-TTS with alpha 1 and linear g^2. Chen et al. 2023 <arXiv:2312.03491>.

    With v(t) the integral of g^2 from 0 to t and w(t) from t to 1: mean (w x0 + v y) / (v + w), variance v w / (v + w).
    At t = 1 nothing is left but y, which tells no solver where to go: the bridge starts just below.
    """

    beta_0: float = 0.01
    beta_1: float = 50.0
    start: float = 0.9999
    kind: ClassVar[str] = "schroedinger_bridge"
    discrete: ClassVar[bool] = False
    first: ClassVar[float] = 0.0

    @property
    def t_max(self) -> float:
        return self.start

    def coefficients(self, t: Array) -> Coefficients:
        slope = self.beta_1 - self.beta_0
        v, w = t * (self.beta_0 + slope * t / 2), (1 - t) * (self.beta_0 + slope * (1 + t) / 2)
        return w / (v + w), v / (v + w), np.sqrt(v * w / (v + w))


@dataclass(frozen=True)
class DataPrior(Conditional):
    """PriorGrad: the base process runs on x0 - y, with y the prior's mean. Lee et al. 2021 <arXiv:2106.06406>.

    The network sees alpha (x0 - y) + sigma noise. Where the prior is not of unit variance, whoever runs the plan
    multiplies the start noise and every fresh noise by its standard deviation, elementwise.
    """

    base: Process
    kind: ClassVar[str] = "data_prior"

    def __post_init__(self) -> None:
        if hasattr(self.base, "gamma"):
            raise BadInput("a prior on a process with an observation", expected="an ordinary process as base")

    @property
    def t_max(self) -> float:
        return self.base.t_max

    def coefficients(self, t: Array) -> Coefficients:
        return self.base.alpha(t), -self.base.alpha(t), self.base.sigma(t)

    def timestep(self, t: ArrayLike) -> Array:
        return self.base.timestep(t)

    def input_scale(self, t: ArrayLike) -> Array:
        return self.base.input_scale(t)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "base": self.base.to_json()}


_NUMBERS = (ResidualShift, ResidualDenoising, Resfusion, MeanReverting, OUVE, SchroedingerBridge)
CONDITIONAL: dict[str, Any] = {kind.kind: kind for kind in (*_NUMBERS, DataPrior)}
"""Every conditional process by its name in JSON."""


def conditional_from_json(kind: str, data: Mapping[str, Any]) -> Process:
    """Read what `to_json` wrote. Raises BadInput for a missing or extra field, one not of its type or range."""
    names = [field.name for field in fields(CONDITIONAL[kind])]
    if sorted(data) != sorted(names):
        raise BadInput(f"process {kind!r} with fields {sorted(data)}", expected=", ".join(names))
    if kind == DataPrior.kind:
        return DataPrior(process_from_json(data["base"]))
    process: Process = CONDITIONAL[kind](**data)
    return process


def _t_of_lam(process: Process, target: ArrayLike) -> Array:
    """lam falls with t: cut [0, t_max] in 64 until float64 is spent. +inf maps to 0; beyond the noisy end, t_max."""
    target = np.asarray(target, dtype=np.float64)
    low, width = np.zeros_like(target), np.full_like(target, process.t_max)
    cuts = np.arange(1, 64) / 64
    for _ in range(11):  # 66 bits: the 53 of float64, also of a t a thousandth of t_max
        cleaner = lam(process, low[..., None] + width[..., None] * cuts) > target[..., None]
        low, width = low + width * cleaner.sum(-1) / 64, width / 64
    t = np.where(target <= lam(process, process.t_max), process.t_max, low + width)
    return np.asarray(np.where(target == np.inf, 0.0, t))


def _check(process: Any) -> None:
    """Every field a positive finite number, whole where it counts levels; and together a process that gets noisier."""
    for field in fields(process):
        value, whole = getattr(process, field.name), field.type == "int"
        if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < math.inf:
            what = "a whole number above 0" if whole else "a number above 0"
            raise BadInput(f"{process.kind}: {field.name} is {value!r}", expected=what)
    levels = getattr(process, "levels", getattr(process, "steps", 2))
    with np.errstate(invalid="ignore"):
        falls = (
            2 <= levels <= MAX_LEVELS and np.diff(lam(process, process.t_max * np.linspace(0.2, 1, 5))) < 0
        )
    if not np.all(falls):
        raise BadInput(f"{process!r}"[:200], expected=f"2 to {MAX_LEVELS} levels, noise that rises with t")


MAX_LEVELS = 10_000
"""More trained noise levels than any published model has; a larger number is a typing error."""
