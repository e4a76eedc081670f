"""Percentiles and intervals against what can be worked out by hand."""

from math import comb, inf, isclose

import numpy as np
import pytest

from fewstep.tools.stats import compare, median_interval, min_pairs, summary


def test_summary_of_0_to_100_is_its_own_percentiles():
    got = summary(list(range(101)))
    assert (got["n"], got["p50"], got["p90"], got["p99"], got["min"], got["max"]) == (101, 50, 90, 99, 0, 100)


def test_summary_of_nothing_is_a_count():
    assert summary([]) == {"n": 0}


def test_six_samples_are_the_fewest_that_give_a_95_percent_interval():
    # the extremes hold the median unless all six fall on one side: 1 - 2 / 2^6 = 0.969; for five it is 0.9375
    assert min_pairs(0.95) == 6
    assert median_interval([1, 2, 3, 4, 5, 6]) == (1, 6)
    assert median_interval([1, 2, 3, 4, 5]) == (-inf, inf)


def test_ten_samples_leave_out_one_at_each_end():
    # coverage of [x1, x8] (counted from 0) is 1 - 2 (1 + 10) / 1024 = 0.9785; [x2, x7] only reaches 0.8906
    assert median_interval(list(range(10))) == (1, 8)


@pytest.mark.parametrize(("n", "k"), [(20, 5), (30, 9), (100, 39)])
def test_interval_matches_the_published_table_of_ranks(n, k):
    # the tabled ranks for 95 %: the 6th and 15th of 20, the 10th and 21st of 30, the 40th and 61st of 100
    tail = sum(comb(n, i) for i in range(k + 1)) / 2**n
    assert 1 - 2 * tail >= 0.95
    assert median_interval(list(range(n))) == (k, n - 1 - k)


def test_interval_holds_the_true_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    n, trials = 15, 4000
    inside = 0
    for _ in range(trials):
        low, high = median_interval(list(rng.exponential(size=n)))
        inside += low <= np.log(2) <= high  # the exponential's median
    exact = 1 - 2 * sum(comb(n, i) for i in range(4)) / 2**n  # 0.9648: ranks 4 and 12 of 15
    assert abs(inside / trials - exact) < 4 * np.sqrt(exact * (1 - exact) / trials)


def test_a_constant_ratio_is_found_whatever_the_host_does():
    load = np.random.default_rng(1).lognormal(sigma=1.0, size=12)  # the same slow and fast rounds for both
    got = compare(list(0.5 * load), list(load))
    assert got.verdict == "faster"
    assert isclose(got.ratio, 0.5)
    assert isclose(got.low, 0.5)
    assert isclose(got.high, 0.5)
    assert str(got) == "2.00x faster (95 % interval 2.00 to 2.00)"


def test_slower_is_the_mirror_of_faster():
    rng = np.random.default_rng(2)
    a, b = list(rng.uniform(1, 1.1, 20)), list(rng.uniform(2, 2.2, 20))
    there, back = compare(a, b), compare(b, a)
    assert (there.verdict, back.verdict) == ("faster", "slower")
    assert isclose(there.ratio, 1 / back.ratio)
    assert isclose(there.low, 1 / back.high)


def test_the_same_series_twice_is_no_difference():
    a = list(np.random.default_rng(3).uniform(1, 2, 30))
    assert compare(a, a).verdict == "no difference"


def test_equal_bundles_are_called_different_about_one_time_in_twenty_at_most():
    rng = np.random.default_rng(4)
    calls = [compare(list(rng.lognormal(size=12)), list(rng.lognormal(size=12))).verdict for _ in range(2000)]
    wrong = sum(verdict != "no difference" for verdict in calls) / len(calls)
    exact = 2 * sum(comb(12, i) for i in range(3)) / 2**12  # 0.0386: the interval is [x2, x9]
    assert abs(wrong - exact) < 4 * np.sqrt(exact * (1 - exact) / 2000)


def test_too_few_runs_prove_nothing():
    got = compare([1.0] * 5, [9.0] * 5)
    assert got.verdict == "no difference"
    assert "too few" in str(got)
    assert got.to_json()["high"] is None


def test_a_difference_inside_the_margin_is_no_difference():
    assert compare([1.005] * 10, [1.0] * 10, margin=0.01).verdict == "no difference"
    assert compare([1.02] * 10, [1.0] * 10, margin=0.01).verdict == "slower"
