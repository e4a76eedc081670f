"""Consistency training: its schedule in numbers, exact where data is one point, and that it learns a distribution."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.ict import ICT, chances, ict_loss, intervals_at, noise_levels  # noqa: E402
from fewstep.distill.student import Setting  # noqa: E402
from fewstep.model.training import Denoising, Latents, Training, given_samples  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import EDM, RectifiedFlow  # noqa: E402

from .analytic import MEAN, PROCESS, SHAPE, WIDTH, context, finish, model_of, module, turn_of  # noqa: E402


class Velocity(torch.nn.Module):
    """x0 = point + gain(t) sigma (x - alpha point), said as v: for gain 0 all data is one point."""

    def __init__(self, point, gain=0.0):
        super().__init__()
        self.point = torch.nn.Parameter(torch.tensor(float(point)))
        self.gain = torch.nn.Parameter(torch.full((9,), float(gain)))

    def forward(self, sample, timestep):
        t = timestep.double().numpy() + 1
        alpha, sigma = (
            torch.tensor(of(t)).float().view(-1, 1, 1, 1) for of in (PROCESS.alpha, PROCESS.sigma)
        )
        at = timestep.clamp(0) / 1000 * (len(self.gain) - 1)
        low = at.floor().long()
        gain = torch.lerp(self.gain[low], self.gain[low + 1], at - low).view(-1, 1, 1, 1)
        return (alpha * sample - self.point) / sigma - gain * (sample - alpha * self.point)


def setting(network, width):
    model = model_of(network, prediction="v_prediction")
    data = np.random.default_rng(0).normal(MEAN, width, (512, *SHAPE)).astype(np.float32)
    samples = given_samples(model, data, [None] * 512)
    return Setting(model, Denoising.of(model), module(model), module(model), 1.0, samples, "key")


class Leaping(torch.nn.Module):
    """The exact leap to the least level where all data is one point: of x = MEAN + level z it leaves MEAN + least z."""

    def __init__(self, least):
        super().__init__()
        self.least = torch.nn.Parameter(torch.tensor(float(least)))

    def forward(self, sample, timestep):
        t = timestep.double().numpy() + 1
        alpha, sigma = (
            torch.tensor(of(t)).float().view(-1, 1, 1, 1) for of in (PROCESS.alpha, PROCESS.sigma)
        )
        x0 = MEAN + self.least / sigma * (sample - alpha * MEAN)
        return (alpha * sample - x0) / sigma


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_the_loss_is_nothing_for_the_exact_leap_to_the_least_level(share):
    least = noise_levels(PROCESS, 10)[0]
    assert least == pytest.approx(float(PROCESS.sigma(1) / PROCESS.alpha(1)))
    exact, off = (
        ict_loss(turn_of(at.samples, at.student, share=share, batch=512), at, ICT(last=40), 0.5)[
            "huber"
        ].item()
        for at in (setting(Leaping(least), 0.0), setting(Leaping(2 * least), 0.0))
    )
    assert exact < 1e-3 * off


def test_levels_double_in_equal_parts_of_the_training():
    counts = [intervals_at(k / 80, 10, 1280) for k in range(80)]
    assert counts == [10 * 2 ** (k // 10) for k in range(80)]
    assert intervals_at(0.999, 10, 25) == 20
    assert intervals_at(0.5, 10, 10) == 10


@pytest.mark.parametrize("process", [PROCESS, EDM(), RectifiedFlow()])
def test_levels_rise_evenly_in_their_seventh_root_from_end_to_end(process):
    levels = noise_levels(process, 20)
    steps = np.diff(levels ** (1 / 7))
    assert np.allclose(steps, steps[0])
    if isinstance(process, EDM):
        assert np.allclose(levels[[0, -1]], [0.002, 80])


def test_chances_are_those_of_a_log_normal_and_follow_the_data():
    levels = np.exp(np.linspace(-12, 10, 45))
    for spread in (0.5, 2.0):
        chance = chances(levels, spread)
        middle = np.log(levels[:-1]) + 0.25
        mean = (chance * middle).sum()
        assert chance.sum() == pytest.approx(1)
        assert mean == pytest.approx(-1.1 + np.log(spread / 0.5), abs=0.01)
        assert np.sqrt((chance * (middle - mean) ** 2).sum()) == pytest.approx(2.0, abs=0.02)


def test_one_call_of_a_trained_student_draws_the_data(tmp_path):
    teacher = Gaussian()
    model = model_of(teacher, prediction="v_prediction")
    training = Training(steps=500, batch=64, rate=1e-2, warm=10, average=0.9, precision="float32")
    job = ICT(
        steps=1,
        first=8,
        last=32,
        latents=Latents(number=256, steps=16, precision="float32"),
        training=training,
    )
    made = finish(job(model, context(model, tmp_path)))
    x = torch.randn(512, *SHAPE, generator=torch.Generator().manual_seed(1))
    t = torch.full((512,), 1000.0)
    with torch.no_grad():
        before, after = (Denoising.of(one)(module(one), x, t, {}).x0 for one in (model, made))
    assert before.std().item() < 0.2 * WIDTH  # a denoiser's one step is the mean of all data
    assert abs(after.mean().item() - MEAN) < 0.1
    assert 0.6 * WIDTH < after.std().item() < 1.3 * WIDTH
    assert (made.steps, made.scheduler["_class_name"]) == (1, "LCMScheduler")


class Gaussian(Velocity):
    """The exact denoiser of N(mean, width^2) with a gain that learns beside."""

    def __init__(self):
        super().__init__(MEAN)

    def forward(self, sample, timestep):
        t = timestep.double().numpy() + 1
        alpha, sigma = (
            torch.tensor(of(t)).float().view(-1, 1, 1, 1) for of in (PROCESS.alpha, PROCESS.sigma)
        )
        exact = alpha * WIDTH**2 / ((alpha * WIDTH) ** 2 + sigma**2) * (sample - alpha * self.point)
        return super().forward(sample, timestep) - exact / sigma


@pytest.mark.parametrize("fields", [{"steps": 0}, {"first": 1}, {"first": 20, "last": 10}])
def test_fields_that_make_no_sense_are_refused(fields):
    with pytest.raises(BadInput, match="of ict"):
        ICT(**fields)
