"""Trained integers are the ones simulated, gradients are the papers', and a job that was killed ends the same."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model.model import Example, Part  # noqa: E402
from fewstep.model.quantized import Activations, Layer, Quantized, Weights  # noqa: E402
from fewstep.model.trajectories import run_part  # noqa: E402
from fewstep.quant.finetune import QUEST, Finetune, finetune  # noqa: E402
from fewstep.quant.simulate import simulated  # noqa: E402
from fewstep.quant.straight import Trainable  # noqa: E402
from fewstep.quant.weights import nearest  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.manifest import TensorSpec  # noqa: E402

from .work import finish  # noqa: E402

CHANNELS = 4


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(CHANNELS, 16, 3, padding=1)
        self.time_emb_proj = torch.nn.Linear(1, 16)
        self.norm = torch.nn.GroupNorm(4, 16)
        self.inner = torch.nn.Linear(16, 32, bias=False)
        self.out = torch.nn.Linear(32, CHANNELS)

    def forward(self, sample, timestep):
        x = self.conv(sample) + self.time_emb_proj(timestep[:, None] / 1000)[:, :, None, None]
        x = torch.nn.functional.silu(self.norm(x)).permute(0, 2, 3, 1)
        return self.out(torch.nn.functional.silu(self.inner(x))).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def part():
    axes = ("batch", CHANNELS, 4, 4)
    inputs = (TensorSpec("sample", "float32", axes), TensorSpec("timestep", "float32", ("batch",)))
    return Part(
        "unet", Small().eval(), inputs, (TensorSpec("out", "float32", axes),), Example({"batch": (2,)})
    )


@pytest.fixture(scope="module")
def rounded(part):
    """3-bit weights in every form there is: groups with multipliers, a zero point, smoothing, a bias of its own."""
    module = part.module
    weight = {name: m.weight.detach().numpy() for name, m in module.named_modules() if hasattr(m, "weight")}
    smooth = np.array([0.5, 2, 1, 4], np.float32)
    smoothed = weight["conv"] * smooth[:, None, None]
    return Quantized(
        {
            "conv": Layer(nearest(smoothed, 3, symmetric=False), Activations(0.4, 8, 4), smooth=smooth),
            "time_emb_proj": Layer(nearest(weight["time_emb_proj"], 8)),
            "inner": Layer(
                nearest(weight["inner"], 3, group=8, multiplier=True),
                Activations(0.25, 2, 4),
                bias=np.linspace(-0.1, 0.1, 32, dtype=np.float32),
            ),
            "out": Layer(nearest(weight["out"], 3), Activations(0.1, 3, 4)),
        },
        params={"norm.bias": np.full(16, 0.1, np.float32)},
    )


def calls(count=16, rows=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "sample": rng.standard_normal((rows, CHANNELS, 4, 4)).astype(np.float32),
            "timestep": np.full(rows, 100.0 * (i % 8), np.float32),
        }
        for i in range(count)
    ]


def outputs(part, quantized, batch):
    with simulated(part, quantized):
        return run_part(part, batch)["out"]


def error(part, quantized, batches):
    pairs = [(outputs(part, quantized, b), run_part(part, b)["out"]) for b in batches]
    return sum(np.square(got - right).sum() for got, right in pairs)


def every(part):
    return [name for name, _ in part.module.named_modules()]


def equal(a, b):
    for name, layer in a.layers.items():
        other = b.layers[name]
        np.testing.assert_array_equal(layer.weights.codes, other.weights.codes)
        np.testing.assert_array_equal(layer.weights.scale, other.weights.scale)
        assert layer.input == other.input
        if layer.bias is not None:
            np.testing.assert_array_equal(layer.bias, other.bias)
    for name, array in a.params.items():
        np.testing.assert_array_equal(array, b.params[name])


def test_the_beginning_is_what_was_given(part, rounded):
    made = Trainable(part, rounded, every(part)).quantized()
    for name, layer in rounded.layers.items():
        np.testing.assert_array_equal(made.layers[name].weights.codes, layer.weights.codes)
        np.testing.assert_array_equal(made.layers[name].weights.scale, layer.weights.scale)
        assert made.layers[name].input == (
            layer.input and replace(layer.input, scale=np.float32(layer.input.scale))
        )
    np.testing.assert_array_equal(outputs(part, made, calls()[0]), outputs(part, rounded, calls()[0]))


@pytest.mark.parametrize("names", [("conv", "inner", "out", "norm", "time_emb_proj"), ("inner",), ("norm",)])
def test_the_trained_forward_is_the_simulated_one_to_the_last_bit(part, rounded, names):
    student = Trainable(part, rounded, names)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for tensors in student.tensors.values():
            for tensor in tensors.values():
                tensor += torch.from_numpy(rng.normal(0, 0.3, tensor.shape).astype(np.float32))
    student.clamp()
    batch = calls(seed=2)[0]
    np.testing.assert_array_equal(
        student(batch)[0].detach().numpy(), outputs(part, student.quantized(), batch)
    )


def test_the_module_is_as_it_was_after_a_forward(part, rounded):
    before = run_part(part, calls()[0])["out"]
    flags = [p.requires_grad for p in part.module.parameters()]
    Trainable(part, rounded, every(part))(calls()[0])[0].sum().backward()
    np.testing.assert_array_equal(run_part(part, calls()[0])["out"], before)
    assert part.module.inner.bias is None
    assert [p.requires_grad for p in part.module.parameters()] == flags
    assert all(p.grad is None for p in part.module.parameters())


def identity(weight=1.0, bits=8):
    """One weight of 1 and an input at 2 bits: codes 0 to 3 in steps of 0.5, 1 means 0."""
    module = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    module[0].weight.data.fill_(weight)
    spec = (TensorSpec("x", "float32", ("batch", 1)),)
    made = Part("one", module.eval(), spec, (TensorSpec("y", "float32", ("batch", 1)),), Example({}))
    codes, scale = np.full((1, 1), 4, np.int8), np.full((1, 1), 0.25, np.float32)
    return made, Quantized({"0": Layer(Weights(bits, codes, scale, (1, 1)), Activations(0.5, 1, 2))})


@pytest.mark.parametrize(
    ("x", "y", "by_factor", "by_zero"),
    [
        (0.6, 0.5, 0.5 - 0.6, 0.0),  # rounded: scale (round(x / scale) - x / scale)
        (9.0, 1.0, 1.0, -0.5),  # above: scale (top - zero), and -scale
        (-9.0, -0.5, -0.5, -0.5),  # below: scale (0 - zero), and -scale
    ],
)
def test_gradients_of_an_input_s_step_and_zero_are_those_of_lsq(x, y, by_factor, by_zero):
    made, quantized = identity()
    student = Trainable(made, quantized, ["0"])
    got = student({"x": np.array([[x]], np.float32)})[0]
    got.backward()
    assert got.item() == pytest.approx(y)
    assert student.tensors["inputs"]["0"].grad.item() == pytest.approx(by_factor, abs=1e-6)
    assert student.tensors["zeros"]["0"].grad.item() == pytest.approx(by_zero, abs=1e-6)


def test_gradients_of_a_weight_pass_straight_and_its_step_s_is_the_weight():
    made, quantized = identity()
    student = Trainable(made, quantized, ["0"])
    student({"x": np.array([[0.6]], np.float32)})[0].backward()
    assert student.tensors["codes"]["0"].grad.item() == pytest.approx(0.25 * 0.5)  # step times rounded input
    assert student.tensors["steps"]["0"].grad.item() == pytest.approx(1.0 * 0.5)


def test_a_weight_begins_beside_its_code_on_the_side_of_the_float_weight():
    for weight, expected in ((1.05, 4.2), (0.9, 3.6), (2.0, 4.49), (-1.0, 3.51)):
        made, quantized = identity(weight)
        codes = Trainable(made, quantized, ["0"]).tensors["codes"]["0"]
        assert codes.item() == pytest.approx(expected, abs=1e-6)


def test_training_halves_the_error_on_calls_never_seen(part, rounded, tmp_path):
    trained, notes = finish(finetune(part, rounded, calls(), Finetune(steps=150, batch=8), tmp_path))
    fresh = calls(4, seed=9)
    assert error(part, trained, fresh) < 0.5 * error(part, rounded, fresh)
    assert notes[-1].fraction == 1.0
    fractions = [note.fraction for note in notes]
    assert fractions == sorted(fractions)


def test_a_job_cut_off_ends_with_the_same_bits(part, rounded, tmp_path):
    how = Finetune(steps=30, batch=8, calls=2, stages=("time_emb", ""), save_every=7)
    whole, _ = finish(finetune(part, rounded, calls(), how, tmp_path / "whole"))
    for stop in (1, 3, 5):
        running = finetune(part, rounded, calls(), how, tmp_path / "cut")
        for _ in range(stop):
            next(running)
        del running  # nothing it would do at its end reaches the disk
    again, _ = finish(finetune(part, rounded, calls(), how, tmp_path / "cut"))
    equal(whole, again)


def test_other_settings_do_not_go_on_with_a_checkpoint(part, rounded, tmp_path):
    finish(finetune(part, rounded, calls(), Finetune(steps=12, batch=4), tmp_path))
    finish(finetune(part, rounded, calls(), Finetune(steps=12, batch=4, seed=1), tmp_path))
    finish(finetune(part, rounded, calls(seed=3), Finetune(steps=12, batch=4), tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_stage_trains_its_layers_alone(part, rounded, tmp_path):
    trained, _ = finish(
        finetune(part, rounded, calls(), Finetune(steps=60, batch=8, stages=("inner",), rate=0.05), tmp_path)
    )
    assert (trained.layers["inner"].weights.codes != rounded.layers["inner"].weights.codes).any()
    for name in ("conv", "out", "time_emb_proj"):
        assert trained.layers[name] is rounded.layers[name]
    assert trained.params.keys() == {"norm.bias"}


def test_what_did_not_help_is_not_taken(part, rounded, tmp_path):
    how = Finetune(steps=3, batch=4, rate=30.0, step_rate=3.0)
    kept, notes = finish(finetune(part, rounded, calls(), how, tmp_path))
    assert "after" in notes[-1].note
    np.testing.assert_array_equal(outputs(part, kept, calls()[0]), outputs(part, rounded, calls()[0]))


def test_layers_outputs_can_be_part_of_the_loss(part, rounded, tmp_path):
    def inner(quantized):
        seen = []
        hook = part.module.inner.register_forward_hook(lambda *a: seen.append(a[2].numpy()))
        run_part(part, fresh)
        with simulated(part, quantized):
            run_part(part, fresh)
        hook.remove()
        return np.square(seen[0] - seen[1]).mean()

    fresh = calls(1, seed=9)[0]
    how = Finetune(steps=100, batch=8)
    alone, _ = finish(finetune(part, rounded, calls(), how, tmp_path))
    beside, _ = finish(finetune(part, rounded, calls(), replace(how, layer_loss=1.0), tmp_path))
    assert inner(beside) < inner(alone)


def test_guided_halves_lower_the_error_of_the_guided_output(part, rounded, tmp_path):
    def guided(quantized):
        found = 0.0
        for batch in calls(6, seed=9):
            wrong = outputs(part, quantized, batch) - run_part(part, batch)["out"]
            found += np.square(3 * wrong[2:] - 2 * wrong[:2]).sum()
        return found

    how = Finetune(steps=150, batch=8, guidance=3.0)
    trained, _ = finish(finetune(part, rounded, calls(), how, tmp_path))
    assert guided(trained) < 0.5 * guided(rounded)


def test_divergence_is_an_error_and_the_last_good_state_stays(part, rounded, tmp_path):
    good = Finetune(steps=10, batch=4, save_every=2, float_rate=1e30)
    with pytest.raises(BadInput, match="diverged") as error:
        finish(finetune(part, rounded, calls(), good, tmp_path))
    assert "rates" in error.value.fix
    for path in tmp_path.iterdir():
        state = torch.load(path, weights_only=True)
        assert all(
            bool(torch.isfinite(t).all()) for group in state["tensors"].values() for t in group.values()
        )


def test_calls_that_are_not_finite_are_refused(part, rounded, tmp_path):
    batches = calls()
    batches[3]["sample"][0, 0, 0, 0] = np.inf
    with pytest.raises(BadInput, match="call 3: sample"):
        next(finetune(part, rounded, batches, Finetune(), tmp_path))


def test_a_stage_without_layers_is_refused(part, rounded, tmp_path):
    with pytest.raises(BadInput, match="ff.net.2"):
        finish(finetune(part, rounded, calls(), Finetune(steps=2, stages=QUEST), tmp_path))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch": 0}, {"rate": -1.0}, {"rate": float("nan")}, {"stages": ()}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(BadInput):
        Finetune(**wrong)


def test_an_odd_call_has_no_two_halves(part, rounded, tmp_path):
    with pytest.raises(BadInput, match="3 rows"):
        next(finetune(part, rounded, calls(rows=3), Finetune(steps=2, guidance=3.0), tmp_path))
