"""How much every unit of a denoiser matters, accumulated over all the steps of the plan that ships.

Units are switched off by a gate of 0 in front of the layer that reads them (its input times gate, 1 so far). What
follows is one number for each unit, from inputs of the network that its own trajectories give; no data takes part.

    output      E (dL/dgate)^2 with L = <network output, r>, r ~ N(0, 1): to first order the squared change of the
                output when the unit goes, whatever it is used for (diagonal of J^T J by random probes: Hutchinson 1990)
    taylor      E |dL/dgate| with L the denoising loss on the model's own clean latents at times drawn evenly
                (Molchanov et al. 2019, arXiv:1906.10771, eq. 8; over timesteps: Diff-Pruning, Fang et al. 2023,
                arXiv:2305.10924)
    activation  E |input|^2 times |reading weights|^2, without a gradient (after Wanda, Sun et al. 2023,
                arXiv:2306.11695)
    magnitude   mean square of all the unit's weights (Li et al. 2016, arXiv:1608.08710)
    random      chance, to compare with
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import torch
from ..model.model import Model, Part
from ..model.shards import read_shard, write_shard
from ..model.training.estimates import Denoising
from ..model.trajectories import Trajectory, trajectories
from ..runtime.errors import BadInput
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from .width_groups import WidthGroup, rows

__all__ = ["ADDITIVE", "CRITERIA", "importance", "magnitudes"]

Array = NDArray[Any]

CRITERIA = ("output", "taylor", "activation", "magnitude", "random")
ADDITIVE = ("output", "taylor")
"""Errors of one and the same output: comparable between layers. The others are compared within a layer's mean."""
SEEDS = 2_000_000
"""The first seed of the trajectories, far from those that pictures are judged on."""
DONE = "trajectories done"
BATCH = 4
"""Trajectories at once; under guidance the network sees twice as many."""


def importance(
    model: Model,
    network: Any,
    groups: Sequence[WidthGroup],
    criterion: str,
    plan: Plan,
    samples: int,
    seed: int,
    file: Path,
) -> Generator[Progress, None, dict[str, Array]]:
    """Group's name -> [count] of numbers, larger for what matters more.

    network  the one inside the model's denoiser, whose layers the groups name
    samples  trajectories of `plan` that are looked at, at every step
    file     what is done so far, kept there: an interrupted run goes on behind its last batch
    Raises BadInput for a number that is not finite.
    """
    if criterion == "random":
        random = np.random.default_rng(seed)
        return {group.name: random.uniform(size=group.count) for group in groups}
    if criterion == "magnitude":
        return {group.name: magnitudes(network, group) for group in groups}
    totals, done = _read(file, groups)
    seeds = [SEEDS + seed + i for i in range(samples)]
    while done < samples:
        mine = seeds[done : done + BATCH]
        prompts = (
            [model.prompts[i % len(model.prompts)] for i in range(done, done + len(mine))]
            if model.prompts
            else []
        )
        (run,) = trajectories(model, plan, mine, prompts=prompts, batch=len(mine))
        random = torch().Generator().manual_seed(SEEDS + seed + done)
        for name, values in _of_run(model, network, groups, criterion, run, random).items():
            totals[name] = totals[name] + values
        done += len(mine)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_shard(file, {**totals, DONE: np.array([done])})
        yield Progress("importance", done / samples, f"trajectory {done} of {samples}")
    for name, values in totals.items():
        if not np.isfinite(values).all():
            raise BadInput(
                f"the importance of {name} is not finite",
                expected="a network with finite outputs and gradients",
            )
    return totals


def magnitudes(module: Any, group: WidthGroup) -> Array:
    """[count]: mean square of the weights of each unit, over all the layers it lies in; norms and biases left out."""
    total, number = np.zeros(group.count), 0
    for piece in group.slices:
        weight = module.get_submodule(piece.layer).weight.detach().float()
        if weight.ndim == 1:
            continue
        squares = weight.square().transpose(0, piece.axis).flatten(1)
        index = torch().tensor([rows(group, piece, [unit]) for unit in range(group.count)])
        total += squares.sum(1)[index].sum(1).double().numpy()
        number += index.shape[1] * squares.shape[1]
    return total / number


