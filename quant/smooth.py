"""Inputs whose channels differ in size, evened out before they are rounded: x / s goes in, w s are the weights.

Two constants over the halves of a U-Net's skip concatenation do what Q-Diffusion's split shortcut does with two
convolutions (Li et al. 2023, arXiv:2302.04304, section 4.3); a constant a channel is SmoothQuant's (Xiao et al. 2022,
arXiv:2211.10438, equation 4). Either costs a multiplication of the input where it cannot be folded away, so it has to
earn it: what is kept is what lowers the error of the layer's own output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import torch
from ..model.model import Part
from .grid import codes_of_values
from .observe import Seen
from .simulate import quantizable
from .weights import nearest

__all__ = ["ALPHAS", "Trial", "shared_inputs", "smoothing", "splits", "trials"]

Array = NDArray[Any]

ALPHAS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
"""How much of the difficulty moves from inputs to weights: 1 evens the inputs out, 0 the weights. SmoothQuant uses 0.5
to 0.8."""

MIN_GAIN_DB = 1.0
"""Of the output's error, below which a multiplication is not worth its time: what a tenth of a bit more would gain
is 0.6."""

ROWS_TRIED = 64
"""Of the weights, evenly spread: an error averaged over so many outputs is close to that of all."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One way to smooth a layer, tried on rows of its inputs."""

    kind: str
    """none, halves or channels."""
    alpha: float
    divisor: NDArray[np.float32] | None
    """[channels], above 0; None for none."""
    db: float
    """Signal to noise ratio of the layer's output with inputs and weights both rounded."""


def smoothing(
    seen: Seen,
    weight: Array,
    *,
    bits: int,
    input_bits: int,
    halves: Sequence[int] = (),
    group: int = 0,
    least_gain_db: float = MIN_GAIN_DB,
) -> NDArray[np.float32] | None:
    """What to divide a layer's input by, [channels], or None where nothing gains `least_gain_db`.

    seen        with rows
    weight      float, as torch lays it out; of layers that share an input, all of them one after the other
    bits, group of the weights to be, as in weights.nearest
    input_bits  of the inputs
    halves      channels of what the input is a concatenation of, from `splits`; () for none
    """
    tried = trials(seen, weight, bits=bits, input_bits=input_bits, halves=halves, group=group)
    best = max(tried, key=lambda trial: trial.db)
    return best.divisor if best.db - tried[0].db >= least_gain_db else None


def trials(
    seen: Seen, weight: Array, *, bits: int, input_bits: int, halves: Sequence[int] = (), group: int = 0
) -> list[Trial]:
    """Every way to smooth a layer with the error of its output; the first is none, and a grouped or depthwise
    convolution has no other.
    """
    weight = np.asarray(weight, np.float32)
    picked = weight[np.unique(np.linspace(0, len(weight) - 1, min(ROWS_TRIED, len(weight))).astype(int))]
    found = [Trial("none", 0.0, None, _output_db(seen.rows, picked, None, bits, input_bits, group))]
    if weight.shape[1] != len(seen.peaks) or not len(seen.rows):
        return found
    most = np.abs(weight).reshape(len(weight), weight.shape[1], -1).max(axis=(0, 2))
    for kind in ("channels", "halves") if len(halves) > 1 else ("channels",):
        inputs, weights = seen.peaks.astype(np.float64), most.astype(np.float64)
        if kind == "halves":
            inputs, weights = _of_halves(inputs, halves), _of_halves(weights, halves)
        for alpha in ALPHAS:
            divisor = _divisor(inputs, weights, alpha)
            db = _output_db(seen.rows, picked, divisor, bits, input_bits, group)
            found.append(Trial(kind, alpha, divisor, db))
    return found


def _of_halves(peaks: Array, halves: Sequence[int]) -> Array:
    """Every channel its half's largest."""
    parts = np.split(peaks, np.cumsum(halves)[:-1])
    return np.concatenate([np.full(len(part), part.max()) for part in parts])


