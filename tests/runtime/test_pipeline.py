"""A bundle draws what diffusers draws, and says clearly what it cannot."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from fewstep.runtime import Pipeline, randn
from fewstep.runtime.errors import BadInput, Cancelled, PlanError

CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    with Pipeline.from_pretrained(tiny_bundle) as opened:
        yield opened


def psnr(a, b):
    return 10 * np.log10(1 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-20))


@pytest.mark.parametrize("sampler", CLASSES)
def test_the_same_seed_gives_diffusers_image(pipeline, tiny_sd, sampler):
    import diffusers
    import torch

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    # the one spacing on which all of diffusers' schedulers agree
    config = {**theirs.scheduler.config, "timestep_spacing": "trailing"}
    theirs.scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config)
    grid = replace(pipeline.manifest.grid, spacing="trailing")
    ours = Pipeline(replace(pipeline.bundle, manifest=replace(pipeline.manifest, grid=grid)))
    sample = pipeline.manifest.sample
    common = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    mine = ours("a cat", sampler=sampler, seed=3, **common).images[0]
    generator = torch.Generator().manual_seed(3)
    other = theirs("a cat", generator=generator, height=sample.height, width=sample.width, **common).images[0]
    assert psnr(mine, other) >= 50


def test_the_default_plan_is_the_models_own_scheduler(pipeline, tiny_sd):
    import diffusers
    import torch

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    sample = pipeline.manifest.sample
    steps = pipeline.plan().steps
    mine = pipeline("a dog", seed=5, guidance_scale=2.0, output_type="np").images[0]
    other = theirs(
        "a dog",
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5),
        height=sample.height,
        width=sample.width,
        output_type="np",
    ).images[0]
    assert psnr(mine, other) >= 50


def test_a_batch_is_its_images_one_by_one(pipeline):
    together = pipeline(["a cat", "a dog"], num_inference_steps=2, seed=10, output_type="latent").images
    alone = pipeline("a dog", num_inference_steps=2, seed=11, output_type="latent").images
    np.testing.assert_allclose(together[1:], alone, atol=1e-4)


def test_several_images_of_a_prompt_take_successive_seeds(pipeline):
    out = pipeline("a cat", num_inference_steps=1, num_images_per_prompt=3, seed=4, output_type="latent")
    assert out.seeds == (4, 5, 6)
    assert len(out.images) == 3


def test_given_latents_replace_the_noise(pipeline):
    sample = pipeline.manifest.sample
    shape = (1, sample.channels, sample.height // sample.factor, sample.width // sample.factor)
    common = {"num_inference_steps": 2, "output_type": "latent"}
    seeded = pipeline("a cat", seed=9, **common).images
    given = pipeline("a cat", latents=randn(shape, 9), **common).images
    np.testing.assert_array_equal(seeded, given)


def test_pil_images_have_the_size_asked_for(pipeline):
    sample = pipeline.manifest.sample
    image = pipeline("a cat", num_inference_steps=1).images[0]
    assert image.size == (sample.width, sample.height)
    wide = pipeline("a cat", num_inference_steps=1, width=sample.width + sample.multiple).images[0]
    assert wide.size == (sample.width + sample.multiple, sample.height)


def test_guidance_one_needs_no_second_prediction(pipeline):
    one = pipeline(
        "a cat", negative_prompt="a dog", guidance_scale=1.0, num_inference_steps=2, output_type="latent"
    )
    two = pipeline(
        "a cat", negative_prompt="a bird", guidance_scale=1.0, num_inference_steps=2, output_type="latent"
    )
    np.testing.assert_array_equal(one.images, two.images)


def test_low_memory_draws_the_same_and_keeps_nothing_open(pipeline, tiny_bundle):
    frugal = Pipeline.from_pretrained(tiny_bundle, low_memory=True)
    common = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
    np.testing.assert_array_equal(frugal("a cat", **common).images, pipeline("a cat", **common).images)
    assert frugal._sessions == {}


def test_every_step_can_be_previewed(pipeline):
    sample = pipeline.manifest.sample
    previews = [
        pipeline.decode(step.x0)
        for step in pipeline.generate("a cat", num_inference_steps=2, output_type="latent")
    ]
    assert [p.shape for p in previews] == [(1, sample.height, sample.width, 3)] * 2


def test_a_callback_can_interrupt(pipeline):
    seen = []

    def stop(pipe, index, timestep, tensors):
        seen.append((index, tensors["latents"].shape[0]))
        pipe.interrupt()

    with pytest.raises(Cancelled, match="after step 1"):
        pipeline("a cat", num_inference_steps=3, callback_on_step_end=stop)
    assert seen == [(0, 1)]


def test_steps_say_which_timestep_they_came_from(pipeline):
    steps = list(pipeline.generate("a cat", num_inference_steps=4, sampler="ddim", output_type="latent"))
    assert [step.timestep for step in steps] == [call.timestep for call in pipeline.plan(4, "ddim").calls]
    assert [(step.index, step.steps) for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_timings_add_up(pipeline):
    timings = pipeline("a cat", num_inference_steps=2).timings
    assert len(timings["step"]) == 2
    assert timings["text"] + timings["denoise"] + timings["decode"] <= timings["total"] * 1.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "no prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": "cat " * 200}, "shorten it by"),
        ({"height": 13}, "multiples of"),
        ({"height": -8}, "multiples of"),
        ({"width": 65536}, "up to 4096"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"output_type": "tensor"}, "pil, np or latent"),
        ({"num_images_per_prompt": 0}, "1 or more"),
        ({"num_images_per_prompt": 100}, "at most 64"),
        ({"class_labels": 3}, "class labels"),
        ({"latents": np.zeros((1, 2, 3, 4))}, "latents of shape"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_refused_before_any_work(pipeline, arguments, message):
    with pytest.raises(BadInput, match=message):
        pipeline(**{"prompt": "a cat", "num_inference_steps": 1, **arguments})


@pytest.mark.parametrize("steps", [0, -3, 10**6])
def test_a_foolish_number_of_steps_is_refused(pipeline, steps):
    with pytest.raises(PlanError, match="1 to 1000"):
        pipeline("a cat", num_inference_steps=steps)


def test_an_unknown_sampler_names_the_known_ones(pipeline):
    with pytest.raises(PlanError, match="dpmpp_2m"):
        pipeline("a cat", sampler="magic")


def imported_by(code):
    show = "import sys; print(*sorted({m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    return {name for name in out.stdout.split() if not name.startswith("_")}


def test_importing_the_runtime_imports_numpy_and_nothing_else():
    ours = imported_by("import fewstep.runtime, fewstep.runtime.pipeline") - imported_by("pass")
    assert ours == {"fewstep", "numpy"}


def test_a_run_never_imports_torch(tiny_bundle):
    code = (
        f"from fewstep.runtime import Pipeline; Pipeline.from_pretrained({str(tiny_bundle)!r})('a', seed=1)"
    )
    assert not imported_by(code) & {"torch", "diffusers", "transformers", "onnx"}


def test_auto_minds_guidance(pipeline):
    assert pipeline.plan(6, "auto", guidance_scale=1.0).sampler == "auto"
    assert pipeline.plan(6, "auto", guidance_scale=4.0).sampler == "auto_guided"
