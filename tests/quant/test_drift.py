"""What rounding adds on average is found and taken off again; what the sample does not know is left alone."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model.model import Example, Part  # noqa: E402
from fewstep.model.quantized import Activations, Layer, Quantized  # noqa: E402
from fewstep.model.trajectories import run_part  # noqa: E402
from fewstep.quant.drift import correct_biases, measure_drift, shrunk, with_drift  # noqa: E402
from fewstep.quant.simulate import simulated  # noqa: E402
from fewstep.quant.weights import nearest  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.manifest import TensorSpec  # noqa: E402

from .work import result  # noqa: E402

CHANNELS = 4


class Small(torch.nn.Module):
    """Three convolutions with something between them that has no mean of its own; t shifts what goes in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(CHANNELS, 16, 3, padding=1)
        self.second = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.last = torch.nn.Conv2d(16, CHANNELS, 1)

    def forward(self, sample, timestep):
        x = self.first(sample + timestep.reshape(-1, 1, 1, 1) / 1000)
        x = self.second(torch.nn.functional.silu(x))
        return self.last(torch.nn.functional.silu(x))


@pytest.fixture(scope="module")
def part():
    axes = ("batch", CHANNELS, 8, 8)
    inputs = (TensorSpec("sample", "float32", axes), TensorSpec("timestep", "float32", ("batch",)))
    outputs = (TensorSpec("out", "float32", axes),)
    return Part("unet", Small().eval(), inputs, outputs, Example({"batch": (2,)}))


@pytest.fixture(scope="module")
def rounded(part):
    """3 bits of weights, 4 of inputs: errors that cannot be missed."""
    layers = {}
    for name, top in (("first", 3.5), ("second", 2.0), ("last", 2.0)):
        weights = nearest(dict(part.module.named_modules())[name].weight.detach().numpy(), 3)
        layers[name] = Layer(weights, Activations(2 * top / 15, 8, 4))
    return Quantized(layers)


def calls(seed, count=6, rows=8, times=(900, 500, 100)):
    rng = np.random.default_rng(seed)
    return [
        {
            "sample": rng.standard_normal((rows, CHANNELS, 8, 8)).astype(np.float32),
            "timestep": np.full(rows, times[i % len(times)], np.float32),
        }
        for i in range(count)
    ]


def mean_error(part, quantized, batches):
    """[batches, channels]"""
    found = []
    for batch in batches:
        right = run_part(part, batch)["out"]
        with simulated(part, quantized):
            found.append((run_part(part, batch)["out"] - right).mean(axis=(0, 2, 3)))
    return np.stack(found)


def test_a_mean_that_all_samples_agree_on_is_kept_whole():
    samples = np.tile([1.0, -2.0, 3.0, 0.5], (5, 1))
    np.testing.assert_allclose(shrunk(samples), samples[0], rtol=1e-12)


def test_nothing_is_known_from_one_sample():
    assert not shrunk(np.ones((1, 4))).any()


def test_shrinking_is_the_positive_part_of_james_and_stein():
    samples = np.array([[2.0, 0.0, 1.0, 1.0], [0.0, 2.0, 1.0, 3.0]])
    mean = np.array([1.0, 1.0, 1.0, 2.0])
    noise = (2 + 2 + 0 + 2) / 2  # variances over n
    np.testing.assert_allclose(shrunk(samples), mean * (1 - 2 / 4 * noise / 7), rtol=1e-12)
    assert not shrunk(samples * 0.1 + np.array([[5.0], [-5.0]])).any()


def test_shrunk_means_are_nearer_to_the_truth_than_means_over_many_trials():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((500, 4)) * 0.1
    samples = truth[:, None] + rng.standard_normal((500, 8, 4)) * 0.5
    plain = np.square(samples.mean(axis=1) - truth).sum()
    better = sum(np.square(shrunk(s) - t).sum() for s, t in zip(samples, truth))
    assert better < 0.75 * plain


def test_corrected_biases_bring_the_mean_error_down_on_samples_never_seen(part, rounded):
    bias = part.module.last.bias.detach().numpy() + np.array([0.3, -0.2, 0.1, 0.05], np.float32)
    off = Quantized({**rounded.layers, "last": replace(rounded.layers["last"], bias=bias)})
    fixed = result(correct_biases(part, off, calls(0)))
    fresh = calls(1)
    before, after = (np.square(mean_error(part, q, fresh).mean(axis=0)).sum() for q in (off, fixed))
    assert after < 0.05 * before


def test_one_layer_alone_is_corrected_to_the_mean_of_its_float_output(part, rounded):
    only = Quantized({"last": rounded.layers["last"]})
    batch = calls(2, count=1)
    fixed = result(correct_biases(part, only, batch * 2))
    np.testing.assert_allclose(mean_error(part, fixed, batch), 0, atol=1e-6)


def test_in_order_every_layer_sees_what_is_corrected_before_it(part, rounded):
    batch = calls(3, count=1) * 2
    in_order, at_once = (
        result(correct_biases(part, rounded, batch, in_order=flag)) for flag in (True, False)
    )
    assert np.abs(mean_error(part, in_order, batch)).max() < 1e-5
    assert np.abs(mean_error(part, at_once, batch)).max() > 1e-4
    np.testing.assert_array_equal(in_order.layers["first"].bias, at_once.layers["first"].bias)


