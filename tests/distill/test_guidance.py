"""Guidance in one call: exact on a class-conditional Gaussian, learned, and told the scale or left with one."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from diffusers import LatentConsistencyModelPipeline  # noqa: E402
from diffusers.models.embeddings import TimestepEmbedding  # noqa: E402

from fewstep.distill.guidance import DistillGuidance, Scales, guidance_loss  # noqa: E402
from fewstep.distill.lcm import LCM  # noqa: E402
from fewstep.distill.scaled_network import ScaledNetwork, baked, scale_features  # noqa: E402
from fewstep.distill.solver import Solver  # noqa: E402
from fewstep.distill.student import Setting  # noqa: E402
from fewstep.distill.times import drawn_times  # noqa: E402
from fewstep.model import load  # noqa: E402
from fewstep.model.training import Denoising, Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402

from .analytic import SHAPE, Affine, context, finish, model_of, module, samples_of, turn_of, walk  # noqa: E402

MEANS = (0.6, -0.4, 0.1)
"""Of two classes, and of no class in particular."""
LATENTS = Latents(number=256, sampler="ddim", steps=8, precision="float32")
TRAINED = Training(steps=300, batch=64, rate=2e-2, warm=10, average=0.9, precision="float32")


class Offset(Affine):
    """The affine network, fixed, with an offset for each label that learns: straight between knots in time."""

    def __init__(self, knots=9):
        super().__init__(means=MEANS)
        for name in ("a", "b"):
            table = getattr(self, name).data
            delattr(self, name)
            self.register_buffer(name, table)
        self.offset = torch.nn.Parameter(torch.zeros(knots, 3))

    def moved(self, timestep):
        at = timestep / 1000 * (len(self.offset) - 1)
        low = at.floor().long()
        return torch.lerp(self.offset[low], self.offset[low + 1], (at - low).unsqueeze(1))

    def forward(self, sample, timestep, labels):
        moved = self.moved(timestep).gather(1, labels.view(-1, 1)).view(-1, 1, 1, 1)
        return super().forward(sample, timestep, labels) + moved


class Embedded(Offset):
    """The offset behind diffusers' time embedding: a network that can be told a scale."""

    def __init__(self):
        super().__init__()
        self.time_embedding = TimestepEmbedding(4, 64, out_dim=3)
        torch.nn.init.zeros_(self.time_embedding.linear_2.weight)
        torch.nn.init.zeros_(self.time_embedding.linear_2.bias)

    def moved(self, timestep):
        share = (timestep / 1000).view(-1, 1)
        return self.time_embedding(torch.cat([share, share**2, share**4, share**8], dim=1))


def toy(network=None, guidance=3.0):
    return model_of(Affine(means=MEANS) if network is None else network, classes=2, guidance=guidance)


def setting(network, guidance=3.0):
    model = toy(guidance=guidance)
    samples = samples_of(model, subjects=[0, 1] * 256)
    return Setting(model, Denoising.of(model), module(toy(network)), module(model), guidance, samples, "key")


def guided(scale):
    """The affine network that answers as the toy under guidance."""
    network = Affine(means=MEANS)
    with torch.no_grad():
        network.b.copy_(network.b[2] + scale * (network.b - network.b[2]))
    return network


def starts(number=64):
    x = torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(3))
    return x, torch.arange(number) % 2


def test_the_loss_is_nothing_for_the_guided_network_alone():
    for scale in (1.5, 3.0):
        at = setting(guided(scale), scale)
        right = guidance_loss(turn_of(at.samples, at.student), at, DistillGuidance())["squared"]
        at = setting(guided(scale), scale + 1)
        wrong = guidance_loss(turn_of(at.samples, at.student), at, DistillGuidance())["squared"]
        assert right.item() < 1e-10 < 1e-3 < wrong.item()


def test_a_trained_student_needs_one_call_for_what_took_the_teacher_two(tmp_path):
    model = toy(Offset())
    made = finish(DistillGuidance(latents=LATENTS, training=TRAINED)(model, context(model, tmp_path)))
    (x, labels), times = starts(), drawn_times(model, 20)
    wanted = walk(model, module(model), x, times, labels, scale=3.0, nothing=2)
    before = (walk(model, module(model), x, times, labels) - wanted).abs().max().item()
    after = (walk(made, module(made), x, times, labels) - wanted).abs().max().item()
    assert after < 0.05 * before
    assert (made.guidance.scale, made.guidance.kind, made.steps) == (1.0, "cfg", None)
    assert made.history[-1]["scale"] == 3.0


