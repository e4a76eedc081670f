"""Fewer channels, heads and hidden units: the denoiser narrower inside its blocks, and otherwise what it was."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..model.fingerprint import model_fingerprint
from ..model.model import Context, Model, Part
from ..model.structure import network_of, part_with, structure_of
from ..runtime.errors import BadInput
from ..runtime.progress import Progress, within
from .flops import layer_multiplications, multiplications
from .importance import ADDITIVE, BATCH, CRITERIA, SEEDS, importance
from .ranking import choose, comparable
from .refit import eliminate, fold, moments
from .width_groups import KINDS, WidthGroup, cut, find_groups

__all__ = ["CutWidths"]

RANKED = 0.7
"""Of the pass's progress bar: gradients take about three times the refit's forward passes."""


@dataclass(frozen=True)
class CutWidths:
    """A pass: the denoiser with the least important channels, heads and hidden units gone for good.

    What is left is a plain smaller network: no masks, and it exports like any other. The record in history holds
    `parameters` and `multiplications` of the denoiser, before and after, and `widths`: block -> [before, after].
    """

    ratio: float = 0.5
    """Share of the denoiser's parameters, or multiplications, that goes."""
    of: str = "parameters"
    """Or multiplications: where speed counts more than size."""
    kinds: tuple[str, ...] = KINDS
    """Of channels, heads, ffn."""
    criterion: str = "output"
    """importance.py has them all."""
    samples: int = 16
    """Trajectories of the plan that ships behind the importance and the refit."""
    floor: float = 0.1
    """Share of every layer that stays; emoji-64 at ratio 0.5 is 1.9 dB nearer to itself than with 0.25."""
    round_to: int = 8
    """Widths become multiples of it, for engines that work in tiles. On ONNX Runtime on x86 it gains nothing (0.73 of
    the time against 0.72), and costs nothing: emoji-64 at ratio 0.5 is 0.2 dB nearer to itself with 8 than with 1."""
    refit: bool = True
    """Let what stays say what it can of what went, and with the criterion `output` count for a unit only what the
    others cannot say."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise BadInput(f"ratio of narrower layers: {self.ratio}", expected="from 0 to below 1")
        if self.of not in ("parameters", "multiplications"):
            raise BadInput(f"ratio of {self.of}", expected="of parameters or multiplications")
        if not self.kinds or (unknown := [kind for kind in self.kinds if kind not in KINDS]):
            found = f"kinds of width: {', '.join(unknown) if self.kinds else 'none'}"
            raise BadInput(found, expected=f"some of {', '.join(KINDS)}")
        if self.criterion not in CRITERIA:
            raise BadInput(f"criterion {self.criterion!r}", expected=" or ".join(CRITERIA))
        if not 0 <= self.floor <= 1:
            raise BadInput(f"floor of widths: {self.floor}", expected="0 to 1")
        for name in ("samples", "round_to"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} of narrower layers: {getattr(self, name)}", expected="at least 1")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a denoiser that is no network of diffusers or has less to cut than is wanted."""
        part = model.parts[model.denoiser]
        network = network_of(part)
        groups = find_groups(network, self.kinds)
        if not groups:
            raise BadInput(
                f"{part.name} of {model.name} has no {' or '.join(self.kinds)} to cut",
                expected="residual blocks, attentions or feed-forward nets of diffusers",
                fix="take cut_widths out of the recipe",
            )
        work = multiplications(part)
        saved, total = self._savings(part, groups, work)
        file = ctx.store / f"importance-{self._key(model, ctx, groups)}.safetensors"
        scores = yield from within(
            importance(model, network, groups, self.criterion, ctx.plan, self.samples, self.seed, file),
            0,
            RANKED,
        )
        if self.criterion not in ADDITIVE:
            scores = comparable(scores)
        if self.refit and self.ratio > 0:
            seeds = [SEEDS + self.seed + i for i in range(self.samples)]
            seen = yield from within(moments(model, network, groups, ctx.plan, seeds, BATCH), RANKED, 1)
            if self.criterion == "output":
                scores = {
                    group.name: eliminate(
                        group,
                        scores[group.name],
                        seen[group.name],
                        group.widths_kept(self.round_to, self.floor)[-1],
                    )
                    for group in groups
                }
        kept = choose(groups, scores, saved, self.ratio * total, floor=self.floor, round_to=self.round_to)
        cuts = [group for group in groups if len(kept[group.name]) < group.count]
        if self.refit and cuts:
            network = copy.deepcopy(network)
            for group in cuts:
                fold(network, group, kept[group.name], seen[group.name])
        smaller = narrowed(part, network, groups, kept)
        after = multiplications(smaller)
        yield Progress(
            "widths", 1.0, f"{1 - smaller.parameters() / part.parameters():.0%} of {part.name} gone"
        )
        return model.after(
            self,
            {part.name: smaller},
            parameters=[part.parameters(), smaller.parameters()],
            multiplications=[work, after],
            widths={group.name: [group.width, len(kept[group.name]) * group.size] for group in cuts},
        )

    def _savings(self, part: Part, groups: Sequence[WidthGroup], work: int) -> tuple[dict[str, float], float]:
        """What one unit of each group saves, and what there is in all."""
        if self.of == "parameters":
            return {group.name: float(group.weights) for group in groups}, float(part.parameters())
        return unit_multiplications(part, groups), float(work)

    def _key(self, model: Model, ctx: Context, groups: Sequence[WidthGroup]) -> str:
        """Of all that importance depends on."""
        said = {
            "model": model_fingerprint(model),
            "plan": ctx.plan.to_json(),
            "guidance": model.guidance.scale,
            "prompts": model.prompts,
            "how": [self.criterion, self.samples, self.seed],
            "groups": [group.name for group in groups],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def narrowed(
    part: Part, network: Any, groups: Sequence[WidthGroup], kept: Mapping[str, Sequence[int]]
) -> Part:
    """The part around a copy of the network in which only the kept units are left, with its structure written down."""
    structure = structure_of(network)
    heads, norms = dict(structure.heads), dict(structure.groups)
    for group in groups:
        number = len(kept.get(group.name, range(group.count)))
        if number == group.count:
            continue
        if group.kind == "heads":
            heads[group.name] = number
        elif group.kind == "channels":
            norms[f"{group.name}.norm2"] = number
    return part_with(part, cut(network, kept), replace(structure, heads=heads, groups=norms))


def unit_multiplications(part: Part, groups: Sequence[WidthGroup]) -> dict[str, float]:
    """Multiplications of one sample at the default size that go with one unit of each group."""
    network = network_of(part)
    prefix = next(f"{path}." for path, module in part.module.named_modules() if module is network)
    counts = layer_multiplications(part)
    found = {}
    for group in groups:
        total = 0.0
        for piece in group.slices:
            layer = network.get_submodule(piece.layer)
            if layer.weight.ndim > 1:
                share = piece.copies * group.size / layer.weight.shape[piece.axis]
                total += counts[prefix + piece.layer] * share
        if group.kind == "heads":
            total += counts[prefix + group.name] / group.count
        found[group.name] = total
    return found
