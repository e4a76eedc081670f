"""What can be taken out of a denoiser: residual blocks, transformers, single attentions and feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model.model import Part
from ..model.structure import bypassed, network_of, part_with, removable, shadow
from ..runtime.errors import BadInput
from .flops import layer_multiplications, multiplications

__all__ = ["Unit", "find_units"]


@dataclass(frozen=True)
class Unit:
    """A block that a bypass can take the place of, and what is saved then."""

    path: str
    """In the diffusers network."""
    kind: str
    """residual, transformer, block, attention or feed-forward."""
    parameters: int
    multiplications: int
    """Of one sample at the model's own size."""
    inside: str = ""
    """The nearest unit that holds this one: of the two, one at most is taken out by itself."""


def find_units(part: Part) -> tuple[Unit, ...]:
    """All units of a denoiser, outer ones before what they hold. Raises BadInput where there are none."""
    network = network_of(part)
    kinds = removable(network)
    if not kinds:
        raise BadInput(
            f"{type(network).__name__} has no block that can be taken out",
            expected="residual blocks or transformers",
        )
    work = {path.removeprefix("network."): count for path, count in layer_multiplications(part).items()}
    sizes = _sizes(network)
    copied = part_with(part, shadow(network))
    units = []
    for path, kind in kinds.items():
        with bypassed(network_of(copied), [path]):
            left = _sizes(network_of(copied))
            # DiT's first block: what stays of it runs once, and no longer twice
            again = multiplications(copied) if path == "transformer_blocks.0" else None
        parameters = sum(sizes.values()) - sum(left.values())
        count = sum(n - n * left.get(at, 0) // sizes[at] for at, n in work.items() if at in sizes)
        # the products of an attention, which have no weights, go with its first layer
        count += sum(n for at, n in work.items() if at not in sizes and f"{at}.to_q" not in left)
        count = count if again is None else sum(work.values()) - again
        units.append(Unit(path, kind, parameters, count, _holder(path, kinds)))
    return tuple(units)


def _sizes(network: Any) -> dict[str, int]:
    """Path of every module with weights of its own -> their elements."""
    found = {}
    for path, module in network.named_modules():
        if count := sum(tensor.numel() for tensor in module.parameters(recurse=False)):
            found[path] = count
    return found


def _holder(path: str, kinds: Mapping[str, str]) -> str:
    above = path
    while above := above.rpartition(".")[0]:
        if above in kinds:
            return above
    return ""
