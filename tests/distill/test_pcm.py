"""Phased consistency: its closed forms on Gaussian data, the edges of its phases, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.pcm import PCM, Phases, jump, pcm_loss  # noqa: E402
from fewstep.distill.student import Setting, few_step_scheduler  # noqa: E402
from fewstep.distill.times import drawn_times  # noqa: E402
from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model.training import Denoising, Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import EDM, RectifiedFlow  # noqa: E402

from . import analytic  # noqa: E402
from .analytic import PROCESS, Affine, context, finish, model_of, module, samples_of, turn_of, walk  # noqa: E402

TRAINED = Training(steps=400, batch=64, rate=2e-2, warm=10, decay="cosine", average=0.9, precision="float32")
LATENTS = Latents(number=256, sampler="ddim", steps=8, precision="float32")


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, sample, timestep):
        return self.weight * sample


def setting(network, teacher=None):
    model = model_of(network)
    teacher = module(model if teacher is None else model_of(teacher))
    return Setting(model, Denoising.of(model), module(model), teacher, 1.0, samples_of(model), "key")


def leaps(teacher, phases):
    """The network whose jump is exactly where the teacher's own steps of the grid lead: affine steps compose."""
    network = Affine()
    alpha, sigma = PROCESS.alpha, PROCESS.sigma
    with torch.no_grad():
        for t, edge in zip(phases.t, phases.edge, strict=True):
            gain, offset, at = 1.0, 0.0, t
            while at > edge:
                (s,) = phases.s[(phases.t == at)]
                a, b = (float(table.detach()[..., int(at) - 1].squeeze()) for table in (teacher.a, teacher.b))
                step = sigma(s) / sigma(at)
                rest = alpha(s) - step * alpha(at)
                gain, offset, at = gain * (step + rest * a), offset * (step + rest * a) + rest * b, s
            step = sigma(edge) / sigma(t)
            rest = alpha(edge) - step * alpha(t)
            network.a[int(t) - 1], network.b[0, int(t) - 1] = (gain - step) / rest, offset / rest
    return network


def test_the_loss_is_nothing_for_the_exact_jump_and_something_for_any_other():
    teacher, how = Affine(), PCM(steps=4, intervals=20)
    phases = Phases.of(PROCESS, drawn_times(model_of(teacher), 4), 20)
    exact, off = setting(leaps(teacher, phases), teacher), setting(Affine(), teacher)
    right = pcm_loss(turn_of(exact.samples, exact.student), exact, how, [phases])["huber"]
    wrong = pcm_loss(turn_of(off.samples, off.student), off, how, [phases])["huber"]
    assert right.item() < 1e-6 < 1e-4 < wrong.item()


def test_a_jump_to_where_it_stands_changes_nothing_whatever_the_network():
    model = model_of(Affine(width=2.0))
    x = torch.randn(5, *analytic.SHAPE)
    t = torch.tensor([1000.0, 750.0, 250.0, 3.0, 0.0])
    assert torch.equal(jump(module(model), Denoising.of(model), x, t, t, {}), x)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_edges_are_the_times_that_the_plan_calls_the_network_at(steps):
    model = model_of(Affine())
    scheduler = few_step_scheduler(model, "DDIMScheduler")
    edges = drawn_times(model, steps)
    calls = plan_of(replace(model, scheduler=scheduler), "model", steps).calls
    assert [call.t for call in calls] == list(edges[:-1])
    phases = Phases.of(PROCESS, edges, 50)
    assert sorted(set(phases.edge)) == sorted(edges[1:])
    assert set(edges[:-1]) <= set(phases.t)


@pytest.mark.parametrize("process", [RectifiedFlow(), EDM()])
def test_students_of_other_processes_are_drawn_at_the_edges_too(process, tmp_path):
    prediction = "flow" if isinstance(process, RectifiedFlow) else "sample"
    model = model_of(Line(), process=process, prediction=prediction)
    short = Training(steps=2, batch=2, precision="float32")
    made = finish(PCM(steps=3, latents=LATENTS, training=short)(model, context(model, tmp_path)))
    edges = drawn_times(model, 3)
    assert np.allclose([call.t for call in plan_of(made, "model", 3).calls], edges[:-1])
    if isinstance(process, RectifiedFlow):
        assert np.allclose(edges, [1, 2 / 3, 1 / 3, 0])


def test_a_trained_student_goes_in_its_steps_where_the_teacher_goes_in_fifty(tmp_path):
    model = model_of(Affine())
    job = PCM(steps=4, intervals=20, latents=LATENTS, training=TRAINED)
    made = finish(job(model, context(model, tmp_path)))
    x = torch.randn(256, *analytic.SHAPE, generator=torch.Generator().manual_seed(1))
    end = walk(model, module(model), x, drawn_times(model, 50))
    before = (walk(model, module(model), x, drawn_times(model, 4)) - end).square().mean().sqrt()
    after = (walk(made, module(made), x, drawn_times(model, 4)) - end).square().mean().sqrt()
    assert float(after) < 0.3 * float(before)
    assert made.steps == 4
    assert made.history[-1]["pass"] == "PCM"
    assert torch.equal(module(model).module.a, Affine().a)  # the teacher is as it was


def test_segments_grow_fewer_over_the_training():
    teacher, how = Affine(), PCM(steps=2, segments=(8, 4, 2))
    at, seen = setting(Affine(), teacher), []
    phases = [Phases.of(PROCESS, drawn_times(at.model, count), 40) for count in how.segments]

    class Watching:
        def __init__(self, phases):
            self.phases = phases

        def __len__(self):
            return len(self.phases)

        def __getitem__(self, number):
            seen.append(number)
            return self.phases[number]

    for share in (0.0, 0.3, 0.4, 0.6, 0.7, 0.99):
        pcm_loss(turn_of(at.samples, at.student, share=share), at, how, Watching(phases))
    assert seen == [0, 0, 1, 1, 2, 2]


def test_a_student_that_keeps_guidance_is_still_drawn_with_it(tmp_path):
    model = model_of(Affine(means=(0.3, -0.5, 0.0)), classes=2, guidance=2.0)
    short = Training(steps=2, batch=4, precision="float32")
    kept, fixed = (
        finish(PCM(guided=guided, latents=LATENTS, training=short)(model, context(model, tmp_path)))
        for guided in (True, False)
    )
    assert (kept.guidance.scale, fixed.guidance.scale) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps of pcm: 0"),
        ({"intervals": 1}, "intervals of pcm: 1"),
        ({"segments": (8, 4)}, "segments [8, 4] of pcm for 2 steps"),
        ({"huber_c": 0.0}, "huber_c 0.0"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(BadInput) as refused:
        PCM(**{"steps": 2, **fields})
    assert said in str(refused.value)


def test_steps_that_do_not_divide_the_levels_are_refused_before_anything_is_drawn(tmp_path):
    model = model_of(Affine())
    with pytest.raises(BadInput, match="3 steps of toy, which has 1000 noise levels"):
        next(PCM(steps=3)(model, context(model, tmp_path)))
    assert not list(tmp_path.iterdir())


def test_keeping_guidance_needs_a_model_that_has_it(tmp_path):
    model = model_of(Affine())
    with pytest.raises(BadInput, match="knows no guidance"):
        next(PCM(guided=True)(model, context(model, tmp_path)))
