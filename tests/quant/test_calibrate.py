import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model import Model, load  # noqa: E402
from fewstep.model.quantized import Quantized  # noqa: E402
from fewstep.model.trajectories import PROMPTS, trajectories  # noqa: E402
from fewstep.quant import calibrate as module  # noqa: E402
from fewstep.quant.calibrate import Calibration, calibrate  # noqa: E402
from fewstep.quant.calls import chosen_calls  # noqa: E402
from fewstep.runtime import files  # noqa: E402
from fewstep.runtime.errors import BadInput, OutputError  # noqa: E402
from fewstep.runtime.plan import plan  # noqa: E402
from fewstep.runtime.process import DiscreteVP  # noqa: E402


class Faint(torch.nn.Module):
    """Predicts a clean sample of a tenth of what it sees; but `bad` where the class label is `of`."""

    def __init__(self, bad=0.0, of=None):
        super().__init__()
        self.scale, self.bad, self.of = torch.nn.Parameter(torch.tensor(0.1)), bad, of

    def forward(self, sample, timestep, class_labels=None):
        out = self.scale * sample
        if self.of is not None:
            out = torch.where((class_labels == self.of)[:, None, None, None], self.bad, out)
        return out


def small(classes=None, guidance=1.0, **network):
    process = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)
    return Model.from_module(
        Faint(**network),
        sample_shape=(3, 4, 8),
        process=process,
        prediction="sample",
        classes=classes,
        guidance=guidance,
    )


def shipped(model, steps=4):
    return plan("ddim", steps, model.process, prediction=model.prediction, grid=model.grid)


def result(generator):
    try:
        while True:
            next(generator)
    except StopIteration as stop:
        return stop.value


def recorded(model, store, steps=4, **how):
    return result(calibrate(model, shipped(model, steps), Calibration(**how), store))


def same(one, other):
    assert one.key == other.key
    for mine, theirs in ((one.used, other.used), (one.held, other.held)):
        assert mine.keys() == theirs.keys()
        for name, feeds in mine.items():
            for a, b in zip(feeds, theirs[name], strict=True):
                assert a.keys() == b.keys()
                assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture
def counted(monkeypatch):
    """How often trajectories were run."""
    runs = []

    def run(*args, **options):
        runs.append(args)
        return trajectories(*args, **options)

    monkeypatch.setattr(module, "trajectories", run)
    return runs


def test_every_part_gets_what_the_pipeline_feeds_it(tiny_sd, tmp_path):
    model = load(tiny_sd)
    seen = recorded(model, tmp_path, samples=3, prompts=["a cat", "a dog", "a bus", "a tree", "a sea"])
    (run,) = trajectories(
        model,
        shipped(model),
        range(module.FIRST_SEED, module.FIRST_SEED + 3),
        prompts=["a cat", "a dog", "a tree"],
    )
    assert seen.steps("unet") == [0, 1, 2, 3]
    for feeds, call in zip(seen.batches("unet"), run.calls, strict=True):
        assert list(feeds) == ["sample", "timestep", "encoder_hidden_states"]
        assert len(feeds["sample"]) == 6  # guided: the unconditional half first
        assert all(np.array_equal(feeds[name], call[name]) for name in feeds)
    (latents,) = seen.batches("vae_decoder")
    np.testing.assert_allclose(latents["latent_sample"], run.latent / 0.18215, rtol=1e-6)
    (texts,) = seen.batches("text_encoder")
    # nothing in particular comes first, then all prompts but the one held out
    assert np.array_equal(texts["input_ids"][:4], np.concatenate([t["input_ids"] for t in _texts(run)]))
    assert len(texts["input_ids"]) == 5
    assert len(seen.held_out("text_encoder")[0]["input_ids"]) == 1
    assert seen.steps("vae_decoder") == [0]


def _texts(run):
    *prompts, nothing = run.texts
    return [nothing, *prompts]


def test_what_is_held_out_has_other_noise_and_other_prompts(tiny_sd, tmp_path):
    seen = recorded(load(tiny_sd), tmp_path, samples=2, steps=2)
    used = {row.tobytes() for feeds in seen.batches("unet") for row in feeds["sample"]}
    held = {row.tobytes() for feeds in seen.held_out("unet") for row in feeds["sample"]}
    assert held
    assert not used & held
    words = [
        {row.tobytes() for feeds in batches("text_encoder") for row in feeds["input_ids"]}
        for batches in (seen.batches, seen.held_out)
    ]
    assert not words[0] & words[1]
    assert len(words[0] | words[1]) == len(PROMPTS) + 1
    assert seen.steps_held_out("unet") == [0, 1]


