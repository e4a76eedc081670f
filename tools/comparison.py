"""What is measured of two sets of pictures, and how the pictures' numbers become a candidate's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.quality import MAX_DB, cosine_distance, frechet_distance, frechet_interval, share_interval
from ..runtime.errors import BadInput
from .features import ImageGraph, Scorer
from .pairs import Artist, How, Pair, Tick, pairs
from .stats import median_interval
from .subjects import Subject

__all__ = [
    "METRICS",
    "Measured",
    "Metric",
    "Shortfall",
    "judge",
    "measure",
    "parse_floor",
    "shown",
    "summarize",
]

Array = NDArray[Any]

WORST = 6
"""Pairs of pictures kept to be looked at."""
TOP = 5
SAMPLES_A_FEATURE = 2
"""Pictures a feature from which on a Frechet distance gets an interval: with 2 to 30 it held the truth in 88 to 98 of
100 Gaussian trials (as in tests/export/test_quality.py); with fewer the value says more of them than of models."""


@dataclass(frozen=True)
class Metric:
    title: str
    unit: str = ""
    more_is_better: bool = True
    needs: str = ""
    """What must be passed for it: features or scorer."""


METRICS = {
    "image_psnr_db": Metric("picture PSNR", "dB"),
    "ssim": Metric("picture SSIM"),
    "latent_psnr_db": Metric("latent PSNR", "dB"),
    "latent_sqnr_db": Metric("latent SQNR, own trajectory", "dB"),
    "network_sqnr_db": Metric("network SQNR, worst call", "dB"),
    "feature_distance": Metric("feature distance (cosine)", more_is_better=False, needs="features"),
    "frechet_distance": Metric("Frechet distance of features", more_is_better=False, needs="features"),
    "retrieval_top1": Metric("prompt retrieved first", "%", needs="scorer"),
    "retrieval_top5": Metric(f"prompt retrieved in the first {TOP}", "%", needs="scorer"),
}
"""Name -> what it is; the names are those of --floor."""


@dataclass
class Measured:
    """All that is kept of one candidate's pictures."""

    pairs: list[Pair] = field(default_factory=list)
    """Without their images."""
    worst: list[Pair] = field(default_factory=list)
    """With them; the furthest from the reference first, by picture PSNR."""
    features: tuple[list[Array], list[Array]] = field(default_factory=lambda: ([], []))
    """The reference's and the candidate's."""
    ranks: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))

    def add(self, pair: Pair, graph: ImageGraph | None, scorer: Scorer | None) -> None:
        for which, image in enumerate(pair.images):
            if graph is not None:
                self.features[which].append(graph(image))
            if scorer is not None:
                assert pair.subject.prompt is not None, "make_subjects gives a scorer's pictures prompts"
                self.ranks[which].append(scorer.rank(image, pair.subject.prompt))
        metrics = dict(pair.metrics)
        if graph is not None:
            a, b = (np.stack([vectors[-1]]) for vectors in self.features)
            metrics["feature_distance"] = float(cosine_distance(a, b)[0])
        bare = (np.empty(0), np.empty(0))
        self.pairs.append(
            Pair(pair.candidate, pair.subject, metrics, pair.own_sqnr_db, pair.led_sqnr_db, bare)
        )
        self.worst = sorted([*self.worst, pair], key=lambda p: p.metrics["image_psnr_db"])[:WORST]


def measure(
    reference: Artist,
    candidates: Sequence[Artist],
    subjects: Sequence[Subject],
    how: How,
    into: Mapping[str, Measured],
    graph: ImageGraph | None = None,
    scorer: Scorer | None = None,
) -> Iterator[Tick]:
    """Draw, compare and keep the numbers under each candidate's label; the pictures themselves are let go."""
    for tick in pairs(reference, candidates, subjects, how):
        if tick.pair is not None:
            into[tick.pair.candidate].add(tick.pair, graph, scorer)
        yield Tick(tick.fraction, tick.note)


