"""Networks that tell a student's samples from real ones: a denoiser's own encoder, and a small head on its middle.

Denoisers know their noise levels and conditions, and need no decoder to judge latents (SDXL-Lightning, Lin et al. 2024,
arXiv:2402.13929, section 3.2; DMD2, arXiv:2405.14867, section 4.3). Imported only where torch is already needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..model.model import Model
from ..model.training import Denoising
from ..runtime.errors import BadInput
from .features import stages

__all__ = ["Discriminator", "Head", "Opinion", "middle", "network_inputs", "opinion", "seen_at", "verdict"]

Tensor = Any
Module = Any

GROUPS, TOGETHER = 32, 16
"""Groups of the head's normalization, as in SDXL-Lightning, fewer where less than so many channels would share one:
a channel alone on a map of one cell is always zero."""


def middle(network: Module) -> str:
    """The path of the module whose output is judged: a U-Net's innermost one, a transformer's middle block.

    Raises BadInput for a network that has neither.
    """
    found = list(stages(network))
    inner = [name for name in found if name.endswith("mid_block")]
    down = [name for name in found if "down_blocks" in name]
    if not found:
        raise BadInput(
            "a critic for a network without stages",
            expected="a U-Net or a transformer of diffusers",
            fix="set critic to 0",
        )
    return inner[0] if inner else down[-1] if down else found[(len(found) - 1) // 2]


def spread(feature: Tensor) -> Tensor:
    """[batch, tokens, channels] of a transformer as [batch, channels, height, width]; a U-Net's as they are."""
    if feature.ndim == 4:
        return feature
    side = math.isqrt(feature.shape[1])
    height = side if side * side == feature.shape[1] else 1
    return feature.transpose(1, 2).unflatten(2, (height, -1))


class _Reached(Exception):
    """The middle was reached: what comes after it is not needed."""


def seen_at(network: Module, where: str, inputs: Sequence[Tensor], *, stop: bool) -> tuple[Any, Tensor]:
    """(the network's output, the feature [batch, channels, height, width] at `where`); with `stop` no output, and
    nothing behind `where` is computed."""
    kept: list[Tensor] = []

    def keep(module: Module, given: Any, output: Any) -> None:
        feature = output[0] if isinstance(output, tuple) else output
        kept.append(spread(feature))
        if stop:
            raise _Reached

    hook = dict(network.named_modules())[where].register_forward_hook(keep)
    try:
        output = network(*inputs)
    except _Reached:
        output = None
    finally:
        hook.remove()
    return output, kept[0]


class Head(torch.nn.Module):  # type: ignore[misc]
    """[batch, channels, height, width] -> [batch]: halved by 4x4 convolutions while it can be, then averaged."""

    def __init__(self, channels: int, width: int, size: int) -> None:
        super().__init__()
        groups = max(n for n in range(1, GROUPS + 1) if width % n == 0 and (width // n >= TOGETHER or n == 1))
        layers: list[Module] = []
        while size >= 2 or not layers:
            kernel, stride, margin = (4, 2, 1) if size >= 2 else (1, 1, 0)
            layers += [
                torch.nn.Conv2d(channels, width, kernel, stride, margin),
                torch.nn.GroupNorm(groups, width),
                torch.nn.SiLU(),
            ]
            channels, size = width, size // 2
        self.layers = torch.nn.Sequential(*layers)
        self.last = torch.nn.Linear(width, 1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.last(self.layers(feature).mean((2, 3))).squeeze(1)


class Opinion(torch.nn.Module):  # type: ignore[misc]
    """A denoiser that also says how real its sample looks: (output, [batch] logits)."""

    def __init__(self, network: Module, where: str, head: Head) -> None:
        super().__init__()
        self.network, self.where, self.head = network, where, head

    @classmethod
    def of(cls, network: Module, model: Model) -> Opinion:
        """Around a network that is called as the model's denoiser. Raises BadInput as `middle` does."""
        where = middle(network)
        shape = tried(network, where, model)
        return cls(network, where, Head(shape[1], shape[1], min(shape[2:])))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output, feature = seen_at(self.network, self.where, inputs, stop=False)
        return output[0] if isinstance(output, tuple) else output, self.head(feature)


class Discriminator(torch.nn.Module):  # type: ignore[misc]
    """The encoder of a denoiser, and a head that sees one sample or several of the same condition together."""

    def __init__(self, network: Module, where: str, head: Head) -> None:
        super().__init__()
        self.network, self.where, self.head = network, where, head

    @classmethod
    def of(cls, network: Module, model: Model, looks: int, *, frozen: bool = False) -> Discriminator:
        """With a copy of the network, which learns too unless frozen.

        looks  how many samples are judged together: 2 for a step's start and end
        Raises BadInput as `middle` does.
        """
        network = copy.deepcopy(network)
        where = middle(network)
        shape = tried(network, where, model)
        network.requires_grad_(False)
        if not frozen:
            for module in _called(network, where, model):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
        return cls(network, where, Head(looks * shape[1], shape[1], min(shape[2:])))

    def forward(self, condition: Sequence[Tensor], *looks: Tensor) -> Tensor:
        """[batch] logits; looks: sample, timestep, sample, timestep, ..."""
        found = [
            seen_at(self.network, self.where, (x, t, *condition), stop=True)[1]
            for x, t in zip(looks[::2], looks[1::2], strict=True)
        ]
        return self.head(torch.cat(found, 1))


def opinion(
    denoising: Denoising, critic: Module, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]
) -> Tensor:
    """[batch] logits of an Opinion about x at process time t."""
    return critic(*network_inputs(denoising, x, t), *condition.values())[1].float()


def verdict(
    denoising: Denoising,
    critic: Module,
    looks: Sequence[tuple[Tensor, Tensor]],
    condition: Mapping[str, Tensor],
) -> Tensor:
    """[batch] logits of a Discriminator about samples (x, t) seen together."""
    flat = [tensor for x, t in looks for tensor in network_inputs(denoising, x, t)]
    return critic(list(condition.values()), *flat).float()


def network_inputs(denoising: Denoising, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sample and time as networks take them."""
    times = t.detach().cpu().numpy()
    scale = torch.as_tensor(denoising.process.input_scale(times), dtype=torch.float32, device=x.device)
    timestep = torch.as_tensor(denoising.process.timestep(times), dtype=torch.float32, device=x.device)
    return x * scale.view(-1, 1, 1, 1), timestep


def tried(network: Module, where: str, model: Model) -> tuple[int, ...]:
    """The shape of the feature at the model's own size."""
    with torch.no_grad():
        return tuple(seen_at(network, where, _example(network, model), stop=True)[1].shape)


def _example(network: Module, model: Model) -> list[Tensor]:
    part = model.parts[model.denoiser]
    feeds = part.example.feeds(part.inputs, part.example.default_sizes(), seed=0)
    device = next(network.parameters()).device
    return [torch.as_tensor(array, device=device) for array in feeds.values()]


def _called(network: Module, where: str, model: Model) -> list[Module]:
    """The modules that run before the middle is reached, the middle among them."""
    found: list[Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, given: found.append(module))
        for module in network.modules()
    ]
    try:
        tried(network, where, model)
    finally:
        for hook in hooks:
            hook.remove()
    return found
