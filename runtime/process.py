"""Forward processes: how data turns into noise.

Every process here is x_t = alpha(t) x_0 + sigma(t) noise, with t rising from clean (t = 0) to noise (t = t_max).
Notation is the DPM-Solver papers': lam = log(alpha / sigma) is half the log signal-to-noise ratio; it falls with t.
Times are float64 scalars or arrays; every method maps shape [...] to shape [...].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BadInput

Array = NDArray[Any]

__all__ = ["EDM", "DiscreteVP", "Process", "RectifiedFlow", "process_from_json"]


class Process(Protocol):
    """What samplers and plans need to know of a forward process."""

    @property
    def t_max(self) -> float: ...
    def alpha(self, t: ArrayLike) -> Array: ...
    def sigma(self, t: ArrayLike) -> Array: ...
    def t_of_lam(self, lam: ArrayLike) -> Array:
        """The inverse of lam(t); +inf maps to 0."""
        ...

    def timestep(self, t: ArrayLike) -> Array:
        """What the network is fed as its time input at time t."""
        ...

    def input_scale(self, t: ArrayLike) -> Array:
        """The network sees input_scale(t) * x_t."""
        ...

    def to_json(self) -> dict[str, Any]: ...


def observed(process: Process, t: float) -> float:
    """gamma(t) of a process with an observation, x_t = alpha x0 + gamma y + sigma noise; 0 for the others."""
    gamma = getattr(process, "gamma", None)
    return 0.0 if gamma is None else float(gamma(t))


def lam(process: Process, t: ArrayLike) -> Array:
    """Half the log signal-to-noise ratio, log(alpha / sigma); +inf where sigma is 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(process.alpha(t)) - np.log(process.sigma(t)))


