"""A smaller denoiser: the blocks that matter least are taken out, and nothing stands in their place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.fingerprint import model_fingerprint
from ..model.model import Context, Model, Part
from ..model.structure import without
from ..runtime.errors import BadInput
from ..runtime.progress import Progress, within
from .bk_sdm import BK_SDM, bk_sdm_part, by_hand
from .criteria import (
    SEEDS,
    each_alone,
    final_distance,
    latent_distance,
    magnitude,
    output_distance,
    paired_distance,
    random,
    recorded_calls,
)
from .flops import multiplications
from .knapsack import lightest, lowest
from .scores import Scores
from .units import Unit, find_units

__all__ = ["CRITERIA", "CutBlocks"]

CRITERIA = ("laptop", "ld_pruner", "ld_pruner_paired", "magnitude", "random", "by_hand", *BK_SDM)
BY = ("parameters", "multiplications")


@dataclass(frozen=True)
class CutBlocks:
    """A pass: residual blocks, transformers, attentions and feed-forwards of the denoiser are taken out.

    Which ones, the criterion says; what is left keeps its weights and wants recovery training. The record in history
    holds `removed`, `scores` of every unit, `parameters` and `multiplications` before and after, and `predicted`, the
    sum of the scores of what was removed, beside `measured`, the score of all of it together.
    """

    criterion: str = "laptop"
    """laptop, ld_pruner, ld_pruner_paired (sample by sample), magnitude, random; by_hand in BK-SDM's order; or one of
    bk_sdm_base, bk_sdm_small and bk_sdm_tiny, which have a size of their own and load in diffusers as they are."""
    ratio: float = 0.5
    """Share of the denoiser that goes, at least; of BK-SDM's cuts nothing."""
    by: str = "parameters"
    """Or multiplications."""
    samples: int = 8
    """Trajectories that units are judged on."""
    calls: int = 8
    """Network calls of each that laptop looks at."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise BadInput(f"criterion {self.criterion!r}", expected=" or ".join(CRITERIA))
        if not 0 < self.ratio < 1:
            raise BadInput(f"ratio of blocks to cut: {self.ratio}", expected="between 0 and 1")
        if self.by not in BY:
            raise BadInput(f"ratio by {self.by!r}", expected=" or ".join(BY))
        for name in ("samples", "calls"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} of cut_blocks: {getattr(self, name)}", expected="at least 1")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a denoiser without such blocks, and for a ratio that all of them do not reach."""
        part = model.parts[model.denoiser]
        if self.criterion in BK_SDM:
            yield Progress("cut blocks", 0.0, self.criterion)
            smaller = bk_sdm_part(part, self.criterion)
            found: dict[str, Any] = {}
        else:
            removed, found = yield from self._chosen(model, part, ctx)
            smaller = without(part, removed)
        counts = {
            "parameters": [part.parameters(), smaller.parameters()],
            "multiplications": [multiplications(part), multiplications(smaller)],
        }
        gone = 1 - counts["parameters"][1] / counts["parameters"][0]
        yield Progress("cut blocks", 1.0, f"{gone:.1%} of {part.name}'s parameters gone")
        return model.after(self, {part.name: smaller}, **counts, **found)

    def _chosen(
        self, model: Model, part: Part, ctx: Context
    ) -> Generator[Progress, None, tuple[tuple[str, ...], dict[str, Any]]]:
        """What to take out, and what is said of it in history."""
        units = find_units(part)
        sizes = {unit.path: getattr(unit, self.by) for unit in units}
        whole = part.parameters() if self.by == "parameters" else multiplications(part)
        reach = sum(sizes[unit.path] for unit in units if not unit.inside) / whole
        if self.ratio > reach:
            raise BadInput(
                f"{self.ratio:.0%} of the {self.by} of {part.name}",
                expected=f"at most {reach:.1%}, what all blocks that can go have together",
                fix="a lower ratio",
            )
        inside = {unit.path: unit.inside for unit in units}
        if self.criterion == "by_hand":
            order = by_hand(part)
            removed = lowest(sizes, {path: order.index(path) for path in order}, inside, self.ratio * whole)
            return removed, {"removed": list(removed)}
        if self.criterion in ("magnitude", "random"):
            scores = magnitude(part, units) if self.criterion == "magnitude" else random(units, self.seed)
            removed = lowest(sizes, scores, inside, self.ratio * whole)
            return removed, {"removed": list(removed), "scores": _rounded(scores)}
        scores, together = yield from within(self._measured(model, part, units, ctx), 0, 0.95)
        best = lightest(sizes, scores, inside, round(self.ratio * whole))
        assert best is not None, "the ratio was checked"
        removed = best
        said = {"removed": list(removed), "scores": _rounded(scores)}
        predicted = sum(scores[path] for path in removed)
        return removed, {**said, "predicted": round(predicted, 6), "measured": round(together(removed), 6)}

    def _measured(
        self, model: Model, part: Part, units: Sequence[Unit], ctx: Context
    ) -> Generator[Progress, None, tuple[dict[str, float], Callable[[Sequence[str]], float]]]:
        """Score of every unit, and what tells it for several of them together."""
        seeds = tuple(SEEDS + 1000 * (ctx.seed + self.seed) + i for i in range(self.samples))
        yield Progress("trajectories", 0.0, f"{self.samples} of {len(ctx.plan.calls)} calls")
        if self.criterion == "laptop":
            together = output_distance(part, recorded_calls(model, ctx.plan, seeds, self.calls))
        else:
            far = latent_distance if self.criterion == "ld_pruner" else paired_distance
            together = final_distance(model, ctx.plan, seeds, far)
        scores = yield from each_alone(
            units, together, Scores(ctx.store / f"blocks-{self._key(model, ctx)}.json")
        )
        return scores, together

    def _key(self, model: Model, ctx: Context) -> str:
        """Of everything that scores depend on."""
        what = {
            "model": model_fingerprint(model),
            "plan": ctx.plan.to_json(),
            "guidance": model.guidance.scale,
            "prompts": model.prompts,
            "how": [self.criterion, self.samples, self.calls, self.seed, ctx.seed],
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {
        path: float(f"{score:.4g}") for path, score in scores.items()
    }  # four digits: more is noise of the draw
