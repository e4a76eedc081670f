"""Error-compensated rounding: the moments of layers' inputs, and what is gained from them."""

import numpy as np
import pytest
import torch

from fewstep.model.model import Example, Part
from fewstep.model.quantized import Activations, Layer, Quantized
from fewstep.quant.rounding import gptq, moments, moments_shape, output_error
from fewstep.quant.simulate import simulated
from fewstep.quant.weights import codes_on, nearest, steps_of
from fewstep.runtime.errors import BadInput
from fewstep.runtime.manifest import TensorSpec


def part_of(module, shape):
    spec = TensorSpec("x", "float32", shape)
    return Part("net", module.eval(), (spec,), (TensorSpec("y", "float32", shape),), Example({}))


def correlated(n, seed=0):
    """Moments of inputs with a common component and a falling spectrum, as activations have them."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n, n)) * np.geomspace(1, 0.05, n)
    mix[:, 0] += 1
    return (mix @ mix.T).astype(np.float32)[None, None]


def by_inverse(w, grid, h, damping):
    """GPTQ as the paper writes it (algorithm 1): Cholesky of the inverse, the errors pushed onto later columns."""
    n = len(h)
    order = np.argsort(-h.diagonal(), kind="stable")
    h = h[np.ix_(order, order)].astype(np.float64)
    h += damping * h.diagonal().mean() * np.eye(n)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    step = np.repeat(steps_of(grid), n // steps_of(grid).shape[1], axis=1)[:, order]
    w = w[:, order].astype(np.float64)
    codes = np.zeros(w.shape)
    for j in range(n):
        codes[:, j] = np.clip(np.rint(w[:, j] / step[:, j]), -8, 7)
        off = (w[:, j] - codes[:, j] * step[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(off, upper[j, j:])
    back = np.empty(w.shape, np.int8)
    back[:, order] = codes
    return back


def test_the_feedback_form_gives_the_codes_of_the_paper():
    w = np.random.default_rng(1).standard_normal((16, 300)).astype(np.float32)
    h = correlated(300)
    grid = nearest(w, 4, group=60)
    codes = gptq(w, grid, h).codes
    # a tie broken otherwise in float32 moves all later columns of its row
    same = (codes == by_inverse(w, grid, h[0, 0], 0.01)).all(axis=1)
    assert same.mean() > 0.8


@pytest.mark.parametrize(
    "form",
    [
        {"bits": 3},
        {"bits": 4, "group": 16},
        {"bits": 4, "group": 16, "symmetric": False},
        {"bits": 4, "group": 16, "symmetric": False, "multiplier": True},
        {"bits": 8},
        {"bits": 8, "symmetric": False},
    ],
    ids=str,
)
def test_correlated_inputs_halve_the_output_error_and_the_grid_stays(form):
    w = np.random.default_rng(2).standard_normal((24, 96)).astype(np.float32)
    h = correlated(96)
    plain = nearest(w, **form)
    found = gptq(w, plain, h)
    assert output_error(w, found, h) < 0.5 * output_error(w, plain, h)
    assert found.scale is plain.scale
    assert found.zero is plain.zero
    assert np.abs(found.integers().astype(int)).max() <= (
        127 if form.get("symmetric", True) or form["bits"] < 8 else 255
    )


def test_white_inputs_leave_nothing_to_compensate():
    w = np.random.default_rng(3).standard_normal((24, 96)).astype(np.float32)
    plain = nearest(w, 4, group=32)
    diagonal = np.diag(np.random.default_rng(4).uniform(0.1, 10, 96)).astype(np.float32)[None, None]
    np.testing.assert_array_equal(gptq(w, plain, diagonal).codes, codes_on(w, plain))


def test_the_output_error_is_that_of_the_outputs():
    rng = np.random.default_rng(5)
    w, x = rng.standard_normal((8, 20)).astype(np.float32), rng.standard_normal((500, 20)).astype(np.float32)
    plain = nearest(w, 3)
    direct = np.mean(np.sum((x @ (w - plain.floats()).T) ** 2, axis=1))
    assert output_error(w, plain, (x.T @ x / 500)[None, None]) == pytest.approx(direct, rel=1e-4)


def test_inputs_that_never_come_leave_their_weights_at_the_nearest():
    w = np.random.default_rng(6).standard_normal((4, 10)).astype(np.float32)
    plain = nearest(w, 4)
    np.testing.assert_array_equal(gptq(w, plain, np.zeros((1, 1, 10, 10), np.float32)).codes, plain.codes)
    dead = correlated(10)
    dead[..., 3, :] = dead[..., :, 3] = 0
    np.testing.assert_array_equal(gptq(w, plain, dead).codes[:, 3], plain.codes[:, 3])


CONVOLUTIONS = [
    torch.nn.Conv2d(4, 6, 3, padding=1),
    torch.nn.Conv2d(4, 6, 3, stride=2, padding=(2, 1), bias=False),
    torch.nn.Conv2d(4, 6, (3, 2), dilation=2),
    torch.nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    torch.nn.Conv2d(4, 6, 3, padding=1, groups=2),
    torch.nn.Conv2d(4, 4, 3, groups=4),
    torch.nn.Conv2d(4, 6, 1),
    torch.nn.Conv1d(4, 6, 5, padding=2),
    torch.nn.Linear(9, 6),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_moments_are_those_of_the_rows_a_layer_multiplies(layer):
    rng = np.random.default_rng(7)
    shape = (2, 4, 8) if isinstance(layer, torch.nn.Conv1d) else (2, 4, 9, 9)
    batches = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(3)]
    part = part_of(torch.nn.Sequential(layer), shape)
    found = moments(part, batches, ["0"], rows=10**6)["0"]
    assert found.shape == moments_shape(layer)
    # a row of weights times its input rows gives the output, so their mean squares agree
    w = layer.weight.detach().numpy().reshape(len(layer.weight), -1)
    groups = getattr(layer, "groups", 1)
    w = w.reshape(groups, -1, w.shape[1])
    expected = np.einsum("goi,gij,goj->go", w, found[:, 0], w).reshape(-1)
    with torch.no_grad():
        bias = 0 if layer.bias is None else layer.bias
        outputs = [layer(torch.from_numpy(batch["x"])) for batch in batches]
        outputs = [out if isinstance(layer, torch.nn.Linear) else out.movedim(1, -1) for out in outputs]
        squares = torch.cat([((out - bias) ** 2).reshape(-1, len(layer.weight)) for out in outputs])
    np.testing.assert_allclose(expected, squares.mean(dim=0).numpy(), rtol=1e-4)


def test_every_group_of_a_convolution_is_compensated_by_its_own_inputs():
    rng = np.random.default_rng(8)
    w = rng.standard_normal((8, 4, 3, 3)).astype(np.float32)
    h = np.concatenate([correlated(36, 0), correlated(36, 1)])
    plain = nearest(w, 4)
    found = gptq(w, plain, h)
    for half in (0, 1):
        rows = slice(4 * half, 4 * half + 4)
        alone = gptq(w[rows], nearest(w[rows], 4), h[half : half + 1])
        np.testing.assert_array_equal(found.codes[rows], alone.codes)


def test_wide_rows_are_compensated_in_blocks_of_whole_channels():
    layer = torch.nn.Conv2d(12, 5, 3, padding=1)
    assert moments_shape(layer, widest=60) == (1, 2, 54, 54)
    assert moments_shape(layer, widest=1) == (1, 12, 9, 9)
    x = np.random.default_rng(9).standard_normal((4, 12, 8, 8)).astype(np.float32) + 0.7
    part = part_of(torch.nn.Sequential(layer), x.shape)
    w = layer.weight.detach().numpy()
    whole = moments(part, [{"x": x}], ["0"])["0"]
    blocks = moments(part, [{"x": x}], ["0"], widest=60)["0"]
    np.testing.assert_allclose(blocks[0, 1], whole[0, 0, 54:, 54:], rtol=1e-5, atol=1e-5)
    plain = nearest(w, 4)
    error = [
        output_error(w, weights, whole) for weights in (gptq(w, plain, whole), gptq(w, plain, blocks), plain)
    ]
    assert error[0] < error[1] < error[2]


def test_few_rows_drawn_at_random_estimate_the_moments_of_all():
    layer = torch.nn.Conv2d(3, 4, 3, padding=1)
    rng = np.random.default_rng(10)
    batches = [{"x": rng.standard_normal((4, 3, 16, 16)).astype(np.float32) + 1} for _ in range(4)]
    part = part_of(torch.nn.Sequential(layer), (4, 3, 16, 16))
    every, some = (moments(part, batches, ["0"], rows=rows)["0"] for rows in (10**6, 40))
    assert np.linalg.norm(every - some) < 0.15 * np.linalg.norm(every)
    again = moments(part, batches, ["0"], rows=40)["0"]
    np.testing.assert_array_equal(some, again)


def test_inside_a_simulation_moments_see_what_the_quantized_layers_pass_on():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    part = part_of(module, (16, 5))
    x = np.random.default_rng(11).standard_normal((16, 5)).astype(np.float32)
    smooth = np.linspace(0.5, 2, 7).astype(np.float32)
    first = Layer(nearest(module[0].weight.detach().numpy(), 2))
    second = Layer(nearest(module[1].weight.detach().numpy() * smooth, 8), Activations(0.25, 128), smooth)
    with simulated(part, Quantized({"0": first, "1": second})):
        found = moments(part, [{"x": x}], ["1"])["1"][0, 0]
    hidden = x @ first.weights.floats().T + module[0].bias.detach().numpy()
    fed = np.rint(hidden / smooth / 0.25) * 0.25
    np.testing.assert_allclose(found, fed.T @ fed / 16, rtol=1e-4, atol=1e-5)


def test_what_calibration_cannot_tell_is_refused_by_name():
    module = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 3), "idle": torch.nn.Linear(3, 3)})
    module.forward = lambda x: module["used"](x)
    part = part_of(module, (2, 3))
    x = np.ones((2, 3), np.float32)
    with pytest.raises(BadInput, match="net.idle never ran"):
        moments(part, [{"x": x}], ["used", "idle"])
    with pytest.raises(BadInput, match="net.used is fed what is not finite"):
        moments(part, [{"x": x * np.nan}], ["used"])
    with pytest.raises(BadInput, match="no batches"):
        moments(part, [], ["used"])
