"""What rounding every layer does to a part's output: the table that mixed precision is chosen from.

An option is written as schemes are: "w4" (weights of 4 bits), "a8" (inputs of 8 bits), "w4a8" (both), "float" (as it
is). Single ones are measured. Of both together the squared errors are added, as they are over layers: rounding errors
of different tensors are nearly uncorrelated (benchmarks/results/sensitivity.json has how nearly).
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import BadInput

__all__ = ["FLOAT", "KINDS", "Table", "bits_of", "decibels", "kind_of", "split"]

Array = NDArray[Any]

FLOAT = "float"
"""The option that leaves a layer as it is."""

MAX_DB = 300.0
"""Stands for no error at all: JSON has no infinity, and float64 itself ends at 313 dB."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "conv_in": ("*conv_in",),
    "conv_out": ("*conv_out",),
    "time embedding": ("*time_embedding.linear_*",),
    "time projection": ("*time_emb_proj",),
    "shortcut": ("*conv_shortcut",),
    "resnet conv1": ("*resnets.*.conv1",),
    "resnet conv2": ("*resnets.*.conv2",),
    **{f"self {end}": (f"*attn1.to_{end}*", f"*self_attn.{end}_proj") for end in ("q", "k", "v", "out")},
    **{f"cross {end}": (f"*attn2.to_{end}*",) for end in ("q", "k", "v", "out")},
    "feed-forward in": ("*ff.net.0.proj", "*mlp.fc1"),
    "feed-forward out": ("*ff.net.2", "*mlp.fc2"),
    "attention proj_in": ("*attentions.*.proj_in",),
    "attention proj_out": ("*attentions.*.proj_out",),
    "sampler": ("*samplers.*.conv",),
    "embedding": ("*token_embedding", "*position_embedding"),
}
"""Kind of operator -> patterns of the names diffusers' and transformers' networks give it; the first that fits."""


def kind_of(layer: str) -> str:
    """One of KINDS, or "other"."""
    fits = (kind for kind, patterns in KINDS.items() if any(fnmatchcase(layer, p) for p in patterns))
    return next(fits, "other")


def split(option: str) -> tuple[str, ...]:
    """The single options in one: ("w4", "a8") for "w4a8", () for "float". Raises BadInput for what is none."""
    found = re.fullmatch(r"(w[2-8])?(a\d{1,2})?", option)
    if option == FLOAT:
        return ()
    if found is None or not option:
        raise BadInput(
            f"option {option!r}", expected="w4, a8, w4a8 or float", fix="weights first, then inputs"
        )
    return tuple(single for single in found.groups() if single)


def bits_of(option: str) -> tuple[int | None, int | None]:
    """Bits of weights and of inputs; None: floating point."""
    bits = {single[0]: int(single[1:]) for single in split(option)}
    return bits.get("w"), bits.get("a")


def decibels(nsr: float) -> float:
    """Of a noise-to-signal ratio, the signal over the noise."""
    return min(MAX_DB, -10 * math.log10(nsr)) if nsr > 0 else MAX_DB


