"""Score identity distillation: its gradient on Gaussians, and that it learns."""

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.sid import SiD, sid_loss  # noqa: E402
from fewstep.export.passes import PASSES  # noqa: E402
from fewstep.model.training import Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402

from .analytic import context, finish, model_of  # noqa: E402
from .toys import Constant, Gaussian, Knots, drawn, setting_of, turn_of  # noqa: E402

MEAN, WIDTH = 0.7, 0.4
TIMES = torch.tensor([1000.0, 0.0])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(("shift", "sign"), [(-0.2, -1), (0.2, 1)])
def test_with_an_exact_fake_the_mean_moves_to_the_teachers(alpha, shift, sign):
    student = Constant(MEAN + shift, WIDTH)
    setting = setting_of(student, Gaussian(MEAN, WIDTH))
    turn = turn_of(setting, fake=Gaussian(MEAN + shift, WIDTH))
    sid_loss(turn, setting, alpha, TIMES)["identity"].backward()
    assert float(student.mean.grad) * sign > 0.01


def test_where_teacher_and_fake_agree_nothing_moves():
    student = Constant(MEAN, WIDTH)
    setting = setting_of(student, Gaussian(MEAN, WIDTH))
    sid_loss(turn_of(setting, fake=Gaussian(MEAN, WIDTH)), setting, 1.2, TIMES)["identity"].backward()
    assert abs(float(student.mean.grad)) < 1e-6


def test_a_toy_student_comes_to_the_teachers_distribution(tmp_path):
    model = model_of(Knots())
    training = Training(steps=150, batch=64, rate=3e-2, warm=10, average=0.95, precision="float32")
    job = SiD(alpha=1.0, fake_turns=2, fake_rate=2.0, training=training)
    done = finish(job(model, context(model, tmp_path, teacher=model_of(Gaussian(MEAN, WIDTH)))))
    x = drawn(done)
    assert done.steps == 1
    assert abs(x.mean() - MEAN) < 0.04
    assert abs(x.std() - WIDTH) < 0.04


@pytest.mark.parametrize("fields", [{"guidance": -1.0}, {"fake_rate": 0.0}, {"fake_turns": 0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(BadInput, match="sid"):
        SiD(**fields)


def test_a_recipe_may_name_it():
    assert PASSES["sid"] is SiD
