import numpy as np

from fewstep.export import speed


def quartiles(middle):
    return np.array([middle - 1, middle, middle + 1.0])


def test_the_verdict_is_said_in_so_many_words():
    assert speed.verdict(quartiles(10), quartiles(20)) == "faster: 2.00 times the un-optimized export"
    assert speed.verdict(quartiles(20), quartiles(10)).startswith("slower: 2.00 times the time of")
    assert speed.verdict(quartiles(10), quartiles(11)) == "no speed-up over the un-optimized export"


def test_the_summary_has_medians_and_the_ratio():
    found = speed.summary({"exported": [2.0, 1.0, 3.0], "unoptimized": [4.0, 5.0, 6.0]})
    assert found["exported_ms"] == [1.5, 2.0, 2.5]
    assert found["runs"] == 3
    assert found["speedup"] == 2.5
    assert found["verdict"].startswith("faster: 2.50")
