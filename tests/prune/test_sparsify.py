"""The pass: as many zeros as asked, in the pattern asked, through an interruption as well."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model import Context, Model, load  # noqa: E402
from fewstep.model.training import Latents, Training  # noqa: E402
from fewstep.prune.sparsify import Pattern, Sparsify, imitated, sparse_layers, zipped_bytes  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import DiscreteVP  # noqa: E402
from fewstep.targets import load_target  # noqa: E402


class Pixels(torch.nn.Module):
    """Convolutions and a linear layer, with a time: as small as a denoiser can be."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.inner = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.time = torch.nn.Linear(1, 16)
        self.wide = torch.nn.Conv2d(16, 32, 1)
        self.conv_out = torch.nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, sample, timestep):
        h = self.conv_in(sample) + self.time(timestep.float().view(-1, 1) / 1000)[:, :, None, None]
        return self.conv_out(torch.relu(self.wide(torch.relu(self.inner(h)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    process = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)
    return Model.from_module(Pixels(), sample_shape=(3, 8, 8), process=process, name="pixels")


def context(model, folder):
    return Context(load_target("laptop-cpu"), plan_of(model, "auto", 2), folder, folder)


def job(steps=10, **fields):
    training = Training(steps=steps, batch=4, rate=1e-3, warm=0, average=0.5, precision="float32")
    latents = Latents(number=16, steps=2, batch=16, precision="float32")
    return Sparsify(**{"every": 2, "latents": latents, "training": training, **fields})


def result(work):
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def weights_of(done, pattern="1x1"):
    module = done.parts["unet"].module
    return {
        name: module.get_parameter(name).detach() for name in sparse_layers(module, Pattern.of(pattern))[0]
    }


@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_every_layer_has_the_sparsity_asked_and_history_says_so(model, tmp_path, method):
    done = result(job(method=method, sparsity=0.75)(model, context(model, tmp_path)))
    weights = weights_of(done)
    assert set(weights) == {"module.inner.weight", "module.time.weight", "module.wide.weight"}
    for weight in weights.values():
        assert int(weight.count_nonzero()) == round(0.25 * weight.numel())
    record = done.history[-1]
    assert record["nonzeros"] == sum(int(weight.count_nonzero()) for weight in weights.values())
    assert record["weights"] == sum(weight.numel() for weight in weights.values())
    assert record["zipped_bytes"][1] < 0.75 * record["zipped_bytes"][0]
    assert record["zipped_bytes"][1] == zipped_bytes(done.parts["unet"].module)


def test_the_model_that_came_in_keeps_its_weights(model, tmp_path):
    before = {key: tensor.clone() for key, tensor in model.parts["unet"].module.state_dict().items()}
    result(job()(model, context(model, tmp_path)))
    after = model.parts["unet"].module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_one_threshold_gives_the_sparsity_over_all_layers(model, tmp_path):
    weights = weights_of(result(job(scope="global", sparsity=0.5)(model, context(model, tmp_path))))
    left = {name: int(weight.count_nonzero()) / weight.numel() for name, weight in weights.items()}
    assert sum(int(w.count_nonzero()) for w in weights.values()) == round(
        0.5 * sum(w.numel() for w in weights.values())
    )
    assert max(left.values()) - min(left.values()) > 0.05


def test_two_of_four_stay_everywhere_and_what_does_not_fit_stays_dense(model, tmp_path):
    done = result(job(pattern="2:4")(model, context(model, tmp_path)))
    assert done.history[-1]["dense"] == ["module.time.weight"]
    for weight in weights_of(done, "2:4").values():
        groups = weight.movedim(1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()


def test_blocks_are_zero_or_not_as_one(model, tmp_path):
    done = result(job(pattern="4x1", sparsity=0.5)(model, context(model, tmp_path)))
    for weight in weights_of(done, "4x1").values():
        alive = (weight != 0).view(weight.shape[0] // 4, 4, -1)
        assert (alive.all(1) | ~alive.any(1)).all()
        assert float(alive.float().mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_a_run_that_was_cut_off_ends_where_the_whole_one_does(model, tmp_path, method, monkeypatch):
    from fewstep.model.training import loop

    how = job(method=method, sparsity=0.75, steps=12)
    whole = weights_of(result(how(model, context(model, tmp_path / "whole"))))
    monkeypatch.setattr(loop, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    work = how(model, context(model, tmp_path / "cut"))
    for event in work:
        if event.note.startswith("step 7 "):
            break
    work.close()
    again = weights_of(result(how(model, context(model, tmp_path / "cut"))))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_training_brings_the_outputs_nearer_than_cutting_alone(model, tmp_path):
    part = model.parts["unet"]
    feeds = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.full((8,), 400)
    with torch.no_grad():
        right = part.module(*feeds)
    errors = []
    for steps, rate in ((10, 1e-9), (300, 3e-3)):
        training = Training(steps=steps, batch=8, rate=rate, warm=0, average=0.0, precision="float32")
        how = job(training=training, sparsity=0.7, every=max(2, steps // 20))
        module = result(how(model, context(model, tmp_path / str(steps)))).parts["unet"].module
        with torch.no_grad():
            errors.append(float((module(*feeds) - right).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_a_text_model_is_thinned_with_its_guidance(tiny_sd, tmp_path):
    model = load(tiny_sd)
    done = result(job(steps=2, every=1, sparsity=0.6)(model, context(model, tmp_path)))
    record = done.history[-1]
    assert record["nonzeros"] / record["weights"] == pytest.approx(0.4, abs=0.001)
    assert done.guidance == model.guidance
    assert all(np.isfinite(t.detach().numpy()).all() for t in done.parts["unet"].module.parameters())


def test_a_student_of_few_steps_imitates_itself_and_not_its_teacher(model, tmp_path):
    ctx = replace(context(model, tmp_path), teacher=model)
    pruned, few = replace(model, name="pruned"), replace(model, steps=2)
    assert imitated(pruned, ctx) is model
    assert imitated(few, ctx) is few
    assert imitated(few, replace(ctx, teacher=None)) is few


@pytest.mark.parametrize(
    ("text", "pattern"), [("4x1", Pattern(4, 1)), ("8x8", Pattern(8, 8)), ("2:4", Pattern(n=2, m=4))]
)
def test_patterns_are_read(text, pattern):
    assert Pattern.of(text) == pattern


@pytest.mark.parametrize("text", ["", "4", "0x4", "4x0", "4:4", "0:4", "5:4", "2:4:1", "x", "-1x4"])
def test_other_patterns_are_refused(text):
    with pytest.raises(BadInput, match="pattern"):
        Pattern.of(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "lottery"},
        {"scope": "model"},
        {"sparsity": 1.0},
        {"initial": -0.1},
        {"until": 0.0},
        {"every": 0},
        {"every": 11},
        {"regrown": 1.0},
        {"method": "granet", "pattern": "2:4"},
        {"scope": "global", "pattern": "4x1"},
    ],
)
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(BadInput):
        job(**wrong)


def test_a_pattern_that_fits_no_layer_is_refused(model, tmp_path):
    with pytest.raises(BadInput, match="no layer"):
        result(job(pattern="3:7")(model, context(model, tmp_path)))