def test_a_student_told_the_scale_can_be_left_with_any_without_another_training(tmp_path):
    model, (x, labels) = toy(Embedded()), starts()
    long = replace(TRAINED, steps=600, rate=5e-3)
    told = DistillGuidance(scales=Scales(1.5, 4.5), latents=LATENTS, training=long)
    first = finish(told(model, context(model, tmp_path)))
    (checkpoint,) = tmp_path.glob("guidance-*.checkpoint")
    written = checkpoint.stat().st_mtime_ns
    times = drawn_times(model, 20)
    for scale in (2.0, 3.0, 4.0):
        made = finish(replace(told, scales=Scales(1.5, 4.5, scale))(model, context(model, tmp_path)))
        wanted = walk(model, module(model), x, times, labels, scale=scale, nothing=2)
        before = (walk(model, module(model), x, times, labels) - wanted).abs().mean().item()
        after = (walk(made, module(made), x, times, labels) - wanted).abs().mean().item()
        assert after < 0.4 * before, scale  # the features of scales far from 1 are all but random
        assert made.history[-1]["scale"] == scale
        if scale == 3.0:  # the model's own: what comes out where none is said
            assert torch.equal(
                walk(first, module(first), x, times, labels), walk(made, module(made), x, times, labels)
            )
    assert checkpoint.stat().st_mtime_ns == written


def test_a_network_told_the_scale_is_a_plain_one_at_each(tiny_sd):
    network = module(load(tiny_sd))
    names = [name for name, _ in network.named_parameters()]
    sample = torch.randn(3, network.network.config.in_channels, 8, 8)
    text = torch.randn(3, 5, network.network.config.cross_attention_dim)
    time = torch.tensor([999.0, 500.0, 3.0])
    with torch.no_grad():
        as_it_was = network(sample, time, text)
        told = ScaledNetwork(network)
        assert torch.equal(told(sample, time, text, torch.tensor([1.0, 2.0, 7.0])), as_it_was)
        torch.nn.init.normal_(told.network.network.time_embedding.projection.weight, std=0.1)
        answers = []
        for scale in (1.0, 3.7):
            plain = baked(told, scale)
            answers.append(plain(sample, time, text))
            torch.testing.assert_close(told(sample, time, text, torch.full((3,), scale)), answers[-1])
            assert [name for name, _ in plain.named_parameters()] == names
        assert (answers[0] - answers[1]).abs().max() > 0.01


def test_scales_are_told_as_diffusers_tells_them():
    scales = torch.tensor([1.0, 3.5, 9.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, 256)
    torch.testing.assert_close(
        scale_features(scales), theirs, rtol=0, atol=2e-3
    )  # sines of thousands, in float32


def test_a_network_that_has_no_place_for_the_scale_is_refused(tmp_path):
    model = toy()
    with pytest.raises(BadInput, match="time_embedding or timestep_embedder"):
        finish(DistillGuidance(scales=Scales(1, 4), latents=LATENTS)(model, context(model, tmp_path)))


@pytest.mark.parametrize("model", [model_of(Affine()), toy(guidance=1.0)])
def test_there_must_be_guidance_to_distill(model, tmp_path):
    with pytest.raises(BadInput, match="which is drawn without"):
        next(DistillGuidance()(model, context(model, tmp_path)))


@pytest.mark.parametrize(
    "fields",
    [
        {"low": 2.0},
        {"baked": 3.0},
        {"low": 3.0, "high": 2.0},
        {"low": 0.5, "high": 2.0},
        {"low": 1.0, "high": 4.0, "baked": 5.0},
    ],
)
def test_ranges_that_are_none_are_refused(fields):
    with pytest.raises(BadInput, match="scales"):
        Scales(**fields)


def test_the_scale_left_must_lie_in_the_range(tmp_path):
    model = toy(guidance=7.0)
    with pytest.raises(BadInput, match="while the teacher's own is 7.0"):
        next(DistillGuidance(scales=Scales(1, 4))(model, context(model, tmp_path)))


def test_a_consistency_model_can_be_taught_a_range_of_scales_by_a_noisy_teacher(tmp_path):
    model = toy(Embedded())
    short = replace(TRAINED, steps=3, batch=4)
    job = LCM(scales=Scales(1.5, 4.5), solver=Solver(eta=1.0, substeps=2), latents=LATENTS, training=short)
    made = finish(job(model, context(model, tmp_path)))
    assert module(made).state_dict().keys() == module(model).state_dict().keys()
    assert (made.guidance.scale, made.scheduler["_class_name"]) == (1.0, "LCMScheduler")
    x, labels = starts(8)
    other = finish(replace(job, scales=Scales(1.5, 4.5, 4.0))(model, context(model, tmp_path)))
    assert len(list(tmp_path.glob("lcm-*.checkpoint"))) == 1
    time = torch.full((8,), 500.0)
    assert not torch.equal(module(made)(x, time, labels), module(other)(x, time, labels))
