"""What pictures are asked for: prompts, class labels and seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import BadInput
from ..runtime.manifest import Manifest
from .features import Scorer

__all__ = ["PICTURES", "Subject", "make_subjects", "read_prompts"]

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

    @property
    def caption(self) -> str:
        if self.prompt is not None:
            return self.prompt
        return f"seed {self.seed}" if self.label is None else f"class {self.label}, seed {self.seed}"


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--prompts {path} cannot be read ({error})", expected="a text file in UTF-8"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"--prompts {path} holds no prompt", expected="one a line")
    return prompts


def make_subjects(
    manifest: Manifest,
    prompts: Sequence[str],
    labels: Sequence[int],
    count: int | None,
    seed: int,
    scorer: Scorer | None = None,
) -> list[Subject]:
    """Every prompt or label `count` times, each picture with a seed of its own, counted on from `seed`."""
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
    if scorer:
        scorer.check(prompts)
    texts: Sequence[str | None] = prompts or [None]
    classes: Sequence[int | None] = labels or [None]
    kinds = list(itertools.product(texts, classes))
    repeat = count or math.ceil(PICTURES / len(kinds))
    asked = [kind for kind in kinds for _ in range(repeat)]
    return [Subject(seed + i, prompt, label) for i, (prompt, label) in enumerate(asked)]
