"""Latent consistency distillation: its boundary, its loss at the exact consistency function, and that it learns."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.lcm import LCM, SIGMA_DATA, TIMESTEP_SCALING, boundary, lcm_loss  # noqa: E402
from fewstep.distill.student import Setting  # noqa: E402
from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model import Model  # noqa: E402
from fewstep.model.training import Denoising, Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import RectifiedFlow  # noqa: E402

from .analytic import (  # noqa: E402
    MEAN,
    PROCESS,
    SHAPE,
    WIDTH,
    Affine,
    context,
    exact_end,
    finish,
    model_of,
    module,
    samples_of,
    turn_of,
)


class Leaper(torch.nn.Module):
    """The clean estimate whose consistency function is the exact end of the teacher's way, and off by `shift`."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(shift))

    def forward(self, sample, timestep):
        c_skip, c_out = boundary(timestep)
        x = sample.double().numpy()
        end = [exact_end(one, float(t) + 1) for one, t in zip(x, timestep, strict=True)]
        end = torch.tensor(np.stack(end)).float()
        return (end + self.shift - c_skip * sample) / c_out.clamp(min=1e-6)


def loss_of(student, **options):
    model = model_of(Affine())
    setting = Setting(model, Denoising.of(model), student, module(model), 1.0, samples_of(model), "key")
    turn = turn_of(setting.samples, setting.student, batch=512)
    return float(lcm_loss(turn, setting, LCM(**options))["huber"].detach())


def test_at_level_0_the_function_is_the_identity_and_far_from_it_the_clean_estimate():
    c_skip, c_out = (value.flatten().tolist() for value in boundary(torch.tensor([0.0, 1.0, 999.0])))
    assert (c_skip[0], c_out[0]) == (1.0, 0.0)
    assert c_skip[1] == pytest.approx(SIGMA_DATA**2 / (TIMESTEP_SCALING**2 + SIGMA_DATA**2))
    assert c_out[1] == pytest.approx(TIMESTEP_SCALING / (TIMESTEP_SCALING**2 + SIGMA_DATA**2) ** 0.5)
    assert (c_skip[2], c_out[2]) == pytest.approx((0, 1), abs=1e-6)


def test_the_exact_consistency_function_loses_only_what_a_ddim_step_of_the_grid_is_off():
    coarse, fine = loss_of(Leaper(), intervals=50), loss_of(Leaper(), intervals=500)
    assert fine < 0.2 * coarse
    assert coarse < 0.02 * WIDTH


def test_a_student_is_pulled_towards_its_own_average_a_step_nearer_to_clean():
    """One that shifts every leap alike agrees with itself but at level 0, where the boundary holds it."""
    assert loss_of(Leaper(0.5)) > 2 * loss_of(Leaper())


def test_a_toy_learns_to_draw_the_data_in_two_steps(tmp_path):
    job = LCM(
        steps=2,
        latents=Latents(number=256, sampler="ddim", steps=8, precision="float32"),
        training=Training(steps=500, batch=64, rate=2e-2, warm=10, average=0.9, precision="float32"),
    )
    teacher = model_of(Affine())
    blank = model_of(Affine(means=(0.0,), width=1.0))
    student = finish(job(blank, context(blank, tmp_path, teacher)))
    way = plan_of(student, "model", 2)
    assert len(way.calls) == 2
    rng = np.random.default_rng(0)
    network = student.parts[student.denoiser].module

    def noise():
        return rng.standard_normal((2000, *SHAPE)).astype(np.float32)

    def denoise(x, call):
        with torch.no_grad():
            return network(torch.from_numpy(x).float(), torch.full((len(x),), float(call.timestep))).numpy()

    *_, last = way.run(denoise, way.start(noise()), noise)
    assert last.x.mean() == pytest.approx(MEAN, abs=0.05)
    assert last.x.std() == pytest.approx(WIDTH, abs=0.08)
    assert student.guidance.scale == 1.0
    assert student.steps == 2


def test_a_process_without_levels_is_refused(tmp_path):
    model = Model.from_module(Affine(), sample_shape=SHAPE, process=RectifiedFlow(), prediction="sample")
    with pytest.raises(BadInput, match="rectified_flow"):
        finish(LCM()(model, context(model, tmp_path)))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"intervals": 1}, {"huber_c": 0.0}, {"guidance": -1.0}])
def test_fields_that_cannot_be_are_refused(wrong):
    with pytest.raises(BadInput, match="of lcm"):
        LCM(**wrong)


def test_the_process_of_the_toys_is_the_one_of_latent_diffusion():
    assert PROCESS.t_max == 1000
