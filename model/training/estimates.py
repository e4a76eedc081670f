"""Denoising in torch: what a network's output says about clean data and noise, in the symbols of the samplers.

Times are the process's own (DiscreteVP: 0 is clean, i + 1 is trained level i), tensors [batch]; samples are tensors
[batch, ...]. Everything but the network itself is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime.errors import BadInput
from ...runtime.process import Process
from ..libraries import torch
from ..model import Model

__all__ = ["Denoising", "Estimate"]

Tensor = Any
Network = Callable[..., Any]

READ = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Estimate:
    """What a network makes of a sample: x = alpha x0 + sigma noise."""

    x0: Tensor
    noise: Tensor


@dataclass(frozen=True, eq=False)
class Denoising:
    """How the network of a model is called, and its output read. Raises BadInput for a process it does not know."""

    process: Process
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in READ or hasattr(self.process, "gamma"):
            raise BadInput(
                f"training for prediction {self.prediction!r} of {type(self.process).__name__}",
                expected=f"{', '.join(READ)} of a process without an observation",
            )

    @classmethod
    def of(cls, model: Model) -> Denoising:
        return cls(model.process, model.prediction)

    def signal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), [batch, 1, 1, 1] each."""
        return self._number(self.process.alpha, t), self._number(self.process.sigma, t)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A sample of q(x_t | x0)."""
        alpha, sigma = self.signal(t)
        return alpha * x0 + sigma * noise

    def onward(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_s) = N(ratio x_s, fresh^2) for t >= s: ratio and fresh, [batch, 1, 1, 1] each."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.signal(s), self.signal(t)
        ratio = alpha_t / alpha_s
        return ratio, (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at x_t = alpha x0 + sigma noise."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        if self.prediction == "flow":
            return noise - x0
        alpha, sigma = self.signal(t)
        return alpha * noise - sigma * x0

    def output(self, network: Network, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The network's own answer in float32."""
        th = torch()
        timestep = th.as_tensor(self.process.timestep(t.cpu().numpy()), dtype=th.float32, device=x.device)
        scale = self._number(self.process.input_scale, t)
        output = network(x * scale, timestep, *condition.values())
        return (output[0] if isinstance(output, tuple) else output).float()

    def __call__(
        self, network: Network, x: Tensor, t: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Estimate:
        """condition: the network's further inputs by name, in its order."""
        return self.read(self.output(network, x, t, condition or {}), x, t)

    def read(self, output: Tensor, x: Tensor, t: Tensor) -> Estimate:
        """An output at (x, t) as clean data and noise."""
        alpha, sigma = self.signal(t)
        if self.prediction == "epsilon":
            return Estimate((x - sigma * output) / alpha, output)
        if self.prediction == "sample":
            return Estimate(output, (x - alpha * output) / sigma)
        if self.prediction == "flow":
            return Estimate(x - sigma * output, x + alpha * output)
        return Estimate(alpha * x - sigma * output, sigma * x + alpha * output)

    def guided(
        self,
        network: Network,
        x: Tensor,
        t: Tensor,
        condition: Mapping[str, Tensor],
        nothing: Mapping[str, Tensor] | None,
        scale: float | Tensor,
    ) -> Estimate:
        """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) in one call of twice the batch.

        scale  1 is none, as in diffusers; a tensor [batch] has its own for every sample. Without `nothing` the
               condition alone speaks
        """
        if nothing is None or (isinstance(scale, int | float) and scale == 1):
            return self(network, x, t, condition)
        th = torch()
        both = {name: th.cat([nothing[name], condition[name]]) for name in condition}
        plain, told = self.output(network, th.cat([x, x]), th.cat([t, t]), both).chunk(2)
        w = scale if isinstance(scale, int | float) else scale.view(-1, *[1] * (x.ndim - 1))
        return self.read(plain + w * (told - plain), x, t)

    def ddim(self, estimate: Estimate, s: Tensor) -> Tensor:
        """The sample at time s on the straight way of an estimate: DDIM (Song et al. 2020, arXiv:2010.02502)."""
        return self.noised(estimate.x0, estimate.noise, s)

    def _number(self, of: Callable[[Any], Any], t: Tensor) -> Tensor:
        th = torch()
        values = th.as_tensor(of(t.detach().cpu().numpy()), dtype=th.float32, device=t.device)
        return values.view(-1, 1, 1, 1)
