"""Sensitivity of a model's denoiser along a plan, from nothing but the model: record, then measure."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from ..model.model import Model
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from .calibrate import Calibration, calibrate
from .compose import of_time
from .observe import input_codes, observe
from .sensitivity import Sensitivity, sensitivity
from .simulate import quantizable
from .table import Table, bits_of

__all__ = ["study"]


def study(
    model: Model, plan: Plan, how: Calibration, options: Sequence[str], group: int, store: Path
) -> Generator[Progress, None, Table]:
    """The table of every layer of the denoiser with every option; resumed from `store` where it was cut off.

    options  single ones, "w4" or "a8"
    group    weights of a row that share a scale, below 8 bits
    """
    recorded = yield from calibrate(model, plan, how, store)
    part = model.parts[model.denoiser]
    batches, steps = recorded.batches(part.name), recorded.steps(part.name)
    widths = [bits for option in options if (bits := bits_of(option)[1]) is not None]
    inputs = {}
    if widths:
        names = [
            name
            for name, module in quantizable(part).items()
            if type(module).__name__ != "Embedding" and not of_time(name)
        ]
        seen = yield from observe(part, batches, names, steps)
        inputs = {name: {bits: input_codes(one, bits) for bits in widths} for name, one in seen.items()}
    guidance = model.guidance.scale if model.guidance.kind != "none" else 1.0
    settings = Sensitivity(options=tuple(options), group=group, symmetric=False, multiplier=True)
    table = yield from sensitivity(
        part, batches, steps, inputs, settings, store, plan=plan, guidance=guidance
    )
    return table
