"""BK-SDM's cuts: plain networks of diffusers with the weights of what stays."""

import json

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.model.builders import BK_SMALL_UNET, BK_TINY_UNET, SD15_UNET  # noqa: E402
from fewstep.model.libraries import quiet  # noqa: E402
from fewstep.model.model import Part  # noqa: E402
from fewstep.model.structure import network_of, without  # noqa: E402
from fewstep.model.wrappers import TextDenoiser  # noqa: E402
from fewstep.prune.bk_sdm import bk_sdm_part, by_hand, smaller_config  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402

from .networks import dit, output, text_unet  # noqa: E402


def on_meta(config):
    with quiet(), torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(config)


@pytest.mark.parametrize(
    ("cut", "published"), [("bk_sdm_base", 579.4), ("bk_sdm_small", 482.3), ("bk_sdm_tiny", 323.4)]
)
def test_sd15_is_cut_to_the_published_sizes(cut, published):
    # Kim et al. 2023, arXiv:2305.15798, table 1, in millions
    config, _ = smaller_config(on_meta(SD15_UNET), cut)
    assert round(sum(t.numel() for t in on_meta(config).parameters()) / 1e6, 1) == published


@pytest.mark.parametrize(
    ("cut", "published"), [("bk_sdm_small", BK_SMALL_UNET), ("bk_sdm_tiny", BK_TINY_UNET)]
)
def test_sd15_is_cut_to_the_published_configurations(cut, published):
    config, _ = smaller_config(on_meta(SD15_UNET), cut)
    for key, value in published.items():
        assert config[key] == (list(value) if isinstance(value, tuple) else value), key


def test_small_is_the_network_with_those_blocks_bypassed():
    part = text_unet()
    second = [f"down_blocks.{i}.resnets.1" for i in range(3)] + [
        f"down_blocks.{i}.attentions.1" for i in range(2)
    ]
    middle = ["mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0"]
    small = bk_sdm_part(part, "bk_sdm_small")
    # going up the middle pair takes its input from a skip, so that no bypass is like a block that is not there:
    # what comes down to the innermost skip is compared
    seen = {}
    for name, each in (("cut", small), ("bypassed", without(part, second + middle))):
        last = network_of(each).up_blocks[0].resnets[0]
        last.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        output(each)
    torch.testing.assert_close(seen["cut"], seen["bypassed"])


@pytest.mark.parametrize("cut", ["bk_sdm_base", "bk_sdm_small", "bk_sdm_tiny"])
def test_a_cut_is_a_plain_network_that_diffusers_loads_with_equal_output(cut, tmp_path):
    part = text_unet()
    small = bk_sdm_part(part, cut)
    assert small.parameters() < part.parameters()
    network_of(small).save_pretrained(tmp_path)
    assert "_structure" not in json.loads((tmp_path / "config.json").read_text())
    with quiet():
        plain, report = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    loaded = Part("unet", TextDenoiser(plain).eval(), part.inputs, part.outputs, part.example)
    assert torch.equal(output(loaded), output(small))


def test_coming_up_the_first_and_the_last_pair_stay():
    part = text_unet()
    old, new = (network_of(each).up_blocks[1] for each in (part, bk_sdm_part(part, "bk_sdm_base")))
    assert torch.equal(new.resnets[1].conv1.weight, old.resnets[2].conv1.weight)
    assert torch.equal(new.attentions[0].proj_in.weight, old.attentions[0].proj_in.weight)
    tiny = network_of(bk_sdm_part(part, "bk_sdm_tiny")).up_blocks[0]
    assert torch.equal(tiny.resnets[1].conv1.weight, old.resnets[2].conv1.weight)
    assert torch.equal(tiny.upsamplers[0].conv.weight, old.upsamplers[0].conv.weight)


def test_by_hand_takes_second_pairs_then_the_middle_then_the_innermost():
    order = by_hand(text_unet())
    middle = [n for n, path in enumerate(order) if path.startswith("mid_block")]
    assert {path.split(".")[-1] for path in order[: middle[0]]} == {"1"}
    assert {path.split(".")[1] for path in order[middle[-1] + 1 :][:3]} == {"0", "2"}
    assert order[-1].startswith(("down_blocks.0", "up_blocks.2"))


@pytest.mark.parametrize(
    ("make", "cut", "said"),
    [
        (dit, "bk_sdm_base", "DiTTransformer2DModel"),
        (lambda: text_unet(layers_per_block=1), "bk_sdm_base", "1 layer a block"),
        (lambda: text_unet(mid_block_type=None), "bk_sdm_small", "without a middle block"),
        (lambda: text_unet(block_out_channels=(8, 8, 16)), "bk_sdm_tiny", "8 8 16 channels"),
        (lambda: without(text_unet(), ["mid_block.resnets.0"]), "bk_sdm_small", "cut out of"),
    ],
)
def test_a_network_without_what_the_cut_takes_is_refused(make, cut, said):
    with pytest.raises(BadInput, match=said):
        bk_sdm_part(make(), cut)


def test_a_dit_has_no_order_by_hand():
    with pytest.raises(BadInput, match="U-Net"):
        by_hand(dit())
