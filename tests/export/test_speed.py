import numpy as np

from fewstep.export import speed


def rounds(middle, spread=1.0, seed=0, n=40):
    return middle + spread * np.random.default_rng(seed).standard_normal(n)


def test_the_verdict_is_said_in_so_many_words():
    assert speed.verdict(rounds(10), rounds(20, seed=1)).startswith("faster: ")
    assert speed.verdict(rounds(20), rounds(10, seed=1)).startswith("slower: ")
    assert speed.verdict(rounds(10), rounds(10, seed=1)) == "no speed-up over the un-optimized export"


def test_disturbances_that_both_suffer_do_not_hide_a_difference():
    noise = np.random.default_rng(0).exponential(30, 40)
    assert speed.verdict(10 + noise, 11.5 + noise).startswith("faster")


def test_a_difference_below_a_percent_is_none():
    assert speed.verdict(np.full(40, 10.0), np.full(40, 10.05)) == "no speed-up over the un-optimized export"


def test_chance_is_rarely_taken_for_speed():
    claims = sum(
        not speed.verdict(rounds(10, seed=2 * i), rounds(10, seed=2 * i + 1)).startswith("no ")
        for i in range(300)
    )
    assert claims <= 9  # one in a hundred would be 3


def test_the_summary_has_quartiles_rounds_and_the_ratio():
    found = speed.summary({"exported": [2.0, 1.0, 3.0] * 3, "unoptimized": [4.0, 2.0, 6.0] * 3})
    assert found["exported_ms"] == [1.0, 2.0, 3.0]
    assert (found["rounds"], found["won"], found["speedup"]) == (9, 9, 2.0)
    assert found["verdict"] == "faster: 2.00 times the un-optimized export"
