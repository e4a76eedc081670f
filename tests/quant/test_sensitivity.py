"""Sensitivity: closed forms where the network is linear, and a job that was cut off ends where it would have."""

import csv
import io
import json

import numpy as np
import pytest
import torch

from fewstep.model.model import Example, Part
from fewstep.model.quantized import Activations
from fewstep.model.trajectories import trajectories
from fewstep.quant.probe import Probe, combined, final_gains, shrinkage
from fewstep.quant.sensitivity import Sensitivity, sensitivity
from fewstep.quant.table import Table, bits_of, decibels, kind_of, split
from fewstep.quant.weights import nearest
from fewstep.runtime.errors import BadInput
from fewstep.runtime.manifest import TensorSpec
from fewstep.runtime.plan import plan
from fewstep.runtime.process import DiscreteVP, RectifiedFlow

from .work import result

WIDTH = 24


def codes_of_range(low, high, bits):
    scale = (high - low) / (2**bits - 1)
    return Activations(scale, round(-low / scale), bits)


def noted(work, notes):
    """The same generator, with what it says kept."""
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            return stop.value
        notes.append(event.note)
        yield event


class Chain(torch.nn.Module):
    """Two linear layers one after the other, and a convolution's worth of nothing else."""

    def __init__(self, rng):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.second = torch.nn.Linear(WIDTH, WIDTH)
        for layer in (self.first, self.second):
            layer.weight = torch.nn.Parameter(torch.from_numpy(rng.normal(size=(WIDTH, WIDTH)).astype("f")))

    def forward(self, sample):
        return self.second(self.first(sample))


