"""Weights of a MIL program as palettes or as integers with scales, and bits by layer.

A palette is the table of 2^bits values nearest to a layer's weights in squares, k-means in one dimension (Lloyd 1982,
"Least squares quantization in PCM"). Weights are halves on a device, of which there are 65,536: k-means runs on how
often each occurs, so that a network of a billion weights takes a minute and not a day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.model import Part
from ..quant.budget import average_bits, choose
from ..quant.simulate import weights_of
from ..quant.table import Table, bits_of
from ..runtime.errors import BadInput
from .mil_reference import coremltools, silent

__all__ = ["Compression", "compress", "integers", "kmeans", "palette"]

Array = NDArray[Any]

LEAST = 2048
"""Weights of a layer that is worth a table: what coremltools' own compression asks for."""
FLOAT = 16
"""Bits of a weight that is left alone."""
ROUNDS = 100
"""Of Lloyd's iteration at most; layers of emoji-64 stand still after 15 to 60."""
PALETTES = (1, 2, 3, 4, 6, 8)
"""Bits Core ML has tables for."""
CONSUMERS = {"conv": 1, "linear": 1, "conv_transpose": 1, "matmul": 0, "gather": 1}
"""Operators whose constants are weights -> their axis of inputs."""


@dataclass(frozen=True)
class Compression:
    """What the weights of one part are stored as."""

    kind: str
    """float, palette or linear."""
    bits: int
    group: int = 0
    by_layer: Mapping[str, int] = field(default_factory=dict)
    """Layer -> its bits, where they are not `bits`; FLOAT leaves it alone."""

    @classmethod
    def of(cls, part: Part, kind: str, bits: int, group: int, mixed: tuple[str, ...]) -> Compression:
        """mixed  PATTERN=BITS over PART.LAYER, the first that fits"""
        rules = [(entry.rpartition("=")[0], int(entry.rpartition("=")[2])) for entry in mixed]
        chosen = {}
        for layer in weights_of(part):
            found = [number for pattern, number in rules if fnmatchcase(f"{part.name}.{layer}", pattern)]
            if found:
                chosen[layer] = found[0]
        return cls(kind, bits, group, chosen)

    def by_table(self, part: Part, file: Path, bits: float) -> Compression:
        """Bits of every layer chosen for an average of `bits` by a sensitivity table of this part, else as it is.

        Layers that `mixed` names keep what it says. Raises BadInput for a file that is no table.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            table = Table.from_json(data.get("table", data))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise BadInput(
                f"{file} is no sensitivity table ({type(error).__name__}: {error})",
                fix="fewstep sensitivity writes one as sensitivity.json",
            ) from None
        if table.part != part.name:
            return self
        allowed = PALETTES if self.kind == "palette" else (4, 8)
        options = [name for name in table.options if name in {f"w{count}" for count in allowed}]
        if not options:
            raise BadInput(
                f"{file} has {', '.join(table.options)}", expected=f"some of w{', w'.join(map(str, allowed))}"
            )
        chosen = {
            layer: bits_of(option)[0] or FLOAT
            for layer, option in choose(table, average_bits(table, bits), options).items()
        }
        nearest = {
            layer: min((b for b in (*allowed, FLOAT) if b >= count), default=FLOAT)
            for layer, count in chosen.items()
        }
        return replace(self, by_layer={**nearest, **self.by_layer})

    def bits_of(self, layer: str) -> int:
        return FLOAT if self.kind == "float" else self.by_layer.get(layer, self.bits)


def compress(program: Any, part: Part, compression: Compression) -> dict[str, Any]:
    """Store the weights of a MIL program as `compression` says, in place; returns what the manifest says of it, {} for
    floats.

    part  as it was traced: its layers' names are those of the program's constants
    """
    if compression.kind == "float":
        return {}
    layers = {f"p_{layer.replace('.', '_')}_weight": layer for layer in weights_of(part)}
    of_bits: dict[str, int] = {}
    left: dict[str, int] = {}
    stored = total = 0
    mb = coremltools("coremltools.converters.mil").Builder
    for function in program.functions.values():
        for op in [op for op in function.operations if op.op_type == "const"]:
            axis = _axis(op)
            if axis is None:
                continue
            layer = next((layers[name] for name in _names(op.name) if name in layers), op.name)
            weights = op.outputs[0].val
            bits = compression.bits_of(layer)
            total += weights.size
            made = None
            if bits < FLOAT:
                with silent(), function:
                    made = _store(mb, op, weights, bits, axis, compression)
            if made is None:
                left[layer] = weights.size
                stored += weights.size * 8 * weights.itemsize
                continue
            var, size = made
            stored += size
            of_bits[str(bits)] = of_bits.get(str(bits), 0) + weights.size
            function.replace_uses_of_var_after_op(
                anchor_op=op, old_var=op.outputs[0], new_var=var, no_check_var_types=True
            )
            function.remove_ops([op])
    return {
        "kind": compression.kind,
        "weights_by_bits": dict(sorted(of_bits.items())),
        "bits_per_weight": round(stored / max(total, 1), 3),
        "left_alone": dict(sorted(left.items())),
    }


def _names(const: str) -> list[str]:
    """A constant's name without what coremltools appends to it: _to_fp16, _0."""
    found = [const]
    while True:
        shorter = found[-1].removesuffix("_to_fp16")
        head, _, tail = shorter.rpartition("_")
        shorter = head if shorter == found[-1] and tail.isdigit() else shorter
        if shorter == found[-1]:
            return found
        found.append(shorter)


