"""What the units that go can still say through those that stay: a linear fit, folded into the layer that reads both.

A reader's input h falls into kept and gone values. The best guess of the gone ones, linear in the kept ones at the same
place, is  h_gone = A h_kept + b,  A = C_gk C_kk^-1,  from means and covariances over the trajectories. A reader W then
sees the same with  W_kept + W_gone A  and a bias of  W_gone b.  (Least squares behind pruning: ThiNet, Luo et al. 2017,
arXiv:1707.06342; at the zero border of a convolution the bias is a little wrong.)
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import torch
from ..model.model import Model
from ..model.trajectories import trajectories
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from .width_groups import Slice, WidthGroup, rows

__all__ = ["Moments", "eliminate", "fold", "moments"]

Array = NDArray[Any]
Tensor = Any

DAMPING = 1e-4
"""Of the kept values' mean variance, added to each: inputs that hardly vary are not leaned on. From GPTQ's 1 %
(arXiv:2210.17323) downwards; here values outnumber unknowns by far."""


@dataclass
class Moments:
    """Sums over all places of a reader's inputs, float64."""

    count: int
    first: Tensor
    """[width]"""
    second: Tensor
    """[width, width]"""

    @classmethod
    def empty(cls, width: int) -> Moments:
        th = torch()
        return cls(0, th.zeros(width, dtype=th.float64), th.zeros(width, width, dtype=th.float64))

    def covariance(self) -> Tensor:
        """[width, width]"""
        mean = self.first / self.count
        return self.second / self.count - torch().outer(mean, mean)

    def add(self, values: Tensor) -> None:
        """values: [..., width], or [batch, width, height, width] of a picture."""
        flat = values.transpose(1, -1) if values.ndim == 4 else values
        flat = flat.reshape(-1, len(self.first)).float()
        self.count += len(flat)
        self.first += flat.sum(0).double()
        self.second += (flat.T @ flat).double()


def moments(
    model: Model,
    module: Any,
    groups: Sequence[WidthGroup],
    plan: Plan,
    seeds: Sequence[int],
    batch: int,
) -> Generator[Progress, None, dict[str, Moments]]:
    """Of what every group's reader is fed along trajectories of `plan`.

    module  the network whose layers the groups name, the one inside the model's denoiser
    """
    found = {}
    handles = []
    for group in groups:
        found[group.name] = mine = Moments.empty(group.width)

        def look(_: Any, inputs: tuple[Any, ...], mine: Moments = mine) -> None:
            mine.add(inputs[0].detach())

        handles.append(module.get_submodule(group.reader).register_forward_pre_hook(look))
    try:
        done = 0
        for run in trajectories(model, plan, seeds, prompts=model.prompts, batch=batch):
            done += len(run.seeds)
            yield Progress("refit", done / len(seeds), f"trajectory {done} of {len(seeds)}")
    finally:
        for handle in handles:
            handle.remove()
    return found


def fold(module: Any, group: WidthGroup, kept: Sequence[int], seen: Moments) -> None:
    """Change the reader's weights in place so that the units which are about to go may go; call before the cut."""
    th = torch()
    reader = module.get_submodule(group.reader)
    piece = Slice(group.reader, 1)
    gone = [unit for unit in range(group.count) if unit not in set(kept)]
    k, g = (th.tensor(rows(group, piece, units)) for units in (kept, gone))
    if len(g) == 0 or seen.count == 0:
        return
    centred = reader.bias is not None
    mean = seen.first / seen.count if centred else th.zeros_like(seen.first)
    covariance = seen.second / seen.count - th.outer(mean, mean)
    a = th.linalg.solve(_damped(covariance[k][:, k]), covariance[k][:, g]).T  # [gone, kept]
    with th.no_grad():
        weight = reader.weight.double()
        left = weight[:, g]  # [out, gone, ...]
        weight[:, k] += th.einsum("og...,gk->ok...", left, a)
        if centred:
            offset = mean[g] - a @ mean[k]
            reader.bias += (left.flatten(2).sum(2) if left.ndim > 2 else left).matmul(offset).to(reader.bias)
        reader.weight.copy_(weight.to(reader.weight))


def eliminate(group: WidthGroup, scores: Array, seen: Moments, least: int) -> Array:
    """[count]: what each unit costs in the order in which units go, when the others take over what they can say of it.

    scores  [count] of the units themselves, squared errors of the output
    least   units that stay whatever happens; theirs are larger than those of all others
    A unit costs its score times the share of its variance that is left given all that remain, which is read off the
    inverse covariance P: the variance of unit u given the rest is inv(P_uu). The cheapest goes, P shrinks to that of
    the rest, and so on (the optimal brain surgeon's step, Hassibi and Stork 1993, with values in place of weights).
    """
    th = torch()
    n, s = group.count, group.size
    covariance = seen.covariance()
    precision = th.linalg.inv(_damped(covariance))
    own = covariance.diagonal().view(n, s).sum(1).clamp(min=1e-30)
    rate = th.from_numpy(scores) / own
    gone = th.zeros(n, dtype=th.bool)
    found, highest = np.empty(n), 0.0
    for _ in range(n - least):
        if s == 1:
            left = 1 / precision.diagonal()
        else:
            blocks = precision.view(n, s, n, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            left = th.linalg.inv(blocks + gone.view(n, 1, 1) * th.eye(s, dtype=th.float64))
            left = left.diagonal(dim1=1, dim2=2).sum(1)
        costs = th.where(gone, th.inf, rate * left)
        unit = int(costs.argmin())
        # never less than one before: units go in this order
        highest = max(highest * (1 + 1e-9), float(costs[unit]))
        found[unit], gone[unit] = highest, True
        at = slice(unit * s, (unit + 1) * s)
        rows_of = precision[at].clone()
        if s == 1:
            precision.addr_(rows_of[0], rows_of[0], alpha=-1 / float(rows_of[0, unit]))
        else:
            precision -= rows_of.T @ th.linalg.solve(rows_of[:, at], rows_of)
    found[~gone.numpy()] = np.maximum(highest * 2, (rate * own).numpy()[~gone.numpy()])
    return found


def _damped(covariance: Tensor) -> Tensor:
    more = DAMPING * covariance.diagonal().mean() + 1e-30
    return covariance + more * torch().eye(len(covariance), dtype=covariance.dtype)
