"""How far one set of samples is from another: what `fewstep compare` measures, for whoever must judge a bundle.

Plain functions over numpy arrays, all in float64. Decibels end at MAX_DB, so that everything fits into JSON.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    *("MAX_DB", "SSIM_WINDOW", "cosine_distance", "frechet_distance", "frechet_gaussian", "frechet_interval"),
    *("psnr_db", "share_interval", "sqnr_db", "ssim"),
]

Array = NDArray[Any]

MAX_DB = 300.0
"""Stands for "equal" where the error is 0: JSON has no infinity, and float64 itself ends at 313 dB."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
"""Wang et al. 2004, section III.C."""


def sqnr_db(right: Array, got: Array) -> float:
    """Signal over error, 10 log10(sum right^2 / sum (got - right)^2); -MAX_DB where `got` is not finite."""
    right = right.astype(np.float64)
    return _decibels(float(np.sum(right**2)), float(np.sum((got - right) ** 2)))


def psnr_db(right: Array, got: Array, peak: float | None = None) -> float:
    """Peak signal over mean error, 10 log10(peak^2 / mean (got - right)^2).

    peak  1 for pictures in 0..1; None takes the largest magnitude in `right`, for latents, which have no fixed range
    """
    right = right.astype(np.float64)
    peak = float(np.abs(right).max()) if peak is None else peak
    return _decibels(peak**2, float(np.mean((got - right) ** 2)))


def ssim(right: Array, got: Array, peak: float = 1.0) -> float:
    """Structural similarity of two pictures [height, width, channels], the mean over windows and channels.

    Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13 and section III.C: 11x11 Gaussian windows of sigma 1.5 that lie
    wholly inside the picture, moments weighted by the window. 1 where the pictures are equal.
    Raises ValueError for pictures that no window fits into.
    """
    if min(right.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"pictures of {right.shape[:2]} pixels are smaller than the window of {SSIM_WINDOW}")
    x, y = right.astype(np.float64), got.astype(np.float64)
    mx, my = _blur(x), _blur(y)
    vx, vy, cov = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    likeness = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(likeness.mean())


def cosine_distance(a: Array, b: Array) -> Array:
    """1 - cos of the angle, pair by pair. [n, features] twice -> [n]; 0 means the same direction, 2 the opposite."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    # a zero vector shares no direction with any but its like
    cos = np.divide(np.sum(a * b, axis=1), size, out=np.zeros(len(a)), where=size > 0)
    return np.where((a == b).all(axis=1), 0.0, 1 - np.clip(cos, -1, 1))


def frechet_gaussian(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Frechet distance of two Gaussians: |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    Dowson and Landau 1982, eq. 4; as a distance of pictures Heusel et al. 2017, eq. 6 (arXiv:1706.08500). A B and
    A^(1/2) B A^(1/2) have equal eigenvalues, and the second is symmetric: no complex square root.
    """
    values, vectors = np.linalg.eigh(np.asarray(cov_a, np.float64))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ np.asarray(cov_b, np.float64) @ root
    overlap = float(np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum())
    return _squared(mean_a, mean_b, float(np.trace(cov_a) + np.trace(cov_b)), overlap)


def frechet_distance(a: Array, b: Array) -> float:
    """`frechet_gaussian` of the Gaussians fitted to two sets of feature vectors, [n, features] and [m, features].

    With fewer vectors than features the covariances are singular, and their eigenvalues come from the small side:
    for centred a and b, tr (A B)^(1/2) is the sum of the singular values of a b^T / sqrt((n - 1) (m - 1)).
    It overestimates by an amount that falls with n (Chong and Forsyth 2020, arXiv:1911.07023): compare distances of
    equal n only. Raises ValueError for fewer than 2 vectors.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{min(len(a), len(b))} feature vectors, 2 or more have a covariance")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    u, v = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    if max(len(a), len(b)) > a.shape[1]:
        return frechet_gaussian(mean_a, u.T @ u, mean_b, v.T @ v)
    overlap = float(np.linalg.svd(u @ v.T, compute_uv=False).sum())
    return _squared(mean_a, mean_b, float(np.sum(u**2) + np.sum(v**2)), overlap)


def frechet_interval(
    a: Array, b: Array, rng: np.random.Generator, *, draws: int = 200, confidence: float = 0.95
) -> tuple[float, float]:
    """A bootstrap interval of `frechet_distance`, for pairs: a[i] and b[i] are drawn together.

    The reverse percentile interval (Davison and Hinkley, Bootstrap Methods and their Application, 1997, eq. 5.6):
    a resample repeats vectors and so overestimates as few vectors do, which this turns round and takes off again. It
    may lie below `frechet_distance` itself. With fewer than twice as many vectors as features it means nothing.
    """
    found = frechet_distance(a, b)
    picks = (rng.integers(0, len(a), len(a)) for _ in range(draws))
    tail = (1 - confidence) / 2
    low, high = np.quantile([frechet_distance(a[i], b[i]) for i in picks], (tail, 1 - tail))
    return max(0.0, float(2 * found - high)), max(0.0, float(2 * found - low))


def share_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share hits / n (Wilson 1927): sound for few trials and for shares near 0 and 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, extra = hits / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _decibels(signal: float, error: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(error)):
        return -MAX_DB
    if error == 0:
        return MAX_DB
    return max(-MAX_DB, min(MAX_DB, 10 * math.log10(signal / error))) if signal > 0 else -MAX_DB


def _squared(mean_a: Array, mean_b: Array, traces: float, overlap: float) -> float:
    """Rounding can leave a little less than nothing."""
    return max(0.0, float(np.sum((mean_a - mean_b) ** 2)) + traces - 2 * overlap)


def _blur(x: Array) -> Array:
    """Gaussian means over every window inside x: [h, w, c] -> [h - 10, w - 10, c]; one axis after the other."""
    offset = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weight = np.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    weight /= weight.sum()
    for axis in (0, 1):
        x = np.lib.stride_tricks.sliding_window_view(x, SSIM_WINDOW, axis=axis) @ weight
    return x