@dataclass(frozen=True, eq=False)
class Table:
    """Noise-to-signal ratios (squared error over squared output) with one layer quantized and the others as they are.

    Yang et al. 2023 (arXiv:2312.05431) rank the blocks of latent diffusion models by the inverse of this, in decibels.
    """

    part: str
    mode: str
    """exact: of the part's output. local: of the layer's own output, times how much of it arrives."""
    layers: tuple[str, ...]
    options: tuple[str, ...]
    """Single ones."""
    steps: tuple[int, ...]
    """Indices of the plan's calls."""
    nsr: Array
    """[layers, options, steps]; NaN where a layer cannot take an option: an Embedding has no input to round."""
    bits: Array
    """[layers, options] that the layer's weights take, scales included; those of floats for an option of inputs."""
    weights: tuple[int, ...]
    """Of each layer."""
    macs: tuple[int, ...]
    """Multiply-accumulates of each layer for one sample at one step."""
    gains: Array
    """[steps]: the noise-to-signal ratio of the final latents is the sum of gain * that of the output at a step."""
    float_bits: int = 32
    """Of a weight that is left alone."""

    @cached_property
    def final(self) -> Array:
        """[layers, options]: noise-to-signal ratio of the final latents."""
        final: Array = self.nsr @ self.gains
        return final

    def of_outputs(self) -> Table:
        """The same with the part's own output in place of final latents: its noise, the mean over steps. Sums predict
        it far better, and a floor on it is what most layers can be held to.
        """
        return replace(self, gains=np.full(len(self.steps), 1 / len(self.steps)))

    @cached_property
    def _row(self) -> dict[str, int]:
        return {layer: i for i, layer in enumerate(self.layers)}

    @cached_property
    def _column(self) -> dict[str, int]:
        return {option: i for i, option in enumerate(self.options)}

    def takes(self, layer: str, option: str) -> bool:
        """Whether there are figures for it."""
        columns = [self._column.get(single) for single in split(option)]
        return all(c is not None and bool(np.isfinite(self.final[self._row[layer], c])) for c in columns)

    def error(self, layer: str, option: str) -> float:
        """Noise-to-signal ratio of the final latents, the squared errors of weights and inputs added."""
        return sum(float(self.final[self._row[layer], self._at(single)]) for single in split(option))

    def stored_bits(self, layer: str, option: str) -> int:
        """Of the layer's weights."""
        row, weights = self._row[layer], [single for single in split(option) if single[0] == "w"]
        if not weights:
            return self.weights[row] * self.float_bits
        return int(self.bits[row, self._at(weights[0])])

    def predicted(self, chosen: Mapping[str, str]) -> float:
        """Noise-to-signal ratio of the final latents with every layer as chosen; those not named stay float."""
        return sum(self.error(layer, option) for layer, option in chosen.items())

    def predicted_steps(self, chosen: Mapping[str, str]) -> Array:
        """[steps] the same of the part's output."""
        total = np.zeros(len(self.steps))
        for layer, option in chosen.items():
            for single in split(option):
                total += self.nsr[self._row[layer], self._at(single)]
        return total

    def average_bits(self, chosen: Mapping[str, str]) -> float:
        """Stored bits of a weight, scales included, over all layers of the table."""
        stored = sum(self.stored_bits(layer, chosen.get(layer, FLOAT)) for layer in self.layers)
        return stored / max(sum(self.weights), 1)

    def by_kind(self, option: str) -> dict[str, dict[str, float]]:
        """Kind of operator -> layers, weights, and decibels: of the mean noise, and of the worst layer.

        Qua2SeDiMo (Mills et al. 2024, arXiv:2412.14628) finds that kinds differ; the noise here is that of a layer's
        output alone, the mean over steps.
        """
        found: dict[str, list[tuple[int, float]]] = {}
        for i, layer in enumerate(self.layers):
            nsr = float(np.mean(sum(self.nsr[i, self._at(single)] for single in split(option))))
            if math.isfinite(nsr):
                found.setdefault(kind_of(layer), []).append((self.weights[i], nsr))
        return {
            kind: {
                "layers": len(rows),
                "weights": sum(weights for weights, _ in rows),
                "mean_db": round(decibels(float(np.mean([nsr for _, nsr in rows]))), 2),
                "worst_db": round(decibels(max(nsr for _, nsr in rows)), 2),
            }
            for kind, rows in found.items()
        }

    def _at(self, single: str) -> int:
        if single not in self._column:
            raise BadInput(
                f"option {single!r}",
                expected=f"one that was measured: {', '.join(self.options)}",
                fix="measure sensitivity with it among the options",
            )
        return self._column[single]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; decibels with four places, None where there is no figure."""
        rows = []
        for i, layer in enumerate(self.layers):
            options = {
                option: {
                    "bits": int(self.bits[i, j]),
                    "final_db": _rounded(float(self.final[i, j])),
                    "sqnr_db": [_rounded(float(value)) for value in self.nsr[i, j]],
                }
                for j, option in enumerate(self.options)
            }
            row = {"layer": layer, "kind": kind_of(layer), "weights": self.weights[i], "macs": self.macs[i]}
            rows.append({**row, "options": options})
        head = {"part": self.part, "mode": self.mode, "float_bits": self.float_bits}
        return {**head, "steps": list(self.steps), "gains": self.gains.tolist(), "layers": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        rows: Sequence[Mapping[str, Any]] = data["layers"]
        options = tuple(rows[0]["options"]) if rows else ()
        shape = (len(rows), len(options), len(data["steps"]))
        values = [_ratio(v) for row in rows for o in options for v in row["options"][o]["sqnr_db"]]
        return cls(
            part=data["part"],
            mode=data["mode"],
            layers=tuple(row["layer"] for row in rows),
            options=options,
            steps=tuple(data["steps"]),
            nsr=np.array(values, np.float64).reshape(shape),
            bits=np.array([[row["options"][o]["bits"] for o in options] for row in rows], np.int64),
            weights=tuple(row["weights"] for row in rows),
            macs=tuple(row["macs"] for row in rows),
            gains=np.array(data["gains"], np.float64),
            float_bits=data["float_bits"],
        )

    def csv(self) -> str:
        """A row for each layer, option and step, for whoever wants to plot it."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("layer", "kind", "option", "step", "sqnr_db", "bytes", "macs"))
        for i, layer in enumerate(self.layers):
            for j, option in enumerate(self.options):
                size = math.ceil(int(self.bits[i, j]) / 8)
                for k, step in enumerate(self.steps):
                    value = _rounded(float(self.nsr[i, j, k]))
                    writer.writerow((layer, kind_of(layer), option, step, value, size, self.macs[i]))
        return out.getvalue()


def _rounded(nsr: float) -> float | None:
    return round(decibels(nsr), 4) if math.isfinite(nsr) else None


def _ratio(value: float | None) -> float:
    if value is None:
        return math.nan
    return 0.0 if value >= MAX_DB else 10 ** (-value / 10)
