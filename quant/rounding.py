"""Integer weights by error-compensated rounding: what one weight is off, the later ones of its row make up for.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the feedback form of LDLQ (Chee et al. 2023, arXiv:2307.13304), which
gives the same codes with one factorisation and no inverse. A layer's output error over the inputs x it saw is

    |(w - w^) X|^2 = e H e^T = |e M|^2        e = w - w^,  H = X X^T = M M^T,  M upper triangular

and component j of e M holds only e_1 .. e_j. So column by column the best code for column j, given those before it, is
the nearest to w_j + sum_(i<j) e_i M_ij / M_jj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Weights
from ..model.trajectories import run_part
from ..runtime.errors import BadInput
from .weights import codes_on, lowest_code, steps_of

__all__ = ["WIDEST", "gptq", "moments", "moments_shape", "output_error"]

Array = NDArray[Any]

WIDEST = 2880
"""Columns of a row that are compensated together: 320 channels of 3 x 3. The widest rows of SD-1.5 have 23,040, whose
moments alone would be 2.1 GB and 12 TFLOP to factorise."""

ROWS = 32
"""Input rows wanted for each column of the moments. On emoji-64 at 4 bits a row: 2 give 21.1 dB, 8 21.8, 32 22.3."""

DAMPING = 0.01
"""Of the mean diagonal, added to the diagonal: GPTQ's own value."""

BLOCK = 128
"""Columns whose feedback is summed one by one; what lies before comes in by one product. GPTQ's value."""


