"""Noise equals torch's, and is the same to the last bit everywhere.

`python tests/runtime/test_noise.py` writes spec/golden/noise.json anew; do that only when the contract
itself changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.runtime import noise
from fewstep.runtime.errors import BadInput
from fewstep.runtime.noise import Noise, randn

GOLDEN = Path(__file__).parents[2] / "runtime/spec/golden/noise.json"
STREAMS: list[tuple[int, list[list[int]]]] = [
    (0, [[1, 4, 64, 64]]),
    (42, [[1, 4, 64, 64], [1, 4, 64, 64]]),
    (42, [[17], [16], [3, 5, 7]]),
    (2**32 + 42, [[16]]),  # torch uses the low 32 bits of a seed: the same values as seed 42
    (2**64 - 1, [[2, 3, 32, 32]]),
    (1234567890123456789, [[100003]]),  # longer than one chunk, not a multiple of 16
]
TORCH = 2e-6
"""Largest difference from torch seen in 24 million values is 1.91e-6: this, rounded up: torch's own float32
rounding.
"""


def golden() -> dict[str, Any]:
    streams = []
    for seed, shapes in STREAMS:
        source = Noise(seed)
        draws = [source.randn(shape) for shape in shapes]
        blob = b"".join(draw.astype("<f4").tobytes() for draw in draws)
        first = [float(value) for value in draws[0].reshape(-1)[:4]]
        streams.append(
            {"seed": str(seed), "draws": shapes, "sha256": hashlib.sha256(blob).hexdigest(), "first": first}
        )
    about = "sha256 of all draws of one stream one after the other, float32 little-endian; seeds in decimal"
    return {"about": about, "streams": streams}


def test_noise_reproduces_the_golden_bits() -> None:
    assert golden() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 42, 2**63, 2**64 - 1])
@pytest.mark.parametrize("shape", [(16,), (17,), (31,), (3, 5, 7), (1, 4, 64, 64), (70001,)])
def test_noise_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    np.testing.assert_allclose(randn(shape, seed), theirs, rtol=0, atol=TORCH)


def test_successive_draws_continue_the_stream_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = Noise(7), torch.Generator("cpu").manual_seed(7)
    for shape in [(1, 4, 8, 8), (17,), (16,), (1, 3, 5, 7), (65537,), (16,)]:
        np.testing.assert_allclose(
            ours.randn(shape), torch.randn(shape, generator=theirs).numpy(), rtol=0, atol=TORCH
        )


def test_the_logarithm_is_right_to_the_last_bit_or_so() -> None:
    k = np.unique(np.concatenate([np.arange(1, 2**24, 997), [1, 2, 3, 2**23, 2**24 - 1, 2**24]])).astype(
        np.uint32
    )
    exact = np.log(k / 2.0**24)
    np.testing.assert_allclose(noise.log_of_24_bits(k), exact, rtol=4e-16, atol=0)


def test_sine_and_cosine_are_right_in_every_octant() -> None:
    v = np.unique(np.concatenate([np.arange(0, 2**24, 997), np.arange(8) * 2**21])).astype(np.uint32)
    angle = v * (2 * np.pi / 2**24)
    sine, cosine = noise.sin_cos_of_24_bits(v)
    np.testing.assert_allclose(sine, np.sin(angle), rtol=0, atol=1e-15)
    np.testing.assert_allclose(cosine, np.cos(angle), rtol=0, atol=1e-15)


def test_the_extreme_draws_stay_finite() -> None:
    words = np.array([0] * 8 + [0xFFFFFF] * 8 + [0xFFFFFF] * 8 + [0] * 8, dtype=np.uint32)
    values = noise.box_muller(words)
    assert np.isfinite(values).all()
    assert np.abs(values).max() == pytest.approx(np.sqrt(48 * np.log(2)))  # sqrt(-2 ln 2^-24)


def test_chunks_do_not_change_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = randn((1003,), 3)
    monkeypatch.setattr(noise, "CHUNK", 32)
    np.testing.assert_array_equal(randn((1003,), 3), whole)


def test_a_numpy_seed_is_a_seed() -> None:
    np.testing.assert_array_equal(randn((16,), np.int64(5)), randn((16,), 5))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
def test_a_seed_out_of_range_is_refused(seed: Any) -> None:
    with pytest.raises(BadInput, match=r"seed .*18446744073709551615"):
        Noise(seed)


@pytest.mark.parametrize("shape", [(15,), (), (0, 64), (3, 5)])
def test_fewer_than_16_values_are_refused_with_the_limit(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="at least 16 values"):
        randn(shape, 0)


@pytest.mark.parametrize("shape", [(-4, -4), (4.0, 8), "ab", 16])
def test_a_shape_that_is_none_is_refused(shape: Any) -> None:
    with pytest.raises(BadInput, match="noise of shape"):
        randn(shape, 0)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=2) + "\n")
