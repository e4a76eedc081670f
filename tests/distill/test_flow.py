"""Rectified flow: other processes read as flows, the loss of straight pairs, and students that draw in one step."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.flow import (  # noqa: E402
    FlowGuided,
    Reflow,
    flow_guided_loss,
    flow_of,
    flow_scheduler,
    reflow_loss,
)
from fewstep.distill.student import Setting  # noqa: E402
from fewstep.export.passes import PASSES  # noqa: E402
from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model import load  # noqa: E402
from fewstep.model.libraries import quiet  # noqa: E402
from fewstep.model.save import save_folder  # noqa: E402
from fewstep.model.training import Denoising, Latents, Training, given_samples, prepare_samples  # noqa: E402
from fewstep.model.trajectories import trajectories  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402
from fewstep.runtime.noise import Noise  # noqa: E402
from fewstep.runtime.process import RectifiedFlow  # noqa: E402

from .analytic import PROCESS, SHAPE, context, finish, model_of, module  # noqa: E402
from .toys import Gaussian, Knots, drawn  # noqa: E402
from .toys import turn_of as large_turn_of  # noqa: E402

MEAN, WIDTH = 0.7, 0.4
FLOW = Denoising(RectifiedFlow(), "flow")
LATENTS = Latents(number=256, sampler="dpmpp_2m", steps=16, precision="float32")
QUICK = Training(steps=150, batch=32, rate=5e-2, warm=10, average=0.9, precision="float32")


def turn_of(at, batch=256):
    return large_turn_of(at, batch)


class Straight(torch.nn.Module):
    """The flow of pairs x0 = mean + width z: noise is known from any point of a line, so that v = z - x0 is exact."""

    def __init__(self, mean=MEAN, width=WIDTH):
        super().__init__()
        self.mean, self.width = (torch.nn.Parameter(torch.tensor(value)) for value in (mean, width))

    def forward(self, sample, timestep):
        t = timestep.view(-1, 1, 1, 1) / 1000
        z = (sample - (1 - t) * self.mean) / ((1 - t) * self.width + t)
        return (1 - self.width) * z - self.mean


class Bent(torch.nn.Module):
    """The flow of the same data and noise of no pair: the mean of noise - x0 over all that may have led there."""

    def forward(self, sample, timestep):
        t = timestep.view(-1, 1, 1, 1) / 1000
        spread = ((1 - t) * WIDTH) ** 2 + t**2
        return (t - (1 - t) * WIDTH**2) / spread * (sample - (1 - t) * MEAN) - MEAN


def paired(model, number=256):
    """Samples of which every latent is mean + width times the noise of its seed."""
    seeds = np.arange(number)
    latents = np.stack([MEAN + WIDTH * Noise(int(seed)).randn(SHAPE) for seed in seeds])
    return replace(given_samples(model, latents.astype(np.float32), [None] * number), seeds=seeds)


def setting(student, teacher, **more):
    model = model_of(teacher, **more)
    return Setting(model, Denoising.of(model), student, module(model), 1.0, paired(model), "key")


def test_the_loss_is_nothing_for_the_flow_of_the_pairs_and_more_for_another():
    at = setting(Straight(), Gaussian(MEAN, WIDTH))
    right = reflow_loss(turn_of(at), FLOW)["squared"]
    wrong = replace(at, student=Straight(MEAN + 0.1))
    assert right.item() < 1e-10
    # the error is 0.1 over (1 - t) width + t, whose mean square over t is 0.01 / width
    assert abs(reflow_loss(turn_of(wrong), FLOW)["squared"].item() / (0.01 / WIDTH) - 1) < 0.1


def test_noise_of_no_pair_is_plain_flow_matching():
    """Its best velocity is the mean over all noises that may have led there."""

    mean = setting(Bent(), Gaussian(MEAN, WIDTH))
    straight = replace(mean, student=Straight())

    def loss(at, beta):
        with torch.no_grad():
            return reflow_loss(turn_of(at), FLOW, beta)["squared"].item()

    assert loss(mean, 1.0) < 0.8 * loss(straight, 1.0)
    assert loss(straight, 0.0) < 1e-10 < loss(mean, 0.0)


def test_noise_anneals_to_that_of_the_pairs():
    job = Reflow(anneal=0.5)
    assert [job.beta(share) for share in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0]
    assert Reflow(anneal=0.0).beta(0.0) == 0.0


def test_flow_guided_loss_is_nothing_on_the_lines_of_the_flow():
    at = setting(Straight(), Gaussian(MEAN, WIDTH))
    right = flow_guided_loss(turn_of(at), FLOW, Straight(), 1.0)
    assert set(right) == {"pairs", "flow"}
    assert sum(right.values()).item() < 1e-10
    at = setting(Straight(MEAN + 0.3), Gaussian(MEAN, WIDTH))
    wrong = flow_guided_loss(turn_of(at), FLOW, Straight(), 1.0)
    assert abs(wrong["pairs"].item() - 0.09) < 1e-4
    assert 0 < wrong["flow"].item() < 0.09  # the flow leads part of the way back
    assert set(flow_guided_loss(turn_of(at), FLOW, Straight(), 0.0)) == {"pairs"}


def test_a_flow_that_is_not_straight_would_lead_off_the_pairs():
    at = setting(Straight(), Gaussian(MEAN, WIDTH))
    losses = flow_guided_loss(turn_of(at), FLOW, Bent(), 1.0)
    assert losses["pairs"].item() < 1e-10 < 1e-2 < losses["flow"].item()


@pytest.fixture(scope="module")
def reflowed(tmp_path_factory):
    """A flow of a discrete teacher, the teacher, and the store the pairs lie in."""
    store = tmp_path_factory.mktemp("flow")
    teacher, student = model_of(Gaussian(MEAN, WIDTH)), model_of(Knots(gain=0.0, knots=17))
    job = Reflow(steps=2, latents=LATENTS, training=QUICK)
    return finish(job(student, context(student, store, teacher=teacher))), teacher, store


def ends(model, steps, noise):
    """What the model's own plan draws of the noise."""
    way, network = plan_of(model, "model", steps), module(model)

    def denoise(x, t):
        with torch.no_grad():
            v = network(torch.from_numpy(x).float(), torch.full((len(x),), float(t.timestep)))
        return x - float(t) * v.numpy()

    *_, last = way.run(denoise, way.start(noise), None)
    return last.x