def test_a_second_call_reads_what_the_first_wrote(tmp_path, counted):
    model = small()
    first = recorded(model, tmp_path)
    runs = len(counted)
    assert runs == 5  # 32 trajectories in batches of 8, and 8 held out
    same(first, recorded(model, tmp_path))
    assert len(counted) == runs


def test_other_weights_plans_and_settings_are_run_again(tmp_path, counted):
    model = small()
    keys = {recorded(model, tmp_path, samples=1).key}
    keys.add(recorded(model, tmp_path, samples=2).key)
    keys.add(recorded(model, tmp_path, samples=1, seed=1).key)
    keys.add(recorded(model, tmp_path, samples=1, steps=5).key)
    with torch.no_grad():
        model.parts["unet"].module.module.scale.mul_(1.01)
    keys.add(recorded(model, tmp_path, samples=1).key)
    assert len(keys) == 5
    assert len(counted) == 10


def test_a_job_killed_at_any_point_goes_on_with_the_batches_it_had(tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_calibrate as t
from pathlib import Path
model = t.small()
for number, event in enumerate(t.calibrate(model, t.shipped(model), t.Calibration(), Path({str(tmp_path)!r}))):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = tmp_path.iterdir()
    kept = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert sorted(kept) == ["trajectories-0000.safetensors", "trajectories-0001.safetensors"]
    seen = recorded(small(), tmp_path)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    same(seen, recorded(small(), tmp_path / "afresh"))


def test_a_damaged_file_is_made_again(tmp_path, counted):
    model = small()
    wanted = recorded(model, tmp_path)
    (folder,) = tmp_path.iterdir()
    second, third = (folder / f"trajectories-000{n}.safetensors" for n in (1, 2))
    data = bytearray(second.read_bytes())
    data[-100] ^= 1  # a bit of an array: the format itself does not notice
    second.write_bytes(data)
    third.write_bytes(third.read_bytes()[:500])
    (folder / "held-out-0000.safetensors").write_bytes(b"")
    counted.clear()
    same(wanted, recorded(model, tmp_path))
    assert len(counted) == 3


def test_a_full_disk_is_said_and_what_was_written_before_stays(tmp_path, monkeypatch, counted):
    model = small()
    really, writes = os.replace, []

    def full(source, target):
        writes.append(target)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", full)
        with pytest.raises(OutputError, match=r"trajectories-0002.*no space left.*free some space"):
            recorded(model, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [
        "trajectories-0000.safetensors",
        "trajectories-0001.safetensors",
    ]
    counted.clear()
    recorded(model, tmp_path)
    assert len(counted) == 3


def test_nan_is_said_with_part_call_and_label(tmp_path):
    model = small(classes=4, bad=float("nan"), of=2)
    with pytest.raises(BadInput, match=r"calibration of unet: call 1 of 4.*NaN or infinity.*label 2"):
        recorded(model, tmp_path, samples=4)
    recorded(model, tmp_path, samples=4, labels=(0, 1, 3))


def test_nan_is_said_with_the_prompt_it_comes_from(tiny_sd, tmp_path):
    model = load(tiny_sd)
    ids = set(_ids(model, "a dog")) - set(_ids(model, "a cat"))
    table = model.parts["text_encoder"].module.encoder.get_input_embeddings().weight
    table.data[sorted(ids)] = torch.nan
    with pytest.raises(BadInput, match=r"text_encoder puts out NaN or infinity for the prompt 'a dog'"):
        recorded(model, tmp_path, samples=2, prompts=("a cat", "a dog", "a cat a", "a cat c"))


def _ids(model, prompt):
    return module.text_inputs(model, [prompt])[0]["input_ids"][0].tolist()


def test_settings_that_make_no_sense_are_refused(tiny_sd, tmp_path):
    model = small()
    with pytest.raises(BadInput, match="timesteps 'all'; expected uniform or normal or steps"):
        recorded(model, tmp_path, timesteps="all")
    with pytest.raises(BadInput, match='timesteps "steps" for a plan of 17 calls; expected at most 16'):
        recorded(model, tmp_path, timesteps="steps", steps=17)
    with pytest.raises(BadInput, match="0 samples"):
        recorded(model, tmp_path, samples=0)
    with pytest.raises(BadInput, match="without text"):
        recorded(model, tmp_path, prompts=("a cat",))
    with pytest.raises(BadInput, match="class label 9"):
        recorded(small(classes=3), tmp_path, labels=(9,))
    with pytest.raises(BadInput, match="prompt 2 to calibrate on is empty"):
        recorded(load(tiny_sd), tmp_path, prompts=("a cat", " "))


def test_a_model_that_is_quantized_already_is_refused(tmp_path):
    model = small()
    unet = replace(model.parts["unet"], quantized=Quantized({}))
    with pytest.raises(BadInput, match="unet of model is quantized already; expected a model in floating"):
        recorded(replace(model, parts={"unet": unet}), tmp_path)


def test_prompts_are_those_given_or_the_models_own_or_neutral_ones(tiny_sd, tmp_path):
    model = load(tiny_sd)

    def first(model, **how):
        seen = recorded(model, tmp_path, samples=1, steps=1, **how)
        return seen.batches("text_encoder")[0]["input_ids"][1].tolist()

    own = replace(model, prompts=("a bus", "a tree"))
    assert first(own, prompts=("a cat", "a dog")) == _ids(model, "a cat")
    assert first(own) == _ids(model, "a bus")
    assert first(model) == _ids(model, PROMPTS[0])


def test_labels_are_spread_over_all_classes_and_those_held_out_are_others(tmp_path):
    seen = recorded(small(classes=100, guidance=2.0), tmp_path, steps=1)
    used = {label for feeds in seen.batches("unet") for label in feeds["class_labels"].tolist()}
    held = {label for feeds in seen.held_out("unet") for label in feeds["class_labels"].tolist()}
    assert used & held == {100}  # "no class", under guidance
    assert len(used) == 33
    assert min(used) < 10
    assert max(used - {100}) > 90


def test_uniform_keeps_every_call_alike_or_spreads_them():
    assert chosen_calls("uniform", 8, 4, 32) == [list(range(8))] * 4
    kept = chosen_calls("uniform", 50, 4, 20)
    counts = np.bincount(np.concatenate(kept), minlength=50)
    assert counts.sum() == 20
    assert counts.max() == 1
    assert np.diff(np.flatnonzero(counts)).max() <= 3
    assert {len(batch) for batch in kept} == {5}


def test_normal_keeps_most_where_there_is_little_noise():
    kept = chosen_calls("normal", 20, 64, 512)
    counts = np.bincount(np.concatenate(kept), minlength=20)
    # P(z < -1) falls on the clean end, the last call, P(z > 1.5) on the noisy one; both with half a call more
    assert counts[19] / counts.sum() == pytest.approx(0.1751, abs=0.005)
    assert counts[0] / counts.sum() == pytest.approx(0.0761, abs=0.005)
    assert counts[10:].sum() > 1.4 * counts[:10].sum()
    assert np.argmax(counts[1:19]) + 1 in (11, 12)  # t = 0.4 T, from the clean end
    assert all(len(set(batch)) == len(batch) for batch in kept)


def test_steps_keeps_every_call_of_every_trajectory():
    assert chosen_calls("steps", 4, 3, 1) == [[0, 1, 2, 3]] * 3
    assert chosen_calls("normal", 1, 2, 9) == chosen_calls("uniform", 1, 2, 9) == [[0], [0]]


def test_a_large_model_is_calibrated_on_few_calls(tiny_sd, tmp_path, monkeypatch):
    model = load(tiny_sd)
    unet = model.parts["unet"]
    # as dear as SD-1.5's
    monkeypatch.setattr(type(unet), "work", lambda self: int(3.52e12) if self.name == "unet" else 10**8)
    seen = recorded(model, tmp_path)
    assert [len(feeds["sample"]) for feeds in seen.batches("unet")] == [2] * 8  # 16 forwards, guided
    assert sorted(seen.steps("unet")) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(seen.held_out("unet")) == 4
    seen = recorded(model, tmp_path, guidance=1.0)
    assert [len(feeds["sample"]) for feeds in seen.batches("unet")] == [1] * 16


def test_an_image_encoder_is_fed_the_pictures_drawn(tiny_sd, tmp_path):
    from fewstep.model.families import with_image_encoder

    model = with_image_encoder(load(tiny_sd))
    seen = recorded(model, tmp_path, samples=2, steps=1)
    (pictures,) = seen.batches("vae_encoder")
    assert pictures["sample"].shape == (2, 3, 16, 16)
    assert len(seen.held_out("vae_encoder")) == 1
