"""Masks against what can be counted by hand."""

import math

import pytest

from fewstep.runtime.errors import BadInput

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.prune.masks import (  # noqa: E402
    block_mask,
    cubic_sparsity,
    drop_and_regrow,
    global_masks,
    magnitude_mask,
    n_of_m_mask,
    regrown_fraction,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_cubic_schedule_hits_its_ends_and_the_eighth_between():
    how = {"initial": 0.0, "final": 0.8, "begin": 100, "pulses": 10, "every": 20}
    assert cubic_sparsity(0, **how) == 0
    assert cubic_sparsity(100, **how) == 0
    assert cubic_sparsity(200, **how) == pytest.approx(0.8 * (1 - 0.5**3))
    assert cubic_sparsity(300, **how) == pytest.approx(0.8)
    assert cubic_sparsity(10_000, **how) == pytest.approx(0.8)


def test_the_cubic_schedule_begins_where_it_is_told():
    how = {"initial": 0.5, "final": 0.9, "begin": 0, "pulses": 1, "every": 4}
    assert [cubic_sparsity(k, **how) for k in range(5)] == pytest.approx(
        [0.9 - 0.4 * (1 - k / 4) ** 3 for k in range(5)]
    )


def test_the_largest_weights_stay():
    weight = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    assert magnitude_mask(weight, 0.5).tolist() == [[True, False], [False, True]]
    assert magnitude_mask(weight, 0.0).all()


def test_ties_do_not_change_how_many_stay():
    assert int(magnitude_mask(torch.ones(10, 10), 0.37).sum()) == 63
    assert int(block_mask(torch.ones(8, 8), 0.5, 2, 2).sum()) == 32


def test_one_threshold_for_all_layers_takes_from_the_layer_of_small_weights():
    weights = {"small": 0.1 * normal(10, 10), "large": normal(10, 10, seed=1).sign()}
    masks = global_masks(weights, 0.5)
    assert not masks["small"].any()
    assert masks["large"].all()


def test_of_every_four_inputs_two_stay_and_they_are_the_larger():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.0, 5.0, 5.5, -7.0, 6.0]])
    assert n_of_m_mask(weight, 2, 4).tolist() == [[False, True, True, False, False, False, True, True]]


def test_a_convolutions_pattern_runs_along_its_channels():
    weight = normal(6, 8, 3, 3)
    mask = n_of_m_mask(weight, 2, 4)
    assert mask.shape == weight.shape
    groups = mask.view(6, 2, 4, 3, 3).sum(2)
    assert (groups == 2).all()
    one = weight[3, 4:8, 1, 2].abs()
    assert mask[3, 4:8, 1, 2].tolist() == (one >= one.sort().values[2]).tolist()


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (1, 4), (8, 8)])
@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 3, 3)])
def test_blocks_go_as_one_by_their_energy(rows, columns, shape):
    weight = normal(*shape)
    mask = block_mask(weight, 0.5, rows, columns)
    flat = mask.view(16, 24, -1).permute(2, 0, 1)
    tiles = flat.unfold(1, rows, rows).unfold(2, columns, columns).flatten(3)
    whole = tiles.all(-1)
    assert (whole | ~tiles.any(-1)).all()
    assert int(whole.sum()) == whole.numel() // 2
    energy = weight.view(16, 24, -1).permute(2, 0, 1).unfold(1, rows, rows).unfold(2, columns, columns)
    energy = energy.flatten(3).square().mean(-1)
    assert energy[whole].min() >= energy[~whole].max()


def test_blocks_of_one_are_magnitude():
    weight = normal(12, 8)
    assert torch.equal(block_mask(weight, 0.4, 1, 1), magnitude_mask(weight, 0.4))


def test_the_regrown_share_falls_along_a_cosine():
    assert regrown_fraction(0, first=0.5, end=100) == 0.5
    assert regrown_fraction(50, first=0.5, end=100) == pytest.approx(0.25)
    assert regrown_fraction(25, first=0.5, end=100) == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert regrown_fraction(100, first=0.5, end=100) == pytest.approx(0)
    assert regrown_fraction(200, first=0.5, end=100) == pytest.approx(0)


def test_the_smallest_go_and_the_strongest_pull_grows():
    weight = torch.tensor([5.0, 1.0, 4.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([True, True, True, False, False, False])
    gradient = torch.tensor([9.0, 0.1, 9.0, 0.2, -3.0, 1.0])
    assert drop_and_regrow(weight, mask, gradient, 1 / 3).tolist() == [True, False, True, False, True, False]


def test_what_was_just_dropped_may_grow_again():
    weight = torch.tensor([5.0, 1.0, 0.0])
    mask = torch.tensor([True, True, False])
    assert drop_and_regrow(weight, mask, torch.tensor([0.0, 2.0, 1.0]), 0.5).tolist() == mask.tolist()


def test_regrowth_keeps_the_number_even_when_nearly_all_stay():
    weight, gradient = normal(100), normal(100, seed=1)
    for sparsity in (0.0, 0.05, 0.9):
        mask = magnitude_mask(weight, sparsity)
        assert int(drop_and_regrow(weight, mask, gradient, 0.5).sum()) == int(mask.sum())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(BadInput, match="sparsity"):
        magnitude_mask(torch.ones(4), sparsity)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (0, 2), (5, 4)])
def test_a_pattern_that_does_not_fit_is_refused(n, m):
    with pytest.raises(BadInput, match="pattern"):
        n_of_m_mask(torch.ones(4, 6), n, m)


def test_blocks_that_do_not_tile_are_refused():
    with pytest.raises(BadInput, match="blocks of 4x1"):
        block_mask(torch.ones(6, 6), 0.5, 4, 1)