def unseen(teacher, store):
    """Noise, and what the teacher draws of it, that no student has learned on: [64, ...] each."""
    batch = finish(prepare_samples(teacher, replace(LATENTS, number=320), store)).take(np.arange(256, 320))
    return batch.start().numpy(), batch.x0.numpy()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_reflowed_student_goes_where_its_teacher_goes_in_any_number_of_steps(reflowed, steps):
    made, teacher, store = reflowed
    noise, wanted = unseen(teacher, store)
    assert np.sqrt(((ends(made, steps, noise) - wanted) ** 2).mean()) < 0.03


def test_it_says_that_it_is_a_flow(reflowed):
    made, teacher, _ = reflowed
    assert (made.process, made.prediction, made.steps) == (RectifiedFlow(), "flow", 2)
    assert made.history[-1]["pass"] == "Reflow"
    calls = plan_of(made, "model", 4).calls
    assert [call.t for call in calls] == pytest.approx([1, 0.75, 0.5, 0.25], abs=1.1e-3)
    assert [call.timestep for call in calls] == [999, 749, 499, 249]
    assert teacher.process is PROCESS


def test_a_flow_becomes_a_generator_of_one_step_with_the_same_pairs(reflowed):
    made, teacher, store = reflowed
    (latents,) = store.glob("latents-*")
    job = FlowGuided(latents=LATENTS, training=replace(QUICK, steps=60, rate=5e-3))
    once = finish(job(made, context(made, store, teacher=teacher)))
    assert list(store.glob("latents-*")) == [latents]
    assert (once.process, once.prediction, once.steps) == (made.process, "flow", 1)
    assert once.scheduler == made.scheduler
    noise, wanted = unseen(teacher, store)
    assert np.sqrt(((ends(once, 1, noise) - wanted) ** 2).mean()) < 0.03


