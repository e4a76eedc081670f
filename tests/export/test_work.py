"""What one call does, counted against sums on paper."""

import torch

from fewstep.export.work import count
from fewstep.model import Model, load
from fewstep.model.load import sketch
from fewstep.prune.flops import multiplications
from fewstep.runtime import DiscreteVP

LINEAR = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)


class Few(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inward = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.mixed = torch.nn.Linear(8, 8)
        self.outward = torch.nn.Conv2d(8, 3, 1)

    def forward(self, sample, timestep):
        x = torch.nn.functional.silu(self.inward(sample))
        x = self.mixed(x.movedim(1, -1)).movedim(-1, 1)
        return self.outward(x)


def part_of(module, shape=(3, 4, 4)):
    model = Model.from_module(module, sample_shape=shape, process=LINEAR)
    return model.parts[model.denoiser]


def test_products_values_and_weights_are_those_on_paper():
    work = count(part_of(Few()))
    layers = {layer.name.rpartition(".")[2]: layer for layer in work.layers}
    assert layers["inward"].operations == 2 * 8 * 3 * 9 * 16
    assert (layers["inward"].inputs, layers["inward"].outputs, layers["inward"].taps) == (48, 128, 9)
    assert layers["mixed"].operations == 2 * 8 * 8 * 16
    assert work.operations("convolution") == 2 * 16 * (8 * 27 + 8 * 3)
    assert work.moved == 2 * 128  # the silu reads and writes 8 channels of 4 x 4
    assert work.attention == 0
    assert work.weights == sum(t.numel() for t in Few().parameters())
    assert work.other_weights == 8 + 8 + 3


def test_the_peak_counts_what_lives_together():
    work = count(part_of(Few()))
    # 8 channels of 16 pixels in float32 are 512 bytes: what a layer reads and what it writes
    assert 2 * 512 <= work.peak <= 4 * 512


def test_a_layer_used_twice_does_twice_the_work():
    class Twice(Few):
        def forward(self, sample, timestep):
            return super().forward(super().forward(sample, timestep), timestep)

    once, twice = count(part_of(Few())), count(part_of(Twice()))
    assert twice.operations("convolution") == 2 * once.operations("convolution")
    assert twice.weights == once.weights
    assert {layer.calls for layer in twice.layers} == {2}


def test_explicit_attention_is_no_layer():
    class Attends(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, sample, timestep):
            flat = sample.flatten(2)
            scores = torch.softmax(flat.transpose(1, 2) @ flat, -1)
            return (flat @ scores).reshape(sample.shape) * self.weight

    work = count(part_of(Attends()))
    assert work.attention == 2 * (2 * 16 * 16 * 3)
    assert work.layers == ()


def test_a_sketch_counts_as_the_model_does(tiny_sd):
    for part, drawn in zip(load(tiny_sd), sketch(tiny_sd), strict=True):
        assert count(part) == count(drawn)
        in_layers = 2 * multiplications(part)
        counted = count(part)
        ours = counted.operations("convolution") + counted.operations("linear")
        # an Attention of diffusers is counted there by its layer, in CLIP by neither
        assert ours <= in_layers * 1.0001
        assert ours + counted.attention >= in_layers * 0.9999
