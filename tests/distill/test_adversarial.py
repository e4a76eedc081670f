"""The adversarial stage: what its steps are, whom each loss teaches, and what it refuses."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.distill.adversarial import Adversarial, pair_of  # noqa: E402
from fewstep.export.passes import PASSES  # noqa: E402
from fewstep.model.training import Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402

from .analytic import Affine, context, exact_end, finish, model_of  # noqa: E402
from .test_critics import model_of as real_model  # noqa: E402
from .toys import Knots, setting_of, turn_of  # noqa: E402

TIMES = torch.tensor([1000.0, 500.0, 0.0])
LATENTS = Latents(number=8, sampler="ddim", steps=1, precision="float32", batch=128)


def test_the_teachers_end_comes_to_the_exact_one_with_more_small_steps():
    teacher = Affine()
    setting = setting_of(Knots(), teacher)

    def error(substeps):
        pair = pair_of(
            turn_of(setting, 64), setting, Adversarial(steps=2, substeps=substeps), TIMES, teachers=True
        )
        late = pair.t == 500
        wanted = exact_end(pair.x[late].numpy(), 500.0)
        return float(np.abs(pair.teachers[late].detach().numpy() - wanted).mean())

    assert error(32) < error(4) / 4  # first order: an eighth


def test_the_first_step_begins_with_noise_alone():
    setting = setting_of(Knots(), Affine())
    pair = pair_of(turn_of(setting, 4096), setting, Adversarial(steps=2), TIMES, teachers=False)
    assert float(pair.x[pair.t == 1000].std()) == pytest.approx(1, abs=0.02)
    noise = float(setting.denoising.process.sigma(500))
    assert float(pair.x[pair.t == 500].std()) == pytest.approx(noise, abs=0.02)  # the toy's latents are zeros


@pytest.mark.parametrize("looks", [(), (0.01, 0.5)])
def test_first_one_discriminator_then_the_other(tmp_path, looks):
    model = real_model("unet")
    training = Training(steps=2, batch=4, warm=0, average=0, precision="float32")
    job = Adversarial(steps=2, substeps=2, looks=looks, latents=LATENTS, training=training)
    done = finish(job(model, context(model, tmp_path)))
    losses = done.history[-1]["losses"]
    for name in ("pairs", "ends"):
        assert losses[f"{name}.told"] == pytest.approx(
            2 * math.log(2), rel=0.3
        )  # heads that know nothing yet
    assert (done.steps, done.scheduler["timestep_spacing"]) == (2, "trailing")


def test_a_network_without_stages_is_refused(tmp_path):
    model = model_of(Knots())
    with pytest.raises(BadInput, match="without stages"):
        finish(Adversarial(steps=1, latents=LATENTS)(model, context(model, tmp_path)))


@pytest.mark.parametrize("fields", [{"steps": 0}, {"substeps": 0}, {"paired": 1.5}, {"looks": (1.0,)}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(BadInput, match="adversarial"):
        Adversarial(**fields)


def test_a_recipe_may_name_it():
    assert PASSES["adversarial"] is Adversarial