def _axis(op: Any) -> int | None:
    """The axis of inputs of a constant that holds a layer's weights; None for other constants."""
    var = op.outputs[0]
    if var.val is None or not hasattr(var.val, "dtype") or var.val.dtype.kind != "f" or var.val.size < LEAST:
        return None
    axes = []
    for child in var.child_ops:
        role = "x" if child.op_type == "gather" else "y" if child.op_type == "matmul" else "weight"
        if child.op_type not in CONSUMERS or child.inputs.get(role) is not var:
            return None
        axes.append(CONSUMERS[child.op_type])
    return axes[0] if axes and var.val.ndim >= 2 else None


def _store(
    mb: Any, op: Any, weights: Array, bits: int, axis: int, compression: Compression
) -> tuple[Any, int] | None:
    """The operator that means `weights` in fewer bits, and the bits it takes; None where groups do not fit."""
    types, builtin = coremltools("coremltools.converters.mil.mil.types"), op.outputs[0]
    name = f"{builtin.name}_palette" if compression.kind == "palette" else f"{builtin.name}_integers"
    if compression.kind == "palette":
        group = compression.group or len(weights)
        if len(weights) % group:
            group = len(weights)
        indices, tables = palette(weights, bits, group)
        kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
        shape = (len(tables), *(1,) * (weights.ndim - 1), 2**bits, 1)
        lut = tables.reshape(shape).astype(weights.dtype)
        var = mb.constexpr_lut_to_dense(indices=indices.astype(kind), lut=lut, before_op=op, name=name)
        return var, bits * weights.size + 8 * lut.nbytes
    size = weights.shape[axis]
    group = compression.group if compression.group and size % compression.group == 0 else size
    codes, scale = integers(weights, bits, axis, group)
    kind = types.nptype_from_builtin(types.string_to_builtin(f"int{bits}"))
    scale = scale.astype(weights.dtype)
    var = mb.constexpr_blockwise_shift_scale(data=codes.astype(kind), scale=scale, before_op=op, name=name)
    return var, bits * weights.size + 8 * scale.nbytes


