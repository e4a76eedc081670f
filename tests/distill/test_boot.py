"""BOOT: the signal's own way in closed form, a boundary that is the teacher's, and a student of one step."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.boot import BOOT, boot_loss, signal_of  # noqa: E402
from fewstep.export.passes import PASSES  # noqa: E402
from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model import load  # noqa: E402
from fewstep.model.libraries import quiet  # noqa: E402
from fewstep.model.save import save_folder  # noqa: E402
from fewstep.model.training import Denoising, Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.process import EDM, RectifiedFlow  # noqa: E402

from .analytic import PROCESS, context, exact_end, finish, model_of, module  # noqa: E402
from .toys import Gaussian, Knots, drawn, setting_of, turn_of  # noqa: E402

MEAN, WIDTH = 0.7, 0.4
HOW = BOOT(intervals=20)
READS = Denoising(PROCESS, "sample")
QUICK = Training(steps=300, batch=64, rate=3e-2, warm=10, average=0.9, precision="float32")


class Way(torch.nn.Module):
    """The signal y_t = gain(t) noise + offset(t) on the teacher's way, step by step of DDIM from the longest time."""

    def __init__(self, intervals, off=0.0):
        super().__init__()
        times = np.linspace(1000, 0, intervals + 1)
        state, noise_to_signal, f = self.clean(1000.0, 1.0, 0.0), 0.0, 0.0
        self.known = {}
        for t in times:
            alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
            if self.known:
                rho = sigma / alpha / noise_to_signal
                state = rho * state + (1 - rho) * f
            noise_to_signal = sigma / alpha
            f = self.clean(t, alpha * state[0] + sigma, alpha * state[1])
            self.known[max(2, round(t))] = state + off

    def clean(self, t, gain, offset):
        """f(gain noise + offset, t) of N(MEAN, WIDTH^2): its gain and offset."""
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        share = alpha * WIDTH**2 / ((alpha * WIDTH) ** 2 + sigma**2)
        return np.array([share * gain, MEAN + share * (offset - alpha * MEAN)])

    def forward(self, sample, timestep):
        rows = [self.known.get(round(float(t)) + 1, (0.0, 0.0)) for t in timestep]
        gain, offset = torch.tensor(np.array(rows)).float().unbind(1)
        return gain.view(-1, 1, 1, 1) * sample + offset.view(-1, 1, 1, 1)


def test_the_loss_is_nothing_along_the_teachers_way_and_more_beside_it():
    for off, wanted in ((0.0, 0.0), (0.2, None)):
        at = setting_of(Way(20, off), Gaussian(MEAN, WIDTH))
        loss = boot_loss(turn_of(at, batch=512), at, HOW, READS)["signal"].item()
        assert loss < 1e-9 if wanted == 0.0 else loss > 1e-3


def test_the_way_ends_at_the_end_of_the_probability_flow():
    noise = np.linspace(-2, 2, 9)
    errors = []
    for count in (50, 100, 200):
        gain, offset = Way(count).known[2]
        errors.append(abs(gain - WIDTH))
        # the way begins with noise and a touch of data, alpha f(noise), which the flow is not given: 0.02 of it
        assert np.abs(gain * noise + offset - exact_end(noise, 1000.0)).max() < 2 * errors[-1] + 0.025
    assert errors[0] > 1.7 * errors[1] > 2.6 * errors[2]  # of the first order


def test_the_longest_time_is_learned_from_the_teacher_alone():
    way = Way(20)
    wrong = {t: state + (0.5 if t == 1000 else 0.0) for t, state in way.known.items()}
    way.known = wrong
    at = setting_of(way, Gaussian(MEAN, WIDTH))
    begins = replace(HOW, boundary=1 - 1e-9)
    loss = boot_loss(turn_of(at, batch=512), at, begins, READS)["signal"].item()
    noise_too = 0.25 * 2  # gain and offset are both off by a half
    assert abs(loss / noise_too - 1) < 0.1


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_student_begins_with_its_teachers_answer_to_noise(prediction):
    network = Knots(gain=0.3, offset=0.1)
    reads = Denoising(PROCESS, prediction)
    noise, t = torch.randn(4, 16, 1, 1), torch.full((4,), 1000.0)
    with torch.no_grad():
        got = signal_of(reads, network, noise, t, {})
        wanted = Denoising(PROCESS, prediction)(network, noise, t).x0
    assert torch.equal(got, wanted)


def test_a_toy_student_draws_in_one_step_what_its_teacher_draws_in_all(tmp_path):
    model = model_of(Knots(gain=0.05, knots=9))
    job = BOOT(intervals=8, training=QUICK)
    made = finish(job(model, context(model, tmp_path, teacher=model_of(Gaussian(MEAN, WIDTH)))))
    x = drawn(made, sampler="ddim")
    gain, offset = Way(8).known[2]
    assert abs(x.mean() - offset) < 0.01
    assert abs(x.std() - gain) < 0.01
    assert made.steps == 1
    assert not list(tmp_path.glob("latents*"))  # nothing was drawn


@pytest.mark.parametrize(
    ("prediction", "read"), [("v_prediction",) * 2, ("sample",) * 2, ("epsilon", "sample")]
)
def test_its_one_call_is_at_timestep_1_and_read_as_noise(tmp_path, prediction, read):
    model = model_of(Knots(), prediction=prediction)
    job = BOOT(training=replace(QUICK, steps=1, batch=4))
    made = finish(job(model, context(model, tmp_path)))
    (call,) = plan_of(made, "model", 1).calls
    assert (call.timestep, made.prediction) == (1, read)
    assert made.process.alpha(2.0) == pytest.approx(PROCESS.alpha(1000.0), rel=1e-9)
    noise, t = torch.randn(4, 16, 1, 1), torch.full((4,), 2.0)
    with torch.no_grad():
        wanted = signal_of(Denoising(PROCESS, read), module(made), noise, t, {})
        found = Denoising.of(made)(module(made), noise, t).x0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_diffusers_draws_what_the_student_answers(tiny_sd, tmp_path):
    model = load(tiny_sd)
    job = BOOT(latents=Latents(prompts=("a", "b")), training=Training(steps=1, batch=2, precision="float32"))
    made = finish(job(model, context(model, tmp_path / "store")))
    folder = save_folder(made, tmp_path / "out", "float32")
    back = load(folder)
    assert (back.prediction, back.steps, back.guidance.scale) == (made.prediction, 1, 1.0)
    assert plan_of(back, "model", 1) == plan_of(made, "model", 1)
    with quiet():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args))
    found = pipe(
        "a",
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    ((noise, timestep, *_),) = seen
    text, _ = pipe.encode_prompt("a", "cpu", 1, False)
    with torch.no_grad():
        wanted = signal_of(
            Denoising(model.process, made.prediction),
            module(made),
            noise,
            torch.full((1,), 2.0),
            {"encoder_hidden_states": text},
        )
    assert int(timestep) == 1
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("process", "prediction"), [(RectifiedFlow(), "flow"), (EDM(), "sample")])
def test_other_processes_are_refused(tmp_path, process, prediction):
    model = model_of(Knots(), process=process, prediction=prediction)
    with pytest.raises(BadInput, match="reflow"):
        next(BOOT()(model, context(model, tmp_path)))


@pytest.mark.parametrize(
    "fields", [{"intervals": 1}, {"boundary": 0.0}, {"boundary": 1.0}, {"guidance": -1.0}]
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(BadInput, match="boot"):
        BOOT(**fields)


def test_a_recipe_may_name_it():
    assert PASSES["boot"] is BOOT
