"""Quantiles of the Beta distribution, without scipy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

TERMS = 60
"""Of a power series in x <= 1/2: the rest is below 2^-60."""

NEWTON = 12
"""Steps, each doubling the digits; from the leading term of the series, 6 give the last digit for a, b near 1."""


def beta_ppf(p: ArrayLike, a: float, b: float) -> NDArray[np.float64]:
    """The x in [0, 1] with I_x(a, b) = p, elementwise, to 1e-12.

    I_x is the regularised incomplete beta function; I_x(a, b) = 1 - I_{1-x}(b, a) keeps the series below at x <= 1/2.
    """
    p = np.asarray(p, dtype=np.float64)
    middle = float(_cdf(np.array(0.5), a, b))
    return np.where(
        p <= middle,
        _lower(np.minimum(p, middle), a, b),
        1 - _lower(np.minimum(1 - p, 1 - middle), b, a),
    )


def _lower(p: NDArray[np.float64], a: float, b: float) -> NDArray[np.float64]:
    """beta_ppf where the answer is at most 1/2, by Newton's method on y = x^a.

    dI/dy = (1 - x)^(b - 1) / (a B) is monotone, so I is convex or concave in y, and y = p a B lies on the side of the
    root from which Newton's method never crosses it: quadratic convergence without a bracket.
    """
    ab = a * math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    x = np.minimum((p * ab) ** (1 / a), 0.5)
    for _ in range(NEWTON):
        y = np.maximum(x**a - (_cdf(x, a, b) - p) * ab * (1 - x) ** (1 - b), 0)
        x = np.minimum(y ** (1 / a), 0.5)
    return np.asarray(x)


def _cdf(x: NDArray[np.float64], a: float, b: float) -> NDArray[np.float64]:
    """I_x(a, b) = x^a / (a B(a, b)) 2F1(a, 1 - b; a + 1; x), for x <= 1/2. DLMF 8.17.7 <dlmf.nist.gov/8.17>."""
    n = np.arange(1, TERMS)
    coefficients = np.append(1.0, np.cumprod((n - b) / n) * a / (a + n))
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return np.asarray(x**a * np.polyval(coefficients[::-1], x) / a * math.exp(-log_beta))
