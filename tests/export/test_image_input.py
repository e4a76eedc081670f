"""A bundle exported with the VAE's encoder takes pictures."""

import numpy as np
import pytest

from fewstep.runtime import Pipeline
from fewstep.runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def bundle(tiny_sd, tmp_path_factory):
    from fewstep.export import export_bundle

    out = tmp_path_factory.mktemp("image-input") / "tiny-sd"
    *_, done = export_bundle(tiny_sd, "laptop-cpu", out, steps=2, measure_speed=False, image_input=True)
    assert done.manifest.quality["parts"]["vae_encoder"]["snr_db"] > 60
    return done.path


def test_a_picture_is_encoded_as_diffusers_does(bundle, tiny_sd):
    import diffusers
    import torch

    vae = diffusers.AutoencoderKL.from_pretrained(tiny_sd / "vae")
    with Pipeline.from_pretrained(bundle) as pipeline:
        sample = pipeline.manifest.sample
        picture = np.random.default_rng(0).random((sample.height, sample.width, 3)).astype(np.float32)
        pixels = torch.from_numpy(picture.transpose(2, 0, 1)[None] * 2 - 1)
        with torch.no_grad():
            expected = (vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).numpy()
        # everything is kept: what comes out is what went in, encoded
        out = pipeline(
            "a cat",
            image=picture,
            mask_image=np.zeros((sample.height, sample.width)),
            output_type="latent",
            num_inference_steps=2,
            sampler="ddim",
        )
    np.testing.assert_allclose(out.images, expected, atol=1e-4 * np.abs(expected).max())


def test_little_strength_returns_nearly_what_the_vae_makes_of_the_picture(bundle):
    with Pipeline.from_pretrained(bundle) as pipeline:
        sample = pipeline.manifest.sample
        picture = np.full((sample.height, sample.width, 3), 0.5, dtype=np.float32)
        options = {"output_type": "np", "sampler": "ddim", "num_inference_steps": 50}
        through = pipeline("a cat", image=picture, mask_image=np.zeros(picture.shape[:2]), **options).images
        near = pipeline("a cat", image=picture, strength=0.02, **options).images
        far = pipeline("a cat", image=picture, strength=1.0, **options).images
    assert np.abs(near - through).mean() < np.abs(far - through).mean()


def test_a_model_without_a_vae_says_so():
    import diffusers

    from fewstep.model.families import from_pipeline, with_image_encoder

    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(CheckpointError, match="no VAE"):
        with_image_encoder(from_pipeline(pipeline, "pixels"))
