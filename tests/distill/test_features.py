"""Recovery: which stages are compared, how their errors are made comparable, and that a cut network comes back."""

import copy
import json

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel  # noqa: E402

from fewstep.distill.features import Recover, feature_losses, pairs_of, stages, watched  # noqa: E402
from fewstep.model import Model  # noqa: E402
from fewstep.model.families import from_pipeline  # noqa: E402
from fewstep.model.training import Latents, Training  # noqa: E402
from fewstep.prune.cut_blocks import CutBlocks  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import DiscreteVP  # noqa: E402

from .analytic import context, finish  # noqa: E402

PROCESS = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)


def unet(stage_count=3, seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 8, 8)[:stage_count],
        down_block_types=("DownBlock2D",) * stage_count,
        up_block_types=("UpBlock2D",) * stage_count,
        norm_num_groups=4,
        add_attention=False,
    ).eval()


def test_stages_of_a_unet_and_blocks_of_a_transformer_are_found_inside_wrappers():
    model = Model.from_module(unet(), sample_shape=(2, 8, 8), process=PROCESS)
    names = list(stages(model.parts["unet"].module))
    assert [name.partition("module.")[2] for name in names] == [
        *("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2")
    ]  # fmt: skip
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, num_layers=3, sample_size=4, patch_size=1,
        num_embeds_ada_norm=5,
    )  # fmt: skip
    assert list(stages(dit)) == [f"transformer_blocks.{i}" for i in range(3)]
    assert stages(torch.nn.Linear(2, 2)) == {}


def test_a_student_of_fewer_stages_is_compared_from_both_ends():
    assert pairs_of(unet(3), unet(2)) == (
        ("down_blocks.0", "down_blocks.0"),
        ("mid_block", "mid_block"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
    )


def test_features_are_what_the_stages_put_out_and_no_hook_stays():
    network = unet()
    with torch.no_grad(), watched(network, ["up_blocks.2", "mid_block"]) as seen:
        network(torch.randn(1, 2, 8, 8), 3)
    assert {name: tuple(value.shape) for name, value in seen.items()} == {
        "up_blocks.2": (1, 8, 8, 8),
        "mid_block": (1, 8, 2, 2),
    }
    assert not any(module._forward_hooks for module in network.modules())


def test_the_size_of_a_feature_does_not_decide_how_much_its_error_counts():
    torch.manual_seed(0)
    right, got = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    output = torch.tensor(0.5)
    one = feature_losses([(right, got)], output, "relative")
    assert float(feature_losses([(100 * right, 100 * got)], output, "relative")) == pytest.approx(float(one))
    assert float(one) == pytest.approx(float((right - got).square().mean() / right.square().mean()))
    plain = feature_losses([(right, got), (10 * right, 10 * got)], output, "none")
    assert float(plain) == pytest.approx(float((right - got).square().mean()) * 101 / 2, rel=1e-5)
    # balanced: of equal features every term is as large as the output's loss
    assert float(feature_losses([(right, got)] * 3, output, "balanced")) == pytest.approx(0.5, rel=1e-5)


def test_a_cut_network_learns_its_teacher_back(tmp_path):
    teacher = from_pipeline(DDPMPipeline(unet(), DDPMScheduler(beta_schedule="linear")), "toy")
    ctx = context(teacher, tmp_path, teacher)
    cut = finish(CutBlocks(criterion="random", ratio=0.2, samples=1, calls=1)(teacher, ctx))
    how = Recover(
        task=0.0,
        latents=Latents(number=8, steps=2, precision="float32"),
        training=Training(steps=120, batch=8, rate=1e-3, warm=5, average=0, precision="float32"),
    )
    done = finish(how(cut, ctx))
    lines = [json.loads(line) for line in (tmp_path / done.history[-1]["log"]).read_text().splitlines()]
    for term in ("output", "features"):
        assert lines[-1][f"student.{term}"] < 0.8 * lines[0][f"student.{term}"]
    assert done.parts["unet"].parameters() == cut.parts["unet"].parameters()
    assert done.guidance == teacher.guidance
    assert done.history[-1]["pass"] == "Recover"


def test_the_model_that_is_given_keeps_its_weights(tmp_path):
    teacher = Model.from_module(unet(), sample_shape=(2, 8, 8), process=PROCESS)
    before = copy.deepcopy(teacher.parts["unet"].module.state_dict())
    how = Recover(latents=Latents(number=2, steps=1), training=Training(steps=2, batch=2, warm=0))
    finish(how(teacher, context(teacher, tmp_path)))
    assert all(
        torch.equal(before[key], value) for key, value in teacher.parts["unet"].module.state_dict().items()
    )


@pytest.mark.parametrize(
    "wrong",
    [{"task": -1.0}, {"task": 0.0, "output": 0.0, "features": 0.0}, {"normalized": "layer"}, {"drop": 1.0}],
)
def test_a_recovery_that_cannot_be_is_refused(wrong):
    with pytest.raises(BadInput, match="recover"):
        Recover(**wrong)