def _of_run(
    model: Model, network: Any, groups: Sequence[WidthGroup], criterion: str, run: Trajectory, random: Any
) -> dict[str, Array]:
    """What one batch of trajectories says, summed over its steps and samples."""
    th, part = torch(), model.parts[model.denoiser]
    totals = {group.name: np.zeros(group.count) for group in groups}
    denoising = Denoising.of(model) if criterion == "taylor" else None
    for feeds in run.calls:
        inputs = [th.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in part.inputs]
        with _gates(network, groups, criterion) as seen:
            if denoising is None:
                output = _first(part.module(*inputs))
                loss = (output * th.randn(output.shape, generator=random)).sum()
            else:
                loss = _denoising_loss(denoising, model, part, run, feeds, random)
            if criterion == "activation":
                gradients: Sequence[Any] = [None] * len(groups)
            else:
                gradients = th.autograd.grad(loss, [seen[group.name] for group in groups])
            for group, gradient in zip(groups, gradients, strict=True):
                if gradient is None:
                    per_unit = seen[group.name]
                elif criterion == "output":
                    per_unit = gradient.square().sum(0)
                else:
                    per_unit = gradient.abs().sum(0)
                totals[group.name] += per_unit.detach().double().numpy()
    return totals


def _denoising_loss(
    denoising: Denoising, model: Model, part: Part, run: Trajectory, feeds: Mapping[str, Array], random: Any
) -> Any:
    """Of every sample, summed: the loss the model was trained with, at times and noises drawn anew."""
    th = torch()
    x0 = th.from_numpy(run.latent)
    count = len(x0)
    names = [spec.name for spec in part.inputs]
    more = {n: th.from_numpy(feeds[n][-count:].copy()) for n in names if n not in ("sample", "timestep")}
    # times of the process run from 0, where nothing is noise, to t_max; level i is at i + 1 in a discrete one
    t = th.rand(count, generator=random, dtype=th.float64)
    t = (
        1 + (t * model.process.t_max).floor().clamp(max=model.process.t_max - 1)
        if model.process.t_max > 1
        else t
    )
    noise = th.randn(x0.shape, generator=random)
    output = denoising.output(part.module, denoising.noised(x0, noise, t), t, more)
    return (output - denoising.target(x0, noise, t)).square().flatten(1).mean(1).sum()


@contextmanager
def _gates(network: Any, groups: Sequence[WidthGroup], criterion: str) -> Iterator[dict[str, Any]]:
    """Inside, every reader's input goes through gates [samples, units], found in the mapping by the group's name; for
    `activation` the mapping holds each unit's squared contribution instead."""
    th = torch()
    seen: dict[str, Any] = {}
    handles = []
    for group in groups:

        def gate(layer: Any, inputs: tuple[Any, ...], group: WidthGroup = group) -> tuple[Any, ...]:
            x = inputs[0]
            axis = 1 if x.ndim == 4 else -1  # channels of a picture, or the last of tokens
            if criterion == "activation":
                rest = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
                reads = layer.weight.detach().square().transpose(0, 1).flatten(1).sum(1)
                seen[group.name] = (x.detach().square().sum(rest) * reads).view(group.count, -1).sum(1)
                return inputs
            gates = th.ones(len(x), group.count, requires_grad=True)
            seen[group.name] = gates
            wide = gates.repeat_interleave(group.size, dim=1)
            shape = (len(x), -1, 1, 1) if axis == 1 else (len(x), *[1] * (x.ndim - 2), -1)
            return (x * wide.view(shape), *inputs[1:])

        handles.append(network.get_submodule(group.reader).register_forward_pre_hook(gate))
    try:
        with th.set_grad_enabled(criterion != "activation"):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _read(file: Path, groups: Sequence[WidthGroup]) -> tuple[dict[str, Array], int]:
    """What an earlier run finished; a damaged file counts as none."""
    kept = read_shard(file)
    if kept is None:
        return {group.name: np.zeros(group.count) for group in groups}, 0
    return kept, int(kept.pop(DONE)[0])
