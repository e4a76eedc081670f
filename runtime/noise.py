"""Seeded noise: the same seed gives torch's noise, without torch, and the same bits in every language.

The stream is torch's CPU generator (ATen/native/cpu/DistributionTemplates.h, normal_fill): MT19937 seeded
the classic way (Matsumoto and Nishimura 1998), the low 24 bits of each draw as a uniform, Box-Muller over
blocks of 16.

torch works in float32 with the C library's log, sin and cos, which differ between languages. Here they are
fdlibm's polynomials (Sun 1993, e_log.c, k_sin.c, k_cos.c), written with + - * / sqrt in float64 and rounded
once: equal to the last bit wherever IEEE 754 holds, and within 2e-6 of torch (the worst of 24 million
values: 1.91e-6). A compiled port must not contract a*b + c into one rounding (-ffp-contract=off).
spec/golden/noise.json is what every port must reproduce.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput

__all__ = ["Noise", "randn"]

BLOCK = 16
"""torch draws 16 values at a time: the first 8 uniforms give radii, the last 8 angles. Below 16 it works
otherwise.
"""

MAX_SEED = 2**64 - 1
"""The largest seed torch takes; only its low 32 bits reach MT19937."""

CHUNK = 1 << 16
"""Values computed at a time, so that the temporaries stay in cache; a multiple of BLOCK, without effect on
the result.
"""

# fdlibm e_log.c: ln 2 in two parts, and R(z) = log((1+s)/(1-s))/s - 2 at z = s^2
LN2_HI, LN2_LO = 6.93147180369123816490e-01, 1.90821492927058770002e-10
LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
# fdlibm k_sin.c and k_cos.c, for |x| <= pi/4
SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)

Float64 = NDArray[np.float64]
Words = NDArray[np.integer[Any]]


class Noise:
    """A stream of standard normal values, as one `torch.Generator("cpu").manual_seed(seed)` gives them call
    by call.
    """

    def __init__(self, seed: int) -> None:
        """seed  0 to 2^64 - 1. Raises BadInput for anything else."""
        try:
            seed = operator.index(seed)
        except TypeError:
            raise BadInput(f"seed {seed!r}", expected=f"a whole number from 0 to {MAX_SEED}") from None
        if not 0 <= seed <= MAX_SEED:
            raise BadInput(f"seed {seed}", expected=f"0 to {MAX_SEED}")
        from numpy.random import (
            RandomState,
        )  # a third of the import time of this package, so only when needed

        self._generator = RandomState(seed & 0xFFFFFFFF)

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next values of the stream, in C order, float32 of `shape`.

        Raises BadInput for fewer than 16 values in all, where torch takes another path that this does not
        follow.
        """
        dims = _checked(shape)
        n = math.prod(dims)
        out = np.empty(n, dtype=np.float32)
        whole = n - n % BLOCK
        for start in range(0, whole, CHUNK):
            stop = min(start + CHUNK, whole)
            out[start:stop] = box_muller(self._draw(stop - start))
        if whole < n:
            self._draw(n - whole)  # torch fills all n uniforms first, then draws the last 16 values anew
            out[-BLOCK:] = box_muller(self._draw(BLOCK))
        return out.reshape(dims)

    def rand(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """The next uniforms in [0, 1): bit for bit `torch.rand(shape, dtype=torch.float64, generator=...)`.

        Two words make one value, the high one first, of which the low 53 bits count.
        """
        dims = _checked(shape, least=0)
        words = self._draw(2 * math.prod(dims)).astype(np.uint64)
        bits = ((words[0::2] << np.uint64(32)) | words[1::2]) & np.uint64((1 << 53) - 1)
        return (bits.astype(np.float64) * 2.0**-53).reshape(dims)

    def _draw(self, n: int) -> Words:
        """The next n 32-bit words of MT19937."""
        words: Words = self._generator.randint(0, 1 << 32, size=n, dtype=np.uint32)
        return words


def randn(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """`torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` within 2e-6, float32 of
    `shape`.
    """
    return Noise(seed).randn(shape)


def _checked(shape: Sequence[int], least: int = BLOCK) -> tuple[int, ...]:
    try:
        dims = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise BadInput(f"noise of shape {shape!r}", expected="a list of whole numbers") from None
    if any(size < 0 for size in dims) or math.prod(dims) < least:
        raise BadInput(
            f"noise of shape {dims}",
            expected=f"at least {least} values in all",
            fix="draw more and keep a part",
        )
    return dims


def box_muller(words: Words) -> NDArray[np.float32]:
    """Normal values from 32-bit words, block by block of 16 (Box and Muller 1958): eight cosines, then
    eight sines.

    words  [16 k] uint32, of which the low 24 bits count  ->  [16 k] float32
    """
    bits = (words & 0xFFFFFF).reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(-2.0 * log_of_24_bits(0x1000000 - bits[:, 0]))
    sine, cosine = sin_cos_of_24_bits(bits[:, 1])
    values = np.stack([radius * cosine, radius * sine], axis=1)
    return values.reshape(-1).astype(np.float32)


def log_of_24_bits(k: Words) -> Float64:
    """ln(k / 2^24) for k from 1 to 2^24."""
    m, e = np.frexp(k.astype(np.float64))  # k = m 2^e exactly, m in [0.5, 1)
    low = m < 0.7071067811865476  # sqrt(1/2): from here m in [sqrt(1/2), sqrt(2)]
    m = np.where(low, m + m, m)
    exponent = (e - 24 - low).astype(np.float64)
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    half = 0.5 * f * f
    tail = s * (half + z * polynomial(z, LOG)) + exponent * LN2_LO
    return np.asarray(exponent * LN2_HI - ((half - tail) - f))


def sin_cos_of_24_bits(v: Words) -> tuple[Float64, Float64]:
    """sin and cos of 2 pi v / 2^24 for v from 0 to 2^24 - 1: folded exactly, in integers, into [0, pi/4]."""
    quadrant, within = v >> 22, v & 0x3FFFFF
    fold = within > 0x200000  # past pi/4: sin(a) = cos(pi/2 - a)
    x = (
        np.where(fold, 0x400000 - within, within).astype(np.float64) * (2.0**-22) * 1.5707963267948966
    )  # pi / 2
    z = x * x
    sine = x + (z * x) * polynomial(z, SIN)
    cosine = 1.0 - (0.5 * z - (z * z) * polynomial(z, COS))
    swap = fold ^ ((quadrant & 1) == 1)
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    return (
        np.where(quadrant >= 2, -sine, sine),
        np.where((quadrant == 1) | (quadrant == 2), -cosine, cosine),
    )


def polynomial(z: Float64, coefficients: Sequence[float]) -> Any:
    """c0 + z (c1 + z (c2 + ...)), innermost first: the order is part of the contract."""
    value: Any = coefficients[-1]
    for c in coefficients[-2::-1]:
        value = c + z * value
    return value
