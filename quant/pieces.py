"""What finetuning draws its steps from: recorded calls cut to a size, in an order that is the same every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from ..model.fingerprint import fingerprint
from ..model.model import Part
from ..model.quantized import Array, Quantized
from ..runtime.errors import BadInput

__all__ = ["check_calls", "cut", "drawn", "key_of"]

Feeds = Mapping[str, Array]


def cut(calls: Sequence[Feeds], rows: int, *, guided: bool) -> list[dict[str, Array]]:
    """The calls in pieces of at most `rows` rows, under guidance each with as much of either half.

    Raises BadInput for a guided call that has no two halves.
    """
    halves = 2 if guided else 1
    size = max(1, rows // halves)
    pieces = []
    for call in calls:
        count = len(next(iter(call.values())))
        if count % halves:
            raise BadInput(
                f"a call of {count} rows", expected="an unconditional row for every other, as guidance has it"
            )
        half = count // halves
        for begin in range(0, half, size):
            parts = [slice(at + begin, at + min(begin + size, half)) for at in (0, half)[:halves]]
            pieces.append({name: np.concatenate([array[p] for p in parts]) for name, array in call.items()})
    return pieces


def drawn(pieces: int, step: int, many: int, seed: int) -> list[int]:
    """Which pieces a step takes: each once before any comes again, in an order of its own every time round."""
    places = range(step * many, (step + 1) * many)
    orders = {
        i: np.random.default_rng([seed, i]).permutation(pieces) for i in {at // pieces for at in places}
    }
    return [int(orders[at // pieces][at % pieces]) for at in places]


def check_calls(calls: Sequence[Feeds]) -> None:
    """Raises BadInput for fewer than 2 calls, or numbers that are not finite."""
    if len(calls) < 2:
        raise BadInput(f"{len(calls)} calls to finetune on", expected="at least 2", fix="record more of them")
    for number, call in enumerate(calls):
        for name, array in call.items():
            if not np.isfinite(array).all():
                raise BadInput(
                    f"call {number}: {name} is not finite", expected="numbers", fix="record the calls again"
                )


def key_of(part: Part, quantized: Quantized, calls: Sequence[Feeds], how: Mapping[str, object]) -> str:
    """Of all that a result depends on."""
    digest = hashlib.sha256(json.dumps([fingerprint(part), how], sort_keys=True).encode())
    for name, layer in sorted(quantized.layers.items()):
        digest.update(f"{name} {layer.input} {layer.weights.bits} {layer.weights.shape}".encode())
        arrays = (layer.weights.codes, layer.weights.scale, layer.weights.zero, layer.weights.multiplier)
        for array in (*arrays, layer.smooth, layer.bias):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    for named in (quantized.params, *calls):
        for name in sorted(named):
            digest.update(name.encode() + np.ascontiguousarray(named[name]).tobytes())
    return digest.hexdigest()[:16]
