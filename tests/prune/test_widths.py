"""The pass: narrower denoisers that draw nearly the same, export, and say what was cut."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model import Context, Model, load  # noqa: E402
from fewstep.model.structure import network_of, restructure, structure_of  # noqa: E402
from fewstep.model.trajectories import run_part, trajectories  # noqa: E402
from fewstep.prune.flops import multiplications  # noqa: E402
from fewstep.prune.importance import CRITERIA, importance  # noqa: E402
from fewstep.prune.refit import Moments, eliminate, fold, moments  # noqa: E402
from fewstep.prune.width_groups import Slice, WidthGroup, cut, find_groups, rows  # noqa: E402
from fewstep.prune.widths import CutWidths, unit_multiplications  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import DiscreteVP  # noqa: E402
from fewstep.targets import load_target  # noqa: E402


def result(work):
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load(tiny_sd)


@pytest.fixture
def ctx(model, tmp_path):
    return Context(load_target("laptop-cpu"), plan_of(model, "auto", 2), tmp_path, tmp_path / "store")


def final(model, ctx):
    return np.concatenate([run.latent for run in trajectories(model, ctx.plan, [5, 6])])


def relative(found, right):
    return float(np.mean((found - right) ** 2) / np.mean(right**2))


def test_ratio_0_is_the_identity(model, ctx):
    same = result(CutWidths(ratio=0, criterion="magnitude")(model, ctx))
    assert np.array_equal(final(same, ctx), final(model, ctx))
    assert same.parts["unet"].parameters() == model.parts["unet"].parameters()
    assert same.history[-1]["widths"] == {}


@pytest.mark.parametrize("of", ["parameters", "multiplications"])
def test_as_much_goes_as_was_asked_and_history_says_it(model, ctx, of):
    cut_one = result(CutWidths(ratio=0.3, of=of, criterion="magnitude", refit=False, round_to=4)(model, ctx))
    record, part = cut_one.history[-1], cut_one.parts["unet"]
    before, after = record[of]
    assert 0.62 < after / before <= 0.7
    assert record["parameters"] == [model.parts["unet"].parameters(), part.parameters()]
    assert record["multiplications"] == [multiplications(model.parts["unet"]), multiplications(part)]
    assert record["pass"] == "CutWidths"
    assert record["ratio"] == 0.3
    assert all(after < before for before, after in record["widths"].values())


def test_the_model_that_came_in_is_as_it_was(model, ctx):
    before = {key: tensor.clone() for key, tensor in model.parts["unet"].module.state_dict().items()}
    result(CutWidths(ratio=0.3, samples=2)(model, ctx))
    after = model.parts["unet"].module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_a_unit_saves_is_what_its_loss_saves(model):
    part = model.parts["unet"]
    network = network_of(part)
    groups = find_groups(network)
    saved = unit_multiplications(part, groups)
    for kind in ("channels", "heads", "ffn"):
        group = next(g for g in groups if g.kind == kind)
        smaller = replace(part, module=type(part.module)(cut(network, {group.name: range(1, group.count)})))
        assert multiplications(part) - multiplications(smaller) == pytest.approx(saved[group.name], rel=1e-9)


def test_it_is_built_again_from_its_structure_and_its_weights(model, ctx):
    smaller = network_of(result(CutWidths(ratio=0.4, criterion="random")(model, ctx)).parts["unet"])
    again = type(smaller).from_config(dict(network_of(model.parts["unet"]).config)).eval()
    weights = smaller.state_dict()
    restructure(again, structure_of(smaller), {name: tuple(tensor.shape) for name, tensor in weights.items()})
    again.load_state_dict(weights)
    feeds = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 77, 64)
    with torch.no_grad():
        assert torch.equal(again(*feeds).sample, smaller(*feeds).sample)


def test_a_second_cut_goes_on_from_the_first(model, ctx):
    once = result(CutWidths(ratio=0.2, criterion="magnitude")(model, ctx))
    twice = result(CutWidths(ratio=0.2, criterion="magnitude")(once, ctx))
    assert twice.parts["unet"].parameters() <= 0.8 * once.parts["unet"].parameters()
    assert np.isfinite(final(twice, ctx)).all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_dead_units_matter_least(model, ctx, criterion):
    network = cut(network_of(model.parts["unet"]), {})
    groups = find_groups(network)
    with torch.no_grad():
        for group in groups:
            for piece in group.slices:
                weight = network.get_submodule(piece.layer).weight
                if weight.ndim > 1:
                    index = rows(group, piece, [0])
                    (weight if piece.axis == 0 else weight.transpose(0, 1))[index] = 0
    part = model.parts["unet"]
    dead = replace(model, parts={**model.parts, "unet": replace(part, module=type(part.module)(network))})
    scores = result(importance(dead, network, groups, criterion, ctx.plan, 2, 0, ctx.store / "scores"))
    assert {name: len(values) for name, values in scores.items()} == {g.name: g.count for g in groups}
    if criterion != "random":
        assert all(values[0] <= 1e-6 * values[1:].max() for values in scores.values())


def test_output_importance_is_the_squared_change_of_the_output_where_it_is_linear(model, ctx):
    """The last attention's heads: their sum is linear in every gate up to the norms behind it."""
    network = network_of(model.parts["unet"])
    groups = find_groups(network, ["heads"])
    scores = result(importance(model, network, groups, "output", ctx.plan, 8, 0, ctx.store / "scores"))
    (run,) = trajectories(model, ctx.plan, [1, 2], prompts=model.prompts)
    part, measured, said = model.parts["unet"], [], []
    for group in groups:
        for head in range(group.count):
            kept = [unit for unit in range(group.count) if unit != head]
            other = replace(part, module=type(part.module)(cut(network, {group.name: kept})))
            changes = [
                run_part(other, feeds)[part.outputs[0].name] - run_part(part, feeds)[part.outputs[0].name]
                for feeds in run.calls
            ]
            measured.append(float(np.mean(np.square(changes))))
            said.append(scores[group.name][head])
    assert np.corrcoef(np.log(measured), np.log(said))[0, 1] > 0.8


