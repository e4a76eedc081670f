"""The budget: as good as trying everything, never over, and honest about what cannot be met."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fewstep.quant.budget import (
    Pin,
    average_bits,
    choose,
    propose,
    time_cost,
    total_bytes,
)
from fewstep.quant.table import Table, decibels
from fewstep.runtime.errors import BadInput

OPTIONS = ("w8", "w4", "w3")


def table(errors, weights, names=None, options=OPTIONS, bits=None, macs=None):
    """errors [layers][options] of the one step; stored bits are those of the option alone."""
    errors = np.array(errors, np.float64)
    names = names or [f"layer{i}" for i in range(len(errors))]
    wide = [int(option[1:]) if option[0] == "w" else 32 for option in options]
    stored = np.outer(weights, wide) if bits is None else bits
    macs = tuple(macs or weights)
    gains = np.ones(1)
    return Table(
        "unet", "exact", tuple(names), options, (0,), errors[:, :, None], stored, tuple(weights), macs, gains
    )


def random_table(rng, layers=6):
    eight = rng.uniform(0.1, 10, layers) ** 3 * 1e-7
    errors = np.stack(
        [eight, eight * rng.uniform(100, 400, layers), eight * rng.uniform(500, 2000, layers)], 1
    )
    return table(errors, [int(w) for w in rng.integers(100, 5000, layers)])


def best_by_trying(t, limit, options):
    found = None
    for pick in itertools.product(options, repeat=len(t.layers)):
        chosen = dict(zip(t.layers, pick, strict=True))
        if t.average_bits(chosen) <= limit * (1 + 1e-9):
            error = t.predicted(chosen)
            found = error if found is None else min(found, error)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_as_good_as_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    t = random_table(rng)
    limit = rng.uniform(3.05, 6)
    chosen = choose(t, average_bits(t, limit), OPTIONS, pins=())
    assert t.average_bits(chosen) <= limit
    assert t.predicted(chosen) == pytest.approx(best_by_trying(t, limit, OPTIONS), rel=1e-5)


def test_greed_would_have_been_worse_here():
    # by rate layer0 comes first, and then layer1, which matters, no longer fits
    t = table([[0, 10, 11.0], [0, 50, 100.0]], [10, 60], options=OPTIONS)
    costs = average_bits(t, (10 * 3 + 60 * 4) / 70)
    assert choose(t, costs, OPTIONS, pins=()) == {"layer0": "w3", "layer1": "w4"}
    t = table([[0, 9.0], [0, 10.0], [0, 10.0]], [10, 14, 14], options=("w8", "w4"))
    chosen = choose(t, average_bits(t, (10 * 4 + 28 * 8) / 38), ("w8", "w4"), pins=())
    assert chosen == {"layer0": "w4", "layer1": "w8", "layer2": "w8"}


def test_more_bits_never_predict_more_error():
    t = random_table(np.random.default_rng(3), layers=40)
    errors = [
        t.predicted(choose(t, average_bits(t, limit), OPTIONS, pins=())) for limit in np.linspace(3, 8, 21)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[0] > 100 * errors[-1]


def test_errors_of_very_different_sizes_are_told_apart():
    t = table([[1e-12, 1e-10, 1e-9], [1e-5, 1e-3, 1e-2], [1e-12, 1e-10, 2e-9]], [100, 100, 100])
    chosen = choose(t, average_bits(t, 16 / 3), OPTIONS, pins=())
    assert chosen == {"layer0": "w4", "layer1": "w8", "layer2": "w4"}


def test_scales_count_as_bits():
    bits = np.array([[800, 420, 330], [800, 400, 300]])
    t = table([[0, 1, 2.0], [0, 1, 2.1]], [100, 100], bits=bits)
    assert t.average_bits({"layer0": "w4", "layer1": "w3"}) == 3.6
    assert choose(t, average_bits(t, 3.65), OPTIONS, pins=()) == {"layer0": "w3", "layer1": "w4"}


def test_pins_and_fixed_layers_hold_whatever_it_costs():
    names = ["conv_in", "time_embedding.linear_1", "resnets.0.time_emb_proj", "a", "conv_out"]
    options = ("w8", "w4", "w3", "a8", "a4")
    errors = np.tile([1e-6, 1e-4, 1e-3, 1e-6, 1e-3], (5, 1))
    t = table(errors, [10, 10, 10, 1000, 10], names, options)
    chosen = choose(t, average_bits(t, 3.38), ("w4a8", "w3a8"), fixed={"conv_out": "float"})
    assert chosen == {
        "conv_in": "w8a8",
        "time_embedding.linear_1": "w8",
        "resnets.0.time_emb_proj": "w3",
        "a": "w3a8",
        "conv_out": "float",
    }
    kept = choose(t, average_bits(t, 32), OPTIONS, pins=[Pin("a", weights=32), Pin("conv_*", weights=4)])
    assert (kept["a"], kept["conv_in"]) == ("float", "w8")
    with pytest.raises(BadInput, match="at least 30.89"):
        choose(t, average_bits(t, 5), OPTIONS, pins=[Pin("a", weights=32)])


def test_a_layer_without_an_input_to_round_gets_its_weights_alone():
    t = table([[1e-6, np.nan], [1e-6, 1e-6]], [10, 10], options=("w8", "a8"))
    assert choose(t, average_bits(t, 8), ("w8a8",), pins=()) == {"layer0": "w8", "layer1": "w8a8"}
    with pytest.raises(BadInput, match="layer0 as a8"):
        choose(t, average_bits(t, 8), ("w8a8",), fixed={"layer0": "a8"})


def test_a_budget_that_cannot_be_met_says_the_nearest_that_can():
    t = table(np.ones((2, 3)), [100, 100], ["conv_in", "b"])
    with pytest.raises(BadInput, match=r"2.5 bits a weight for unet; expected at least 5.5 bits") as error:
        choose(t, average_bits(t, 2.5), OPTIONS)
    assert "ask for 5.5" in error.value.fix
    assert choose(t, average_bits(t, 5.5), OPTIONS) == {"conv_in": "w8", "b": "w3"}
    with pytest.raises(BadInput, match="10 bytes.*at least 137.5 bytes"):
        choose(t, total_bytes(t, 10), OPTIONS)
    assert choose(t, total_bytes(t, 138), OPTIONS) == {"conv_in": "w8", "b": "w3"}


def test_time_is_spent_where_it_saves_most_error():
    options = ("w8", "a8")
    t = table([[1e-9, 1e-4], [1e-9, 1e-6]], [10, 10], options=options, macs=[1000, 1000])
    cost = {"float": 1.0, "w8a8": 0.25}
    chosen = choose(t, time_cost(t, 1300, cost), ("float", "w8a8"), pins=())
    assert chosen == {"layer0": "float", "layer1": "w8a8"}
    with pytest.raises(BadInput, match="at least 500 multiply"):
        choose(t, time_cost(t, 400, cost), ("float", "w8a8"), pins=())


def test_a_layer_without_a_row_in_the_table_cannot_be_fixed():
    t = table(np.ones((1, 3)), [10])
    with pytest.raises(BadInput, match="'nowhere'"):
        choose(t, average_bits(t, 8), OPTIONS, fixed={"nowhere": "float"})
    with pytest.raises(BadInput, match="option 'w5'"):
        t.error("layer0", "w5")


def test_the_layers_to_relax_are_the_fewest_that_reach_the_floor():
    t = table([[1e-6, 1e-4, 1e-3], [1e-6, 1e-2, 1e-1], [1e-6, 3e-3, 2e-2], [1e-6, 1e-5, 1e-4]], [100] * 4)
    chosen = dict.fromkeys(t.layers, "w4")
    relaxed = propose(t, chosen, 30.0, options=OPTIONS)
    assert [(r.layer, r.before, r.after, r.bytes) for r in relaxed] == [
        ("layer1", "w4", "w8", 50),
        ("layer2", "w4", "w8", 50),
    ]
    after = {**chosen, **{r.layer: r.after for r in relaxed}}
    assert relaxed[-1].final_db == pytest.approx(decibels(t.predicted(after)), abs=0.01)
    assert relaxed[-1].final_db >= 30 > relaxed[-2].final_db
    assert propose(t, chosen, 10.0, options=OPTIONS) == []


def test_a_measured_shortfall_scales_the_prediction():
    t = table([[0, 1e-3, 1e-2], [0, 1e-4, 1e-3]], [100, 100])
    chosen = dict.fromkeys(t.layers, "w4")
    predicted = decibels(t.predicted(chosen))
    assert propose(t, chosen, predicted - 1) == []
    first, *rest = propose(t, chosen, predicted - 1, measured_db=predicted - 3)
    assert (first.layer, first.after, rest) == ("layer0", "float", [])
    # what the other layer leaves, as much worse than predicted as all was
    assert first.final_db == pytest.approx(40 - 3, abs=0.01)


def test_every_floor_is_reached_when_all_is_float_again():
    t = table(np.full((3, 3), 1e-3), [10, 10, 10])
    relaxed = propose(t, dict.fromkeys(t.layers, "w3"), 200.0)
    assert [r.after for r in relaxed] == ["float"] * 3
    assert relaxed[-1].final_db == 300


def test_a_floor_on_outputs_counts_every_step_alike():
    t = table([[0, 1e-3, 1e-2]], [10])
    nsr = np.concatenate([t.nsr, 3 * t.nsr], axis=2)
    two = replace(t, steps=(0, 1), nsr=nsr, gains=np.array([1.0, 0.0]))
    assert two.error("layer0", "w4") == pytest.approx(1e-3)
    assert two.of_outputs().error("layer0", "w4") == pytest.approx(2e-3)
