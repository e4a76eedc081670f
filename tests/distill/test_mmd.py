"""MMD finetuning: the estimate's closed forms, features with gradients, and that it learns."""

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.distill.mmd import MMD, mmd_loss, squared_mmd, teacher_features  # noqa: E402
from fewstep.distill.student import Setting  # noqa: E402
from fewstep.export.passes import PASSES  # noqa: E402
from fewstep.model.training import Denoising, given_samples  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402

from .analytic import data, model_of  # noqa: E402
from .test_critics import looks, network  # noqa: E402
from .test_critics import model_of as real_model  # noqa: E402
from .toys import Knots, turn_of  # noqa: E402

TIMES = torch.tensor([1000.0, 500.0, 0.0])


def test_equal_distributions_are_no_distance_apart_on_average_whatever_conditions_they_share():
    torch.manual_seed(0)
    found = []
    for _ in range(400):
        shared = torch.randn(32, 4)
        found.append(squared_mmd(*((shared + torch.randn(32, 4)) / 2**0.5 for _ in range(2))))
    found = torch.stack(found)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20  # 20 is the root of 400


def test_of_two_points_it_is_the_kernels_own_sum():
    """All x equal a, all y equal b: k(a, a) + k(b, b) - 2 k(a, b), with k = (ab + 1)^3 in one dimension."""
    x, y = torch.full((5, 1), 1.0), torch.full((5, 1), 2.0)
    assert float(squared_mmd(x, y)) == pytest.approx(2**3 + 5**3 - 2 * 3**3)


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_the_teachers_features_have_gradients_in_the_samples(name):
    torch.manual_seed(0)
    model = real_model(name)
    x, _, condition = looks(model)
    setting = Setting(model, Denoising.of(model), network(model), network(model), 1.0, None, "")
    features = teacher_features(setting, 0.1)(x.requires_grad_(), condition, torch.randn_like(x))
    assert features.shape == (2, 16)
    features.square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_toy_student_gets_the_datas_mean_and_width():
    """Through two unrolled steps, with the samples themselves as features."""
    torch.manual_seed(0)
    student = Knots()
    model = model_of(student)
    samples = given_samples(model, data(4096), [None] * 4096)
    setting = Setting(model, Denoising.of(model), student, student, 1.0, samples, "")
    optimizer = torch.optim.Adam(student.parameters(), 2e-2)
    for step in range(150):
        turn = turn_of(setting, 128, seed=step)
        loss = mmd_loss(turn, setting, TIMES, lambda x0, condition, noise: x0[:, :1].flatten(1))["mmd"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(20000, 16, 1, 1)
    with torch.no_grad():
        for t, s in pairwise(TIMES):
            estimate = setting.denoising(student, x, t.expand(len(x)), {})
            x = setting.denoising.ddim(estimate, s.expand(len(x)))
    assert float(x.mean()) == pytest.approx(0.7, abs=0.05)
    assert float(x.std()) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("fields", [{"steps": 0}, {"look": 0.0}, {"guidance": -1.0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(BadInput, match="mmd"):
        MMD(**fields)


def test_a_recipe_may_name_it():
    assert PASSES["mmd"] is MMD