class Pictures(torch.nn.Module):
    """A convolution of stride 2 with padding, one in groups, and an embedding, for what local rows must find."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.places = torch.nn.Embedding(5, 8)
        self.conv = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = torch.nn.Conv2d(8, 6, 3, groups=2, dilation=2)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, sample, ids):
        return self.grouped(torch.tanh(self.conv(sample)) + self.places(ids)[:, :, None, None])


def part(module, inputs):
    specs = tuple(TensorSpec(name, dtype, shape) for name, dtype, shape in inputs)
    return Part("net", module.eval(), specs, (TensorSpec("out", "float32", ("batch",)),), Example({}))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def chain(rng):
    return part(Chain(rng), [("sample", "float32", ("batch", WIDTH))])


def batches(rng, count=2, rows=4):
    return [{"sample": rng.normal(size=(rows, WIDTH)).astype(np.float32)} for _ in range(count)]


CODES = {name: {8: codes_of_range(-4, 4, 8), 4: codes_of_range(-4, 4, 4)} for name in ("first", "second")}


def test_the_noise_of_a_linear_network_is_that_of_its_matrices(chain, rng, tmp_path):
    fed = batches(rng)
    t = result(sensitivity(chain, fed, [0, 3], CODES, Sensitivity(mode="exact"), tmp_path))
    assert (t.mode, t.layers, t.steps, t.weights) == ("exact", ("first", "second"), (0, 3), (576, 576))
    first, second = (
        layer.weight.detach().double().numpy() for layer in (chain.module.first, chain.module.second)
    )
    bias1, bias2 = (
        layer.bias.detach().double().numpy() for layer in (chain.module.first, chain.module.second)
    )
    for k, batch in enumerate(fed):
        x = batch["sample"].astype(np.float64)
        right = (x @ first.T + bias1) @ second.T + bias2
        rounded = nearest(first.astype("f"), 4).floats().astype(np.float64)
        error = x @ (rounded - first).T @ second.T
        assert t.nsr[0, 1, k] == pytest.approx(np.sum(error**2) / np.sum(right**2), rel=1e-3)
        coarse = CODES["second"][4]
        hidden = x @ first.T + bias1
        left = (np.clip(np.rint(hidden / coarse.scale) + coarse.zero, 0, 15) - coarse.zero) * coarse.scale
        error = (left - hidden) @ second.T
        assert t.nsr[1, 4, k] == pytest.approx(np.sum(error**2) / np.sum(right**2), rel=1e-3)
    assert t.final == pytest.approx(t.nsr.mean(axis=2))
    assert t.stored_bits("first", "w4a8") == 576 * 4 + WIDTH * 32
    assert t.macs == (576, 576)


def test_errors_of_two_layers_add_in_squares(chain, rng, tmp_path):
    fed = batches(rng, count=1, rows=256)
    how = Sensitivity(mode="exact", samples=256)
    t = result(sensitivity(chain, fed, [0], CODES, how, tmp_path))
    probe = Probe.of(chain, fed, [0], CODES, how)
    with (
        probe.rounded("first", "w4", probe.weights("first", 4)),
        probe.rounded("second", "w4", probe.weights("second", 4)),
    ):
        together = probe.noise()
    assert together == pytest.approx(t.predicted_steps({"first": "w4", "second": "w4"}), rel=0.1)
    both = t.error("first", "w4a8")
    assert both == t.error("first", "w4") + t.error("first", "a8")


def test_the_module_is_as_it_was_afterwards(chain, rng, tmp_path):
    fed = batches(rng)
    before = [p.detach().clone() for p in chain.module.parameters()]
    for mode in ("exact", "local"):
        result(sensitivity(chain, fed, [0, 1], CODES, Sensitivity(mode=mode), tmp_path))
    for old, new in zip(before, chain.module.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.requires_grad
        assert new.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in chain.module.modules())


def test_local_noise_is_exact_noise_where_the_network_is_linear(chain, rng, tmp_path):
    fed = batches(rng, count=1, rows=512)
    exact = Sensitivity(mode="exact", samples=512)
    local = Sensitivity(mode="local", samples=512, rows=512)
    right = result(sensitivity(chain, fed, [0], CODES, exact, tmp_path))
    got = result(sensitivity(chain, fed, [0], CODES, local, tmp_path))
    # the last layer's gain is known but for the spread of v^2; the first's assumes that errors have no direction
    assert 10 * np.log10(got.nsr[1] / right.nsr[1]) == pytest.approx(np.zeros((5, 1)), abs=0.5)
    assert 10 * np.log10(got.nsr[0] / right.nsr[0]) == pytest.approx(np.zeros((5, 1)), abs=1.5)


def test_some_output_channels_stand_for_all(rng, tmp_path):
    wide = part(torch.nn.Sequential(torch.nn.Linear(WIDTH, 600)), [("sample", "float32", ("batch", WIDTH))])
    fed = batches(rng, count=1, rows=64)
    how = {"options": ("w8", "w4"), "mode": "local", "samples": 64}
    every, some = (
        result(sensitivity(wide, fed, [0], {}, Sensitivity(**how, channels=count), tmp_path))
        for count in (600, 100)
    )
    assert 10 * np.log10(some.nsr / every.nsr) == pytest.approx(np.zeros((1, 2, 1)), abs=0.5)
    assert np.array_equal(some.bits, every.bits)


@pytest.mark.parametrize("doubled", [False, True])
def test_local_rows_are_what_convolutions_and_embeddings_see(doubled, rng, tmp_path):
    module = Pictures()
    network = part(module, [("sample", "float32", ("batch", 4, 12, 12)), ("ids", "int64", ("batch",))])
    rows = 32
    fed = [
        {
            "sample": rng.normal(size=(rows, 4, 12, 12)).astype(np.float32),
            "ids": rng.integers(0, 5, rows),
        }
    ]
    table = plan("ddim", 1, DiscreteVP.from_schedule("linear", 1e-4, 0.02, 10)) if doubled else None
    guidance = 3.0 if doubled else 1.0
    how = {"samples": rows, "rows": 4000, "options": ("w8", "w4", "w3")}
    probe = Probe.of(network, fed, [0], {}, Sensitivity(**how), plan=table, guidance=guidance)
    tables = [
        result(sensitivity(network, fed, [0], {}, Sensitivity(mode=mode, **how), tmp_path / mode))
        for mode in ("exact", "local")
    ]
    assert len(probe.reference[0]) == (rows // 2 if doubled else rows)
    exact, local = (t.nsr[:, :, 0] for t in tables)
    assert np.all(exact[3] == 0)
    assert np.all(local[3] == 0)
    difference = 10 * np.log10(local[:3] / exact[:3])
    assert np.abs(difference).max() < 3
    # the last layer's error is that of the output itself
    assert np.abs(difference[2]).max() < 0.7


def test_guidance_is_applied_before_errors_are_squared(rng):
    out = rng.normal(size=(6, 2))
    assert combined(out, 3.0) == pytest.approx(3 * out[3:] - 2 * out[:3])
    assert combined(out, 1.0) is out


def test_a_job_that_was_cut_off_ends_where_it_would_have(chain, rng, tmp_path):
    fed = batches(rng)
    whole = result(sensitivity(chain, fed, [0, 1], CODES, Sensitivity(mode="exact"), tmp_path / "whole"))
    job = sensitivity(chain, fed, [0, 1], CODES, Sensitivity(mode="exact"), tmp_path / "again")
    while not next(job).note.startswith("second"):
        pass
    job.close()
    [kept] = (tmp_path / "again").glob("*.json")
    assert list(json.loads(kept.read_text())) == ["first"]
    events = []
    job = sensitivity(chain, fed, [0, 1], CODES, Sensitivity(mode="exact"), tmp_path / "again")
    again = result(noted(job, events))
    assert np.array_equal(again.nsr, whole.nsr)
    assert not any(note.startswith("first") for note in events)
    # other weights, other work
    with torch.no_grad():
        chain.module.first.weight += 1
    other = result(sensitivity(chain, fed, [0, 1], CODES, Sensitivity(mode="exact"), tmp_path / "again"))
    assert not np.array_equal(other.nsr, whole.nsr)


def test_a_kept_file_that_is_damaged_counts_as_none(chain, rng, tmp_path):
    fed = batches(rng)
    whole = result(sensitivity(chain, fed, [0, 1], CODES, Sensitivity(mode="exact"), tmp_path))
    [kept] = tmp_path.glob("*.json")
    kept.write_text("{")
    again = result(sensitivity(chain, fed, [0, 1], CODES, Sensitivity(mode="exact"), tmp_path))
    assert np.array_equal(again.nsr, whole.nsr)


def test_smoothing_is_part_of_what_is_measured(chain, rng, tmp_path):
    fed = batches(rng)
    fed[0]["sample"][:, 0] *= 50
    codes = {"first": {4: codes_of_range(-150, 150, 4)}}
    how = Sensitivity(options=("a4",), mode="exact")
    plain = result(sensitivity(chain, fed, [0, 1], codes, how, tmp_path))
    smooth = np.ones(WIDTH, np.float32)
    smooth[0] = 50
    finer = {"first": {4: codes_of_range(-4, 4, 4)}}
    eased = result(sensitivity(chain, fed, [0, 1], finer, how, tmp_path, smooth={"first": smooth}))
    # the batch without an outlier has to do with its scale
    assert eased.nsr[0, 0, 1] < 0.1 * plain.nsr[0, 0, 1]
    assert np.isnan(eased.nsr[1]).all()  # nothing is known of its input
    assert not eased.takes("second", "a4")


@pytest.mark.parametrize("bad", ["w4a8", "float", "w9", "a", ""])
def test_only_single_options_can_be_measured(chain, rng, tmp_path, bad):
    with pytest.raises(BadInput, match="option"):
        result(sensitivity(chain, batches(rng), [0, 1], CODES, Sensitivity(options=(bad,)), tmp_path))


def test_bad_input_says_what_is_wrong(chain, rng, tmp_path):
    with pytest.raises(BadInput, match="no recorded inputs of net"):
        result(sensitivity(chain, [], [], CODES, Sensitivity(), tmp_path))
    with pytest.raises(BadInput, match="mode 'quick'"):
        result(sensitivity(chain, batches(rng), [0, 1], CODES, Sensitivity(mode="quick"), tmp_path))
    broken = batches(rng)
    broken[1]["sample"][0, 0] = np.nan
    with pytest.raises(BadInput, match="net puts out NaN"):
        result(sensitivity(chain, broken, [0, 1], CODES, Sensitivity(), tmp_path))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "score"])
def test_every_prediction_passes_errors_on_alike(prediction):
    process = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
    table = plan("ddim", 4, process, prediction=prediction)
    for call in table.calls:
        assert shrinkage(prediction, call) == pytest.approx(float(process.alpha(call.t)), rel=1e-9)
    flow = plan("ddim", 4, RectifiedFlow(), prediction="flow")
    for call in flow.calls[1:]:
        alpha, sigma = 1 - call.t, call.t
        assert shrinkage("flow", call) == pytest.approx(alpha / (alpha**2 + sigma**2), rel=1e-9)


def test_an_error_of_the_output_ends_as_the_gains_say():
    """A network that is the best linear denoiser of unit data: what is added to a call's output is found at the end."""
    process = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
    table = plan("dpmpp_2m", 5, process, prediction="v_prediction")
    rng = np.random.default_rng(1)
    start = rng.normal(size=(1, 64))

    def run(k, error):
        count = [0]

        def denoise(x, t):
            # of unit data, the best v is 0 everywhere
            v = error if count[0] == k else np.zeros_like(x)
            count[0] += 1
            a, b, _ = t.call.x0
            return a * x + b * v

        *_, last = table.run(denoise, table.start(start))
        return last.x

    error = rng.normal(size=(1, 64))
    plain = run(-1, error)
    gains = final_gains(table, range(5), np.ones(5), 1.0)
    for k in range(5):
        assert np.mean((run(k, error) - plain) ** 2) == pytest.approx(gains[k] * np.mean(error**2), rel=1e-6)
    few = final_gains(table, [0, 4], np.ones(2), 1.0)
    assert few.sum() == pytest.approx(gains.sum())