def _divisor(inputs: Array, weights: Array, alpha: float) -> NDArray[np.float32]:
    """max|x|^alpha / max|w|^(1 - alpha), its geometric mean 1; 1 for channels that carry nothing.

    max|x| is taken to be the channels' median at least.
    """
    alive = (inputs > 0) & (weights > 0)
    if not alive.any():
        return np.ones(len(inputs), np.float32)
    # a channel that calibration saw little of may hold more tomorrow: only those above the median are brought down.
    # Without this, smoothing costs emoji-64 1.2 dB of its output at 8 bits on trajectories not calibrated on
    inputs = np.maximum(inputs, np.median(inputs[alive]))
    log = np.zeros(len(inputs))
    log[alive] = alpha * np.log(inputs[alive]) - (1 - alpha) * np.log(weights[alive])
    log[alive] -= log[alive].mean()
    return np.exp(log).astype(np.float32)


def _output_db(
    rows: Array, weight: Array, divisor: Array | None, bits: int, input_bits: int, group: int
) -> float:
    """Signal to noise ratio of rows @ weight^T with both rounded."""
    if not len(rows):
        return 0.0
    x = rows.reshape(len(rows), weight.shape[1], -1)
    right = rows @ weight.reshape(len(weight), -1).T
    if divisor is not None:
        x = x / divisor[:, None]
        weight = weight * divisor.reshape(-1, *[1] * (weight.ndim - 2))
    codes = codes_of_values(x, input_bits)
    rounded = np.clip(np.rint(x / codes.scale) + codes.zero, 0, 2**codes.bits - 1) - codes.zero
    integers = nearest(weight, bits, group=group).floats()
    got = (rounded * codes.scale).reshape(len(rows), -1) @ integers.reshape(len(weight), -1).T
    noise = float(np.square(got - right, dtype=np.float64).sum())
    signal = float(np.square(right, dtype=np.float64).sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def splits(part: Part, batch: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Layers that a concatenation along channels feeds directly, with the channels of each of its pieces.

    In a diffusers U-Net these are the 1x1 convolutions around the ResNet blocks of the way up; what lies behind a norm
    has been evened out. One forward of the batch's first sample finds them.
    """
    fed, joined = _traced(part, batch)
    return {name: joined[key] for name, key in fed.items() if key in joined}


def shared_inputs(part: Part, batch: Mapping[str, Array]) -> list[tuple[str, ...]]:
    """Layers that are fed the very same tensor, together: one smoothing and one rounding can serve them all."""
    fed, _ = _traced(part, batch)
    together: dict[Any, list[str]] = {}
    for name, key in fed.items():
        together.setdefault(key, []).append(name)
    return [tuple(names) for names in together.values() if len(names) > 1]


def _traced(part: Part, batch: Mapping[str, Array]) -> tuple[dict[str, Any], dict[Any, tuple[int, ...]]]:
    """(layer -> key of the tensor that feeds it, key -> pieces of a concatenation along its channels)."""
    th = torch()
    alive: list[Any] = []  # so that no address is used twice
    joined: dict[Any, tuple[int, tuple[int, ...]]] = {}
    fed: dict[str, Any] = {}
    pieces: dict[Any, tuple[int, ...]] = {}

    class Joins(th.overrides.TorchFunctionMode):  # type: ignore[misc, name-defined]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in (th.cat, th.concat, th.concatenate):
                tensors = args[0] if args else kwargs["tensors"]
                axis = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
                alive.append(result)
                sizes = tuple(int(tensor.shape[axis]) for tensor in tensors)
                joined[_key(result)] = (axis % result.ndim, sizes)
            return result

    def look(name: str, module: Any) -> Any:
        def hook(_: Any, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            alive.append(x)
            fed[name] = key = _key(x)
            channels = x.ndim - 1 if isinstance(module, th.nn.Linear) else 1
            # of vectors only the embedding of the time is one, and its halves, sines and cosines, are alike
            if key in joined and joined[key][0] == channels and x.ndim > 2:
                pieces[key] = joined[key][1]

        return hook

    handles = [
        module.register_forward_pre_hook(look(name, module)) for name, module in quantizable(part).items()
    ]
    try:
        with th.no_grad(), Joins():
            part.module(*(th.from_numpy(np.ascontiguousarray(batch[i.name][:1])) for i in part.inputs))
    finally:
        for handle in handles:
            handle.remove()
    return fed, pieces


def _key(tensor: Any) -> Any:
    return (tensor.data_ptr(), tuple(tensor.shape))
