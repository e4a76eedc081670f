"""Pieces of a network that are worked on one at a time: which there are, what they are fed, which are finished."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.fingerprint import fingerprint
from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Activations, Layer, Quantized
from ..model.shards import read_shard, write_shard
from ..model.trajectories import run_part

__all__ = ["KINDS", "Block", "Recording", "Store", "find_blocks", "record", "run_order"]

Array = NDArray[Any]

KINDS = (
    *("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Attention"),
    *("CLIPEncoderLayer", "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"),
)
"""Classes of diffusers and transformers that are one block each, as BRECQ and Q-Diffusion take them."""

LAYERS = 16
"""Of a block, at most: Transformer2DModel has 12 in SD-1.5, where it holds one transformer block, and 22 or more in
SDXL, where that is the block."""


@dataclass(frozen=True)
class Block:
    """A module, and the layers below it that are worked on together."""

    name: str
    layers: tuple[str, ...]


def run_order(part: Part, batch: Mapping[str, Array], names: Sequence[str]) -> list[str]:
    """Of modules by the order in which a forward first enters them; those it does not enter are left out."""
    entered: dict[str, None] = {}
    modules = dict(part.module.named_modules())
    with ExitStack() as stack:
        for name in names:
            hook = lambda *_, name=name: entered.setdefault(name)  # noqa: E731
            stack.callback(modules[name].register_forward_pre_hook(hook).remove)
        run_part(part, batch)
    return list(entered)


def find_blocks(part: Part, batch: Mapping[str, Array], names: Sequence[str]) -> list[Block]:
    """Every layer of `names` in one block, in the order in which they run.

    A block is the largest module of at most LAYERS of them that is of a class in KINDS or has none of those below it,
    else a layer; and it runs once in a forward and puts out one tensor.
    """
    single = _plain(part, batch)
    wanted = set(names)
    found: list[Block] = []

    def below(name: str) -> tuple[str, ...]:
        return tuple(layer for layer in names if layer == name or layer.startswith(f"{name}.") or not name)

    def visit(name: str, module: Any) -> None:
        layers = below(name)
        if not layers:
            return
        inner = [type(child).__name__ for child in module.modules() if child is not module]
        whole = type(module).__name__ in KINDS or not set(inner) & set(KINDS)
        if name in single and (name in wanted or (name and len(layers) <= LAYERS and whole)):
            found.append(Block(name, layers))
            return
        for child, submodule in module.named_children():
            visit(f"{name}.{child}" if name else child, submodule)

    visit("", part.module)
    place = {name: k for k, name in enumerate(run_order(part, batch, [block.name for block in found]))}
    return sorted(found, key=lambda block: place[block.name])


def _plain(part: Part, batch: Mapping[str, Array]) -> set[str]:
    """Modules that run once in a forward and put out a tensor with a row for every sample."""
    runs: dict[str, int] = {}
    tensor: set[str] = set()

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def seen(_: Any, __: Any, output: Any) -> None:
            runs[name] = runs.get(name, 0) + 1
            if isinstance(output, torch().Tensor) or (isinstance(output, tuple) and len(output) == 1):
                tensor.add(name)

        return seen

    with ExitStack() as stack:
        for name, module in part.module.named_modules():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        run_part(part, batch)
    return {name for name in tensor if runs[name] == 1}


class _EnoughError(Exception):
    """Thrown out of a forward once the block has run."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What a block was called with, a row for every sample, and what it put out."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Any
    """[rows, ...]"""

    def rows(self, chosen: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for some rows; what has no row for every sample stays as it is."""
        count = len(self.output)

        def pick(value: Any) -> Any:
            return value[chosen] if _per_row(value, count) else value

        return tuple(map(pick, self.arguments)), {key: pick(value) for key, value in self.named.items()}


def record(part: Part, batches: Sequence[Mapping[str, Array]], block: str, memory_mib: float) -> Recording:
    """Run the part on batches up to the block, as it stands: inside quant.simulate.simulated with rounded weights.

    memory_mib  of arguments and output together; rows beyond it are left out, evenly from every batch
    """
    module = dict(part.module.named_modules())[block]
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    share = memory_mib * 2**20 / len(batches)

    def enter(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        entered.append((arguments, named))

    def leave(_: Any, __: Any, output: Any) -> None:
        arguments, named = entered.pop()
        output = output[0] if isinstance(output, tuple) else output
        count = len(output)
        every = [output, *arguments, *named.values()]
        size = sum(v[0].numel() * v.element_size() for v in every if _per_row(v, count))
        # a copy, and of few rows where memory is short: a view would keep the whole
        few = np.linspace(0, count - 1, max(1, min(count, int(share / size)))).round().astype(int)

        def cut(value: Any) -> Any:
            return value.detach()[few].clone() if _per_row(value, count) else value

        calls.append((tuple(map(cut, arguments)), {k: cut(v) for k, v in named.items()}, cut(output)))
        raise _EnoughError

    with ExitStack() as stack:
        # before the hooks of a simulation, which belong to the block
        handle = module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        stack.callback(handle.remove)
        stack.callback(module.register_forward_hook(leave).remove)
        for batch in batches:
            with suppress(_EnoughError):
                run_part(part, batch)
    counts = [len(output) for _, _, output in calls]
    arguments = tuple(_joined(values, counts) for values in zip(*(call[0] for call in calls)))
    named = {key: _joined([call[1][key] for call in calls], counts) for key in calls[0][1]}
    return Recording(arguments, named, torch().cat([output for _, _, output in calls]))


def _per_row(value: Any, count: int) -> bool:
    return isinstance(value, torch().Tensor) and value.ndim > 0 and len(value) == count


def _joined(values: Sequence[Any], counts: Sequence[int]) -> Any:
    if all(_per_row(value, count) for value, count in zip(values, counts, strict=True)):
        return torch().cat(list(values))
    return values[0]


class Store:
    """Finished layers on disk, so that work that was cut off goes on with the next piece."""

    def __init__(
        self, folder: Path, part: Part, quantized: Quantized, batches: Sequence[Mapping[str, Array]], how: Any
    ) -> None:
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((fingerprint(part), how, sorted(quantized.params))).encode())
        for name, layer in sorted(quantized.layers.items()):
            digest.update(repr((name, layer.input, layer.weights.bits, layer.weights.shape)).encode())
            for array in (*_arrays(layer).values(), layer.smooth, layer.bias):
                digest.update(b"" if array is None else np.ascontiguousarray(array).data)
        for batch in batches:
            for name in sorted(batch):
                digest.update(repr((name, batch[name].shape)).encode())
                digest.update(np.ascontiguousarray(batch[name]).data)
        self.folder = folder / f"{type(how).__name__.lower()}-{part.name}-{digest.hexdigest()}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, piece: str, layers: Mapping[str, Layer]) -> dict[str, Layer] | None:
        """The layers of a finished piece; None where it is not, or its file is damaged."""
        arrays = read_shard(self.folder / f"{piece}.safetensors")
        if arrays is None:
            return None
        return {name: _read(name, layer, arrays) for name, layer in layers.items()}

    def save(self, piece: str, layers: Mapping[str, Layer]) -> None:
        """Raises OutputError, and leaves nothing behind, where it cannot be written."""
        arrays: dict[str, Array] = {}
        for name, layer in layers.items():
            arrays |= {f"{name}:{key}": array for key, array in _arrays(layer).items()}
        write_shard(self.folder / f"{piece}.safetensors", arrays)


def _arrays(layer: Layer) -> dict[str, Array]:
    """What rounding may change of a layer."""
    arrays: dict[str, Array] = {"codes": layer.weights.codes, "scale": layer.weights.scale}
    if layer.input is not None:
        arrays["input"] = np.array([layer.input.scale, layer.input.zero], np.float64)
    return arrays


def _read(name: str, layer: Layer, arrays: Mapping[str, Array]) -> Layer:
    weights = replace(layer.weights, codes=arrays[f"{name}:codes"], scale=arrays[f"{name}:scale"])
    given = layer.input
    if given is not None:
        scale, zero = arrays[f"{name}:input"]
        given = Activations(float(scale), int(zero), given.bits)
    return replace(layer, weights=weights, input=given)
