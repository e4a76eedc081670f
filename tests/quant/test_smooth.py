import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model import load  # noqa: E402
from fewstep.model.model import Example, Part  # noqa: E402
from fewstep.model.quantized import Layer, Quantized  # noqa: E402
from fewstep.quant.observe import input_codes, observe  # noqa: E402
from fewstep.quant.simulate import simulated  # noqa: E402
from fewstep.quant.smooth import shared_inputs, smoothing, splits, trials  # noqa: E402
from fewstep.quant.weights import nearest  # noqa: E402
from fewstep.runtime.manifest import TensorSpec  # noqa: E402

from .work import result  # noqa: E402


class Skip(torch.nn.Module):
    """A shortcut over a concatenation of two tensors of very different size, whose weights make up for it."""

    def __init__(self, ratio=60.0):
        super().__init__()
        self.shortcut = torch.nn.Conv2d(12, 6, 1)
        self.normed = torch.nn.Conv2d(12, 6, 3, padding=1)
        with torch.no_grad():
            self.shortcut.weight[:, 8:] *= ratio

    def forward(self, small, large):
        x = torch.cat([large, small], dim=1)
        return self.shortcut(x) + self.normed(torch.nn.functional.silu(x))


def part(module):
    names = (("small", 4), ("large", 8))
    inputs = tuple(TensorSpec(name, "float32", ("batch", size, 8, 8)) for name, size in names)
    outputs = (TensorSpec("y", "float32", ("batch", 6, 8, 8)),)
    return Part("net", module.eval(), inputs, outputs, Example({}))


def batch(seed, ratio=60.0):
    rng = np.random.default_rng(seed)
    small, large = (rng.standard_normal((4, size, 8, 8)).astype(np.float32) for size in (4, 8))
    return {"small": small, "large": large * np.float32(ratio)}


def output_db(net, quantized, feeds):
    x = [torch.from_numpy(feeds[spec.name]) for spec in net.inputs]
    with torch.no_grad():
        right = net.module(*x)
        with simulated(net, quantized):
            got = net.module(*x)
    return 10 * math.log10(float(right.square().sum() / (got - right).square().sum()))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_split_of_a_bimodal_concatenation_raises_the_ratio_by_more_than_ten_decibels(bits):
    net = part(Skip())
    net.module.normed.weight.data.zero_()
    net.module.normed.bias.data.zero_()
    batches, steps, names = [batch(0), batch(1)], [0, 0], ["shortcut"]
    halves = splits(net, batches[0])["shortcut"]
    assert halves == (8, 4)
    weight = net.module.shortcut.weight.detach().numpy()
    plain = result(observe(net, batches, names, steps, rows=64))["shortcut"]
    half = [t for t in trials(plain, weight, bits=8, input_bits=bits, halves=halves) if t.kind == "halves"]
    divisor = max(half, key=lambda t: t.db).divisor
    assert set(np.unique(divisor[:8])) != set(np.unique(divisor[8:]))
    assert len(np.unique(divisor)) == 2
    even = result(observe(net, batches, names, steps, smooth={"shortcut": divisor}))["shortcut"]
    before = Layer(nearest(weight, 8), input_codes(plain, bits))
    after = Layer(nearest(weight * divisor[:, None, None], 8), input_codes(even, bits), divisor)
    unseen = batch(2)
    gain = output_db(net, Quantized({"shortcut": after}), unseen) - output_db(
        net, Quantized({"shortcut": before}), unseen
    )
    assert gain > 10


def test_only_layers_fed_directly_by_a_concatenation_are_split():
    assert splits(part(Skip()), batch(0)) == {"shortcut": (8, 4)}


def test_the_shortcuts_of_a_diffusers_unet_are_found_and_the_attentions_that_share_an_input(tiny_sd):
    model = load(tiny_sd)
    unet = model.parts["unet"]
    feeds = unet.example.feeds(unet.inputs, unet.example.default_sizes(), seed=0)
    found = splits(unet, feeds)
    modules = dict(unet.module.named_modules())
    assert found
    assert all(name.endswith("conv_shortcut") and "up_blocks" in name for name in found)
    assert all(sum(sizes) == modules[name].in_channels for name, sizes in found.items())
    together = shared_inputs(unet, feeds)
    assert any([name.rsplit(".", 1)[-1] for name in names] == ["to_q", "to_k", "to_v"] for names in together)
    text = [names for names in together if names[0].endswith("attn2.to_k")]
    assert len(text) == 1
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in text[0])
    assert not any(module._forward_pre_hooks for module in unet.module.modules())


def outliers(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 50, 16)).astype(np.float32)
    x[..., 3] *= 80
    return {"x": x}


def linear(weight_of_outlier):
    module = torch.nn.Linear(16, 32)
    with torch.no_grad():
        module.weight[:, 3] *= weight_of_outlier
    spec = (TensorSpec("x", "float32", ("batch", 50, 16)),)
    return Part("net", torch.nn.Sequential(module), spec, spec, Example({}))


def test_an_outlier_channel_is_smoothed_and_the_layer_still_computes_the_same():
    net = linear(1 / 80)
    seen = result(observe(net, [outliers(0)], ["0"], [0], rows=64))["0"]
    weight = net.module[0].weight.detach().numpy()
    divisor = smoothing(seen, weight, bits=8, input_bits=8)
    assert divisor.shape == (16,)
    assert np.argmax(divisor) == 3
    assert np.exp(np.log(divisor).mean()) == pytest.approx(1, rel=1e-5)
    layer = Layer(nearest(weight * divisor, 8), None, divisor)
    # weights alone rounded: what is left is their noise, 2^-8 of the largest
    assert output_db(net, Quantized({"0": layer}), outliers(1)) > 35


def test_what_is_even_already_is_left_alone():
    rng = np.random.default_rng(0)
    net = linear(1.0)
    feeds = {"x": rng.uniform(-1, 1, (4, 50, 16)).astype(np.float32)}
    seen = result(observe(net, [feeds], ["0"], [0], rows=64))["0"]
    assert smoothing(seen, net.module[0].weight.detach().numpy(), bits=8, input_bits=8) is None


def test_channels_that_carry_nothing_keep_a_finite_divisor():
    net = linear(1 / 80)
    feeds = outliers(0)
    feeds["x"][..., 5] = 0
    net.module[0].weight.data[:, 7] = 0
    seen = result(observe(net, [feeds], ["0"], [0], rows=64))["0"]
    for trial in trials(seen, net.module[0].weight.detach().numpy(), bits=8, input_bits=8)[1:]:
        assert np.isfinite(trial.divisor).all()
        assert (trial.divisor > 0).all()
        assert trial.divisor[5] == trial.divisor[7] == 1


def test_a_depthwise_convolution_is_not_smoothed():
    spec = (TensorSpec("x", "float32", ("batch", 6, 8, 8)),)
    net = Part("net", torch.nn.Sequential(torch.nn.Conv2d(6, 6, 3, groups=6)), spec, spec, Example({}))
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 6, 8, 8)).astype(np.float32)}
    seen = result(observe(net, [feeds], ["0"], [0], rows=16))["0"]
    assert smoothing(seen, net.module[0].weight.detach().numpy(), bits=8, input_bits=8) is None
