"""The units that go are those of least error for what they save."""

import numpy as np
import pytest

from fewstep.prune.ranking import choose, comparable
from fewstep.prune.width_groups import Slice, WidthGroup
from fewstep.runtime.errors import BadInput


def group(name, count, size=1):
    return WidthGroup(name, "ffn", count, size, (Slice(name, 1),), 1)


def kept(scores, saved, wanted, *, floor=0.0, round_to=1, size=1):
    groups = [group(name, len(values), size) for name, values in scores.items()]
    arrays = {name: np.asarray(values, float) for name, values in scores.items()}
    return choose(groups, arrays, saved, wanted, floor=floor, round_to=round_to)


def test_nothing_wanted_nothing_gone():
    assert kept({"a": [1, 2], "b": [3, 4]}, {"a": 1, "b": 1}, 0) == {"a": [0, 1], "b": [0, 1]}


def test_the_least_scores_of_all_layers_go_first():
    assert kept({"a": [5, 1, 4], "b": [2, 9, 3]}, {"a": 1, "b": 1}, 3) == {"a": [0, 2], "b": [1]}


def test_a_score_counts_by_what_it_saves():
    # one of b costs 3 for 10 saved, one of a 1 for 1
    assert kept({"a": [1, 1], "b": [3, 50]}, {"a": 1, "b": 10}, 8) == {"a": [0, 1], "b": [1]}


def test_a_floor_of_each_layer_stays():
    found = kept({"a": [1, 1, 1, 1], "b": [9, 9, 9, 9]}, {"a": 1, "b": 1}, 4, floor=0.5)
    assert {name: len(units) for name, units in found.items()} == {"a": 2, "b": 2}


def test_one_unit_of_each_layer_stays_without_a_floor():
    found = kept({"a": [1, 1], "b": [1, 1]}, {"a": 1, "b": 1}, 2)
    assert {name: len(units) for name, units in found.items()} == {"a": 1, "b": 1}


def test_more_than_the_floors_allow_is_refused():
    with pytest.raises(BadInput, match="at most 2"):
        kept({"a": [1, 1, 1, 1]}, {"a": 1}, 3, floor=0.5)


def test_widths_round_to_what_was_asked():
    found = kept({"a": np.arange(20)}, {"a": 1}, 3, round_to=8)
    assert found["a"] == list(range(4, 20))  # 16


def test_a_dear_unit_before_a_cheap_one_does_not_hide_what_both_save():
    # in steps of two: {1, 100} against {20, 20} of b
    found = kept({"a": [1, 100, 500, 500], "b": [20, 20, 500, 500]}, {"a": 1, "b": 1}, 2, round_to=2)
    assert found == {"a": [0, 1, 2, 3], "b": [2, 3]}


def test_comparable_scores_have_mean_one():
    found = comparable({"a": np.array([1.0, 3.0]), "b": np.array([100.0, 300.0]), "c": np.zeros(2)})
    assert found["a"].tolist() == [0.5, 1.5]
    assert found["b"].tolist() == [0.5, 1.5]
    assert found["c"].tolist() == [0, 0]
