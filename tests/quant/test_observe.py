import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model.model import Example, Part  # noqa: E402
from fewstep.quant.grid import codes_of_range, codes_of_values  # noqa: E402
from fewstep.quant.observe import input_codes, observe, predicted_db, step_codes, step_gain_db  # noqa: E402
from fewstep.quant.simulate import fake_quantize  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.manifest import TensorSpec  # noqa: E402

from .work import result  # noqa: E402


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.linear = torch.nn.Linear(4, 2)
        self.unused = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.conv(x).flatten(2).transpose(1, 2))


def part(module=None):
    inputs = (TensorSpec("x", "float32", ("batch", 3, 8, 8)),)
    return Part(
        "net", module or Net().eval(), inputs, (TensorSpec("y", "float32", ("batch", 2)),), Example({})
    )


def seen_of(arrays, steps=None, names=("conv",), net=None, **options):
    batches = [{"x": np.asarray(array, np.float32).reshape(-1, 3, 8, 8)} for array in arrays]
    return result(observe(net or part(), batches, names, steps or [0] * len(batches), **options))


def noise(seed, scale=1.0):
    return np.random.default_rng(seed).standard_normal((4, 3, 8, 8)) * scale


def test_least_and_largest_are_of_all_values_and_by_channel_and_step():
    first, second = noise(0), noise(1, 20.0)
    seen = seen_of([first, second], [0, 3])["conv"]
    both = np.concatenate([first, second]).astype(np.float32)
    assert (seen.low, seen.high) == (both.min(), both.max())
    assert seen.steps == (0, 3)
    np.testing.assert_array_equal(seen.ranges, np.float32([[a.min(), a.max()] for a in (first, second)]))
    np.testing.assert_array_equal(seen.highs, both.max(axis=(0, 2, 3)))
    np.testing.assert_array_equal(seen.peaks, np.abs(both).max(axis=(0, 2, 3)))


def test_a_histogram_keeps_every_count_when_its_range_grows():
    first, second = noise(0), noise(1, 100.0)
    seen = seen_of([first, second], [0, 1])["conv"]
    assert seen.counts.sum(axis=1).tolist() == [first.size, second.size]
    values, counts = seen.histogram(0)
    # equal to the histogram of the wide range from the beginning, but for values on a bin's very edge
    wanted, _ = np.histogram(first.astype(np.float32), len(seen.counts[0]), (-seen.bound, seen.bound))
    assert np.abs(np.cumsum(seen.counts[0]) - np.cumsum(wanted)).max() <= 2
    assert np.average(values**2, weights=counts) == pytest.approx(np.mean(first**2), rel=0.03)


def test_a_linear_layers_channels_are_its_last_axis_and_layers_no_batch_reaches_are_left_out():
    seen = seen_of([noise(0)], names=("linear", "unused"))
    assert list(seen) == ["linear"]
    assert seen["linear"].peaks.shape == (4,)


def test_rows_times_weights_is_the_layers_output():
    net = part()
    x = noise(3)
    seen = seen_of([x, x], names=("conv", "linear"), net=net, rows=40)
    with torch.no_grad():
        middle = net.module.conv(torch.from_numpy(x.astype(np.float32)))
        end = net.module.linear(middle.flatten(2).transpose(1, 2))
    for name, outputs in (
        ("conv", middle.permute(0, 2, 3, 1).reshape(-1, 4)),
        ("linear", end.reshape(-1, 2)),
    ):
        module = getattr(net.module, name)
        rows = seen[name].rows
        assert rows.shape[0] == 40
        got = (
            rows @ module.weight.detach().numpy().reshape(len(module.weight), -1).T
            + module.bias.detach().numpy()
        )
        nearest = np.abs(got[:, None] - outputs.numpy()[None]).max(axis=2).min(axis=1)
        assert nearest.max() < 1e-5


def test_what_is_smoothed_is_seen_divided():
    x = noise(0)
    divisor = np.float32([1, 10, 0.1])
    plain, smooth = seen_of([x])["conv"], seen_of([x], smooth={"conv": divisor})["conv"]
    np.testing.assert_allclose(smooth.peaks, plain.peaks / divisor, rtol=1e-6)