def test_latents_know_the_noise_they_were_drawn_from(reflowed, tmp_path):
    _, teacher, _ = reflowed
    samples = finish(prepare_samples(teacher, replace(LATENTS, number=64), tmp_path))
    batch = samples.take(np.arange(64))
    z, x = (one.flatten().numpy() for one in (batch.start(), batch.x0))
    assert np.corrcoef(z, x)[0, 1] > 1 - 1e-6  # a Gaussian's way to the data is affine


def test_a_flow_keeps_its_own_process_and_is_drawn_at_even_times(tmp_path):
    model = model_of(Knots(gain=0.0), process=RectifiedFlow(), prediction="flow")
    job = Reflow(steps=2, latents=LATENTS, training=replace(QUICK, steps=2))
    made = finish(job(model, context(model, tmp_path)))
    assert made.scheduler is None
    assert [call.t for call in plan_of(made, "model", 2).calls] == [1.0, 0.5]
    assert drawn(made, count=16).shape == (16, *SHAPE)


@pytest.mark.parametrize("sampler", ["lcm", "euler_ancestral"])
def test_a_sampler_with_noise_of_its_own_makes_no_pairs(tmp_path, sampler):
    model = model_of(Knots())
    with pytest.raises(BadInput, match="first noise decides"):
        next(Reflow(latents=replace(LATENTS, sampler=sampler))(model, context(model, tmp_path)))


def test_only_a_flow_is_flow_guided(tmp_path):
    model = model_of(Knots())
    with pytest.raises(BadInput, match="reflow first"):
        next(FlowGuided(latents=LATENTS)(model, context(model, tmp_path)))


@pytest.mark.parametrize("fields", [{"steps": 0}, {"anneal": 1.5}, {"anneal": -0.1}, {"guidance": -1.0}])
def test_fields_of_reflow_out_of_range_are_refused(fields):
    with pytest.raises(BadInput, match="reflow"):
        Reflow(**fields)


@pytest.mark.parametrize("fields", [{"weight": -1.0}, {"guidance": -1.0}])
def test_fields_of_flow_guided_out_of_range_are_refused(fields):
    with pytest.raises(BadInput, match="flow_guided"):
        FlowGuided(**fields)


def test_recipes_may_name_both():
    assert (PASSES["reflow"], PASSES["flow_guided"]) == (Reflow, FlowGuided)


@pytest.fixture(scope="module")
def straightened(tiny_sd, tmp_path_factory):
    """A diffusers checkpoint of discrete levels, as a flow's folder, and what was written."""
    model, folder = load(tiny_sd), tmp_path_factory.mktemp("straight")
    job = Reflow(
        steps=2,
        latents=Latents(number=4, steps=2, precision="float32", prompts=("a", "b")),
        training=Training(steps=2, batch=2, precision="float32"),
    )
    made = finish(job(model, context(model, folder)))
    return save_folder(made, folder / "out", "float32"), made


def test_a_flow_is_read_back_from_its_diffusers_folder(straightened):
    folder, made = straightened
    back = load(folder)
    assert (back.process, back.prediction, back.steps) == (made.process, "flow", 2)
    assert back.grid == made.grid
    assert plan_of(back, "model", 2) == plan_of(made, "model", 2)
    assert flow_of(back) == back.process
    assert flow_scheduler(back.process)["num_train_timesteps"] == 1000


def test_diffusers_draws_what_the_plan_draws(straightened):
    folder, made = straightened
    with quiet():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        wanted = pipe(
            "a", num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="latent"
        ).images
    way = plan_of(made, "model", 2)
    (one,) = trajectories(made, way, [3], prompts=["a"], guidance=1.0, calls=False)
    factor = pipe.vae.config.scaling_factor
    found = torch.from_numpy(one.latent)
    assert min((found - wanted).abs().max(), (found * factor - wanted).abs().max()) < 1e-3


@pytest.mark.slow
def test_it_ships(straightened, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs an engine")
    from fewstep.export import export_bundle

    folder, _ = straightened
    *_, done = export_bundle(folder, "laptop-cpu", tmp_path / "bundle", measure_speed=False)
    assert (done.manifest.process["kind"], done.manifest.prediction) == ("rectified_flow", "flow")
    assert [call["timestep"] for call in done.manifest.plans["default"]["calls"]] == [999, 499]
