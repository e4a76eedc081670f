"""The second reference model: a diffusion transformer, from its folder to a bundle that draws the same pictures."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.export import export_bundle  # noqa: E402
from fewstep.model import load  # noqa: E402
from fewstep.model.trajectories import run_part, trajectories  # noqa: E402
from fewstep.runtime import Pipeline  # noqa: E402
from fewstep.runtime.plan import plan  # noqa: E402

FOLDER = Path(__file__).parents[2] / "models/cifar-dit"


@pytest.fixture(scope="module")
def model():
    return load(FOLDER)


def test_the_folder_says_what_it_is(model):
    assert (model.task, model.classes, model.prediction) == ("class-conditional", 10, "v_prediction")
    assert (model.sample.height, model.sample.width, model.sample.factor) == (32, 32, 4)
    assert model.guidance.kind == "cfg"
    assert list(model.original.labels) == sorted(model.original.labels)
    assert model.parts["transformer"].parameters() < 12_000_000
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 25 * 2**20


def test_the_class_makes_the_picture(model):
    """One noise, three conditions: the labels are heard, and "no class" is a condition of its own."""
    way = plan("ddim", 4, model.process, prediction=model.prediction, grid=model.grid)
    frog, ship = (
        next(iter(trajectories(model, way, [5], labels=[label], guidance=1.0))).latent for label in (6, 8)
    )
    assert np.abs(frog - ship).mean() > 0.1
    both = next(iter(trajectories(model, way, [5], labels=[6], guidance=2.0)))
    assert both.calls[0]["class_labels"].tolist() == [10, 6]
    assert np.abs(both.latent - frog).mean() > 0.01


def test_its_latents_are_of_unit_size_and_decode_to_pictures(model):
    way = plan("dpmpp_2m", 8, model.process, prediction=model.prediction, grid=model.grid)
    run = next(iter(trajectories(model, way, range(8))))
    assert 0.7 < run.latent.std() < 1.4
    decoder = model.parts["vae_decoder"]
    (pictures,) = run_part(decoder, {"latent_sample": run.latent / model.sample.scaling_factor}).values()
    assert pictures.shape == (8, 3, 32, 32)
    assert np.abs(pictures).max() < 1.5
    assert pictures.std(axis=(1, 2, 3)).min() > 0.1


def test_its_bundle_draws_what_diffusers_draws_under_guidance(tmp_path):
    *_, done = export_bundle(FOLDER, "laptop-cpu", tmp_path / "b", steps=4, measure_speed=False)
    with Pipeline.from_pretrained(done.path) as pipeline:
        quality = pipeline.manifest.quality["pipeline"]
        images = pipeline(class_labels=[0, 9], output_type="np").images
    assert quality["against"] == "diffusers DiTPipeline"
    assert quality["guidance_scale"] > 1
    assert quality["psnr_db"] > 60
    assert images.shape == (2, 32, 32, 3)