def test_a_large_input_is_sampled_evenly_and_its_extremes_are_exact():
    x = np.random.default_rng(0).standard_normal((2048, 3, 8, 8))  # 393,216 values
    x[1234, 1, 2, 3] = 77.0
    seen = seen_of([x], net=part(torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3))), names=("0",))["0"]
    assert seen.high == 77.0
    assert 1 << 16 <= seen.counts.sum() <= 1 << 18
    values, counts = seen.histogram()
    assert np.average(values**2, weights=counts) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("low", "high"), [(0, 5), (-3, 0), (-0.28, 6), (2, 5), (0, 0)])
def test_zero_is_always_a_code_of_its_own(bits, low, high):
    how = codes_of_range(low, high, bits)
    assert 0 <= how.zero < 2**bits
    assert how.scale > 0
    x = torch.tensor([0.0, low, high])
    rounded = fake_quantize(x, how)
    assert rounded[0] == 0
    assert (rounded - x).abs().max() <= (how.scale * 1.001 if low <= 0 <= high else max(abs(low), abs(high)))


def test_values_on_a_grid_are_coded_without_error():
    grid = np.arange(-100, 156) * 0.02
    how = codes_of_values(grid, 8)
    x = torch.from_numpy(grid.astype(np.float32))
    assert (fake_quantize(x, how) - x).abs().max() < 0.02 / 2


def test_the_search_clips_outliers_where_that_pays_and_never_does_worse_than_the_whole_range():
    x = np.random.default_rng(0).standard_normal((500, 3, 8, 8))
    x[0, 0, 0, 0] = 60.0
    seen = seen_of([x])["conv"]
    whole, found = codes_of_range(seen.low, seen.high, 4), input_codes(seen, 4)
    assert found.scale * (15 - found.zero) < 30
    assert predicted_db(seen, found) > predicted_db(seen, whole) + 1
    eight = input_codes(seen, 8)
    assert predicted_db(seen, eight) > predicted_db(seen, codes_of_range(seen.low, seen.high, 8)) - 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_the_predicted_noise_is_the_measured_one(bits):
    x = np.maximum(noise(0, 2.0), -0.28)  # a short end and a long one, as SiLU has
    seen = seen_of([x])["conv"]
    how = input_codes(seen, bits)
    t = torch.from_numpy(x.astype(np.float32))
    error = float((fake_quantize(t, how) - t).square().mean())
    measured = 10 * math.log10(float(t.square().mean()) / error)
    assert predicted_db(seen, how) == pytest.approx(measured, abs=0.4)


def test_the_noise_of_a_uniform_input_is_a_twelfth_of_a_square_step():
    x = np.random.default_rng(0).uniform(-1, 1, (64, 3, 8, 8))
    seen = seen_of([x])["conv"]
    # 10 log10 (1/3) / (step^2 / 12) with step = 2 / 255
    assert predicted_db(seen, input_codes(seen, 8)) == pytest.approx(20 * math.log10(255), abs=0.1)


def test_a_step_of_small_inputs_gains_by_a_grid_of_its_own_what_the_ranges_say():
    rng = np.random.default_rng(0)
    large, small = rng.uniform(-8, 8, (8, 3, 8, 8)), rng.uniform(-1, 1, (8, 3, 8, 8))
    seen = seen_of([large, small], [0, 1])["conv"]
    gain = step_gain_db(seen, 8)
    assert gain[1] == pytest.approx(20 * math.log10(8), abs=0.5)
    assert abs(gain[0]) < 0.5
    assert step_codes(seen, 8)[0].scale == pytest.approx(8 * step_codes(seen, 8)[1].scale, rel=0.05)


def test_an_input_of_zeros_has_a_grid():
    seen = seen_of([np.zeros((1, 3, 8, 8))])["conv"]
    assert input_codes(seen, 8).zero == 0
    assert math.isfinite(input_codes(seen, 4).scale)


def test_nan_is_refused_with_the_first_layer_and_the_call():
    bad = noise(1)
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(BadInput, match=r"net: the input of conv holds NaN or infinity at call 3 of the plan"):
        seen_of([noise(0), bad], [0, 2], names=("conv", "linear"))
    net = part()
    net.module.linear.bias.data[0] = torch.inf
    with pytest.raises(BadInput, match=r"net: the output holds NaN or infinity at call 1"):
        seen_of([noise(0)], names=("conv", "linear"), net=net)
    assert not net.module.conv._forward_pre_hooks


def test_bits_there_is_no_grid_for_are_refused():
    seen = seen_of([noise(0)])["conv"]
    with pytest.raises(BadInput, match="inputs of 9 bits; expected 2 to 8"):
        input_codes(seen, 9)
