"""Cutting what does nothing changes nothing; what is left has the right shapes."""

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.prune.width_groups import KINDS, cut, find_groups, rows  # noqa: E402


def noisy(network, seed=0):
    """The network with weights drawn anew: a fresh one has zeros that would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.parameters():
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator) + (tensor.ndim == 1))
    return network.eval()


def conditional_unet():
    from diffusers import UNet2DConditionModel

    return noisy(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    )


def scale_shift_unet():
    from diffusers import UNet2DModel

    return noisy(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
        )
    )


def dit():
    from diffusers import DiTTransformer2DModel

    return noisy(
        DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
            norm_num_groups=8,
        )
    )


def inputs_of(network):
    generator = torch.Generator().manual_seed(1)
    channels = network.config.in_channels
    sample, t = torch.randn(2, channels, 8, 8, generator=generator), torch.tensor([7, 400])
    if type(network).__name__ == "UNet2DConditionModel":
        return sample, t, torch.randn(2, 5, 12, generator=generator)
    return (
        (sample, t, torch.tensor([1, 9]))
        if type(network).__name__ == "DiTTransformer2DModel"
        else (sample, t)
    )


def output_of(network):
    with torch.no_grad():
        return network(*inputs_of(network), return_dict=False)[0]


NETWORKS = [conditional_unet, scale_shift_unet, dit]


@pytest.mark.parametrize("make", NETWORKS)
def test_units_whose_readers_ignore_them_can_go_without_a_trace(make):
    network = make()
    groups = find_groups(network)
    dead = {group.name: list(range(0, group.count, 2)) for group in groups}
    with torch.no_grad():
        for group in groups:
            reader = network.get_submodule(group.reader)
            reader.weight[:, rows(group, group.slices[-1], dead[group.name])] = 0
    kept = {group.name: [u for u in range(group.count) if u not in dead[group.name]] for group in groups}
    smaller = cut(network, kept)
    before = output_of(network)
    assert float(before.std()) > 0.01
    torch.testing.assert_close(output_of(smaller), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", NETWORKS)
def test_cutting_live_units_changes_the_output(make):
    network = make()
    for kind in {group.kind for group in find_groups(network)}:
        kept = {group.name: range(1, group.count) for group in find_groups(network, [kind])}
        assert float((output_of(cut(network, kept)) - output_of(network)).abs().max()) > 1e-3, kind


@pytest.mark.parametrize("make", NETWORKS)
def test_keeping_every_unit_is_the_identity_on_other_memory(make):
    network = make()
    same = cut(network, {group.name: range(group.count) for group in find_groups(network)})
    assert torch.equal(output_of(same), output_of(network))
    mine = {tensor.data_ptr() for tensor in network.parameters()}
    assert not mine & {tensor.data_ptr() for tensor in same.parameters()}


@pytest.mark.parametrize("make", NETWORKS)
def test_what_goes_is_what_a_unit_is_said_to_weigh(make):
    network = make()
    groups = find_groups(network)
    smaller = cut(network, {group.name: range(group.count - 1) for group in groups})
    count = [sum(tensor.numel() for tensor in each.parameters()) for each in (network, smaller)]
    assert count[0] - count[1] == sum(group.weights for group in groups)


def test_every_kind_of_block_is_found():
    found = {make.__name__: {group.kind for group in find_groups(make())} for make in NETWORKS}
    assert found["conditional_unet"] == set(KINDS)
    assert found["scale_shift_unet"] == {"channels", "heads"}
    assert found["dit"] == {"heads", "ffn"}
    assert find_groups(torch.nn.Sequential(torch.nn.Linear(4, 4))) == []


def test_channels_go_by_whole_groups_of_their_norm():
    network = conditional_unet()
    group = next(g for g in find_groups(network, ["channels"]) if g.width == 32)
    norm = cut(network, {group.name: [0, 3, 5]}).get_submodule(f"{group.name}.norm2")
    assert (group.count, group.size) == (8, 4)
    assert (norm.num_groups, norm.num_channels) == (3, 12)


def test_heads_keep_their_width_and_their_scale():
    network = conditional_unet()
    group = find_groups(network, ["heads"])[0]
    before, after = (
        network.get_submodule(group.name),
        cut(network, {group.name: [1]}).get_submodule(group.name),
    )
    assert after.heads == 1
    assert after.to_q.weight.shape == (group.size, before.to_q.in_features)
    assert after.to_out[0].weight.shape == (before.to_out[0].out_features, group.size)
    assert after.scale == before.scale


def test_value_and_gate_of_a_hidden_unit_go_together():
    network = conditional_unet()
    group = find_groups(network, ["ffn"])[0]
    first = network.get_submodule(group.slices[0].layer).weight
    left = cut(network, {group.name: [2, 5]}).get_submodule(group.slices[0].layer).weight
    assert torch.equal(left, first[[2, 5, group.count + 2, group.count + 5]])


def test_widths_are_multiples_or_what_they_were():
    group = next(g for g in find_groups(conditional_unet(), ["channels"]) if g.width == 32)  # groups of 4
    assert group.widths_kept(8, 0.25) == [8, 6, 4, 2]
    assert group.widths_kept(8, 0.6) == [8, 6]
    assert group.widths_kept(1, 0.0) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert group.widths_kept(64, 0.0) == [8]
