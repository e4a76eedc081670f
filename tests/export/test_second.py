"""Bundles with two denoisers, from two models of one latent space."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.export import export_bundle  # noqa: E402
from fewstep.export.plans import plan_of, plans_of  # noqa: E402
from fewstep.model import Model  # noqa: E402
from fewstep.model.pairs import check_alike, with_small  # noqa: E402
from fewstep.model.trajectories import trajectories  # noqa: E402
from fewstep.runtime import DiscreteVP, Pipeline  # noqa: E402
from fewstep.runtime.errors import BadInput, PlanError  # noqa: E402
from fewstep.runtime.two_graphs import route  # noqa: E402

from .conftest import LINEAR, Pixels  # noqa: E402


class Told(torch.nn.Module):
    """A class-conditional network; label 10 means "no class"."""

    def __init__(self, width):
        super().__init__()
        self.pixels, self.classes = Pixels(width=width), torch.nn.Embedding(11, 3)

    def forward(self, sample, timestep, class_labels):
        return self.pixels(sample, timestep) + self.classes(class_labels)[:, :, None, None]


def told(width, name, process=LINEAR, classes=10):
    torch.manual_seed(width)
    return Model.from_module(
        Told(width),
        sample_shape=(3, 8, 8),
        process=process,
        prediction="v_prediction",
        name=name,
        classes=classes,
        guidance=2.0,
    )


@pytest.fixture(scope="module")
def large():
    return told(16, "large")


@pytest.fixture(scope="module")
def small():
    return told(8, "small")


@pytest.fixture(scope="module")
def stitched_bundle(large, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "stitched"
    *_, done = export_bundle(large, "laptop-cpu", out, steps=5, measure_speed=False, small=small)
    return done


def test_a_stitched_bundle_holds_both_graphs_and_a_plan_for_both_and_each(stitched_bundle):
    manifest = stitched_bundle.manifest
    assert set(manifest.parts) == {manifest.denoiser, "small"}
    assert manifest.graphs == {"denoiser": manifest.denoiser, "small": "small"}
    assert manifest.quality["parts"]["small"]["relative_error"] < 1e-5
    assert manifest.quality["pipeline"]["psnr_db"] > 80
    graphs = {
        name: [row["graph"] for row in table["calls"]].count("small")
        for name, table in manifest.plans.items()
    }
    assert graphs == {"default": 2, "full": 0, "small": 5}
    record = manifest.history[-1]
    assert (record["pass"], record["small"], record["share"]) == ("stitch", "small", 0.4)


def test_what_it_draws_is_what_the_torch_modules_draw_by_the_same_plan(stitched_bundle, large, small):
    pair = with_small(large, small)
    with Pipeline.from_pretrained(stitched_bundle.path) as pipeline:
        for name in ("default", "full", "small"):
            table = pipeline.plan(name=name)
            drawn = pipeline(class_labels=[3, 7], seed=2, plan=name, output_type="latent").images
            (run,) = trajectories(pair, table, [2, 3], labels=[3, 7])
            np.testing.assert_allclose(drawn, run.latent, atol=1e-4 * np.abs(drawn).max())


def test_a_stitched_trajectory_is_the_small_models_half_then_the_large_ones(large, small):
    pair = with_small(large, small, 0.4)
    table = plans_of(pair, "dpmpp_2m", 5)["default"]
    (run,) = trajectories(pair, table, [0, 1], labels=[1, 2])
    with torch.no_grad():
        for k, fed in enumerate(run.calls):
            model = small if k < 2 else large
            inputs = [torch.from_numpy(fed[spec.name]) for spec in model.parts[model.denoiser].inputs]
            out = model.parts[model.denoiser].module(*inputs).numpy()
            half = len(out) // 2
            guided = out[:half] + 2.0 * (out[half:] - out[:half])
            a, b, _ = table.calls[k].x0
            x0 = a * fed["sample"][half:] / table.calls[k].scale + b * guided
    np.testing.assert_allclose(run.latent, x0, atol=1e-4)  # the last step ends on the last prediction


def test_a_student_that_knows_guidance_is_called_without_it(large, small):
    distilled = replace(small, guidance=replace(small.guidance, scale=1.0), steps=2)
    plans = plans_of(with_small(large, distilled, None), "ddim", 6)
    assert [(call.graph, call.guided) for call in plans["default"].calls] == [("small", False)] * 2
    assert plans["student"] == plans["default"]
    assert {(call.graph, call.guided) for call in plans["refine"].calls} == {("denoiser", True)}
    assert plans["full"] == plan_of(large, "ddim", 6)
    half = plans_of(with_small(large, distilled, 0.5), "ddim", 6)["default"]
    assert [call.guided for call in half.calls] == [False] * 3 + [True] * 3


def test_a_student_bundle_routes(large, small, tmp_path):
    student = replace(small, steps=2)
    *_, done = export_bundle(
        large, "laptop-cpu", tmp_path / "b", steps=3, measure_speed=False, small=student, share=None
    )
    with Pipeline.from_pretrained(done.path) as pipeline:
        scores = [1.0, 0.0]
        routed = route(pipeline, lambda picture, i: scores[i], 0.5, class_labels=[1, 2], seed=3)
        alone = pipeline(class_labels=[1, 2], seed=3, output_type="np").images
    assert routed.refined == (False, True)
    np.testing.assert_array_equal(routed.images[0], alone[0])
    assert not np.array_equal(routed.images[1], alone[1])


def test_both_denoisers_are_quantized(large, small, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'passes = ["quantize"]\n[quantize]\nrounding = "nearest"\nsmooth = false\nsamples = 2\n'
        "[quality.int8]\npart_relative_error = 1.0\npart_snr_db = 0.0\npipeline_psnr_db = 0.0\n"
    )
    *_, done = export_bundle(
        large, "laptop-cpu", tmp_path / "b", steps=2, measure_speed=False, small=small, recipe=recipe
    )
    for part in done.manifest.parts.values():
        assert part.quantization["bits_per_weight"] < 32


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: told(8, "s", DiscreteVP.from_schedule("scaled_linear", 1e-4, 0.02, 1000)), "in process"),
        (lambda: told(8, "s", classes=9), "in classes: 9 and 10"),
        (lambda: replace(told(8, "s"), prediction="epsilon"), "in prediction: epsilon and v_prediction"),
        (
            lambda: Model.from_module(Pixels(), sample_shape=(3, 8, 8), process=LINEAR, name="s"),
            "s is unconditional, large is class-conditional",
        ),
    ],
)
def test_a_small_model_of_another_kind_is_refused_and_nothing_is_written(large, other, said, tmp_path):
    with pytest.raises(BadInput, match=said):
        list(export_bundle(large, "laptop-cpu", tmp_path / "b", steps=2, small=other()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_0_to_1_is_refused(large, small, share, tmp_path):
    with pytest.raises(BadInput, match=f"a share of {share}.*expected 0 to 1"):
        list(export_bundle(large, "laptop-cpu", tmp_path / "b", steps=2, small=small, share=share))
    with pytest.raises(BadInput, match="expected 0 to 1"):
        with_small(large, small, share)


def test_a_model_alone_refuses_a_plan_of_two_graphs(large, small, stitched_bundle, tmp_path):
    table = plans_of(with_small(large, small), "ddim", 5)["default"]
    with pytest.raises(BadInput, match="calls the graph 'small', for large; expected denoiser"):
        list(trajectories(large, table, [0], labels=[1]))
    *_, done = export_bundle(large, "laptop-cpu", tmp_path / "b", steps=2, measure_speed=False)
    with Pipeline.from_pretrained(done.path) as pipeline, pytest.raises(PlanError, match="--stitch"):
        pipeline(class_labels=[1], plan=table)


def test_models_that_differ_in_the_sizes_they_draw_alone_are_alike(large, small):
    other = replace(small, sample=replace(small.sample, multiple=4))
    check_alike(other, large)
    assert with_small(large, other).sample.multiple == 4
