"""The pass: what it takes out, what it says of it, what it refuses; and that the result exports."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model import Context, load  # noqa: E402
from fewstep.model.structure import without  # noqa: E402
from fewstep.model.trajectories import run_part  # noqa: E402
from fewstep.prune.criteria import (  # noqa: E402
    final_distance,
    latent_distance,
    magnitude,
    output_distance,
    paired_distance,
    recorded_calls,
)
from fewstep.prune.cut_blocks import CRITERIA, CutBlocks  # noqa: E402
from fewstep.prune.units import find_units  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.targets import load_target  # noqa: E402

QUICK = {"samples": 2, "calls": 2}


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load(tiny_sd)


@pytest.fixture
def context(model, tmp_path):
    return Context(load_target("laptop-cpu"), plan_of(model, "model", 2), tmp_path, tmp_path / "store")


def run(job, model, context):
    events, work = [], job(model, context)
    while True:
        try:
            events.append(next(work))
        except StopIteration as stop:
            return stop.value, events


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if not name.startswith("bk_sdm")])
def test_every_criterion_takes_out_at_least_the_share_asked_for(criterion, model, context):
    smaller, events = run(CutBlocks(criterion, 0.3, **QUICK), model, context)
    record, part = smaller.history[-1], smaller.parts["unet"]
    before, after = record["parameters"]
    assert (before, after) == (model.parts["unet"].parameters(), part.parameters())
    assert after <= 0.7 * before
    assert record["criterion"] == criterion
    assert set(part.config["_structure"]["removed"]) == set(record["removed"])
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    same = without(model.parts["unet"], record["removed"])
    feeds = part.example.feeds(part.inputs, part.example.default_sizes(), seed=1)
    assert np.array_equal(run_part(part, feeds)["out_sample"], run_part(same, feeds)["out_sample"])


def test_a_ratio_may_count_multiplications(model, context):
    smaller, _ = run(CutBlocks("magnitude", 0.3, "multiplications"), model, context)
    before, after = smaller.history[-1]["multiplications"]
    assert after <= 0.7 * before


def test_what_is_predicted_is_the_sum_of_scores_and_what_is_measured_that_of_the_cut(model, context):
    smaller, _ = run(CutBlocks(ratio=0.3, **QUICK), model, context)
    record = smaller.history[-1]
    predicted = sum(record["scores"][path] for path in record["removed"])
    assert predicted == pytest.approx(record["predicted"], rel=1e-2)
    part = model.parts["unet"]
    calls = recorded_calls(model, context.plan, (2_000_000, 2_000_001), 2)
    right = [run_part(part, feeds)["out_sample"].astype(float) for feeds in calls]
    moved = [run_part(smaller.parts["unet"], feeds)["out_sample"].astype(float) for feeds in calls]
    power = sum(np.sum(a**2) for a in right)
    error = sum(np.sum((a - b) ** 2) for a, b in zip(right, moved, strict=True))
    assert record["measured"] == pytest.approx(error / power, rel=1e-4, abs=1e-6)


def test_a_block_that_adds_nothing_has_score_nothing(model, context):
    part = without(model.parts["unet"], [])
    idle = "mid_block.resnets.1"
    last = part.module.network.get_submodule(idle).conv2
    with torch.no_grad():
        last.weight.zero_(), last.bias.zero_()
    changed = replace(model, parts={**model.parts, "unet": part})
    seeds = (1, 2)
    distances = [
        output_distance(part, recorded_calls(changed, context.plan, seeds, 2)),
        final_distance(changed, context.plan, seeds, latent_distance),
        final_distance(changed, context.plan, seeds, paired_distance),
    ]
    for distance in distances:
        assert distance([idle]) == pytest.approx(0, abs=1e-10)
        assert distance(["mid_block.resnets.0"]) > 1e-6


def test_distances_of_latents_have_their_closed_forms():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, 4, 2, 2))
    assert latent_distance(z, z) == paired_distance(z, z) == 0
    assert latent_distance(z, 0 * z) == pytest.approx(1)
    assert paired_distance(z, 0 * z) == pytest.approx(1)
    assert latent_distance(z, z[::-1]) == pytest.approx(0, abs=1e-20)  # the same samples in another order
    assert paired_distance(z, z[::-1]) > 0.5
    assert paired_distance(z, 1.1 * z) == pytest.approx(0.01)


def test_magnitude_is_the_mean_of_absolute_weights_that_go(model):
    part = model.parts["unet"]
    scores = magnitude(part, find_units(part))
    block = part.module.network.mid_block.resnets[0]
    weights = torch.cat([tensor.detach().flatten() for tensor in block.parameters()])
    assert scores["mid_block.resnets.0"] == pytest.approx(float(weights.double().abs().mean()))


def test_scores_that_are_in_the_store_are_not_measured_again(model, context, monkeypatch):
    job = CutBlocks(ratio=0.3, **QUICK)
    first, _ = run(job, model, context)
    [file] = context.store.iterdir()
    import fewstep.prune.cut_blocks as module

    def forbidden(*_):
        return lambda removed: pytest.fail("measured again") if len(removed) == 1 else 0.0

    monkeypatch.setattr(module, "output_distance", forbidden)
    again, _ = run(replace(job, ratio=0.31), model, context)
    assert again.history[-1]["scores"] == first.history[-1]["scores"]
    file.write_text("{")  # killed while an older version wrote it: counts as none
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        run(job, model, context)


def test_equal_seeds_draw_equal_cuts_and_others_others(model, context):
    draws = [
        run(CutBlocks("random", 0.3, seed=seed), model, context)[0].history[-1]["removed"]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"criterion": "best"}, "best"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"by": "layers"}, "layers"),
        ({"samples": 0}, "samples"),
        ({"calls": 0}, "calls"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(BadInput, match=said):
        CutBlocks(**fields)


def test_a_ratio_that_all_blocks_do_not_reach_is_refused_with_what_they_do(model, context):
    with pytest.raises(BadInput, match=r"at most \d+\.\d%"):
        run(CutBlocks(ratio=0.99), model, context)
