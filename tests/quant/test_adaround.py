"""Rounding learned by block reconstruction: which blocks there are, what is gained, what a cut-off job keeps."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep.model.model import Example, Part
from fewstep.model.quantized import Activations, Layer, Quantized
from fewstep.model.trajectories import run_part
from fewstep.quant.adaround import AdaRound, reconstruct
from fewstep.quant.blocks import Block, find_blocks, record, run_order
from fewstep.quant.compensate import float_weight
from fewstep.quant.simulate import quantizable, simulated
from fewstep.quant.soft import Soft
from fewstep.quant.weights import nearest
from fewstep.runtime.errors import BadInput
from fewstep.runtime.manifest import TensorSpec

from .work import finish

QUICK = AdaRound(iterations=120, batch=16, rate=0.03)


class Branch(torch.nn.Module):
    """Two layers and a shortcut: a block of a class nobody knows."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x, scale=1.0, *, shift=None):
        x = x if shift is None else x + shift
        return x + scale * self.down(torch.relu(self.up(x)))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(12, 5)  # registered first, runs last
        self.stem = torch.nn.Linear(6, 12)
        self.body = torch.nn.ModuleList([Branch(12), Branch(12)])
        self.shared = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 12))
        self.idle = torch.nn.Linear(3, 3)

    def forward(self, x):
        x = self.stem(x)
        x = self.body[0](x, 0.5, shift=torch.ones_like(x))
        x = self.body[1](x)
        x = self.shared(self.shared(x) / 2)
        return self.head(x)


@pytest.fixture(scope="module")
def part():
    inputs, outputs = TensorSpec("x", "float32", (16, 6)), TensorSpec("y", "float32", (16, 5))
    return Part("net", Net().eval(), (inputs,), (outputs,), Example({}))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((6, 6))
    return [{"x": (rng.standard_normal((16, 6)) @ mix + 0.5).astype(np.float32)} for _ in range(24)]


def rounded(part, bits=3, **form):
    layers = {
        n: Layer(nearest(m.weight.detach().numpy(), bits, **form)) for n, m in quantizable(part).items()
    }
    return Quantized({n: layer for n, layer in layers.items() if n != "idle"})


def error(part, quantized, batches):
    right = [run_part(part, batch)["y"] for batch in batches]
    with simulated(part, quantized):
        return float(
            np.mean([(run_part(part, b)["y"] - y) ** 2 for b, y in zip(batches, right, strict=True)])
        )


def test_blocks_are_modules_that_run_once_in_the_order_in_which_they_run(part, batches):
    names = [name for name in quantizable(part) if name != "idle"]
    assert run_order(part, batches[0], ["head", "idle", "stem"]) == ["stem", "head"]
    # `shared` runs twice and so do its layers: they are in no block
    assert find_blocks(part, batches[0], names) == [
        Block("stem", ("stem",)),
        Block("body.0", ("body.0.up", "body.0.down")),
        Block("body.1", ("body.1.up", "body.1.down")),
        Block("head", ("head",)),
    ]


def test_a_block_of_too_many_layers_is_taken_apart(part, batches, monkeypatch):
    names = ["body.0.up", "body.0.down", "head"]
    monkeypatch.setattr("fewstep.quant.blocks.LAYERS", 1)
    blocks = find_blocks(part, batches[0], names)
    assert blocks == [Block(name, (name,)) for name in names]


def test_a_class_known_to_hold_blocks_is_not_taken_with_what_it_holds(part, batches, monkeypatch):
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.inside = torch.nn.Linear(6, 12), Branch(12)

        def forward(self, x):
            return self.inside(self.before(x))

    network = torch.nn.Sequential(torch.nn.Linear(6, 6), Outer())
    outer = Part("net", network.eval(), part.inputs, part.outputs, Example({}))
    names = ["0", "1.before", "1.inside.up", "1.inside.down"]
    pair = ("1.inside.up", "1.inside.down")
    whole = [Block("0", ("0",)), Block("1", ("1.before", *pair))]
    assert find_blocks(outer, batches[0], names) == whole
    monkeypatch.setattr("fewstep.quant.blocks.KINDS", ("Branch",))
    apart = [Block("0", ("0",)), Block("1.before", ("1.before",)), Block("1.inside", pair)]
    assert find_blocks(outer, batches[0], names) == apart
    monkeypatch.setattr("fewstep.quant.blocks.KINDS", ("Branch", "Outer"))
    assert find_blocks(outer, batches[0], names) == whole


def test_a_recording_holds_all_arguments_row_by_row_and_stops_at_the_block(part, batches):
    found = record(part, batches[:3], "body.0", 100)
    assert found.output.shape == (48, 12)
    assert found.arguments[1] == 0.5
    arguments, named = found.rows(torch.tensor([0, 17, 40]))
    with torch.no_grad():
        torch.testing.assert_close(part.module.body[0](*arguments, **named), found.output[[0, 17, 40]])
    few = record(part, batches[:3], "body.0", 30 * 12 * 4 * 3 / 2**20)
    assert few.output.shape == (30, 12)


