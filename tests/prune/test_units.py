"""What can be taken out of each kind of network, what that saves, and what is left then."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.model.libraries import quiet  # noqa: E402
from fewstep.model.structure import (  # noqa: E402
    bypassed,
    network_of,
    part_with,
    removable,
    restructure,
    structure_of,
    without,
)
from fewstep.prune.flops import layer_multiplications, multiplications  # noqa: E402
from fewstep.prune.units import find_units  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402

from .networks import dit, output, plain_unet, text_unet  # noqa: E402

KINDS = [text_unet, plain_unet, dit]


def test_multiplications_of_a_convolution_and_of_attention_are_what_paper_says():
    part = text_unet()
    work = layer_multiplications(part)
    assert work["network.conv_in"] == 8 * 8 * 8 * 4 * 9
    block = "network.down_blocks.0.attentions.0.transformer_blocks.0"
    assert work[f"{block}.attn1"] == 2 * 64 * 64 * 8  # queries, keys, channels; scores and their sum
    assert work[f"{block}.attn2"] == 2 * 64 * 5 * 8
    assert work[f"{block}.attn2.to_k"] == 5 * 8 * 8


@pytest.mark.parametrize("make", KINDS)
def test_a_unit_saves_what_it_says(make):
    part = make()
    whole = multiplications(part)
    units = find_units(part)
    assert units
    for unit in units[:: max(1, len(units) // 8)]:
        smaller = without(part, [unit.path])
        assert part.parameters() - smaller.parameters() == unit.parameters, unit
        assert whole - multiplications(smaller) == unit.multiplications, unit


@pytest.mark.parametrize("make", KINDS)
def test_every_unit_can_go_and_changes_the_output(make):
    part = make()
    right = output(part)
    for unit in find_units(part)[1::4]:
        moved = output(without(part, [unit.path]))
        assert moved.shape == right.shape
        assert torch.isfinite(moved).all()
        # labels and times enter through an embedding that nothing but these blocks reads
        assert not torch.equal(moved, right), unit


@pytest.mark.parametrize("make", KINDS)
def test_all_units_can_go_together(make):
    part = make()
    smaller = without(part, list(removable(network_of(part))))
    assert output(smaller).shape == output(part).shape


@pytest.mark.parametrize("make", KINDS)
def test_a_bypass_is_undone_and_the_model_given_never_changes(make):
    part = make()
    right, names = output(part), [name for name, _ in part.module.named_modules()]
    with bypassed(network_of(part), [find_units(part)[0].path]):
        assert not torch.equal(output(part), right)
    without(part, [find_units(part)[0].path])
    assert torch.equal(output(part), right)
    assert [name for name, _ in part.module.named_modules()] == names


@pytest.mark.parametrize("kept", [("down_blocks.0.resnets.0", False), ("down_blocks.1.resnets.0", True)])
def test_a_bypassed_residual_block_is_its_skip_path(kept):
    path, convolves = kept
    network = network_of(text_unet())
    block = network.get_submodule(path)
    assert (block.conv_shortcut is not None) == convolves
    x = torch.randn(2, block.in_channels, 8, 8)
    with torch.no_grad():
        right = block.conv_shortcut(x) if convolves else x
        with bypassed(network, [path]):
            assert torch.equal(network.get_submodule(path)(x, torch.zeros(2, 32)), right)
        # with a branch that adds nothing, the block itself says the same
        block.conv2.weight.zero_(), block.conv2.bias.zero_()
        assert torch.equal(block(x, torch.zeros(2, 32)), right)


@pytest.mark.parametrize("name", ["attn1", "attn2", "ff"])
def test_a_thin_block_is_a_block_whose_branch_adds_nothing(name):
    part = text_unet()
    path = f"mid_block.attentions.0.transformer_blocks.0.{name}"
    thin = output(without(part, [path]))
    last = network_of(part).get_submodule(path)
    last = last.net[2] if name == "ff" else last.to_out[0]
    with torch.no_grad():
        last.weight.zero_(), last.bias.zero_()
    torch.testing.assert_close(output(part), thin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["attn1", "ff"])
@pytest.mark.parametrize("number", [0, 1])
def test_half_a_dit_block_is_a_block_whose_other_half_adds_nothing(name, number):
    part = dit()
    path = f"transformer_blocks.{number}.{name}"
    thin = output(without(part, [path]))
    last = network_of(part).get_submodule(path)
    last = last.net[2] if name == "ff" else last.to_out[0]
    with torch.no_grad():
        last.weight.zero_(), last.bias.zero_()
    torch.testing.assert_close(output(part), thin, rtol=1e-4, atol=1e-5)


def test_both_halves_gone_are_the_block_gone():
    part = dit()
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        halves, whole = without(part, [f"{block}.attn1", f"{block}.ff"]), without(part, [block])
        assert torch.equal(output(halves), output(whole))
        assert halves.parameters() == whole.parameters()


def test_a_cut_network_can_be_cut_again():
    part = text_unet()
    block = "mid_block.attentions.0.transformer_blocks.0"
    twice = without(without(part, [f"{block}.attn1"]), [f"{block}.ff", "mid_block.resnets.0"])
    once = without(part, [f"{block}.attn1", f"{block}.ff", "mid_block.resnets.0"])
    assert torch.equal(output(twice), output(once))
    assert twice.config["_structure"] == once.config["_structure"]


def test_samplers_and_ends_are_no_units():
    for name in removable(network_of(text_unet())):
        assert "samplers" not in name
        assert not name.startswith("conv_")


@pytest.mark.parametrize("make", KINDS)
def test_structure_and_weights_alone_rebuild_a_cut_network(make):
    part = make()
    paths = [unit.path for unit in find_units(part)]
    smaller = without(part, paths[::5])
    network = network_of(smaller)
    state = network.state_dict()
    with quiet():
        again = type(network).from_config(network_of(part).config).eval()
    restructure(again, structure_of(network), {name: tuple(tensor.shape) for name, tensor in state.items()})
    again.load_state_dict(state)
    assert torch.equal(output(part_with(part, again)), output(smaller))


def test_a_path_that_is_no_block_is_refused():
    with pytest.raises(BadInput, match=r"conv_in.*no block"):
        without(text_unet(), ["conv_in"])


def test_a_module_of_ones_own_is_refused():
    with pytest.raises(BadInput, match="Linear"):
        find_units(replace(text_unet(), module=torch.nn.Linear(2, 2)))
