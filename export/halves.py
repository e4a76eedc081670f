"""A part in float16: weights and arithmetic, between float32 inputs and outputs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from ..model.libraries import torch
from ..model.model import Part
from ..runtime.errors import BadInput

__all__ = ["in_float16"]


def in_float16(part: Part) -> Part:
    """The part with a float16 copy of its module; the original keeps its weights.

    float32 inputs but the timestep are cast on the way in, float outputs on the way out: whoever feeds the graph need
    not know. The timestep stays float32 up to its sine and cosine, where 999 and 999.5 differ. Raises BadInput for a
    quantized part, whose integers have scales in float32.
    """
    if part.quantized is not None:
        raise BadInput(
            f"{part.name} is quantized, and its precision is to be float16",
            expected="one of both",
            fix='take quantize out of [recipe] passes, or set precision = "float32" in a --recipe',
        )
    th = torch()
    smaller: dict[
        int, Any
    ] = {}  # copies deepcopy takes in the place of its own: the float32 ones never exist
    for tensor in part.module.parameters():
        smaller[id(tensor)] = th.nn.Parameter(_half(tensor.detach()), requires_grad=False)
    for tensor in part.module.buffers():
        smaller[id(tensor)] = _half(tensor)
    module = copy.deepcopy(part.module, smaller).eval()
    cast = [spec.dtype == "float32" and spec.name != "timestep" for spec in part.inputs]
    module.register_forward_pre_hook(
        lambda _, inputs: tuple(_layer_input(x) if half else x for x, half in zip(inputs, cast, strict=True))
    )
    for layer in module.modules():
        if next(layer.children(), None) is None and next(layer.parameters(), None) is not None:
            # a network that does not cast what it computes from the timestep itself
            layer.register_forward_pre_hook(lambda _, inputs: tuple(_layer_input(x) for x in inputs))
    module.register_forward_hook(
        lambda _, inputs, found: (
            _float(found) if isinstance(found, th.Tensor) else tuple(_float(each) for each in found)
        )
    )
    return replace(part, module=module)


def _half(tensor: Any) -> Any:
    return tensor.half() if tensor.is_floating_point() else tensor.clone()


def _layer_input(value: Any) -> Any:
    return value.half() if isinstance(value, torch().Tensor) and value.is_floating_point() else value


def _float(tensor: Any) -> Any:
    return tensor.float() if tensor.is_floating_point() else tensor