def summarize(measured: Measured) -> dict[str, Any]:
    """The candidate's entry in the JSON document: metrics, curves, pairs."""
    every = measured.pairs
    metrics: dict[str, dict[str, Any]] = {}
    for name in METRICS:
        values = [pair.metrics[name] for pair in every if name in pair.metrics]
        if values:
            metrics[name] = _medians(values, worst=min if METRICS[name].more_is_better else max)
    n = len(every)
    a, b = measured.features
    if len(a) > 1:
        left, right = np.stack(a), np.stack(b)
        found: dict[str, Any] = {"n": n, "value": frechet_distance(left, right), "low": None, "high": None}
        if n >= SAMPLES_A_FEATURE * left.shape[1]:
            found["low"], found["high"] = frechet_interval(left, right, np.random.default_rng(0))
        metrics["frechet_distance"] = found
    for name, within in (("retrieval_top1", 1), (f"retrieval_top{TOP}", TOP)):
        if measured.ranks[1]:
            of_reference, own = (sum(rank < within for rank in ranks) for ranks in measured.ranks)
            low, high = share_interval(own, n)
            metrics[name] = {"n": n, "value": 100 * own / n, "low": 100 * low, "high": 100 * high}
            metrics[name]["reference"] = 100 * of_reference / n
    led, own_path = [p.led_sqnr_db for p in every], [p.own_sqnr_db for p in every]
    apart = ""
    if not own_path[0]:
        apart = "the plans differ: no SQNR a step, and of the networks alone nothing is known"
    elif not led[0]:
        apart = "the guidance differs: of the networks alone nothing is known"
    return {
        "metrics": metrics,
        "apart": apart,
        "own": [_quartiles(step) for step in zip(*own_path, strict=True)],
        "led": [_quartiles(call) for call in zip(*led, strict=True)],
        "pairs": [
            {
                "seed": p.subject.seed,
                "caption": p.subject.caption,
                **p.metrics,
                "own_sqnr_db": p.own_sqnr_db,
                "led_sqnr_db": p.led_sqnr_db,
            }
            for p in every
        ],
    }


@dataclass(frozen=True)
class Shortfall:
    """A floor that a candidate missed."""

    candidate: str
    metric: str
    value: float
    floor: float

    @property
    def by(self) -> float:
        return abs(self.value - self.floor)

    def __str__(self) -> str:
        bound = "at least" if METRICS[self.metric].more_is_better else "at most"
        unit = METRICS[self.metric].unit
        value, floor, by = (
            f"{v:.6g}" + (f" {unit}" if unit else "") for v in (self.value, self.floor, self.by)
        )
        return f"{self.candidate}: {self.metric} is {value}, {bound} {floor} wanted, missed by {by}"


def judge(
    metrics: Mapping[str, Mapping[str, Any]], floors: Mapping[str, float], label: str = ""
) -> list[Shortfall]:
    """The floors that the values miss. Raises BadInput for a floor on what was not measured."""
    short = []
    for name, floor in floors.items():
        if name not in metrics:
            raise BadInput(
                f"--floor {name}: not measured for {label}",
                expected=f"one of {', '.join(metrics)}",
            )
        value = metrics[name]["value"]
        if not (value >= floor if METRICS[name].more_is_better else value <= floor):
            short.append(Shortfall(label, name, value, floor))
    return short


def parse_floor(text: str) -> tuple[str, float]:
    """ "ssim=0.95" -> ("ssim", 0.95)."""
    name, _, number = text.partition("=")
    if name not in METRICS:
        near = get_close_matches(name, METRICS, n=3, cutoff=0.4)
        fix = f"did you mean {' or '.join(near)}?" if near else ""
        raise BadInput(f"floor {name[:80]!r}", expected=f"one of {', '.join(METRICS)}", fix=fix)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadInput(f"--floor {text[:80]}", expected=f"{name}=NUMBER", fix=f"--floor {name}=0.9")
    return name, value


def shown(name: str, value: float, *, unit: bool = False) -> str:
    """A value as people read it."""
    kind = METRICS[name].unit
    if kind == "dB":
        return "equal" if value >= MAX_DB else f"{value:.1f}" + (" dB" if unit else "")
    if kind == "%":
        return f"{value:.1f}" + (" %" if unit else "")
    return f"{value:.4f}" if name == "ssim" else f"{value:.3g}"


def span(name: str, low: float | None, high: float | None) -> str:
    """Two ends of an interval; empty where nothing is known of one, or nothing lies between them."""
    return "" if low is None or high is None or low == high else f"{shown(name, low)} to {shown(name, high)}"


def _medians(values: Sequence[float], worst: Any) -> dict[str, Any]:
    low, high = (end if math.isfinite(end) else None for end in median_interval(values))
    q25, q50, q75 = (float(q) for q in np.percentile(values, (25, 50, 75)))
    ends = {"low": low, "high": high, "p25": q25, "p75": q75, "worst": worst(values)}
    return {"n": len(values), "value": q50, **ends}


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    q25, q50, q75 = (float(q) for q in np.percentile(values, (25, 50, 75)))
    return {"p25": q25, "p50": q50, "p75": q75, "worst": min(values)}
