"""The description of a quantized part, and its simulation in torch, against arithmetic by hand."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model.model import Example, Part  # noqa: E402
from fewstep.model.quantized import Activations, Layer, Quantized, Weights  # noqa: E402
from fewstep.quant.simulate import fake_quantize, simulated, weights_of  # noqa: E402
from fewstep.runtime.manifest import TensorSpec  # noqa: E402


def halves(bits=4, **more):
    """Two rows of four, a scale for each half of a row."""
    codes = np.array([[1, -2, 3, -4], [7, -8, 0, 5]], np.int8)
    return Weights(bits, codes, np.array([[0.5, 2.0], [1.0, 0.25]], np.float32), (2, 4), **more)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 2), torch.nn.Linear(2, 2, bias=False)

    def forward(self, sample, timestep):
        return self.second(self.first(sample))


def part(quantized=None):
    torch.manual_seed(0)
    inputs = (TensorSpec("sample", "float32", ("batch", 4)), TensorSpec("timestep", "float32", ("batch",)))
    outputs = (TensorSpec("out_sample", "float32", ("batch", 2)),)
    return Part("net", Net().eval(), inputs, outputs, Example({"batch": (2, 3)}), quantized=quantized)


def run(made, x, t=0.0):
    with torch.no_grad():
        return made.module(torch.tensor(x), torch.full((len(x),), t)).numpy()


X = np.array([[1.0, -0.5, 0.25, 2.0], [0.1, 0.2, 0.3, 0.4]], np.float32)


def test_groups_of_a_row_have_scales_of_their_own():
    weights = halves()
    assert (weights.group, weights.groups) == (2, 2)
    expected = [[0.5, -1.0, 6.0, -8.0], [7.0, -8.0, 0.0, 1.25]]
    np.testing.assert_array_equal(weights.floats(), np.array(expected, np.float32))


def test_codes_that_mean_zero_are_taken_off():
    weights = halves(zero=np.array([[1, 3], [-8, 5]], np.int8))
    expected = [[0.0, -1.5, 0.0, -14.0], [15.0, 0.0, -1.25, 0.0]]
    np.testing.assert_array_equal(weights.floats(), np.array(expected, np.float32))


def test_multipliers_are_whole_numbers_on_one_scale_a_row():
    weights = Weights(
        4,
        halves().codes,
        np.array([[0.5], [0.1]], np.float32),
        (2, 4),
        multiplier=np.array([[1, 4], [3, 2]], np.uint8),
    )
    assert weights.group == 2
    np.testing.assert_array_equal(weights.integers(), [[1, -2, 12, -16], [21, -24, 0, 10]])
    np.testing.assert_array_equal(weights.floats()[0], np.array([0.5, -1, 6, -8], np.float32))


def test_stored_bits_count_scales_zeros_and_multipliers():
    assert halves().stored_bits() == 8 * 4 + 4 * 32
    assert halves(zero=np.zeros((2, 2), np.int8)).stored_bits() == 8 * 4 + 4 * 32 + 4 * 4


def test_inputs_round_half_to_even_and_clip():
    x = torch.tensor([0.25, 0.75, 1.25, -9.0, 99.0])
    np.testing.assert_array_equal(
        fake_quantize(x, Activations(0.5, 2, 4)).numpy(), [0.0, 1.0, 1.0, -1.0, 6.5]
    )


def test_a_simulated_layer_computes_with_integers_and_then_is_as_it_was():
    layer = Layer(halves(), Activations(0.5, 8, 4), bias=np.array([1.0, -1.0], np.float32))
    made = part(Quantized({"first": layer}))
    before = run(made, X)
    with simulated(made):
        inside = run(made, X)
    rounded = np.clip(np.rint(X / 0.5) + 8, 0, 15) * 0.5 - 4
    second = made.module.second.weight.detach().numpy()
    expected = (rounded @ halves().floats().T + np.array([1.0, -1.0])) @ second.T
    np.testing.assert_allclose(inside, expected, rtol=1e-6)
    np.testing.assert_array_equal(run(made, X), before)


def test_smoothing_divides_the_input_before_it_is_rounded():
    smooth = np.array([1.0, 2.0, 4.0, 0.5], np.float32)
    made = part(Quantized({"first": Layer(halves(), None, smooth)}))
    with simulated(made):
        inside = run(made, X)
    first, second = made.module.first, made.module.second.weight.detach().numpy()
    expected = ((X / smooth) @ halves().floats().T + first.bias.detach().numpy()) @ second.T
    np.testing.assert_allclose(inside, expected, rtol=1e-6)


def test_drift_is_taken_off_linearly_in_time():
    drift = (np.array([10.0, 20.0], np.float32), np.array([[0.0, 1.0], [2.0, 3.0]], np.float32))
    made = part(Quantized({}, drift=drift))
    plain = run(made, X)
    for t, mean in ((5.0, [0, 1]), (15.0, [1, 2]), (99.0, [2, 3])):
        with simulated(made):
            np.testing.assert_allclose(plain - run(made, X, t), np.tile(mean, (2, 1)), atol=1e-6)


def test_trained_parameters_replace_the_float_ones():
    made = part(Quantized({}, params={"first.bias": np.array([5.0, 6.0], np.float32)}))
    with simulated(made):
        np.testing.assert_array_equal(made.module.first.bias.detach().numpy(), [5.0, 6.0])
    assert made.module.first.bias.detach().numpy()[0] != 5.0


def test_the_summary_counts_bits_with_scales_and_names_what_was_left():
    made = part(Quantized({"first": Layer(halves(), Activations(0.5, 8))}))
    summary = made.quantized.summary(weights_of(made))
    assert summary["weights_by_bits"] == {"4": 8}
    assert summary["layers_by_input_bits"] == {"8": 1}
    assert summary["left_alone"] == {"second": 4}
    assert summary["bits_per_weight"] == pytest.approx((8 * 4 + 4 * 32 + 4 * 32) / 12, abs=1e-3)


def test_floors_are_those_of_the_fewest_bits():
    eight = Weights(8, halves().codes, halves().scale, (2, 4))
    assert Quantized({"first": Layer(eight, Activations(0.5, 8))}).floors == "int8"
    assert Quantized({"first": Layer(halves())}).floors == "int4"
    assert Quantized({"first": Layer(eight, Activations(0.5, 8, 4))}).floors == "int4"
