"""The statistics of a benchmark: percentiles, exact intervals of a median, and a verdict on two bundles.

Latencies are skewed and their tails are someone else's work on the same host, so everything here rests
on order statistics: no means, no normal distribution, no resampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, exp, inf, isfinite, log
from typing import Any, Literal

import numpy as np

__all__ = ["Comparison", "Verdict", "compare", "median_interval", "min_pairs", "summary"]

Verdict = Literal["faster", "slower", "no difference"]


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Percentiles of one series, in its own unit, interpolated linearly between neighbours."""
    if not samples:
        return {"n": 0}
    p50, p90, p99 = (float(p) for p in np.percentile(samples, (50, 90, 99)))
    return {"n": len(samples), "p50": p50, "p90": p90, "p99": p99, "min": min(samples), "max": max(samples)}


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with at least the given confidence.

    Exact for every continuous distribution (the sign test turned around; Conover, Practical Nonparametric
    Statistics, 1999, section 3.2): with x sorted, the median lies in [x[k], x[n-1-k]] with probability
    1 - 2 P(Binomial(n, 1/2) <= k). Too few samples for any such pair give (-inf, inf).
    """
    x, n = sorted(samples), len(samples)
    best, tail = (-inf, inf), 0.0
    for k in range(n // 2):
        tail += comb(n, k) / 2**n
        if 1 - 2 * tail < confidence:
            break
        best = (x[k], x[n - 1 - k])
    return best


def min_pairs(confidence: float = 0.95) -> int:
    """How many samples `median_interval` needs: the smallest n with 1 - 2 / 2^n >= confidence."""
    n = 1
    while 1 - 2 / 2**n < confidence:
        n += 1
    return n


@dataclass(frozen=True)
class Comparison:
    """How much time `a` takes for what `b` does in 1: a ratio below 1 means a is faster."""

    ratio: float
    low: float
    high: float
    """The 95 % interval of the ratio."""
    pairs: int
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: an unbounded end is null."""
        low, high = (end if isfinite(end) else None for end in (self.low, self.high))
        return {"ratio": self.ratio, "low": low, "high": high, "pairs": self.pairs, "verdict": self.verdict}

    def __str__(self) -> str:
        if not isfinite(self.high):
            return f"no difference shown: {min_pairs()} runs are needed, not {self.pairs}: too few"
        if self.verdict == "no difference":
            return f"no difference (time x{self.ratio:.2f}; 95 % interval {self.low:.2f} to {self.high:.2f})"
        if self.verdict == "faster":
            return f"{1 / self.ratio:.2f}x faster (95 % interval {1 / self.high:.2f} to {1 / self.low:.2f})"
        return f"{self.ratio:.2f}x slower (95 % interval {self.low:.2f} to {self.high:.2f})"


def compare(
    a: Sequence[float], b: Sequence[float], *, margin: float = 0.0, confidence: float = 0.95
) -> Comparison:
    """Compare two series measured in turn: a[i] and b[i] are the two runs of round i, in seconds.

    The estimate is the median of the rounds' ratios a[i] / b[i] and not the ratio of the two medians: what
    slows the host for a while slows both runs of a round, and cancels.

    margin  the interval must clear 1 by this much before anything is called faster or slower
    """
    ratios = [log(x / y) for x, y in zip(a, b, strict=True)]
    low, high = median_interval(ratios, confidence)
    low, high = (exp(low) if isfinite(low) else 0.0), (exp(high) if isfinite(high) else inf)
    verdict: Verdict = "no difference"
    if high < 1 - margin:
        verdict = "faster"
    elif low > 1 + margin:
        verdict = "slower"
    return Comparison(exp(float(np.median(ratios))) if ratios else 1.0, low, high, len(ratios), verdict)
