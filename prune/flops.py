"""What a network costs: parameters, and multiplications of one sample at the model's own size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..model.libraries import torch
from ..model.model import Part

__all__ = ["layer_multiplications", "multiplications"]


def multiplications(part: Part) -> int:
    """Of one forward of one sample at the default size, in convolutions, linear layers and products of attention."""
    return sum(layer_multiplications(part).values())


def layer_multiplications(part: Part) -> dict[str, int]:
    """The same by module, path in `part.module`; an Attention has its two products alone, its layers have their own.

    Nothing is computed: the network runs on tensors without memory, whatever its size.
    """
    th = torch()
    found: dict[str, int] = {}
    hooks = []

    def layer(path: str) -> Any:
        def count(module: Any, inputs: Any, output: Any) -> None:
            found[path] = found.get(path, 0) + module.weight[0].numel() * output.numel()

        return count

    def attention(path: str) -> Any:
        def count(module: Any, inputs: Any, given: Mapping[str, Any], output: Any) -> None:
            hidden = inputs[0] if inputs else given["hidden_states"]
            context = inputs[1] if len(inputs) > 1 else given.get("encoder_hidden_states")
            queries = hidden.numel() // module.to_q.in_features
            keys = queries if context is None else context.shape[1]
            found[path] = found.get(path, 0) + 2 * queries * keys * module.to_q.out_features

        return count

    for path, module in part.module.named_modules():
        kind = type(module).__name__
        if isinstance(module, th.nn.Conv1d | th.nn.Conv2d | th.nn.Linear):
            hooks.append(module.register_forward_hook(layer(path)))
        elif kind == "Attention":
            hooks.append(module.register_forward_hook(attention(path), with_kwargs=True))
    sizes = {**part.example.default_sizes(), "batch": 1}
    feeds = part.example.feeds(part.inputs, sizes, seed=0)
    tensors = {**dict(part.module.named_parameters()), **dict(part.module.named_buffers())}
    meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    try:
        with th.no_grad():
            values = tuple(th.from_numpy(feeds[spec.name]).to("meta") for spec in part.inputs)
            th.func.functional_call(part.module, meta, values)
    finally:
        for hook in hooks:
            hook.remove()
    return found