@pytest.mark.parametrize(
    "form", [{}, {"group": 6, "symmetric": False}, {"group": 6, "multiplier": True}], ids=str
)
def test_soft_weights_start_between_the_code_and_the_weight_and_end_on_the_code(form):
    weight = np.random.default_rng(2).standard_normal((8, 24)).astype(np.float32)
    layer = Layer(nearest(weight, 4, **form))
    soft = Soft.at(weight, layer)
    np.testing.assert_array_equal(soft.hard(layer).weights.codes, layer.weights.codes)
    step = np.repeat(np.abs(soft.step.numpy()[:, :, 0]), 24 // soft.step.shape[1], axis=1)
    codes = layer.weights.codes
    # the last codes have nothing beyond them
    inside = (np.abs(layer.weights.floats() - weight) < 0.48 * step) & (codes > -8) & (codes < 7)
    start = soft.weight().detach().numpy()
    assert (np.abs(start - weight) < 0.02 * step)[inside].all()
    assert inside.mean() > 0.5
    soft.v.data += 100
    above = soft.hard(layer).weights
    assert above.codes.max() <= 7
    assert ((above.codes - layer.weights.codes) >= 0).all()
    assert ((above.codes - layer.weights.codes) <= 1).all()


def test_the_output_is_nearer_to_the_float_network_on_inputs_not_learned_on(part, batches, tmp_path):
    start = rounded(part)
    done, seen = finish(reconstruct(part, start, batches[:16], QUICK, tmp_path))
    assert error(part, done, batches[16:]) < 0.5 * error(part, start, batches[16:])
    assert not any(p.grad is not None for p in part.module.parameters())
    assert all(p.requires_grad for p in part.module.parameters())
    for name, layer in done.layers.items():
        assert layer.weights.scale is start.layers[name].weights.scale or np.array_equal(
            layer.weights.scale, start.layers[name].weights.scale
        )
    assert "s left" in seen[0].note
    assert [event.fraction for event in seen] == sorted(event.fraction for event in seen)


def test_smoothing_rounded_inputs_and_zero_points_are_learned_with(part, batches, tmp_path):
    modules = quantizable(part)
    smooth = np.geomspace(0.5, 2, 12).astype(np.float32)
    start = rounded(part, 3, group=6, symmetric=False)
    bare = Layer(start.layers["head"].weights, Activations(0.02, 128), smooth)
    weights = nearest(float_weight(modules["head"], bare), 3, group=6, symmetric=False)
    start = replace(start, layers={**start.layers, "head": replace(bare, weights=weights)})
    done, _ = finish(reconstruct(part, start, batches[:16], QUICK, tmp_path))
    assert error(part, done, batches[16:]) < 0.8 * error(part, start, batches[16:])


def test_steps_of_inputs_that_are_far_off_are_learned(part, batches, tmp_path):
    start = rounded(part, 8)
    head = replace(start.layers["head"], input=Activations(0.2, 128))
    start = replace(start, layers={"head": head})
    how = replace(QUICK, iterations=1, input_iterations=200, input_rate=0.01)
    done, _ = finish(reconstruct(part, start, batches[:16], how, tmp_path))
    assert done.layers["head"].input.scale < 0.1
    assert error(part, done, batches[16:]) < 0.7 * error(part, start, batches[16:])


def test_no_block_comes_back_worse_than_it_was(part, batches, tmp_path):
    good, _ = finish(reconstruct(part, rounded(part), batches, QUICK, tmp_path))
    wild = replace(QUICK, iterations=2, rate=100.0)
    done, seen = finish(reconstruct(part, good, batches, wild, tmp_path))
    ends = [event.note for event in seen if " after" in event.note]
    assert len(ends) == 4
    for note in ends:
        before, after = (float(number) for number in re.findall(r"(-?[0-9.]+) dB", note))
        assert after >= before
    kept = [np.array_equal(done.layers[n].weights.codes, good.layers[n].weights.codes) for n in good.layers]
    assert any(kept)


def test_a_job_cut_off_goes_on_with_the_next_block_and_ends_with_the_same_codes(part, batches, tmp_path):
    start, how = rounded(part), replace(QUICK, iterations=60)
    whole, seen = finish(reconstruct(part, start, batches, how, tmp_path / "whole"))
    cut = reconstruct(part, start, batches, how, tmp_path / "cut")
    while "block 3 of 4" not in next(cut).note:
        pass
    cut.close()
    again, rest = finish(reconstruct(part, start, batches, how, tmp_path / "cut"))
    assert not any("block 1 of" in event.note or "block 2 of" in event.note for event in rest)
    for name, layer in whole.layers.items():
        np.testing.assert_array_equal(layer.weights.codes, again.layers[name].weights.codes)
    _, other = finish(reconstruct(part, start, batches, replace(how, iterations=59), tmp_path / "cut"))
    assert len(other) == len(seen)


def test_bad_input_is_refused(part, batches, tmp_path):
    with pytest.raises(BadInput, match="no batches"):
        finish(reconstruct(part, rounded(part), [], QUICK, tmp_path))
    broken = [{"x": batch["x"] * np.nan} for batch in batches[:2]]
    with pytest.raises(BadInput, match="net.stem puts out what is not finite"):
        finish(reconstruct(part, rounded(part), broken, QUICK, tmp_path))
    with pytest.raises(BadInput, match="0 iterations"):
        AdaRound(iterations=0)
