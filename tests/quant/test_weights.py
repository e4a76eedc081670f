"""Rounding weights to nearest: the grid, its search, and what it does with what no grid likes."""

import math

import numpy as np
import pytest

from fewstep.quant.weights import codes_on, group_size, nearest, steps_of
from fewstep.runtime.errors import BadInput

FORMS = [
    {"symmetric": symmetric, "multiplier": multiplier, "group": group}
    for symmetric in (True, False)
    for multiplier in (True, False)
    for group in (0, 12)
]


def snr_db(right, got):
    error = np.asarray(got, np.float64) - right
    return 10 * math.log10(float(np.sum(np.asarray(right, np.float64) ** 2) / np.sum(error**2)))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_that_lie_on_the_symmetric_grid_come_back_exactly(bits):
    rng = np.random.default_rng(bits)
    top = 2 ** (bits - 1) - 1
    codes = rng.integers(-top, top + 1, (5, 4 * 9))
    codes[:, ::12] = top  # every group uses its whole range, so the grid is the only one that fits
    weight = (codes * np.array([[2.0**-k] for k in range(5)])).astype(np.float32).reshape(5, 4, 3, 3)
    for group in (0, 12):
        found = nearest(weight, bits, group=group)
        np.testing.assert_array_equal(found.floats(), weight)
        assert found.codes.dtype == np.int8
        assert found.groups == (3 if group else 1)


def test_weights_that_lie_on_a_grid_with_a_zero_point_come_back():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (6, 32))
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (0.5 * (codes - np.arange(6)[:, None])).astype(np.float32)
    found = nearest(weight, 4, symmetric=False)
    np.testing.assert_allclose(found.floats(), weight, rtol=1e-6)
    np.testing.assert_array_equal(found.zero[:, 0], np.arange(6) - 8)


def test_the_step_found_for_a_gaussian_is_the_known_best():
    # Max (1960), "Quantizing for minimum distortion", table II: 16 equal steps of 0.3352 sigma, error 0.01154; a grid
    # with a code on 0 has one code fewer on one side
    weight = np.random.default_rng(1).standard_normal((1, 200_000)).astype(np.float32)
    found = nearest(weight, 4, importance=np.ones(weight.size))
    assert found.scale[0, 0] == pytest.approx(0.3352, rel=0.05)
    assert snr_db(weight, found.floats()) == pytest.approx(-10 * math.log10(0.01154), abs=0.2)


def test_the_search_beats_the_plain_range_where_one_weight_sticks_out():
    weight = np.random.default_rng(2).standard_normal((8, 256)).astype(np.float32)
    weight[:, 0] = 9
    step = np.abs(weight).max(axis=1, keepdims=True) / 7
    plain = np.clip(np.rint(weight / step), -8, 7) * step
    searched = nearest(weight, 4).floats()
    assert np.mean(np.abs(searched - weight) ** 2.4) < 0.8 * np.mean(np.abs(plain - weight) ** 2.4)


def test_eight_bits_leave_no_weight_more_than_half_a_step_away_and_minus_128_unused():
    weight = np.random.default_rng(3).standard_normal((16, 5, 3, 3)).astype(np.float32)
    found = nearest(weight, 8)
    assert found.codes.min() == -127 or found.codes.max() == 127
    assert found.codes.min() >= -127
    error = np.abs(found.floats() - weight).reshape(16, -1)
    assert (error <= 0.501 * found.scale).all()


def test_smaller_groups_and_zero_points_and_more_bits_each_lower_the_error():
    weight = np.random.default_rng(4).standard_normal((32, 192)).astype(np.float32)
    of = lambda bits, **form: snr_db(weight, nearest(weight, bits, **form).floats())  # noqa: E731
    assert of(3) < of(4) < of(5) < of(8)
    assert of(4) < of(4, group=64) < of(4, group=32) < of(4, group=32, symmetric=False)
    # a multiplier is a coarser scale: it must cost little
    assert of(4, group=32) - 0.5 < of(4, group=32, multiplier=True) <= of(4, group=32) + 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_form_keeps_its_codes_in_range_and_its_products_in_a_byte(bits, form):
    rng = np.random.default_rng(5)
    weight = (rng.standard_normal((7, 4, 3, 3)) * 10 ** rng.uniform(-4, 4, (7, 4, 1, 1))).astype(np.float32)
    weight[1], weight[2] = np.abs(weight[1]), -np.abs(weight[2])
    found = nearest(weight, bits, **form)
    low = -127 if bits == 8 and form["symmetric"] else -(2 ** (bits - 1))
    assert low <= found.codes.min()
    assert found.codes.max() < 2 ** (bits - 1)
    assert (found.scale > 0).all()
    assert np.isfinite(found.floats()).all()
    if form["multiplier"] and form["group"] and bits < 8:
        assert found.scale.shape == (7, 1)
        assert found.multiplier.min() >= 1
        assert np.abs(found.integers().astype(int)).max() <= 127
    elif bits < 8 or form["symmetric"]:
        assert found.multiplier is None


