"""DMD2: which way the student is pulled, the sampler it ships with, its critic, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.dmd2 import DMD2, dmd2_fake_loss, dmd2_loss, regression_loss  # noqa: E402
from fewstep.distill.matching import walked  # noqa: E402
from fewstep.export.passes import PASSES  # noqa: E402
from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model.training import Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import RectifiedFlow  # noqa: E402

from .analytic import PROCESS, context, finish, model_of  # noqa: E402
from .toys import Constant, Gaussian, Knots, drawn, setting_of, turn_of  # noqa: E402

MEAN, WIDTH = 0.7, 0.4
QUICK = Training(steps=150, batch=64, rate=3e-2, warm=10, average=0.95, precision="float32")


def test_an_exact_fake_stays_and_another_moves():
    """The fake that denoises N(MEAN, WIDTH^2) at the optimum has no gradient where the student draws just that."""
    times = torch.tensor([1000.0, 0.0])

    def gradient(student):
        setting, found = setting_of(student, Gaussian(MEAN, WIDTH)), []
        for seed in range(12):
            fake = Gaussian(MEAN, WIDTH, knots=3)
            turn = turn_of(setting, seed=seed, fake=fake)
            dmd2_fake_loss(turn, setting, DMD2(steps=1), times)["denoising"].backward()
            found.append(fake.table.grad)
        found = torch.stack(found)
        return found.mean(0), found.std(0) / len(found) ** 0.5

    mean, error = gradient(Constant(MEAN, WIDTH))
    assert (mean.abs() < 4 * error).all()
    mean, error = gradient(Constant(MEAN, 2 * WIDTH))
    assert (mean[:, 1] < -4 * error[:, 1]).all()  # wider


def test_the_student_moves_from_the_fake_to_the_teacher():
    times = torch.tensor([1000.0, 0.0])
    for shift, sign in ((-0.2, -1), (0.0, 0), (0.2, 1)):
        student = Constant(MEAN + shift, WIDTH)
        setting = setting_of(student, Gaussian(MEAN, WIDTH))
        turn = turn_of(setting, fake=Gaussian(MEAN + shift, WIDTH))
        dmd2_loss(turn, setting, DMD2(steps=1), times)["pull"].backward()
        assert np.sign(round(float(student.mean.grad), 6)) == sign


def test_steps_leap_to_clean_data_and_noise_it_anew():
    setting = setting_of(Constant(5.0, 0.0), Gaussian(MEAN, WIDTH), number=2)
    turn = turn_of(setting, batch=20000)
    x = torch.zeros(20000, 2, 1, 1)
    with torch.no_grad():
        steps = torch.ones(20000, dtype=torch.int64)
        got = walked(
            setting.denoising, setting.student, x, torch.tensor([1000.0, 500.0, 0.0]), steps, {}, turn
        )
    assert float(got.mean()) == pytest.approx(5 * float(PROCESS.alpha(500)), abs=0.02)
    assert float(got.std()) == pytest.approx(
        float(PROCESS.sigma(500)), abs=0.02
    )  # independent of where it came from


def test_the_scheduler_noises_clean_data_again_at_the_times_it_was_trained_at(tmp_path):
    model = model_of(Knots())
    job = DMD2(steps=4, training=replace(QUICK, steps=2))
    done = finish(job(model, context(model, tmp_path, teacher=model_of(Gaussian(MEAN, WIDTH)))))
    plan = plan_of(done, "model", 4)
    assert [call.t for call in plan.calls] == [1000, 750, 500, 250]
    network, rng = Constant(5.0, 0.0), np.random.default_rng(0)

    def denoise(x, t):
        return network(torch.from_numpy(x), None).detach().numpy()

    def noise():
        return rng.standard_normal((1, 2, 1, 1))

    states = [step.x for step in plan.run(denoise, plan.start(noise()), noise)]
    rng = np.random.default_rng(0)
    noise()
    for t, state in zip((750, 500, 250), states):
        assert np.allclose(state, PROCESS.alpha(t) * 5 + PROCESS.sigma(t) * noise(), atol=1e-4)
    assert np.allclose(states[-1], 5, atol=1e-4)


def test_a_toy_student_comes_to_the_teachers_distribution(tmp_path):
    model = model_of(Knots())
    job = DMD2(steps=1, fake_turns=2, fake_rate=2.0, training=QUICK)
    done = finish(job(model, context(model, tmp_path, teacher=model_of(Gaussian(MEAN, WIDTH)))))
    x = drawn(done)
    assert abs(x.mean() - MEAN) < 0.03
    assert abs(x.std() - WIDTH) < 0.03


def test_regression_learns_the_teachers_latents_from_their_noise(tmp_path):
    model = model_of(Knots())
    training = replace(QUICK, steps=120, rate=5e-2)
    latents = Latents(number=256, sampler="ddim", steps=4, precision="float32")
    job = DMD2(steps=1, regression=120, latents=latents, training=training)
    done = finish(job(model, context(model, tmp_path, teacher=model_of(Gaussian(MEAN, WIDTH)))))
    assert "fake.denoising" not in done.history[-1]["losses"]  # the fake waits for its turn
    assert done.history[-1]["losses"]["student.regression"] < 0.04  # 0.5 at first


def test_latents_of_pictures_are_no_pairs():
    setting = setting_of(Knots(), Gaussian(MEAN, WIDTH))
    with pytest.raises(BadInput, match="noise they came from"):
        regression_loss(turn_of(setting), setting, torch.tensor([1000.0, 0.0]))


def test_a_critic_needs_stages(tmp_path):
    model = model_of(Knots())
    job = DMD2(steps=1, critic=1e-3, latents=Latents(number=8, sampler="ddim", steps=1), training=QUICK)
    with pytest.raises(BadInput, match="critic for a network without stages"):
        finish(job(model, context(model, tmp_path)))


def test_several_steps_need_discrete_levels(tmp_path):
    model = model_of(Knots(), process=RectifiedFlow(), prediction="flow")
    with pytest.raises(BadInput, match="tdm in its place"):
        finish(DMD2()(model, context(model, tmp_path)))


@pytest.mark.parametrize("fields", [{"steps": 0}, {"fake_turns": 0}, {"regression": -1}, {"critic": -1.0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(BadInput, match="dmd2"):
        DMD2(**fields)


def test_a_recipe_may_name_it():
    assert PASSES["dmd2"] is DMD2
