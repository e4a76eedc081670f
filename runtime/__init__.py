"""Run a bundle: numpy and one engine, nothing else.

    from fewstep.runtime import Pipeline
    Pipeline.from_pretrained("bundle")("a rooster", seed=1).images[0].save("rooster.png")

The mathematics is here too, for those who bring their own network: processes, time grids, samplers and plans.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from .noise import Noise, randn
from .plan import Plan, Time, plan
from .process import EDM, DiscreteVP, Process, RectifiedFlow
from .step import Step

if TYPE_CHECKING:
    from .bundle import Bundle
    from .pipeline import Output, Pipeline
    from .samplers import SAMPLERS

__all__ = [
    "EDM",
    "SAMPLERS",
    "Bundle",
    "DiscreteVP",
    "Noise",
    "Output",
    "Pipeline",
    "Plan",
    "Process",
    "RectifiedFlow",
    "Step",
    "Time",
    "errors",
    "plan",
    "randn",
]

_LAZY = {"Bundle": "bundle", "Output": "pipeline", "Pipeline": "pipeline", "SAMPLERS": "samplers"}


def __getattr__(name: str) -> Any:
    """The pipeline, the samplers and what they need are imported when first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