def _halves() -> tuple[Array, Array]:
    """All finite halves in order, and the bit patterns they have."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    patterns = np.flatnonzero(np.isfinite(values))
    order = patterns[np.argsort(values[patterns].astype(np.float64), kind="stable")]
    return values[order].astype(np.float64), order


def palette(weights: Array, bits: int, group: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """(indices of weights' shape, tables [groups, 2^bits]) with a table for each `group` output channels.

    weights  [out, ...]; distances are taken between their nearest halves
    """
    values, order = _halves()
    patterns = (
        np.ascontiguousarray(weights, dtype=np.float16).view(np.uint16).reshape(len(weights) // group, -1)
    )
    indices = np.empty(patterns.shape, np.uint8)
    tables = np.empty((len(patterns), 1 << bits))
    lookup = np.zeros(1 << 16, np.uint8)
    for number, row in enumerate(patterns):
        counts = np.bincount(row, minlength=1 << 16)[order]
        present = np.flatnonzero(counts)
        tables[number], labels = kmeans(values[present], counts[present], 1 << bits)
        lookup[order[present]] = labels
        indices[number] = lookup[row]
    return indices.reshape(weights.shape), tables


def kmeans(values: Array, counts: Array, clusters: int) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """(centres [clusters], the cluster of each value): weighted k-means of ascending different values.

    Starts where the density to the power of 1/3 is shared out equally, which is the optimum for many clusters (Panter
    and Dite 1951). Unused centres repeat the last.
    """
    if len(values) <= clusters:
        centres = np.full(clusters, values[-1])
        centres[: len(values)] = values
        return centres, np.arange(len(values)).astype(np.uint8)
    mass, moment = (np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, counts * values))
    # the density of a smooth picture of them: 4 bins a cluster, at least 64
    bins = max(64, 4 * clusters)
    low, high = values[0], values[-1]
    edges = np.linspace(low, high, bins + 1)
    filled = np.diff(np.interp(edges, values, mass[1:], left=0.0)) + 1e-9 * mass[-1]
    shared = np.concatenate([[0.0], np.cumsum(np.cbrt(filled))])
    wanted = (np.arange(clusters) + 0.5) / clusters * shared[-1]
    centres = np.interp(wanted, shared, edges)
    for _ in range(ROUNDS):
        cuts = np.concatenate([[0], np.searchsorted(values, (centres[1:] + centres[:-1]) / 2), [len(values)]])
        weight = np.diff(mass[cuts])
        moved = np.where(weight > 0, np.diff(moment[cuts]) / np.maximum(weight, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    labels = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    return centres, labels.astype(np.uint8)


SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Of the largest weight's scale, tried for 4 bits: clipping a few saves error on the many (as quant/grid.py does)."""


def integers(
    weights: Array, bits: int, axis: int, group: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(codes of weights' shape, scale with 1 for every axis but those of outputs and, in groups, of inputs).

    weights ~ scale * codes, symmetric; each `group` inputs along `axis` and each output share a scale.
    """
    top = 2 ** (bits - 1) - 1
    shape = weights.shape
    other = 0 if axis == 1 else 1
    whole = weights.astype(np.float32).reshape(*shape[:axis], shape[axis] // group, group, *shape[axis + 1 :])
    kept = {axis, other if other < axis else other + 1}
    over = tuple(place for place in range(whole.ndim) if place not in kept)
    peak = np.abs(whole).max(over, keepdims=True)
    best, least = np.where(peak > 0, peak / top, 1.0), None
    for share in SHRINK if bits <= 4 else (1.0,):
        scale = np.where(peak > 0, np.float16(peak * share / top).astype(np.float32), 1.0)
        scale = np.where(scale > 0, scale, np.float32(6e-8))  # the least half there is
        error = ((np.clip(np.round(whole / scale), -top, top) * scale - whole) ** 2).sum(over, keepdims=True)
        if least is None:
            best, least = scale, error
        else:
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
    codes = np.clip(np.round(whole / best), -top, top).astype(np.int8).reshape(shape)
    flat = best.reshape([size for place, size in enumerate(best.shape) if place != axis + 1])
    return codes, flat.astype(np.float32)
