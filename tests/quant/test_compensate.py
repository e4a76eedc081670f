"""A whole part rounded with error compensation: which inputs a layer's moments are of, memory and resuming."""

import numpy as np
import pytest
import torch

from fewstep.model.model import Example, Part
from fewstep.model.quantized import Layer, Quantized
from fewstep.model.trajectories import run_part
from fewstep.quant.compensate import Compensation, compensate, float_weight
from fewstep.quant.simulate import quantizable, simulated
from fewstep.quant.weights import nearest
from fewstep.runtime.errors import BadInput
from fewstep.runtime.manifest import TensorSpec

from .work import finish


class Net(torch.nn.Module):
    """Convolutions, a depthwise one among them, and a Linear that is registered first and runs last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last = torch.nn.Linear(16, 6)
        self.first = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.deep = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.second = torch.nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + self.deep(x))
        return self.last(x.movedim(1, -1))


@pytest.fixture(scope="module")
def part():
    shape = (4, 3, 8, 8)
    inputs, outputs = TensorSpec("x", "float32", shape), TensorSpec("y", "float32", (4, 8, 8, 6))
    return Part("net", Net().eval(), (inputs,), (outputs,), Example({}))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    smooth = np.cumsum(rng.standard_normal((12, 4, 3, 8, 8)), axis=-1) + 1
    return [{"x": x.astype(np.float32)} for x in smooth]


def rounded(part, bits=4):
    return Quantized(
        {n: Layer(nearest(m.weight.detach().numpy(), bits)) for n, m in quantizable(part).items()}
    )


def error(part, quantized, batches):
    right = [run_part(part, batch)["y"] for batch in batches]
    with simulated(part, quantized):
        return float(
            np.mean([(run_part(part, b)["y"] - y) ** 2 for b, y in zip(batches, right, strict=True)])
        )


def test_the_output_is_nearer_to_the_float_network_on_inputs_not_calibrated_on(part, batches, tmp_path):
    start = rounded(part, 3)
    done, seen = finish(compensate(part, start, batches[:8], Compensation(), tmp_path))
    assert error(part, done, batches[8:]) < 0.6 * error(part, start, batches[8:])
    fractions = [event.fraction for event in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_layers_of_a_later_pass_see_the_final_codes_of_those_before(part, batches, tmp_path):
    start = rounded(part, 2)
    done, _ = finish(compensate(part, start, batches, Compensation(passes=4), tmp_path / "a"))
    once, _ = finish(compensate(part, start, batches, Compensation(passes=1), tmp_path / "b"))
    # the first to run sees the same either way, the last does not
    np.testing.assert_array_equal(done.layers["first"].weights.codes, once.layers["first"].weights.codes)
    assert (done.layers["last"].weights.codes != once.layers["last"].weights.codes).any()


def test_less_memory_takes_more_passes(part, batches, tmp_path):
    widest = 4 * 144**2 / 2**20
    _, many = finish(
        compensate(part, rounded(part), batches, Compensation(memory_mib=widest), tmp_path / "a")
    )
    _, once = finish(compensate(part, rounded(part), batches, Compensation(), tmp_path / "b"))
    passes = [sum(event.note.startswith("inputs of") for event in seen) for seen in (many, once)]
    assert passes[1] == 1 < passes[0]


def test_a_job_cut_off_goes_on_with_the_next_pass_and_ends_with_the_same_codes(part, batches, tmp_path):
    start, how = rounded(part), Compensation(passes=4)
    whole, seen = finish(compensate(part, start, batches, how, tmp_path / "whole"))
    cut = compensate(part, start, batches, how, tmp_path / "cut")
    for _ in range(len(seen) // 2):
        next(cut)
    cut.close()
    again, rest = finish(compensate(part, start, batches, how, tmp_path / "cut"))
    assert len(rest) < len(seen)
    for name, layer in whole.layers.items():
        np.testing.assert_array_equal(layer.weights.codes, again.layers[name].weights.codes)
    # other batches, another job
    _, anew = finish(compensate(part, start, batches[:6], how, tmp_path / "cut"))
    assert len(anew) == len(seen)


def test_a_damaged_file_in_the_store_is_made_again(part, batches, tmp_path):
    start = rounded(part)
    whole, _ = finish(compensate(part, start, batches, Compensation(), tmp_path))
    (kept,) = tmp_path.rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-7])
    again, _ = finish(compensate(part, start, batches, Compensation(), tmp_path))
    for name, layer in whole.layers.items():
        np.testing.assert_array_equal(layer.weights.codes, again.layers[name].weights.codes)


def test_a_smoothed_layer_is_rounded_as_its_smoothed_weights(part, batches, tmp_path):
    smooth = np.geomspace(0.25, 4, 16).astype(np.float32)
    modules = quantizable(part)
    layers = {}
    for name, module in modules.items():
        bare = Layer(nearest(module.weight.detach().numpy(), 4))
        if name != "first":
            bare = Layer(bare.weights, smooth=smooth)
            bare = Layer(nearest(float_weight(module, bare), 4), smooth=smooth)
        layers[name] = bare
    start = Quantized(layers)
    # a depthwise kernel has one channel, each its own smoothing
    deep = float_weight(modules["deep"], layers["deep"]) / modules["deep"].weight.detach().numpy()
    np.testing.assert_allclose(deep[:, 0, 0, 0], smooth, rtol=1e-6)
    done, _ = finish(compensate(part, start, batches[:8], Compensation(), tmp_path))
    assert error(part, done, batches[8:]) < 0.7 * error(part, start, batches[8:])


def test_no_batches_are_refused(part, tmp_path):
    with pytest.raises(BadInput, match="no batches"):
        finish(compensate(part, rounded(part), [], Compensation(), tmp_path))