@dataclass(frozen=True, eq=False)
class DiscreteVP:
    """Variance preserving with N trained noise levels (DDPM, Ho et al. 2020, arXiv:2006.11239).

    Time runs over [0, N]: t = i + 1 is trained level i, t = 0 is clean. Between levels log alpha is linear in t, as
    in DPM-Solver (Lu et al. 2022, arXiv:2206.00927, appendix D.4). The network's timestep is t - 1.
    """

    alphas_cumprod: Array
    """[N] float64, the product of 1 - beta up to each level; alpha is its square root."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """How the betas were made, when they have a short description; see `from_schedule`."""

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> DiscreteVP:
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2 or not (np.all(betas > 0) and np.all(betas <= 1)):
            raise BadInput(f"betas of shape {betas.shape}", expected="at least two numbers in (0, 1]")
        return cls(np.cumprod(1 - betas), {"betas": [float(b) for b in betas]})

    @classmethod
    def from_schedule(cls, name: str, beta_start: float, beta_end: float, levels: int) -> DiscreteVP:
        """The named beta schedules of the field: linear (DDPM), scaled_linear (latent diffusion), squaredcos_cap_v2.

        squaredcos_cap_v2 is the cosine schedule of Nichol and Dhariwal 2021 (arXiv:2102.09672, eq. 17), with betas
        capped at 0.999; it ignores beta_start and beta_end.
        """
        if levels < 2:
            raise BadInput(f"{levels} noise levels", expected="at least 2")
        if name == "linear":
            betas = np.linspace(beta_start, beta_end, levels)
        elif name == "scaled_linear":
            betas = np.linspace(beta_start**0.5, beta_end**0.5, levels) ** 2
        elif name == "squaredcos_cap_v2":
            s = np.cos((np.arange(levels + 1) / levels + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - s[1:] / s[:-1], 0.999)
        else:
            raise BadInput(f"beta schedule {name!r}", expected="linear, scaled_linear or squaredcos_cap_v2")
        source = {"beta_schedule": name, "beta_start": beta_start, "beta_end": beta_end, "levels": levels}
        return cls(np.cumprod(1 - betas), source)

    @property
    def t_max(self) -> float:
        return float(len(self.alphas_cumprod))

    def log_alpha(self, t: ArrayLike) -> Array:
        knots = np.concatenate([[0.0], 0.5 * np.log(np.maximum(self.alphas_cumprod, 1e-300))])
        return np.asarray(np.interp(np.asarray(t, dtype=np.float64), np.arange(len(knots)), knots))

    def alpha(self, t: ArrayLike) -> Array:
        return np.asarray(np.exp(self.log_alpha(t)))

    def sigma(self, t: ArrayLike) -> Array:
        return np.asarray(np.sqrt(-np.expm1(2 * self.log_alpha(t))))

    def t_of_lam(self, lam: ArrayLike) -> Array:
        # alpha = 1/sqrt(1 + exp(-2 lam)), computed as a log so that both ends keep their digits
        log_alpha = -0.5 * np.logaddexp(0.0, -2 * np.asarray(lam, dtype=np.float64))
        knots = np.concatenate([[0.0], 0.5 * np.log(np.maximum(self.alphas_cumprod, 1e-300))])
        return np.asarray(np.interp(-log_alpha, -knots, np.arange(len(knots), dtype=np.float64)))

    def timestep(self, t: ArrayLike) -> Array:
        return np.asarray(np.asarray(t, dtype=np.float64) - 1)

    def input_scale(self, t: ArrayLike) -> Array:
        return np.ones_like(np.asarray(t, dtype=np.float64))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "discrete_vp", **self.source}


@dataclass(frozen=True)
class EDM:
    """Variance exploding in the form of Karras et al. 2022 (EDM, arXiv:2206.00364): t is the noise level sigma."""

    sigma_min: float = 0.002
    """EDM, table 1."""
    sigma_max: float = 80.0
    """EDM, table 1."""
    sigma_data: float = 0.5
    """Standard deviation of the data the preconditioning assumes; EDM, table 1."""

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: ArrayLike) -> Array:
        return np.ones_like(np.asarray(t, dtype=np.float64))

    def sigma(self, t: ArrayLike) -> Array:
        return np.asarray(t, dtype=np.float64)

    def t_of_lam(self, lam: ArrayLike) -> Array:
        return np.asarray(np.exp(-np.asarray(lam, dtype=np.float64)))

    def timestep(self, t: ArrayLike) -> Array:
        """c_noise = ln(sigma) / 4 (EDM, table 1)."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(np.asarray(t, dtype=np.float64)) / 4)

    def input_scale(self, t: ArrayLike) -> Array:
        """c_in = 1 / sqrt(sigma^2 + sigma_data^2) (EDM, table 1)."""
        return np.asarray(1 / np.hypot(np.asarray(t, dtype=np.float64), self.sigma_data))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "edm",
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "sigma_data": self.sigma_data,
        }


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x_0 + t noise (Liu et al. 2022, arXiv:2209.03003); t in [0, 1].

    The network predicts the velocity noise - x_0 and is fed t * timestep_scale.
    """

    timestep_scale: float = 1000.0
    """SD3 and Flux feed 1000 t (diffusers FlowMatchEulerDiscreteScheduler)."""

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: ArrayLike) -> Array:
        return np.asarray(1 - np.asarray(t, dtype=np.float64))

    def sigma(self, t: ArrayLike) -> Array:
        return np.asarray(t, dtype=np.float64)

    def t_of_lam(self, lam: ArrayLike) -> Array:
        # sigma / (1 - sigma) = exp(-lam)
        return np.asarray(np.exp(-np.logaddexp(0.0, np.asarray(lam, dtype=np.float64))))

    def timestep(self, t: ArrayLike) -> Array:
        return np.asarray(np.asarray(t, dtype=np.float64) * self.timestep_scale)

    def input_scale(self, t: ArrayLike) -> Array:
        return np.ones_like(np.asarray(t, dtype=np.float64))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "rectified_flow", "timestep_scale": self.timestep_scale}


def process_from_json(data: Mapping[str, Any]) -> Process:
    """Read back what `to_json` wrote. Raises BadInput for an unknown kind, a missing field or a damaged one."""
    from .conditional import CONDITIONAL, conditional_from_json

    if not isinstance(data, Mapping):
        raise BadInput(f"a process that is a {type(data).__name__}", expected="its kind and fields")
    kind, fields = data.get("kind"), {key: value for key, value in data.items() if key != "kind"}
    for name, value in fields.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and name not in ("beta_schedule", "betas", "base"):
            raise BadInput(f"process {kind!r}: {name} is {value!r}"[:200], expected="a finite number")
        if kind in ("edm", "rectified_flow") and value <= 0:
            raise BadInput(f"process {kind!r}: {name} is {value!r}", expected="a number above 0")
    try:
        match kind:
            case "discrete_vp" if "betas" in fields:
                return DiscreteVP.from_betas(fields["betas"])
            case "discrete_vp":
                return DiscreteVP.from_schedule(
                    fields["beta_schedule"], fields["beta_start"], fields["beta_end"], fields["levels"]
                )
            case "edm":
                return EDM(**fields)
            case "rectified_flow":
                return RectifiedFlow(**fields)
            case str() if kind in CONDITIONAL:
                return conditional_from_json(kind, fields)
    except (KeyError, TypeError) as error:
        raise BadInput(f"process {kind!r} with fields {sorted(fields)}", expected=str(error)) from None
    known = f"discrete_vp, edm or rectified_flow, or {', '.join(CONDITIONAL)}"
    raise BadInput(f"process kind {kind!r}", expected=known)
