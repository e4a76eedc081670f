"""A pipeline that is brought an image, a mask or an observation."""

from dataclasses import replace

import numpy as np
import pytest

from fewstep.runtime import Pipeline
from fewstep.runtime.conditional import ResidualShift
from fewstep.runtime.errors import BadInput, PlanError
from fewstep.runtime.given import as_mask, as_samples, encode
from fewstep.runtime.manifest import GridSpec, PartSpec, SampleSpec, TensorSpec


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    with Pipeline.from_pretrained(tiny_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def image(pipeline):
    sample = pipeline.manifest.sample
    shape = (1, sample.channels, sample.height // sample.factor, sample.width // sample.factor)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


COMMON = {
    "output_type": "latent",
    "seed": 3,
    "guidance_scale": 2.0,
    "num_inference_steps": 10,
    "sampler": "ddim",
}


def test_image_to_image_is_diffusers(pipeline, tiny_sd, image):
    import diffusers
    import torch

    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tiny_sd, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    config = {**theirs.scheduler.config, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    theirs.scheduler = diffusers.DDIMScheduler.from_config(config)
    grid = replace(pipeline.manifest.grid, spacing="trailing", final="clean")
    ours = Pipeline(replace(pipeline.bundle, manifest=replace(pipeline.manifest, grid=grid)))
    mine = ours("a cat", image=image, strength=0.6, **COMMON).images
    other = theirs(
        "a cat",
        image=torch.from_numpy(image),
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    assert np.abs(mine - other.numpy()).max() < 5e-3 * np.abs(mine).max()


def test_strength_decides_how_many_steps_are_run(pipeline, image):
    assert len(pipeline("a cat", image=image, **COMMON).plan.calls) == 8  # 0.8, as in diffusers
    assert len(pipeline("a cat", image=image, strength=0.25, **COMMON).plan.calls) == 2


def test_a_mask_keeps_what_is_dark_exactly(pipeline, image):
    cells = image.shape[2:]
    mask = np.zeros(cells, dtype=bool)
    mask[:, : cells[1] // 2] = True
    out = pipeline("a cat", image=image, mask_image=mask, **COMMON)
    assert len(out.plan.calls) == 10
    np.testing.assert_array_equal(out.images[..., cells[1] // 2 :], image[..., cells[1] // 2 :])
    assert np.abs(out.images - image)[..., : cells[1] // 2].mean() > 0.1


def test_an_observation_is_fed_to_the_plan(pipeline, image):
    process = ResidualShift()
    own = {"process": process.to_json(), "prediction": "sample", "plans": {}, "grid": GridSpec()}
    manifest = replace(pipeline.manifest, **own)
    ours = Pipeline(replace(pipeline.bundle, manifest=manifest))
    settings = {"output_type": "latent", "num_inference_steps": 4, "sampler": "reverse_chain"}
    one = ours("a cat", observation=image, **settings)
    assert one.plan.givens == 1
    assert [call.t for call in one.plan.calls] == [4, 3, 2, 1]
    other = ours("a cat", observation=2 * image, **settings)
    assert np.abs(one.images - other.images).max() > 1e-3
    with pytest.raises(PlanError, match="0 given arrays"):
        ours("a cat", **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "without image"),
        ({"mask_image": np.zeros((8, 8))}, "without image"),
        ({"image": np.zeros((1, 4, 3, 3), dtype=np.float32)}, "image of shape"),
        ({"image": "cat.png"}, "image of shape"),
        ({"image": True, "strength": 0.01}, "strength"),
        ({"image": True, "mask_image": np.zeros((3, 5))}, "mask of shape"),
        ({"image": True, "plan": "default"}, "one or the other"),
    ],
)
def test_what_cannot_be_used_is_refused(pipeline, image, options, message):
    if options.get("image") is True:
        options = {**options, "image": image}
    steps = {} if "plan" in options else {"num_inference_steps": 10, "sampler": "ddim"}
    with pytest.raises(BadInput, match=message):
        pipeline("a cat", **steps, **options)


def test_a_picture_needs_an_encoder(pipeline):
    sample = pipeline.manifest.sample
    picture = np.zeros((sample.height, sample.width, 3), dtype=np.uint8)
    if "vae_encoder" not in pipeline.manifest.parts:
        with pytest.raises(BadInput, match="vae_encoder"):
            pipeline("a cat", image=picture, **COMMON)


# arrays


PIXELS = SampleSpec(height=4, width=6, channels=3)


def test_pictures_become_samples_of_a_pixel_model():
    from PIL import Image

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    expected = (picture.transpose(2, 0, 1)[None] / 255 * 2 - 1).astype(np.float32)
    for form in (picture, picture / 255, Image.fromarray(picture), [Image.fromarray(picture)] * 2, expected):
        got = as_samples(form, 2, (3, 4, 6), PIXELS, lambda x: x, "image")
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, np.repeat(expected, 2, 0), atol=1e-6)


def test_masks_paint_every_cell_with_a_light_pixel():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[3, 5] = 255
    expected = np.ones((1, 1, 4, 4))
    expected[0, 0, 1, 2] = 0
    for form in (mask, mask[None], mask / 255, mask > 0, mask.reshape(1, 1, 8, 8)):
        np.testing.assert_array_equal(as_mask(form, 3, (4, 4, 4), 2), expected)
    np.testing.assert_array_equal(as_mask(1 - expected[0, 0], 3, (4, 4, 4), 2), expected)


def test_encoding_is_the_inverse_of_the_decoders_scaling():
    class Session:
        def run(self, feeds, outputs):
            return {"latent": feeds["sample"][:, :, ::2, ::2] * 3}

    spec = PartSpec(
        "onnxruntime",
        "vae_encoder/model.onnx",
        (TensorSpec("sample", "float32", ("batch", 3, "height", "width")),),
        (TensorSpec("latent", "float32", ("batch", 3, "h", "w")),),
    )
    sample = SampleSpec(height=4, width=6, channels=3, factor=2, scaling_factor=0.25, shift_factor=0.1)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
    latent = encode(Session(), spec, sample, pixels)
    np.testing.assert_allclose(latent / 0.25 + 0.1, pixels[:, :, ::2, ::2] * 3, rtol=1e-5, atol=1e-6)
