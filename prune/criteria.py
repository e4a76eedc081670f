"""What a block of a denoiser is worth: the criteria by which blocks are taken out.

Each gives a score for every unit, 0 for one that nothing depends on. Those of LAPTOP-Diff and LD-Pruner add up, nearly,
when several units go: they are squared distances.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.model import Model, Part
from ..model.structure import bypassed, network_of, part_with, shadow
from ..model.trajectories import run_part, trajectories
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from .scores import Scores
from .units import Unit

__all__ = [
    "SEEDS",
    "Distance",
    "each_alone",
    "final_distance",
    "final_latents",
    "latent_distance",
    "magnitude",
    "output_distance",
    "paired_distance",
    "random",
    "recorded_calls",
]

Array = NDArray[Any]
Distance = Callable[[Sequence[str]], float]
"""Paths of units that are out -> how much it matters, 0 for nothing."""
SEEDS = 2_000_000
"""The first seed of the trajectories that blocks are judged on, far from those of pictures and of what teaches."""


def magnitude(part: Part, units: Sequence[Unit]) -> dict[str, float]:
    """Mean |w| of what a unit takes with it."""
    network = network_of(part)
    before = dict(network.named_parameters())
    copied = shadow(network)
    scores = {}
    for unit in units:
        with bypassed(copied, [unit.path]):
            left = {name for name, _ in copied.named_parameters()}
        gone = [tensor for name, tensor in before.items() if name not in left]
        total = sum(float(tensor.detach().double().abs().sum()) for tensor in gone)
        scores[unit.path] = total / max(1, sum(tensor.numel() for tensor in gone))
    return scores


def random(units: Sequence[Unit], seed: int) -> dict[str, float]:
    """Uniform in [0, 1)."""
    drawn = np.random.default_rng(seed).random(len(units))
    return {unit.path: float(value) for unit, value in zip(units, drawn, strict=True)}


def output_distance(part: Part, calls: Sequence[Mapping[str, Array]]) -> Distance:
    """E ||out - out without||^2 over E ||out||^2 (LAPTOP-Diff, Zhang et al. 2024, arXiv:2404.11098).

    calls  what the denoiser is fed, [batch, ...] by input name
    """
    copied = part_with(part, shadow(network_of(part)))
    right = [_output(part, feeds) for feeds in calls]
    power = sum(float(np.sum(np.square(out))) for out in right)

    def distance(removed: Sequence[str]) -> float:
        total = 0.0
        with bypassed(network_of(copied), removed):
            for feeds, out in zip(calls, right, strict=True):
                total += float(np.sum(np.square(_output(copied, feeds) - out)))
        return total / power

    return distance


def final_distance(
    model: Model, plan: Plan, seeds: Sequence[int], far: Callable[[Array, Array], float]
) -> Distance:
    """How far the final latents of the plan move (LD-Pruner, Castells et al. 2024, arXiv:2404.11936).

    far  latent_distance, the paper's, or paired_distance
    """
    part = model.parts[model.denoiser]
    right = final_latents(model, plan, seeds)
    copied = part_with(part, shadow(network_of(part)))
    modified = replace(model, parts={**model.parts, part.name: copied})

    def distance(removed: Sequence[str]) -> float:
        with bypassed(network_of(copied), removed):
            return far(right, final_latents(modified, plan, seeds))

    return distance


def latent_distance(right: Array, moved: Array) -> float:
    """(||mean Z - mean Z'|| + ||std Z - std Z'||)^2 over that of zeros; mean and std over samples, by element.

    right, moved  [samples, channels, height, width]
    Squared, unlike in the paper: squares add up when units go together, and the order is the same.
    """

    def far(a: Array, b: Array) -> float:
        mean = np.linalg.norm(np.mean(a, 0) - np.mean(b, 0))
        return float(mean + np.linalg.norm(np.std(a, 0) - np.std(b, 0)))

    return (far(right, moved) / far(right, np.zeros_like(right))) ** 2


def paired_distance(right: Array, moved: Array) -> float:
    """Mean square of Z - Z', sample by sample of equal seeds, over that of Z."""
    return float(np.sum(np.square(moved - right)) / np.sum(np.square(right)))


def final_latents(model: Model, plan: Plan, seeds: Sequence[int]) -> Array:
    """[samples, channels, height, width] float64: where the plan ends from every seed, with the model's own prompts."""
    ends = [found.latent for found in trajectories(model, plan, seeds, prompts=model.prompts)]
    return np.concatenate(ends).astype(np.float64)


def recorded_calls(model: Model, plan: Plan, seeds: Sequence[int], times: int) -> list[Mapping[str, Array]]:
    """What the denoiser is fed at `times` calls of the plan, evenly spread, from every seed."""
    rows = np.unique(np.linspace(0, len(plan.calls) - 1, times).round().astype(int))
    found = trajectories(model, plan, seeds, prompts=model.prompts)
    return [each.calls[row] for each in found for row in rows]


def each_alone(
    units: Sequence[Unit], distance: Distance, scores: Scores
) -> Generator[Progress, None, dict[str, float]]:
    """The distance for every unit, taken out alone; those that `scores` has are not measured again."""
    for number, unit in enumerate(units):
        yield Progress("score", number / len(units), scores.note(unit.path, number, len(units)))
        if unit.path not in scores.done:
            scores.add(unit.path, distance([unit.path]))
    scores.save()
    return {unit.path: scores.done[unit.path] for unit in units}


def _output(part: Part, feeds: Mapping[str, Array]) -> Array:
    return run_part(part, feeds)[part.outputs[0].name].astype(np.float64)
