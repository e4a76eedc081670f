"""The pass as a whole, on a network of one convolution each way, a group norm and attention."""

from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.export import Exported, export_bundle  # noqa: E402
from fewstep.model import Context, Model  # noqa: E402
from fewstep.quant.adaround import AdaRound  # noqa: E402
from fewstep.quant.quantize import Quantize  # noqa: E402
from fewstep.runtime import DiscreteVP, plan  # noqa: E402
from fewstep.runtime.errors import BadInput, GateFailed  # noqa: E402
from fewstep.targets import load_target  # noqa: E402

from .work import finish  # noqa: E402

LINEAR = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)


class Pixels(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.outward = (
            torch.nn.Conv2d(*ends, 3, padding=1) for ends in ((3, width), (width, 3))
        )
        self.time, self.norm = torch.nn.Linear(1, width), torch.nn.GroupNorm(4, width)
        self.mixed, self.back = torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.Linear(width, width)

    def forward(self, sample, timestep):
        x = self.inward(sample) + self.time(timestep[:, None] / 1000)[:, :, None, None]
        x = x + self.mixed(torch.nn.functional.silu(self.norm(x)))
        x = x + self.back(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.outward(torch.nn.functional.silu(x))


@pytest.fixture
def model():
    # what a network of random weights takes for a velocity keeps samples at their size; noise it would blow up
    return Model.from_module(
        Pixels(), sample_shape=(3, 8, 8), process=LINEAR, prediction="v_prediction", name="pixels"
    )


@pytest.fixture
def context(tmp_path):
    return Context(load_target("laptop-cpu"), plan("ddim", 4, LINEAR), tmp_path / "work", tmp_path / "store")


def quantized(model, context, **fields):
    return finish(Quantize(**fields)(model, context))


def only(model):
    return model.parts[model.denoiser].quantized


def test_every_layer_gets_integers_and_the_history_says_how(model, context):
    done, events = quantized(model, context, scheme="w8a8")
    layers = only(done).layers
    assert {name.rpartition(".")[2] for name in layers} == {"inward", "time", "mixed", "back", "outward"}
    assert all(layer.weights.bits == 8 for layer in layers.values())
    rounded = {name.rpartition(".")[2] for name, layer in layers.items() if layer.input is not None}
    assert rounded == {"time", "mixed", "back"}, "the first and the last layer take what they are given"
    assert (done.history[0]["pass"], done.history[0]["scheme"]) == ("Quantize", "w8a8")
    assert only(done).cases
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 1


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
def test_weights_are_rounded_as_asked(model, context, rounding, monkeypatch):
    monkeypatch.setattr(
        "fewstep.quant.quantize.AdaRound", partial(AdaRound, iterations=10, input_iterations=0)
    )
    done, events = quantized(model, context, scheme="w4a8", group=16, rounding=rounding)
    assert any("compensate" in event.stage for event in events) == (rounding != "nearest")
    assert {layer.weights.bits for layer in only(done).layers.values()} == {4, 8}


def test_the_float_module_stays_as_it_was(model, context):
    before = {
        name: tensor.clone() for name, tensor in model.parts[model.denoiser].module.state_dict().items()
    }
    done, _ = quantized(model, context, scheme="w4a4", group=16)
    after = done.parts[done.denoiser].module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_first_and_last_layer_keep_8_bits(model, context):
    done, _ = quantized(model, context, scheme="w4a8", group=16)
    bits = {name.rpartition(".")[2]: layer.weights.bits for name, layer in only(done).layers.items()}
    assert (bits["inward"], bits["mixed"], bits["back"], bits["outward"]) == (8, 4, 4, 8)


def test_layers_that_are_kept_stay_in_floating_point(model, context):
    done, _ = quantized(model, context, scheme="w8", keep=("*.mixed", "*.ba?k"))
    assert {name.rpartition(".")[2] for name in only(done).layers} == {"inward", "time", "outward"}


def test_a_part_of_which_everything_is_kept_is_not_quantized(model, context):
    done, _ = quantized(model, context, keep=("*",))
    assert only(done) is None


def test_mixed_bits_keep_to_the_average(model, context):
    part = model.parts[model.denoiser]
    done, _ = quantized(model, context, scheme="w5.5", group=16)
    from fewstep.quant.simulate import weights_of

    summary = only(done).summary(weights_of(part))
    assert summary["bits_per_weight"] <= 5.5
    assert len(summary["weights_by_bits"]) > 1


def test_a_budget_that_cannot_be_met_names_the_nearest(model, context):
    with pytest.raises(BadInput, match=r"a budget of 2.5 bits a weight .* at least \d"):
        quantized(model, context, scheme="w2.5", group=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "int8"}, "wBITS"),
        ({"keep": ("vae_decoder.*",)}, "fits no layer"),
        ({"rounding": "best"}, "nearest"),
        ({"timesteps": "often"}, "uniform"),
        ({"prompts": ("a cat",)}, "without text"),
    ],
)
def test_what_makes_no_sense_is_refused(model, context, fields, message):
    with pytest.raises(BadInput, match=message):
        quantized(model, context, **fields)


def test_a_model_is_quantized_once(model, context):
    done, _ = quantized(model, context, scheme="w8")
    with pytest.raises(BadInput, match="quantized already"):
        quantized(done, context, scheme="w8")


def exported(model, out, recipe=None, scheme="w8a8"):
    *_, done = export_bundle(
        model, "laptop-cpu", out, steps=4, recipe=recipe, quantize=scheme, measure_speed=False
    )
    assert isinstance(done, Exported)
    return done.manifest


def test_a_bundle_says_what_of_it_is_integers(model, tmp_path):
    manifest = exported(model, tmp_path / "bundle")
    [part] = manifest.parts.values()
    assert part.quantization["weights_by_bits"] == {
        "8": sum(p.numel() for p in Pixels().parameters() if p.ndim > 1)
    }
    assert part.quantization["left_alone"] == {}
    assert part.quantization["size_of_float32"] < 0.5  # the graph itself is a third of so small a network
    assert not (tmp_path / "bundle.work").exists()


def test_a_missed_floor_names_the_layers_to_relax(model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[quality.int8]\npart_snr_db = 99.0\n")
    with pytest.raises(GateFailed, match=r"99 dB; fix: .*keep = \[\".*\.back\".*\[quality.int8\]|keep = \["):
        exported(model, tmp_path / "bundle", recipe)
    assert not (tmp_path / "bundle").exists()


def test_fields_of_the_pass_come_from_a_table_of_its_name(model, tmp_path):
    recipe = Path(tmp_path / "recipe.toml")
    recipe.write_text('passes = ["quantize"]\n[quantize]\nkeep = ["*.mixed"]\nscheme = "w8"\n')
    manifest = exported(model, tmp_path / "bundle", recipe, scheme=None)
    [part] = manifest.parts.values()
    assert [name.rpartition(".")[2] for name in part.quantization["left_alone"]] == ["mixed"]
