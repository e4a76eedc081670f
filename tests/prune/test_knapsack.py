"""Which set of blocks is worth least and large enough."""

import itertools
import random

from fewstep.prune.knapsack import lightest, lowest


def test_a_set_of_two_beats_the_single_block_of_best_ratio():
    # by hand: 10 wanted; a alone costs 6, b and c together 5
    sizes, scores = {"a": 12, "b": 5, "c": 5}, {"a": 6.0, "b": 2.0, "c": 3.0}
    assert lightest(sizes, scores, {}, 10) == ("b", "c")


def test_more_than_all_blocks_have_is_no_set():
    assert lightest({"a": 3, "b": 4}, {"a": 1.0, "b": 1.0}, {}, 8) is None


def test_a_block_and_what_it_holds_are_never_both_taken():
    sizes = {"whole": 10, "half": 6, "other": 5}
    inside = {"half": "whole"}
    # whole and half would be 16 at 2.5, but half is gone with whole
    assert lightest(sizes, {"whole": 1.0, "half": 1.5, "other": 9.0}, inside, 11) == ("whole", "other")


def test_the_halves_go_where_the_whole_costs_more_than_they_do():
    sizes, inside = {"whole": 10, "a": 4, "b": 4}, {"a": "whole", "b": "whole"}
    assert lightest(sizes, {"whole": 5.0, "a": 1.0, "b": 1.5}, inside, 8) == ("a", "b")
    assert lightest(sizes, {"whole": 2.0, "a": 1.0, "b": 1.5}, inside, 8) == ("whole",)


def test_it_finds_what_trying_every_set_finds():
    draw = random.Random(1)
    for _ in range(20):
        sizes = {str(i): draw.randint(1, 30) for i in range(8)}
        scores = {name: draw.random() for name in sizes}
        inside = {"1": "0", "2": "0", "3": "2", "6": "5"}
        above = {"1": {"0"}, "2": {"0"}, "3": {"0", "2"}, "6": {"5"}}
        least = draw.randint(1, 60)
        best = min(
            (
                sum(scores[name] for name in chosen)
                for count in range(9)
                for chosen in itertools.combinations(sizes, count)
                if sum(sizes[name] for name in chosen) >= least
                and not any(above.get(name, set()) & set(chosen) for name in chosen)
            ),
            default=None,
        )
        found = lightest(sizes, scores, inside, least)
        assert (found is None) == (best is None)
        if found is not None:
            assert abs(sum(scores[name] for name in found) - best) < 1e-12


def test_sizes_of_a_billion_are_never_too_small_in_sum():
    draw = random.Random(2)
    sizes = {str(i): draw.randint(10**6, 10**8) for i in range(40)}
    scores = {name: draw.random() for name in sizes}
    least = sum(sizes.values()) // 2
    found = lightest(sizes, scores, {}, least)
    assert least <= sum(sizes[name] for name in found) < 1.05 * least


def test_lowest_scores_go_until_it_is_enough():
    sizes, scores = {"a": 5, "b": 5, "c": 5}, {"a": 3.0, "b": 1.0, "c": 2.0}
    assert lowest(sizes, scores, {}, 6) == ("b", "c")


def test_a_holder_takes_the_place_of_what_it_holds():
    sizes, scores = {"whole": 10, "half": 6, "x": 1}, {"whole": 2.0, "half": 1.0, "x": 3.0}
    assert lowest(sizes, scores, {"half": "whole"}, 9) == ("whole",)
    assert lowest(sizes, {**scores, "half": 2.5}, {"half": "whole"}, 11) == ("whole", "x")