def test_a_zero_weight_is_exactly_zero_in_every_form():
    weight = np.random.default_rng(6).uniform(1, 2, (4, 24)).astype(np.float32)
    weight[:, ::5] = 0
    for form in FORMS:
        assert (nearest(weight, 4, **form).floats()[:, ::5] == 0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_denormals_and_outliers_give_finite_weights_without_warnings(form):
    weight = np.zeros((5, 24), np.float32)
    weight[1] = 1e-44
    weight[2] = np.linspace(-1, 1, 24)
    weight[2, 3] = 3e38
    weight[3] = np.geomspace(1e-40, 1e38, 24)
    weight[4, 7] = -1
    for bits in (2, 4, 8):
        found = nearest(weight, bits, **form).floats()
        assert np.isfinite(found).all()
        assert (found[0] == 0).all()
        assert found[4, 7] == pytest.approx(-1, rel=0.01)
        # clipping may cost it part of its size, never its sign
        assert found[2, 3] > 1e38


def test_groups_of_one_weight_store_it_in_its_scale():
    weight = np.array([[0.3, -0.7, 0.0, 5.0]], np.float32)
    np.testing.assert_allclose(nearest(weight, 4, group=1).floats(), weight, rtol=1e-6)


@pytest.mark.parametrize(
    ("inner", "group", "size"),
    [
        (36, 32, 18),
        (432, 64, 54),
        (320, 32, 32),
        (48, 0, 48),
        (20, 32, 20),
        (37, 32, 37),
        (2 * 37, 32, 37),
        (7, 1, 1),
    ],
)
def test_a_group_is_the_largest_divisor_of_a_row_unless_that_is_tiny(inner, group, size):
    assert group_size(inner, group) == size
    assert nearest(np.ones((2, inner), np.float32), 4, group=group).group == size


def test_importance_moves_the_grid_to_the_entries_that_matter():
    weight = np.random.default_rng(7).standard_normal((16, 64)).astype(np.float32)
    weight[:, :4] *= 8
    matter = np.where(np.arange(64) < 4, 1e-6, 1.0)
    error = lambda found: np.sum((found.floats() - weight) ** 2 * matter)  # noqa: E731
    assert error(nearest(weight, 4, importance=matter)) < 0.5 * error(nearest(weight, 4))


def test_codes_on_a_given_grid_are_the_nearest_there():
    rng = np.random.default_rng(8)
    grid = nearest(rng.standard_normal((6, 24)), 4, group=8, symmetric=False)
    moved = rng.standard_normal((6, 24)).astype(np.float32)
    codes = codes_on(moved, grid)
    every = (np.arange(-8, 8)[:, None, None] - grid.zero) * steps_of(grid)  # [code, out, groups]
    near = np.abs(np.repeat(every, 8, axis=2) - moved).argmin(axis=0) - 8
    np.testing.assert_array_equal(codes, near)


def test_an_embedding_has_a_scale_for_every_entry_and_half_floats_are_taken():
    table = np.random.default_rng(9).standard_normal((50, 16)).astype(np.float16)
    found = nearest(table, 8)
    assert found.scale.shape == (50, 1)
    assert found.floats().shape == (50, 16)


def test_the_size_stored_is_counted_with_scales_zeros_and_multipliers():
    weight = np.random.default_rng(10).standard_normal((4, 64)).astype(np.float32)
    assert nearest(weight, 8).stored_bits() == 8 * 256 + 4 * 32
    assert nearest(weight, 4, group=32, symmetric=False).stored_bits() == 4 * 256 + 8 * (32 + 4)
    assert nearest(weight, 3, group=32, multiplier=True).stored_bits() == 3 * 256 + 4 * 32 + 8 * 8


@pytest.mark.parametrize(
    ("weight", "bits", "group", "says"),
    [
        (np.array([[1, np.nan], [np.inf, 1]]), 8, 0, "conv_out: 2 of 4 weights are not finite"),
        (np.ones((2, 2)), 9, 0, "conv_out: weights of 9 bits; expected 2 to 8"),
        (np.ones((2, 2)), 1, 0, "weights of 1 bits"),
        (np.ones((2, 2)), 4, -1, "groups of -1"),
        (np.ones((0, 2)), 4, 0, "shape (0, 2)"),
    ],
)
def test_bad_weights_are_refused_by_the_name_of_their_layer(weight, bits, group, says):
    with pytest.raises(BadInput) as caught:
        nearest(weight, bits, group=group, name="conv_out")
    assert says in str(caught.value)
