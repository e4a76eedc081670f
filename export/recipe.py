"""From a model to a bundle: load, passes, lower each part, gate, plans, side files, speed, commit."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..model import Context, Model, Part, load
from ..model.libraries import diffusers, quiet
from ..model.load import Summary, summarize
from ..runtime.bundle import BundleWriter
from ..runtime.errors import NotLinear
from ..runtime.files import remove, temporary_name
from ..runtime.manifest import Manifest, PartSpec, TokenizerSpec
from ..runtime.plan import Plan, plan
from ..runtime.progress import Progress
from ..runtime.samplers import SAMPLERS
from ..runtime.times import check_steps
from ..targets import Target, load_target
from . import gate, onnx, parts, preflight, sidefiles, speed
from .preflight import gib

__all__ = ["Exported", "export_bundle"]

TRACED: Mapping[str, str] = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LCMScheduler": "lcm",
}
"""The scheduler of a checkpoint -> the sampler traced when a run asks for another number of steps."""


@dataclass(frozen=True)
class Exported(Progress):
    """The last event of an export."""
