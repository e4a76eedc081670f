"""w8a8, w4a8, w3.5: how many bits weights and inputs take, as people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..runtime.errors import BadInput

__all__ = ["Scheme", "parse_scheme"]

WEIGHTS = (2.5, 8.0)
"""Average bits of a weight that can be asked for: options end at 2 and 8 bits, and scales come on top."""

INPUTS = (4, 5, 6, 7, 8, 16)
"""Bits of inputs: what codes in bytes can hold, and no fewer than a table of 16; or 16, outputs too, as NPUs take."""


@dataclass(frozen=True)
class Scheme:
    weights: float
    """Bits of a weight; between whole numbers an average over layers of different bits."""
    inputs: int | None
    """Bits of a layer's input; None: floating point."""

    @property
    def mixed(self) -> bool:
        return self.weights != int(self.weights)


def parse_scheme(text: str) -> Scheme:
    """Raises BadInput for what is no scheme, or one no engine has a use for."""
    found = re.fullmatch(r"w(\d(?:\.\d{1,2})?)(?:a(\d{1,2}))?", text.strip().lower())
    expected = (
        f"wBITS or wBITSaBITS: weights of {WEIGHTS[0]:g} to {WEIGHTS[1]:g} bits, inputs of 4 to 8, or 16"
    )
    if found is None:
        raise BadInput(f"scheme {text!r}", expected=expected, fix="w8a8 for speed, w4 for size")
    weights, inputs = float(found[1]), found[2] and int(found[2])
    if not WEIGHTS[0] <= weights <= WEIGHTS[1] or (inputs and inputs not in INPUTS):
        raise BadInput(
            f"scheme {text!r}", expected=expected, fix="leave the inputs out for floating-point ones"
        )
    return Scheme(weights, inputs or None)