def test_biases_that_help_on_some_calls_and_harm_on_others_are_left_alone(part, rounded):
    """The calls that are measured and the one that judges have opposite errors."""
    bias = part.module.last.bias.detach().numpy()
    exact = Layer(nearest(part.module.last.weight.detach().numpy(), 8), bias=bias)
    wide = replace(exact, input=Activations(0.01, 0, 8))  # what lies below 0 or above 2.55 is lost
    batches = calls(0, count=4)
    for number, batch in enumerate(batches):
        batch["sample"] += 9.0 if number < 3 else -9.0
    quantized = Quantized({"last": wide})
    assert result(correct_biases(part, quantized, batches)) is quantized
    assert result(correct_biases(part, quantized, batches[:3])).layers["last"] is not wide


def test_layers_without_a_bias_get_none():
    rows = ("batch", 6)
    module = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False)).eval()
    bare = Part(
        "text", module, (TensorSpec("x", "float32", rows),), (TensorSpec("y", "float32", rows),), Example({})
    )
    quantized = Quantized({"0": Layer(nearest(module[0].weight.detach().numpy(), 3))})
    x = {"x": np.ones((4, 6), np.float32)}
    assert result(correct_biases(bare, quantized, [x, x])).layers["0"].bias is None


def test_drift_is_the_offset_that_was_put_there(part):
    offset = np.array([0.3, -0.2, 0.1, 0.05], np.float32)
    weights = nearest(part.module.last.weight.detach().numpy(), 8)
    bias = part.module.last.bias.detach().numpy() + offset
    shifted = Quantized({"last": Layer(weights, bias=bias)})
    times, means = result(measure_drift(part, shifted, calls(4)))
    assert times.tolist() == [100, 500, 900]
    np.testing.assert_allclose(means, np.tile(offset, (3, 1)), atol=2e-3)


def test_drift_taken_off_lowers_the_error_on_samples_never_seen(part, rounded):
    drifting = with_drift(rounded, result(measure_drift(part, rounded, calls(5, count=9))))
    fresh = calls(6, count=9)
    before, after = (np.square(mean_error(part, q, fresh)).sum() for q in (rounded, drifting))
    assert after < 0.05 * before
    again = result(measure_drift(part, drifting, calls(5, count=9)))
    np.testing.assert_array_equal(again[1], drifting.drift[1])


def test_under_guidance_drift_is_that_of_the_guided_output(part, rounded):
    scale = 3.0
    batches = calls(7, count=3)
    bias = part.module.last.bias.detach().numpy() + np.array([0.3, -0.2, 0.1, 0.05], np.float32)
    rounded = Quantized({**rounded.layers, "last": replace(rounded.layers["last"], bias=bias)})
    _, means = result(measure_drift(part, rounded, batches * 2, guidance=scale))
    for batch, mean in zip(sorted(batches, key=lambda b: b["timestep"][0]), means, strict=True):
        right = run_part(part, batch)["out"]
        with simulated(part, rounded):
            error = (run_part(part, batch)["out"] - right).mean(axis=(2, 3))
        guided = (1 - scale) * error[:4] + scale * error[4:]
        np.testing.assert_allclose(mean, shrunk(np.concatenate([guided, guided])), rtol=1e-4, atol=1e-6)


def test_an_error_without_a_mean_leaves_no_drift():
    """Halves that contradict each other say that there is nothing to take off."""

    class Loud(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
            torch.nn.init.eye_(self.layer.weight.data[:, :, 0, 0])

        def forward(self, sample, timestep):
            return self.layer(sample)

    axes = ("batch", CHANNELS, 2, 2)
    inputs = (TensorSpec("sample", "float32", axes), TensorSpec("timestep", "float32", ("batch",)))
    part = Part(
        "unet", Loud().eval(), inputs, (TensorSpec("out", "float32", axes),), Example({"batch": (2,)})
    )
    quantized = Quantized(
        {"layer": Layer(nearest(part.module.layer.weight.detach().numpy(), 8), Activations(0.5, 8, 4))}
    )
    flips = np.array([0.2, -0.2, 0.2, -0.2], np.float32)  # rounds to 0: the error is its opposite
    sample = np.tile(flips[:, None, None, None], (1, CHANNELS, 2, 2))
    batch = {"sample": np.concatenate([sample, -sample]), "timestep": np.full(8, 500, np.float32)}
    drift = result(measure_drift(part, quantized, [batch]))
    assert with_drift(quantized, drift).drift is None


def test_drift_needs_calls_with_a_timestep(part, rounded):
    with pytest.raises(BadInput, match="timestep"):
        result(measure_drift(part, rounded, []))


def test_an_output_that_is_not_finite_names_its_layer(part, rounded):
    batch = calls(8, count=1)[0]
    batch["sample"][0, 0, 0, 0] = np.nan
    with pytest.raises(BadInput, match="first"):
        result(correct_biases(part, rounded, [batch]))
