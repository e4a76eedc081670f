"""The pass that puts a tiny decoder in the place of the VAE's: what it learns, that it resumes, what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep.distill import tiny_decoder
from fewstep.distill.tiny_decoder import TinyDecoder
from fewstep.distill.tiny_files import write_network
from fewstep.model import Context, Model, load
from fewstep.model.trajectories import run_part
from fewstep.runtime import Pipeline
from fewstep.runtime.errors import BadInput
from fewstep.runtime.plan import plan
from fewstep.runtime.process import DiscreteVP
from fewstep.targets import load_target

SMALL = TinyDecoder(
    widths=(12,), blocks=(1,), latents=16, copies=1, steps=40, batch=8, rate=5e-3, precision="float32"
)


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load(tiny_sd)


def context(model, folder):
    return Context(
        load_target("laptop-cpu"), plan("ddim", 1, model.process, prediction=model.prediction), folder, folder
    )


def finish(work):
    """The events and the result of a pass."""
    events = []
    while True:
        try:
            events.append(next(work))
        except StopIteration as done:
            return events, done.value


@pytest.fixture(scope="module")
def taught(model, tmp_path_factory):
    return finish(SMALL(model, context(model, tmp_path_factory.mktemp("store"))))


def test_the_part_keeps_its_interface_and_says_what_it_is(model, taught):
    _, new = taught
    old, part = model.parts["vae_decoder"], new.parts["vae_decoder"]
    assert (part.inputs, part.outputs, part.example) == (old.inputs, old.outputs, old.example)
    assert part.parameters() < old.parameters() / 4
    assert (
        part.margin == part.module.shape.margin == 5
    )  # 1 + 3 of a block + 1, in cells since nothing doubles
    config = part.config
    assert config["scaling_factor"] == model.sample.scaling_factor
    assert 2 ** (len(config["block_out_channels"]) - 1) == model.sample.factor
    assert new.parts["unet"] is model.parts["unet"]


def test_history_tells_how_good_it_is(taught):
    _, new = taught
    (record,) = new.history
    assert record["pass"] == "TinyDecoder"
    assert record["steps"] == 40
    assert record["psnr_db_worst"] <= record["psnr_db"]
    assert record["parameters"] == new.parts["vae_decoder"].parameters()
    assert 0 < record["work"] < 0.5


def test_it_learns_the_teachers_picture(model, tmp_path):
    """Nearer to the teacher, on latents it never saw, than the best picture of one color."""
    rng, scale = np.random.default_rng(3), model.sample.scaling_factor
    np.save(tmp_path / "normal.npy", rng.standard_normal((68, 4, 8, 8)).astype(np.float32))
    job = replace(SMALL, widths=(24,), steps=150, latents_file=str(tmp_path / "normal.npy"))
    _, new = finish(job(model, context(model, tmp_path)))
    z = torch.from_numpy(rng.standard_normal((8, 4, 8, 8)).astype(np.float32)) / scale
    with torch.no_grad():
        right, got = (m.parts["vae_decoder"].module(z) for m in (model, new))
    mean = (right - right.mean((0, 2, 3), keepdim=True)).square().mean()
    assert (got - right).square().mean() < 0.8 * mean  # measures 0.63


def test_more_training_is_better(model, taught, tmp_path):
    _, short = finish(replace(SMALL, steps=6)(model, context(model, tmp_path)))
    assert taught[1].history[0]["psnr_db"] > short.history[0]["psnr_db"] + 1


def test_progress_rises_and_names_the_decibels(taught):
    events, _ = taught
    shares = [event.fraction for event in events]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert "dB" in events[-1].note
    assert any("min left" in event.note for event in events)


def test_an_interrupted_training_ends_in_the_same_weights(model, taught, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_decoder, "CHECKPOINT_S", 0.0)
    for stop in ("teacher", "step 7 ", "step 31 "):  # in the latents, and twice in the training
        work = SMALL(model, context(model, tmp_path))
        for event in work:
            if stop in (event.stage, event.note[: len(stop)]):
                break
        work.close()
    drawn = {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    events, again = finish(SMALL(model, context(model, tmp_path)))
    assert events[0].note.startswith("step 32 ")
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")} == drawn
    for right, got in zip(
        taught[1].parts["vae_decoder"].module.parameters(), again.parts["vae_decoder"].module.parameters()
    ):
        assert torch.equal(right, got)
    assert again.history == taught[1].history


def test_other_fields_start_afresh_on_the_same_latents(model, tmp_path):
    finish(replace(SMALL, steps=2)(model, context(model, tmp_path)))
    events, _ = finish(replace(SMALL, steps=3)(model, context(model, tmp_path)))
    assert events[0].note.startswith("step 1 of 3")


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_good_weights(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_decoder, "CHECKPOINT_S", 0.0)
    from fewstep.distill.tiny_network import TinyNetwork

    forward = TinyNetwork.forward

    def broken(self, z):
        drawn = forward(self, z)
        broken.calls += self.training and z.shape[0] == SMALL.batch
        return drawn * float("nan") if broken.calls > 4 else drawn

    broken.calls = 0
    monkeypatch.setattr(TinyNetwork, "forward", broken)
    with pytest.raises(BadInput, match="loss turned nan at step 5 of 40") as caught:
        finish(SMALL(model, context(model, tmp_path)))
    assert "a lower rate than 0.005" in str(caught.value)
    (file,) = tmp_path.rglob("training-*.pt")
    kept = torch.load(file, weights_only=True)
    assert kept["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in kept["network"].values())


def test_latents_of_a_file_teach_as_well(model, tmp_path):
    z = np.random.default_rng(0).standard_normal((20, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "latents.npy", z)
    job = replace(SMALL, steps=3, latents_file=str(tmp_path / "latents.npy"))
    _, new = finish(job(model, context(model, tmp_path / "store")))
    assert new.history[0]["latents_file"] == "latents.npy"  # not where it lay
    assert new.history[0]["latents"] == 19
    pieces = [np.load(file) for file in sorted((tmp_path / "store").rglob("latents-*.npy"))]
    np.testing.assert_array_equal(
        np.concatenate([pieces[0][:16], pieces[1][:3], pieces[2]]), z
    )  # the last held out
    np.save(tmp_path / "wrong.npy", z[:, :3])
    with pytest.raises(BadInput, match="4 channels"):
        finish(replace(job, latents_file=str(tmp_path / "wrong.npy"))(model, context(model, tmp_path)))


def test_crops_teach_the_picture_that_belongs_to_them(model):
    """A picture that is its latent, twice as large: every crop of one is the crop of the other."""
    z = np.random.default_rng(0).standard_normal((2, 3, 20, 9)).astype(np.float32)
    picture = z.repeat(2, 2).repeat(2, 3)
    seen = set()
    for seed in range(20):
        piece, right, learned = tiny_decoder._cropped(z, picture, 12, 2, torch.Generator().manual_seed(seed))
        assert piece.shape == (2, 3, 12, 9)  # sides that are small enough stay whole
        np.testing.assert_array_equal(piece.repeat(2, 2).repeat(2, 3), right)
        top = int(np.argmax([np.array_equal(z[:, :, i : i + 12], piece) for i in range(9)]))
        seen.add(top)
        assert learned.shape == (1, 1, 24, 18)
        assert (learned[0, 0, :6].max(), learned[0, 0, -6:].max()) == (float(top == 0), float(top == 8))
        assert learned[0, 0, 6:-6].min() == 1
    assert len(seen) > 4


def test_a_model_without_a_vae_is_refused(tmp_path):
    pixels = Model.from_module(
        torch.nn.Conv2d(3, 3, 1),
        sample_shape=(3, 8, 8),
        process=DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000),
        call=lambda module, sample, timestep: module(sample),
    )
    with pytest.raises(BadInput, match="no vae_decoder"):
        finish(SMALL(pixels, context(pixels, tmp_path)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"rate": 0.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"precision": "float16"}, "precision"),
        ({"copies": -1}, "copies"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(BadInput, match=said):
        replace(SMALL, **fields)


def test_stored_weights_take_no_training(model, taught, tmp_path):
    write_network(taught[1], tmp_path / "tiny")
    assert sorted(file.name for file in (tmp_path / "tiny").iterdir()) == ["config.json", "model.safetensors"]
    events, again = finish(TinyDecoder(weights=str(tmp_path / "tiny"))(model, context(model, tmp_path)))
    assert len(events) == 1
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / model.sample.scaling_factor
    right, got = (m.parts["vae_decoder"].module(z) for m in (taught[1], again))
    assert (right - got).abs().max() < 5e-3  # float16 keeps 11 bits
    first, second = taught[1].history[0], again.history[0]
    assert second["psnr_db"] == first["psnr_db"]
    assert second["weights"] == "tiny"
    assert second["steps"] == 0  # nothing is said about a training that did not take place
    assert (second["widths"], second["blocks"]) == ([12], [1])


def test_its_bundle_draws_as_the_torch_modules_do_and_tiles_exactly(taught, tmp_path):
    from fewstep.export import export_bundle

    *_, done = export_bundle(taught[1], "laptop-cpu", tmp_path / "bundle", steps=2, measure_speed=False)
    manifest = done.manifest
    assert manifest.parts["vae_decoder"].margin == 5
    assert manifest.history[0]["psnr_db"] == taught[1].history[0]["psnr_db"]
    assert manifest.quality["pipeline"]["against"] == "the torch modules, same plan"
    z = np.random.default_rng(1).standard_normal((1, 4, 40, 24)).astype(np.float32)
    with Pipeline.from_pretrained(done.path) as pipeline:
        whole = pipeline.decode(z)
        assert np.abs(pipeline.decode(z, tile=32) - whole).max() < 1e-5
        assert whole.std() > 0.01
        with pytest.raises(BadInput, match="tiles of 20 pixels"):  # 10 cells are all margin
            pipeline.decode(z, tile=20)


def test_a_tiny_decoder_runs_on_openvino(taught, tmp_path):
    pytest.importorskip("openvino")
    from fewstep.export import gate, parts

    part = taught[1].parts["vae_decoder"]
    lowered = parts.lower(part, tmp_path / "vae_decoder", load_target("intel-cpu"), tmp_path, None)
    spec = replace(lowered.spec, precision="float32")
    feeds = part.example.feeds(part.inputs, part.example.other_sizes(), seed=0)
    (got,) = gate.run_graph(tmp_path / lowered.spec.graph, spec, [feeds])
    right = run_part(part, feeds)
    np.testing.assert_allclose(got["sample"], right["sample"], atol=5e-3)  # its weights are kept in float16
    assert spec.margin == part.margin