def test_importance_goes_on_where_it_was_cut_off(model, ctx):
    network = network_of(model.parts["unet"])
    groups = find_groups(network)
    whole = result(importance(model, network, groups, "output", ctx.plan, 8, 0, ctx.store / "whole"))
    work = importance(model, network, groups, "output", ctx.plan, 8, 0, ctx.store / "cut")
    assert next(work).fraction == 0.5
    work.close()
    again = importance(model, network, groups, "output", ctx.plan, 8, 0, ctx.store / "cut")
    assert next(again).fraction == 1
    found = result(again)
    assert all(np.array_equal(found[name], whole[name]) for name in whole)


def ffn(count):
    return WidthGroup("ffn", "ffn", count, 1, (Slice("reader", 1),), 4)


def test_values_that_others_say_exactly_can_go_for_nothing():
    """h_2 = 2 h_0 - h_1 + 3: the fit finds it, and the reader loses nothing."""
    reader = torch.nn.Linear(3, 4)
    module = torch.nn.ModuleDict({"reader": reader})
    group = ffn(3)
    h = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    h[:, 2] = 2 * h[:, 0] - h[:, 1] + 3
    before = reader(h).detach()
    seen = Moments.empty(3)
    seen.add(h)
    fold(module, group, [0, 1], seen)
    after = torch.nn.functional.linear(h[:, :2], reader.weight[:, :2], reader.bias)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=2e-3)


def test_of_two_units_that_say_the_same_one_costs_nothing_and_the_other_all():
    h = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    h[:, 2] = h[:, 0]
    seen = Moments.empty(3)
    seen.add(h)
    costs = eliminate(ffn(3), np.array([1.0, 0.5, 1.0]), seen, 0)
    assert sorted(costs)[0] < 1e-3  # one of the pair
    assert costs[1] == pytest.approx(0.5, rel=0.01)  # says what no other says
    assert max(costs[0], costs[2]) == pytest.approx(1.0, rel=0.01)  # its twin is gone


def test_units_that_have_nothing_in_common_cost_their_own_scores():
    seen = Moments.empty(4)
    seen.add(torch.randn(50_000, 4, generator=torch.Generator().manual_seed(0)))
    scores = np.array([3.0, 1.0, 4.0, 2.0])
    assert eliminate(ffn(4), scores, seen, 0) == pytest.approx(scores, rel=0.01)


def test_units_that_stay_cost_more_than_all_that_go():
    seen = Moments.empty(4)
    seen.add(torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))
    costs = eliminate(ffn(4), np.array([3.0, 1.0, 4.0, 2.0]), seen, 2)
    assert set(np.argsort(costs)[2:]) == {0, 2}


def test_what_repeats_itself_inside_a_denoiser_goes_for_nothing(model, ctx):
    """Every second hidden unit says what the one before it says, to readers of their own."""
    part = model.parts["unet"]
    network = cut(network_of(part), {})
    groups = find_groups(network, ["ffn"])
    with torch.no_grad():
        for group in groups:
            first = network.get_submodule(group.slices[0].layer)
            first.weight[1::2], first.bias[1::2] = first.weight[0::2], first.bias[0::2]

    def around(network):
        return replace(model, parts={**model.parts, "unet": replace(part, module=type(part.module)(network))})

    kept = {group.name: range(0, group.count, 2) for group in groups}
    seen = result(moments(around(network), network, groups, ctx.plan, [1, 2, 3, 4], 4))
    fitted = cut(network, {})
    for group in groups:
        fold(fitted, group, kept[group.name], seen[group.name])
    right = final(around(network), ctx)
    assert relative(final(around(cut(network, kept)), ctx), right) > 1e-3
    assert relative(final(around(cut(fitted, kept)), ctx), right) < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"ratio": float("nan")},
        {"of": "bytes"},
        {"kinds": ()},
        {"kinds": ("depth",)},
        {"criterion": "taste"},
        {"floor": 2.0},
        {"samples": 0},
        {"round_to": 0},
    ],
)
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(BadInput):
        CutWidths(**wrong)


def test_more_than_there_is_inside_the_blocks_is_refused(model, ctx):
    with pytest.raises(BadInput, match="at most"):
        result(CutWidths(ratio=0.95, criterion="random")(model, ctx))


def test_a_module_that_is_no_diffusers_network_is_refused(ctx):
    mine = Model.from_module(
        torch.nn.Identity(),
        sample_shape=(3, 8, 8),
        process=DiscreteVP.from_schedule("linear", 1e-4, 0.02, 100),
        call=lambda module, sample, timestep: module(sample),
    )
    with pytest.raises(BadInput, match="UNet2DModel"):
        result(CutWidths()(mine, ctx))


def test_a_network_without_such_units_is_refused(model, ctx):
    part = model.parts["unet"]
    network = cut(network_of(part), {})
    for name, block in list(network.named_modules()):
        if type(block).__name__ == "FeedForward":
            network.set_submodule(name, torch.nn.Identity())
    bare = replace(model, parts={**model.parts, "unet": replace(part, module=type(part.module)(network))})
    with pytest.raises(BadInput, match="no ffn"):
        result(CutWidths(kinds=("ffn",))(bare, ctx))
