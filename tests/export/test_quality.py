"""Every measure against a closed form: what it must give is known before it runs."""

import math

import numpy as np
import pytest

from fewstep.export.quality import (
    MAX_DB,
    cosine_distance,
    frechet_distance,
    frechet_gaussian,
    frechet_interval,
    psnr_db,
    share_interval,
    sqnr_db,
    ssim,
)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_a_signal_off_by_one_hundredth_has_40_db(rng):
    x = rng.standard_normal((4, 8, 8)).astype(np.float32)
    assert sqnr_db(x, x.astype(np.float64) * 1.01) == pytest.approx(40, abs=1e-4)


def test_psnr_of_a_constant_error_is_its_size_against_the_peak():
    x = np.linspace(-2, 1, 64).reshape(4, 4, 4)
    assert psnr_db(x, x + 0.02) == pytest.approx(40)  # peak 2, error a hundredth of it
    assert psnr_db(x, x + 0.1, peak=1) == pytest.approx(20)


@pytest.mark.parametrize("measure", [sqnr_db, psnr_db])
def test_equal_arrays_reach_the_end_of_the_scale_and_broken_ones_the_other(measure, rng):
    x = rng.standard_normal((3, 5))
    broken = x.copy()
    broken[1, 1] = np.nan
    assert measure(x, x) == MAX_DB
    assert measure(x, broken) == -MAX_DB
    assert measure(0 * x, x) == -MAX_DB
    assert measure(0 * x, 0 * x) == MAX_DB


def test_half_precision_is_compared_in_double():
    x = np.full(100_000, 250, np.float16)  # the sum of squares overflows float16
    assert sqnr_db(x, x.astype(np.float32) * np.float32(1.125)) == pytest.approx(20 * math.log10(8))


def test_ssim_of_flat_pictures_is_the_luminance_term_alone():
    a, b, c1 = 0.3, 0.5, 0.01**2
    x, y = np.full((16, 20, 3), a), np.full((16, 20, 3), b)
    assert ssim(x, y) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-9)
    assert ssim(255 * x, 255 * y, peak=255) == pytest.approx(ssim(x, y), rel=1e-9)


def test_ssim_of_a_negative_about_the_mean_is_minus_the_structure(rng):
    """One window: y = 2 mean - x has the same mean and variance and the opposite covariance."""
    x = rng.uniform(0, 1, (11, 11, 1))
    weight = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    mean = np.sum(weight * x[..., 0])
    variance = np.sum(weight * (x[..., 0] - mean) ** 2)
    c2 = 0.03**2
    assert ssim(x, 2 * mean - x) == pytest.approx((c2 - 2 * variance) / (c2 + 2 * variance), rel=1e-9)


def test_ssim_is_one_for_equal_symmetric_and_lower_for_noise(rng):
    x = rng.uniform(0, 1, (32, 24, 3)).astype(np.float32)
    y = np.clip(x + 0.1 * rng.standard_normal(x.shape), 0, 1)
    assert ssim(x, x) == pytest.approx(1, abs=1e-12)
    assert ssim(x, y) == pytest.approx(ssim(y, x), rel=1e-9)
    assert 0.5 < ssim(x, y) < 0.99


def test_ssim_agrees_with_scikit_image(rng):
    metrics = pytest.importorskip("skimage.metrics", reason="a second opinion, not a dependency")
    x = rng.uniform(0, 1, (40, 33, 3))
    y = np.clip(x + 0.05 * rng.standard_normal(x.shape), 0, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    wanted = metrics.structural_similarity(x, y, data_range=1.0, channel_axis=-1, **options)
    assert ssim(x, y) == pytest.approx(wanted, abs=1e-9)


def test_ssim_refuses_what_no_window_fits_into():
    with pytest.raises(ValueError, match="smaller than the window"):
        ssim(np.zeros((10, 40, 3)), np.zeros((10, 40, 3)))


def test_cosine_distance_knows_parallel_right_angles_and_opposite():
    a = np.array([[1.0, 0], [1, 0], [1, 0], [0, 0], [0, 0]])
    b = np.array([[3.0, 0], [0, 2], [-1, 0], [0, 0], [1, 0]])
    assert cosine_distance(a, b) == pytest.approx([0, 1, 2, 0, 1])


def test_frechet_of_commuting_gaussians_is_the_distance_of_means_and_spreads():
    """Diagonal covariances commute: the distance is |ma - mb|^2 + sum (sa - sb)^2."""
    spread_a, spread_b = np.array([1.0, 2, 0]), np.array([3.0, 0.5, 1])
    mean_a, mean_b = np.array([0.0, 1, 2]), np.array([1.0, 1, 0])
    wanted = 1 + 4 + np.sum((spread_a - spread_b) ** 2)
    got = frechet_gaussian(mean_a, np.diag(spread_a**2), mean_b, np.diag(spread_b**2))
    assert got == pytest.approx(wanted, rel=1e-12)


def test_frechet_of_covariances_that_do_not_commute_takes_the_matrix_root(rng):
    from scipy.linalg import sqrtm

    a, b = (m @ m.T for m in rng.standard_normal((2, 5, 5)))
    wanted = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_gaussian(np.zeros(5), a, np.zeros(5), b) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("n", "features"), [(12, 30), (30, 30), (200, 7)])
def test_frechet_of_samples_is_that_of_their_moments(n, features, rng):
    a, b = rng.standard_normal((n, features)), 1.5 * rng.standard_normal((n, features)) + 0.2
    moments = [moment for x in (a, b) for moment in (x.mean(axis=0), np.cov(x.T))]
    assert frechet_distance(a, b) == pytest.approx(frechet_gaussian(*moments), rel=1e-6)


def test_frechet_of_a_shifted_set_is_the_shift_squared(rng):
    a = rng.standard_normal((9, 40))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(40 * 0.25, rel=1e-9)
    with pytest.raises(ValueError, match="1 feature vectors"):
        frechet_distance(a[:1], a[:1])


@pytest.mark.parametrize(("n", "features"), [(150, 3), (24, 12)])
def test_frechet_interval_holds_the_truth_as_often_as_it_says(n, features):
    """Pairs of spreads 1 and 1.1, shifted by 0.3: the truth is features times 0.1^2 + 0.3^2."""
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a, noise = rng.standard_normal((2, n, features))
        b = 1.1 * (0.6 * a + 0.8 * noise) + 0.3
        low, high = frechet_interval(a, b, rng, draws=100)
        assert low < high
        held += low <= 0.1 * features <= high
    assert held >= 33  # 38 expected; fewer than 33 happens once in 400


@pytest.mark.parametrize(("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)])
def test_share_interval_at_the_ends_has_the_textbook_values(hits, n, low, high):
    assert share_interval(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_share_interval_solves_wilson_s_equation():
    """Both ends are the shares p for which (hits / n - p)^2 = z^2 p (1 - p) / n."""
    for p in share_interval(37, 90):
        assert (37 / 90 - p) ** 2 == pytest.approx(1.959963985**2 * p * (1 - p) / 90, rel=1e-8)
