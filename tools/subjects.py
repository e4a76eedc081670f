"""What pictures are asked for: prompts, class labels, observations and seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.checks import read_prompts
from ..runtime.errors import BadInput, MissingExtra
from ..runtime.manifest import Manifest
from ..runtime.process import process_from_json
from .console import needs
from .features import Scorer

__all__ = ["PICTURES", "Subject", "make_subjects", "read_picture", "read_prompts"]

SCORER_PROMPTS = 64
"""Of a scorer's prompts, evenly spread, where the user names none."""
PICTURES = 8
"""Drawn where --count is not given: enough for an interval of a median (6; stats.py), soon done."""


@dataclass(frozen=True)
class Subject:
    """What one picture shows, and the seed of its noise."""

    seed: int
    prompt: str | None = None
    label: int | None = None
    observation: str | None = None
    """The file of what a restoration model is given."""

    @property
    def caption(self) -> str:
        label = None if self.label is None else f"class {self.label}"
        words = (self.prompt, label, self.observation and Path(self.observation).name)
        return ", ".join(word for word in words if word) or f"seed {self.seed}"


@lru_cache(maxsize=2)
def read_picture(path: str, option: str = "--observation") -> NDArray[Any]:
    """A picture as [height, width, 3] in 0..1, or what a .npy file holds. Raises BadInput for anything else."""
    try:
        if path.endswith(".npy"):
            return np.asarray(np.load(path, allow_pickle=False))
        with needs("onnx"):
            from PIL import Image
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, ValueError) as error:  # what Pillow cannot identify is an OSError too
        if isinstance(error, MissingExtra):
            raise
        raise BadInput(
            f"{option} {path} cannot be read ({error})", expected="a picture, or a .npy file"
        ) from None


def make_subjects(
    manifest: Manifest,
    prompts: Sequence[str],
    labels: Sequence[int],
    count: int | None,
    seed: int,
    scorer: Scorer | None = None,
    observations: Sequence[str] = (),
) -> list[Subject]:
    """Every prompt, label or observation `count` times, each picture with a seed of its own, counted on from `seed`."""
    told = manifest.tokenizer is not None
    if not told and (prompts or scorer):
        raise BadInput(f"a prompt or a scorer for a model of task {manifest.task}", expected="neither")
    if manifest.classes is None and labels:
        raise BadInput(f"class labels for a model of task {manifest.task}", expected="no class labels")
    if scorer and not prompts:
        every = scorer.prompts
        picked = min(SCORER_PROMPTS, len(every))
        prompts = [every[i * len(every) // picked] for i in range(picked)]
    if told and not prompts:
        raise BadInput("no prompt", expected="a text", fix="pass --prompt TEXT or --prompts FILE")
    if manifest.classes is not None and not labels:
        raise BadInput(
            "no class label",
            expected=f"0 to {manifest.classes - 1}",
            fix="pass --class-label 0, also repeatedly",
        )
    restores = hasattr(process_from_json(manifest.process), "gamma")
    if restores != bool(observations):
        raise BadInput(
            "no observation" if restores else "an observation for a model that takes none",
            expected="pictures to restore" if restores else "no --observation",
            fix="pass --observation FILE.png, also repeatedly" if restores else "",
        )
    for observation in observations:
        read_picture(observation)
    if scorer:
        scorer.check(prompts)
    texts: Sequence[str | None] = prompts or [None]
    classes: Sequence[int | None] = labels or [None]
    given: Sequence[str | None] = observations or [None]
    kinds = list(itertools.product(texts, classes, given))
    repeat = count or math.ceil(PICTURES / len(kinds))
    asked = [kind for kind in kinds for _ in range(repeat)]
    return [Subject(seed + i, *kind) for i, kind in enumerate(asked)]