def test_a_real_networks_table_covers_every_step_and_guided_halves(tiny_sd, tmp_path):
    from fewstep.model import load

    model = load(tiny_sd)
    unet = model.parts["unet"]
    table = plan("ddim", 2, model.process, prediction=model.prediction, grid=model.grid)
    [run] = trajectories(model, table, [0], prompts=["a cat"], guidance=5.0)
    how = Sensitivity(options=("w3",), mode="local", samples=1, rows=16)
    t = result(sensitivity(unet, run.calls, [0, 1], {}, how, tmp_path, plan=table, guidance=5.0))
    assert t.nsr.shape == (len(t.layers), 1, 2)
    assert np.all(t.nsr > 0)
    assert t.predicted(dict.fromkeys(t.layers, "w3")) > 1e-4
    assert {"conv_in", "cross v", "shortcut", "time embedding"} <= set(t.by_kind("w3"))


def test_a_table_survives_json_and_lists_every_cell_as_csv(chain, rng, tmp_path):
    codes = {"first": {8: Activations(0.1, 128)}}
    how = Sensitivity(options=("w4", "a8"), mode="exact")
    t = result(sensitivity(chain, batches(rng), [0, 2], codes, how, tmp_path))
    back = Table.from_json(json.loads(json.dumps(t.to_json(), allow_nan=False)))
    assert back.nsr == pytest.approx(t.nsr, rel=2e-5, nan_ok=True)
    assert (back.layers, back.steps, back.macs, back.weights) == (t.layers, t.steps, t.macs, t.weights)
    assert back.error("first", "w4a8") == pytest.approx(t.error("first", "w4a8"), rel=2e-5)
    rows = list(csv.DictReader(io.StringIO(t.csv())))
    assert len(rows) == 2 * 2 * 2
    assert rows[1] == {
        "layer": "first",
        "kind": "other",
        "option": "w4",
        "step": "2",
        "sqnr_db": str(round(decibels(t.nsr[0, 0, 1]), 4)),
        "bytes": str((576 * 4 + WIDTH * 32) // 8),
        "macs": "576",
    }


def test_options_are_read_as_they_are_written():
    assert split("w4a8") == ("w4", "a8")
    assert split("float") == ()
    assert bits_of("a16") == (None, 16)
    assert kind_of("network.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0") == "cross out"
    assert kind_of("network.mid_block.resnets.0.time_emb_proj") == "time projection"
    assert kind_of("network.text_model.encoder.layers.3.self_attn.out_proj") == "self out"
    assert kind_of("decoder.conv_in") == "conv_in"
    assert decibels(0.01) == pytest.approx(20)
