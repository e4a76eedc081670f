"""Ranges for codes of 16 bits."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model.model import Example, Part  # noqa: E402
from fewstep.model.quantized import Quantized  # noqa: E402
from fewstep.model.trajectories import run_part  # noqa: E402
from fewstep.quant import compose  # noqa: E402
from fewstep.quant.ranges import HEADROOM, Ranges, output_ranges  # noqa: E402
from fewstep.quant.scheme import parse_scheme  # noqa: E402
from fewstep.quant.simulate import simulated  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.manifest import TensorSpec  # noqa: E402


def finished(work):
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


@pytest.fixture
def part():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).eval()
    specs = (TensorSpec("x", "float32", (3, 4)),), (TensorSpec("y", "float32", (3, 2)),)
    return Part("small", module, *specs, Example({}))


def batches(count=3):
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((3, 4)).astype(np.float32)} for _ in range(count)]


def test_ranges_span_every_batch(part):
    seen = finished(output_ranges(part, batches(), ["0", "2"]))
    every = np.concatenate([batch["x"] for batch in batches()])
    given = part.module[0](torch.from_numpy(every)).detach().numpy()
    assert seen["0"].input == (every.min(), every.max())
    np.testing.assert_allclose(seen["0"].output, (given.min(), given.max()), rtol=1e-6)


def test_codes_have_headroom_and_an_exact_zero():
    codes, _ = Ranges((-1.0, 3.0), (0.0, 0.0)).codes()
    assert codes.bits == 16
    assert codes.scale * 65535 == pytest.approx(4 * HEADROOM)
    assert (codes.zero + 0.5) * codes.scale > HEADROOM > (codes.zero - 0.5) * codes.scale


def test_a_layer_that_no_batch_reaches_has_no_range(part):
    part.module.unused = torch.nn.Linear(2, 2)
    part.module.forward = lambda x: part.module[2](part.module[1](part.module[0](x)))
    assert "unused" not in finished(output_ranges(part, batches(), ["0", "unused"]))


def test_infinity_names_the_layer(part):
    part.module[2].weight.data[0, 0] = float("inf")
    with pytest.raises(BadInput, match="small: 2 takes or gives NaN or infinity"):
        finished(output_ranges(part, batches(), ["0", "2"]))


def test_16_bits_round_inputs_and_outputs_and_cost_next_to_nothing(part):
    scheme, names = parse_scheme("w8a16"), ["0", "2"]
    inputs = finished(
        compose.round_inputs(part, names, batches(), [0, 0, 0], scheme, {"0"}, smooth=True)
    )  # protected layers too: nothing of it harms
    assert set(inputs.codes) == set(inputs.outputs) == set(names)
    made: Quantized = finished(compose.round_weights(part, dict.fromkeys(names, 8), inputs, group=64))
    assert all(layer.output.bits == 16 for layer in made.layers.values())
    feeds = batches(1)[0]
    with simulated(replace(part, quantized=made), inputs=False):
        right = run_part(part, feeds)["y"]
    with simulated(replace(part, quantized=made)):
        rounded = run_part(part, feeds)["y"]
    error = np.abs(rounded - right).max() / np.abs(right).max()
    assert 0 < error < 1e-3
