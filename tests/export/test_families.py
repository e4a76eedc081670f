"""Pipelines of diffusers other than text to image: each becomes a bundle that draws diffusers' own image."""

import pytest
import torch

from fewstep.export import export_bundle
from fewstep.runtime import Pipeline
from fewstep.runtime.bundle import Bundle

diffusers = pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.model.libraries import quiet  # noqa: E402


def unet():
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )


def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # DiTPipeline takes 1000 for "no class"
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    )
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda: diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(clip_sample=False)), "unconditional"),
        (dit, "class-conditional"),
    ],
    ids=["DDPMPipeline", "DiTPipeline"],
)
def test_a_pipeline_of_another_family_draws_diffusers_image(make, task, tmp_path):
    torch.manual_seed(0)
    with quiet():
        make().save_pretrained(tmp_path / "checkpoint")
    *_, done = export_bundle(
        tmp_path / "checkpoint", "laptop-cpu", tmp_path / "b", steps=3, measure_speed=False
    )
    manifest = Bundle.open(done.path).manifest
    assert manifest.task == task
    assert manifest.quality["pipeline"]["against"].startswith("diffusers ")
    assert manifest.quality["pipeline"]["psnr_db"] > 80
    with Pipeline.from_pretrained(done.path) as pipeline:
        images = pipeline(class_labels=3 if manifest.classes else None, output_type="np").images
    assert images.shape == (1, manifest.sample.height, manifest.sample.width, 3)