def moments_shape(module: Any, widest: int = WIDEST) -> tuple[int, int, int, int]:
    """(groups of the convolution, blocks of a row, columns of a block, the same): the shape of a layer's moments.

    module  a torch Linear or convolution
    widest  columns in a block, at most, in whole channels
    """
    channels, columns = int(module.weight.shape[1]), int(module.weight[0].numel())
    kernel = columns // channels
    taken = max(n for n in range(1, channels + 1) if channels % n == 0 and (n * kernel <= widest or n == 1))
    return (getattr(module, "groups", 1), channels // taken, taken * kernel, taken * kernel)


def moments(
    part: Part,
    batches: Sequence[Mapping[str, Array]],
    names: Sequence[str],
    *,
    widest: int = WIDEST,
    rows: int = ROWS,
    seed: int = 0,
) -> dict[str, NDArray[np.float32]]:
    """Mean of x x^T over the input rows of layers (tokens, or patches of a convolution), in one pass of forwards.

    batches  named inputs of the part, one forward each
    names    layers to watch, Linear or convolution, by the names of their modules
    widest   columns are taken in blocks of this many; the products between blocks are left out
    rows     so many input rows for each column of a block, drawn evenly from all there are
    Returns arrays of moments_shape, all of them in memory. Inside quant.simulate.simulated these are the inputs a layer
    gets from the quantized ones before it, divided by its `smooth` and rounded.
    Raises BadInput without batches, for a layer that never ran, and where an input is not finite.
    """
    if not batches:
        raise BadInput("no batches to take moments from", expected="inputs recorded by calibration")
    modules = dict(part.module.named_modules())
    sums = {name: np.zeros(moments_shape(modules[name], widest), np.float32) for name in names}
    counts = dict.fromkeys(names, 0)

    def watch(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        groups, blocks, width, _ = sums[name].shape
        most = -(-rows * width // len(batches))
        # of its own: what is drawn does not depend on which layers are watched beside it
        rng = np.random.default_rng([seed, crc32(name.encode())])

        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            x = input_rows(module, arguments[0], most, rng).reshape(-1, groups, blocks, width)
            x = x.permute(1, 2, 0, 3)
            sums[name] += (x.transpose(2, 3) @ x).numpy()
            counts[name] += x.shape[2]

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(modules[name].register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            run_part(part, batch)
    for name, total in sums.items():
        if counts[name] == 0:
            raise BadInput(f"{part.name}.{name} never ran", expected="a layer that every forward passes")
        total /= counts[name]
        if not np.isfinite(total).all():
            raise BadInput(
                f"{part.name}.{name} is fed what is not finite", fix="look for NaN in the calibration"
            )
    return sums


def input_rows(module: Any, x: Any, most: int, rng: np.random.Generator) -> Any:
    """[rows, columns] float32 of what a layer multiplies its weights with: tokens, or the patches of a convolution.

    most  rows, drawn evenly from all there are
    """
    th = torch()
    x = x.detach()
    if not hasattr(module, "kernel_size"):
        x = x.reshape(-1, x.shape[-1])
    else:
        x = th.nn.functional.pad(
            x, _padding(module), mode=_MODES.get(module.padding_mode, module.padding_mode)
        )
        for axis, (size, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation)
        ):
            x = x.unfold(axis + 2, (size - 1) * dilation + 1, stride)[..., ::dilation]
        x = x.movedim(1, len(module.kernel_size) + 1)
    # [batch, place .., channels, kernel ..]: a view, so that only the patches that are drawn are copied
    places = tuple(x.shape[: x.ndim // 2 if x.ndim > 2 else 1])
    count = int(np.prod(places))
    chosen = np.arange(count) if count <= most else rng.choice(count, most, replace=False)
    drawn = x[tuple(th.from_numpy(place) for place in np.unravel_index(chosen, places))]
    return drawn.reshape(len(chosen), -1).float()


_MODES = {"zeros": "constant"}
"""torch.nn's words for padding that torch.nn.functional.pad has others for."""


def _padding(conv: Any) -> list[int]:
    """(before, after) of each axis, the last one first, as torch.nn.functional.pad takes it."""
    pads: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0, 0] if conv.padding == "valid" else [conv.padding[axis]] * 2
    return pads


def gptq(weight: Array, grid: Weights, moments: Array, *, damping: float = DAMPING) -> Weights:
    """Other codes on the grid of `grid`, for which the layer's output over the inputs it saw is nearer to w x.

    weight   [out, ...] in floating point, times `smooth` where the layer has one
    grid     of the same weights, from `nearest`: its scales, zeros and multipliers are kept
    moments  mean of x x^T, from `moments`
    damping  of the mean of its diagonal, added to the diagonal: inputs that were hardly seen stay near w
    Columns go by falling mean square of their input, so that errors flow from those that matter to those that do not.
    """
    rows: Array = np.asarray(weight, np.float32).reshape(grid.codes.shape)
    inner = rows.shape[1] // grid.groups
    step = np.repeat(steps_of(grid), rows.shape[1] // steps_of(grid).shape[1], axis=1)
    zero = (
        np.zeros((1, 1), np.float32)
        if grid.zero is None
        else np.repeat(grid.zero.astype(np.float32), inner, axis=1)
    )
    low, high = lowest_code(grid.bits, grid.zero is None), 2 ** (grid.bits - 1) - 1
    least, most = (np.broadcast_to(end - zero, rows.shape) for end in (low, high))
    codes = codes_on(rows, grid)
    for r, c, h in _blocks(len(rows), moments):
        if h.diagonal().sum() > 0:  # else nothing was ever fed to it
            found = _fed_forward(rows[r, c], h, step[r, c], (least[r, c], most[r, c]), damping)
            codes[r, c] = found if grid.zero is None else found + zero[r, c]
    return replace(grid, codes=codes)


def output_error(weight: Array, weights: Weights, moments: Array) -> float:
    """Mean over input rows of |(w - w^) x|^2, summed over the outputs, as far as `moments` knows the inputs."""
    error = np.asarray(weight, np.float64).reshape(weights.codes.shape) - weights.floats().reshape(
        weights.codes.shape
    )
    return sum(float(np.sum((error[r, c] @ h) * error[r, c])) for r, c, h in _blocks(len(error), moments))


def _blocks(out: int, moments: Array) -> Iterator[tuple[slice, slice, Array]]:
    """Rows and columns of the weights, and the moments of the inputs these columns take."""
    groups, blocks, width, _ = moments.shape
    each = out // groups
    for g in range(groups):
        for b in range(blocks):
            yield slice(g * each, (g + 1) * each), slice(b * width, (b + 1) * width), moments[g, b]


def _fed_forward(w: Array, h: Array, step: Array, ends: tuple[Array, Array], damping: float) -> Array:
    """[out, n] whole numbers, codes minus zero; w, step and both ends [out, n], h [n, n]."""
    n = len(h)
    order = np.argsort(-h.diagonal(), kind="stable")
    m: Array = h[np.ix_(order, order)].astype(np.float64)
    m[np.diag_indices(n)] += damping * m.diagonal().mean()
    # H = M M^T with M upper triangular is Cholesky's factor seen from the last row and column
    m = np.linalg.cholesky(m[::-1, ::-1])[::-1, ::-1]
    share = np.ascontiguousarray((m / m.diagonal()).T, np.float32)  # [j, i]: M_ij / M_jj
    w, step, least, most = (np.ascontiguousarray(a[:, order].T) for a in (w, step, *ends))
    error, whole = np.zeros_like(w), np.empty_like(w)
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        wanted = w[begin:end] + share[begin:end, :begin] @ error[:begin]
        for j in range(begin, end):
            target = wanted[j - begin] + share[j, begin:j] @ error[begin:j]
            whole[j] = np.clip(np.rint(target / step[j]), least[j], most[j])
            error[j] = w[j] - whole[j] * step[j]
    found = np.empty_like(whole.T)
    found[:, order] = whole.T
    return found
