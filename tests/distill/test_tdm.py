"""Trajectory distribution matching: closed forms on Gaussian data, where its samples come from, that it learns."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.matching import step_times, walked  # noqa: E402
from fewstep.distill.tdm import TDM, tdm_fake_loss, tdm_loss  # noqa: E402
from fewstep.export.passes import PASSES  # noqa: E402
from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model.training import Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import EDM, RectifiedFlow  # noqa: E402

from .analytic import PROCESS, context, finish, model_of  # noqa: E402
from .toys import Exact, Gaussian, Knots, drawn, setting_of, turn_of  # noqa: E402

MEAN, WIDTH = 0.7, 0.4
TIMES = (1000.0, 500.0, 0.0)
QUICK = Training(steps=150, batch=128, rate=2e-2, warm=10, average=0.95, precision="float32")


def gradient(loss, of):
    of.zero_grad()
    loss.backward()
    return of.table.grad


def fake_gradient(student, target, seeds=range(16)):
    """Of a fake that knows N(MEAN, WIDTH^2), at every knot: mean and standard error over the seeds."""
    fake = Gaussian(MEAN, WIDTH, knots=3)
    setting = setting_of(student, Gaussian(MEAN, WIDTH))
    how = TDM(steps=2, target=target)
    found = []
    for seed in seeds:
        turn = turn_of(setting, seed=seed, fake=fake)
        loss = tdm_fake_loss(turn, setting, how, [torch.tensor(TIMES)])["denoising"]
        found.append(gradient(loss, fake).clone())
    found = torch.stack(found)
    return found.mean(0), found.std(0) / len(found) ** 0.5


def test_a_student_of_the_teachers_distribution_leaves_an_exact_fake_where_it_is():
    mean, error = fake_gradient(Exact(TIMES, MEAN, WIDTH), "noise")
    assert (mean.abs() < 4 * error).all()


def test_a_student_of_another_distribution_does_not():
    mean, error = fake_gradient(Exact(TIMES, MEAN - 0.2, WIDTH), "noise")
    assert (mean[:, 0] > 8 * error[:, 0]).all()  # down, to the lower mean, at every time


def test_clean_targets_make_another_fake_where_samples_are_noisy_still():
    """Its clean estimates are means over what a sample may become: narrower than the data."""
    mean, error = fake_gradient(Exact(TIMES, MEAN, WIDTH), "clean")
    assert (mean.abs() > 8 * error).any()


@pytest.mark.parametrize("huber_c", [0.0, 1e-3])
def test_the_student_moves_from_the_fake_to_the_teacher(huber_c):
    student = Knots()
    setting = setting_of(student, Gaussian(MEAN, WIDTH))
    how, grids = TDM(steps=2, huber_c=huber_c), [torch.tensor(TIMES)]

    def found(fake):
        turn = turn_of(setting, fake=fake)
        return gradient(tdm_loss(turn, setting, how, grids)["pull"], student)

    assert found(Gaussian(MEAN, WIDTH)).abs().max() < 1e-6  # teacher and fake agree: nowhere
    assert (found(Gaussian(MEAN - 0.2, WIDTH))[[-1, 4], 1] < 0).all()  # the offsets at both times rise
    assert (found(Gaussian(MEAN + 0.2, WIDTH))[[-1, 4], 1] > 0).all()


def test_inputs_come_from_the_students_own_steps():
    setting = setting_of(Knots(gain=0.0, offset=5.0), Gaussian(MEAN, WIDTH))
    denoising, x = setting.denoising, torch.randn(3, 2, 1, 1)
    times = torch.tensor([1000.0, 750.0, 500.0, 0.0])
    with torch.no_grad():
        got = walked(denoising, setting.student, x, times, torch.tensor([0, 1, 2]), {})
    alpha, sigma = (float(of(1000.0)) for of in (PROCESS.alpha, PROCESS.sigma))
    noise = (x - alpha * 5) / sigma
    assert torch.allclose(got[0], x[0])
    for b, t in ((1, 750.0), (2, 500.0)):  # its clean estimate is 5 everywhere, so that the noise stays
        wanted = float(PROCESS.alpha(t)) * 5 + float(PROCESS.sigma(t)) * noise[b]
        assert torch.allclose(got[b], wanted, atol=1e-5)


@pytest.mark.parametrize(("steps", "target"), [(1, "clean"), (2, "noise")])
def test_a_toy_student_comes_to_the_teachers_distribution(tmp_path, steps, target):
    model = model_of(Knots())
    job = TDM(steps=steps, target=target, fake_rate=2.0, training=QUICK)
    done = finish(job(model, context(model, tmp_path, teacher=model_of(Gaussian(MEAN, WIDTH)))))
    x = drawn(done)
    assert abs(x.mean() - MEAN) < 0.03
    assert abs(x.std() - WIDTH) < 0.03
    assert (done.steps, done.guidance.scale, done.scheduler["timestep_spacing"]) == (steps, 1.0, "trailing")
    assert not list(tmp_path.glob("latents*"))  # nothing was drawn


def test_one_student_may_be_made_for_several_numbers_of_steps(tmp_path):
    model = model_of(Knots())
    job = TDM(steps=2, also=(1,), training=replace(QUICK, steps=20))
    done = finish(job(model, context(model, tmp_path, teacher=model_of(Gaussian(MEAN, WIDTH)))))
    assert done.steps == 2
    assert done.history[-1]["also"] == [1]


@pytest.mark.parametrize(
    ("process", "prediction"), [(PROCESS, "v_prediction"), (RectifiedFlow(), "flow"), (EDM(), "sample")]
)
def test_it_is_drawn_at_the_times_it_was_trained_at_whatever_the_process(tmp_path, process, prediction):
    model = model_of(Knots(), process=process, prediction=prediction)
    job = TDM(steps=2, training=replace(QUICK, steps=2, batch=8))
    done = finish(job(model, context(model, tmp_path)))
    plan = plan_of(done, "model", 2)
    assert [call.t for call in plan.calls] == pytest.approx(step_times(model, 2)[:-1].tolist(), rel=1e-5)
    x = np.ones((1, 16, 1, 1), np.float32)
    states = [step.x for step in plan.run(lambda x, t: 0 * x + 3, plan.start(x))]
    assert states[-1] == pytest.approx(3, abs=1e-5)  # the last step ends at the clean estimate


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"also": (0,)},
        {"target": "x0"},
        {"huber_c": -1.0},
        {"fake_rate": 0.0},
        {"fake_turns": 0},
    ],
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(BadInput, match="tdm"):
        TDM(**fields)


def test_a_recipe_may_name_it():
    assert PASSES["tdm"] is TDM
