"""Progressive distillation: one step for two in closed form, its stages, and that a student of few steps learns."""

from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.progressive import Progressive, progressive_loss  # noqa: E402
from fewstep.distill.student import Setting  # noqa: E402
from fewstep.distill.times import drawn_times, stage_times  # noqa: E402
from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model.training import Denoising, Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import EDM, RectifiedFlow  # noqa: E402

from .analytic import PROCESS, SHAPE, Affine, context, finish, model_of, module, samples_of, turn_of, walk  # noqa: E402

LATENTS = Latents(number=256, sampler="ddim", steps=8, precision="float32")
TRAINED = Training(steps=250, batch=64, rate=2e-2, warm=10, average=0.9, precision="float32")


def halved(teacher, times):
    """The network whose one step from times[i] is the teacher's two, i even."""
    network = Affine()
    with torch.no_grad():
        for t, middle, s in zip(times[:-2:2], times[1:-1:2], times[2::2], strict=True):
            gain, offset = 1.0, 0.0
            for begin, end in pairwise((t, middle, s)):
                a, b = (
                    float(table.detach()[..., int(begin) - 1].squeeze()) for table in (teacher.a, teacher.b)
                )
                step, rest = terms(begin, end)
                gain, offset = gain * (step + rest * a), offset * (step + rest * a) + rest * b
            step, rest = terms(t, s)
            network.a[int(t) - 1], network.b[0, int(t) - 1] = (gain - step) / rest, offset / rest
    return network


def terms(t, s):
    """x_s = step x_t + rest x0 of DDIM."""
    step = PROCESS.sigma(s) / PROCESS.sigma(t)
    return step, PROCESS.alpha(s) - step * PROCESS.alpha(t)


def setting(network, teacher):
    model = model_of(network)
    return Setting(
        model, Denoising.of(model), module(model), module(model_of(teacher)), 1.0, samples_of(model), "key"
    )


def test_the_loss_is_nothing_where_one_step_is_two():
    teacher, times = Affine(), stage_times(model_of(Affine()), 4)
    at = setting(halved(teacher, times), teacher)
    right = progressive_loss(turn_of(at.samples, at.student), at, times)["squared"]
    at = setting(Affine(), teacher)
    wrong = progressive_loss(turn_of(at.samples, at.student), at, times)["squared"]
    assert right.item() < 1e-9 < 1e-3 < wrong.item()


def test_errors_at_little_noise_weigh_with_the_signal():
    teacher, times = Affine(), stage_times(model_of(Affine()), 4)
    at = setting(halved(teacher, times), teacher)
    with torch.no_grad():
        at.student.module.b += 0.1  # the same error everywhere
    loss = progressive_loss(turn_of(at.samples, at.student, batch=4096), at, times)["squared"]
    t = drawn_times(at.model, 4)[:-1]
    weights = np.maximum(1, (PROCESS.alpha(t) / PROCESS.sigma(t)) ** 2)
    assert weights.max() > 1.5
    assert abs(loss.item() / (0.01 * weights.mean()) - 1) < 0.05


def test_stages_halve_and_the_last_is_drawn_at_the_times_it_learned():
    assert Progressive(steps=4, start=32).stages == (16, 8, 4)
    model = model_of(Affine())
    for steps in (16, 8, 4):
        times = stage_times(model, steps)
        assert len(times) == 2 * steps + 1
        assert set(stage_times(model, steps // 2)) == set(times[::2])
    assert list(times[::2]) == list(drawn_times(model, 4))


def test_a_student_of_four_steps_ends_where_sixteen_of_the_teacher_end(tmp_path):
    model = model_of(Affine())
    job = Progressive(steps=4, start=16, latents=LATENTS, training=TRAINED)
    made = finish(job(model, context(model, tmp_path)))
    x = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(1))
    end = walk(model, module(model), x, stage_times(model, 8))
    few = drawn_times(model, 4)
    before = (walk(model, module(model), x, few) - end).square().mean().sqrt().item()
    after = (walk(made, module(made), x, few) - end).square().mean().sqrt().item()
    assert after < 0.2 * before
    assert made.steps == 4
    assert [call.t for call in plan_of(made, "model", 4).calls] == list(few[:-1])
    assert set(made.history[-1]["stages"]) == {"8", "4"}


def test_a_finished_stage_is_not_trained_again(tmp_path):
    model = model_of(Affine())
    job = Progressive(
        steps=4, start=16, latents=LATENTS, training=Training(steps=3, batch=4, precision="float32")
    )
    first = finish(job(model, context(model, tmp_path)))
    (last,) = tmp_path.glob("progressive-4-*.checkpoint")
    (kept,) = tmp_path.glob("progressive-8-*.checkpoint")
    last.unlink()
    written = kept.stat().st_mtime_ns
    again = finish(job(model, context(model, tmp_path)))
    assert kept.stat().st_mtime_ns == written
    for one, other in zip(module(first).parameters(), module(again).parameters(), strict=True):
        assert torch.equal(one, other)


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, sample, timestep):
        return self.weight * sample


def test_a_flow_is_halved_on_even_times_and_drawn_on_them(tmp_path):
    model = model_of(Line(), process=RectifiedFlow(), prediction="flow")
    job = Progressive(
        steps=2, start=4, latents=LATENTS, training=Training(steps=2, batch=2, precision="float32")
    )
    made = finish(job(model, context(model, tmp_path)))
    assert [call.t for call in plan_of(made, "model", 2).calls] == [1.0, 0.5]


def test_a_model_whose_grids_do_not_nest_is_refused(tmp_path):
    model = model_of(Line(), process=EDM(), prediction="sample")
    with pytest.raises(BadInput, match="are no half of its"):
        next(Progressive(steps=2, start=4)(model, context(model, tmp_path)))


@pytest.mark.parametrize("start", [4, 6, 12, 2, 30])
def test_only_halvings_lead_from_start_to_steps(start):
    with pytest.raises(BadInput, match="steps times 2, 4, 8"):
        Progressive(steps=4, start=start)
