import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from fewstep.export import Exported, export_bundle, gate, preflight, recipe
from fewstep.model import Model
from fewstep.runtime import Pipeline
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput, BundleError, GateFailed, NotLinear, OutputError, PlanError
from fewstep.runtime.process import RectifiedFlow

from .conftest import Actions

TARGET = "laptop-cpu"


def export(model, out, **options):
    return list(export_bundle(model, TARGET, out, **{"steps": 2, "measure_speed": False, **options}))


def refused(error, source, out, *said, **options):
    """The export fails with `error`, in one line, and nothing is left where the bundle would be."""
    with pytest.raises(error) as caught:
        export(source, out, **options)
    for text in said:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    return caught.value


# what a bundle of a whole pipeline holds


def test_a_bundle_holds_what_was_measured(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    assert set(manifest.parts) == {"unet", "vae_decoder", "text_encoder"}
    for name, quality in manifest.quality["parts"].items():
        assert quality["relative_error"] < 1e-5, name
        assert len(quality["cases"]) >= 3
    assert manifest.quality["pipeline"]["psnr_db"] > 80
    assert manifest.quality["pipeline"]["against"] == "diffusers StableDiffusionPipeline"
    assert manifest.quality["golden"]["values"]
    assert manifest.speed["unet"]["verdict"].startswith("not measured")
    assert manifest.plans["default"]["sampler"] == "DDIMScheduler"
    assert manifest.sampler == "ddim"
    assert manifest.target["id"] == TARGET
    assert {"torch", "onnxruntime", "diffusers"} <= set(manifest.versions)
    text = (tiny_bundle / "manifest.json").read_text()
    assert "/tmp" not in text
    assert str(tiny_bundle.parent) not in text


def test_a_bundle_draws_diffusers_image_at_other_seeds_and_steps(tiny_bundle, tiny_sd):
    from diffusers import DDIMScheduler

    from fewstep.model import load

    original = load(tiny_sd).original
    assert isinstance(original.scheduler, DDIMScheduler)
    original.set_progress_bar_config(disable=True)
    import torch

    theirs = original(
        "a dog", num_inference_steps=7, generator=torch.Generator().manual_seed(5), output_type="np"
    ).images
    with Pipeline.from_pretrained(tiny_bundle) as pipeline:
        ours = pipeline("a dog", num_inference_steps=7, seed=5, output_type="np").images
    assert gate.psnr_db(np.asarray(theirs), ours) > 80


def test_other_tools_find_the_files_they_look_for(tiny_bundle):
    """Names of diffusers' and optimum's: model_index.json, one folder a component, config.json, tokenizer files."""
    index = json.loads((tiny_bundle / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    for part in ("unet", "vae_decoder", "text_encoder"):
        assert (tiny_bundle / part / "model.onnx").exists()
        assert json.loads((tiny_bundle / part / "config.json").read_text())
    assert (tiny_bundle / "scheduler/scheduler_config.json").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert (tiny_bundle / "tokenizer" / name).exists()


def test_the_tokenizer_of_a_bundle_is_the_checkpoints(tiny_bundle, tiny_sd):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(str(tiny_sd / "tokenizer"), local_files_only=True)
    ours = CLIPTokenizer.from_pretrained(str(tiny_bundle / "tokenizer"), local_files_only=True)
    for text in ("a cat", "Two dogs, 3 cats & a bird!", "naïve café 🐓"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.model_max_length == theirs.model_max_length == 77


# models no other exporter takes


def test_an_unconditional_pixel_model_exports_and_draws_any_size(pixels, tmp_path):
    *_, done = export(pixels, tmp_path / "b")
    assert done.manifest.task == "unconditional"
    assert done.manifest.quality["pipeline"]["against"] == "the torch modules, same plan"
    with Pipeline.from_pretrained(done.path) as pipeline:
        assert pipeline(height=12, width=16, output_type="np").images.shape == (1, 12, 16, 3)


def test_a_class_conditional_model_exports_with_guidance(labelled, tmp_path):
    *_, done = export(labelled, tmp_path / "b")
    assert (done.manifest.task, done.manifest.classes) == ("class-conditional", 10)
    with Pipeline.from_pretrained(done.path) as pipeline:
        first, second = pipeline(class_labels=[3, 4], latents=np.ones((2, 3, 8, 8)), output_type="np").images
        assert not np.array_equal(first, second)
        with pytest.raises(BadInput, match="class labels 10"):
            pipeline(class_labels=10)


def test_a_policy_over_sequences_exports(tmp_path):
    model = Model.from_module(
        Actions(), sample_shape=(7, 16), process=RectifiedFlow(), prediction="flow", name="policy"
    )
    *_, done = export(model, tmp_path / "b")
    assert done.manifest.sampler == "euler"
    with Pipeline.from_pretrained(done.path) as pipeline:
        assert pipeline(output_type="latent").images.shape == (1, 7, 1, 16)


# options


def test_a_traced_sampler_replaces_the_models_own(pixels, tmp_path):
    *_, done = export(pixels, tmp_path / "b", sampler="dpmpp_2m", steps=3)
    assert done.manifest.plans["default"]["sampler"] == "dpmpp_2m"
    assert done.manifest.sampler == "dpmpp_2m"


def test_a_time_grid_replaces_the_models_own_and_stays_with_the_bundle(pixels, tmp_path):
    *_, done = export(pixels, tmp_path / "b", times="karras", steps=3)
    plan = done.manifest.plans["default"]
    assert (plan["sampler"], plan["steps"]) == ("ddim", 3)
    assert done.manifest.grid.spacing == "karras"
    with Pipeline.from_pretrained(done.path) as pipeline:
        levels = [call.t for call in pipeline.plan(5).calls]
        assert levels == [call.t for call in pipeline.plan(5, times="karras").calls]
        assert levels != [call.t for call in pipeline.plan(5, times="trailing").calls]


def test_speed_is_measured_against_the_unoptimized_export(pixels, tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.export.speed.BUDGET_S", 0.0)
    *_, done = export(pixels, tmp_path / "b", measure_speed=True)
    speed = done.manifest.speed["unet"]
    assert speed["rounds"] >= 8
    assert speed["verdict"].split(":")[0] in ("faster", "slower", "no speed-up over the un-optimized export")
    assert not list((tmp_path / "b").rglob("*unoptimized*"))


def test_the_unoptimized_export_is_a_bundle_too(pixels, tmp_path):
    *_, done = export(pixels, tmp_path / "b", optimize=False)
    assert b"MultiHeadAttention" not in (done.path / "unet/model.onnx").read_bytes()


def test_a_large_part_goes_through_processes_of_its_own(tiny_sd, tmp_path, monkeypatch):
    from fewstep.export import parts

    monkeypatch.setattr(parts, "LARGE_BYTES", 1 << 20)  # the tiny U-Net has 3 MiB
    *_, done = export(tiny_sd, tmp_path / "b")
    assert {"lower unet", "gate unet", "main"} <= set(done.peak_rss_bytes)
    assert done.manifest.quality["parts"]["unet"]["relative_error"] < 1e-5
    assert done.manifest.quality["pipeline"]["psnr_db"] > 80
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_dry_run_plans_and_writes_nothing(tiny_sd, tmp_path):
    events = export(tiny_sd, tmp_path / "b", dry_run=True)
    assert not any(isinstance(event, Exported) for event in events)
    said = {event.stage: event.note for event in events}
    assert said["lower unet"].startswith("803,204 parameters, 3 MiB in float32")
    assert "MiB" in said["memory"] or "GiB" in said["memory"]
    assert said["plan"] == "DDIMScheduler, 2 steps"
    assert not list(tmp_path.iterdir())


def test_progress_only_goes_forward(pixels, tmp_path):
    fractions = [event.fraction for event in export(pixels, tmp_path / "b")]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


# bad input


@pytest.mark.parametrize("steps", [0, -1, 1_000_000, 2.5, True])
def test_steps_out_of_range_are_refused(steps, pixels, tmp_path):
    refused(PlanError, pixels, tmp_path / "b", f"{steps!r} steps", "1 to 1000", steps=steps)


def test_an_unknown_sampler_lists_the_known_ones(pixels, tmp_path):
    refused(PlanError, pixels, tmp_path / "b", "sampler 'magic'", "dpmpp_2m", sampler="magic")


def test_an_unknown_grid_names_the_nearest(pixels, tmp_path):
    refused(PlanError, pixels, tmp_path / "b", "time grid 'karas'", "did you mean karras", times="karas")


def test_an_unknown_target_is_refused(pixels, tmp_path):
    with pytest.raises(BadInput, match="unknown target 'toaster'"):
        next(export_bundle(pixels, "toaster", tmp_path / "b"))


def test_an_unknown_recipe_key_is_refused(pixels, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("stepz = 3")
    refused(BadInput, pixels, tmp_path / "out" / "b", "unknown keys: stepz", recipe=file)


def test_an_unknown_pass_is_refused(pixels, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('passes = ["shrink"]')
    refused(BadInput, pixels, tmp_path / "out" / "b", "unknown pass 'shrink'", recipe=file)


def test_a_scheduler_that_is_no_table_is_refused_with_samplers_to_take(tiny_sd, tmp_path):
    copy = shutil.copytree(tiny_sd, tmp_path / "copy")
    file = copy / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"thresholding": True}))
    refused(NotLinear, copy, tmp_path / "out" / "b", "DDIMScheduler", "pass --sampler auto")


def test_damaged_weights_leave_nothing_behind(tiny_sd, tmp_path):
    copy = shutil.copytree(tiny_sd, tmp_path / "copy")
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(BadInput, copy, tmp_path / "out" / "b", "is truncated")


def test_a_folder_that_cannot_be_written_is_named(pixels, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write|exists") as caught:
        export(pixels, tmp_path / "file" / "b")
    assert str(tmp_path / "file") in str(caught.value)


def test_a_full_disk_is_noticed_before_the_work(pixels, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(OutputError, pixels, tmp_path / "b", "free there", "free some space")


def test_too_little_memory_is_noticed_before_the_work(pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_available", lambda: 10 << 20)
    refused(BadInput, pixels, tmp_path / "b", "of memory and 10 MiB are free", "close other programs")


def test_a_model_beyond_the_targets_memory_is_refused_before_it_is_loaded(pixels, tmp_path, monkeypatch):
    target = recipe.load_target(TARGET)
    small = replace(target, limits=replace(target.limits, part_mib=0))
    monkeypatch.setattr(recipe, "load_target", lambda name: small)
    monkeypatch.setattr(recipe, "run_passes", lambda *a: pytest.fail("it went on"))
    refused(
        BadInput, pixels, tmp_path / "b", "does not fit", "the limits of laptop-cpu", "take a smaller model"
    )


def test_a_failed_gate_publishes_nothing(pixels, tmp_path, monkeypatch):
    right = gate.run_graph
    monkeypatch.setattr(
        gate, "run_graph", lambda *a: [{k: v * 1.001 for k, v in case.items()} for case in right(*a)]
    )
    error = refused(
        GateFailed, pixels, tmp_path / "b", "unet: out_sample at", "1.00e-03", "fuse_attention = false"
    )
    assert error.exit_code == 5


def test_a_failed_pipeline_gate_publishes_nothing(pixels, tmp_path, monkeypatch):
    right = gate.draw
    monkeypatch.setattr(gate, "draw", lambda *a: (right(*a)[0] * 0.9, {}))
    refused(
        GateFailed, pixels, tmp_path / "b", "images differ from the original's", "expected at least 50 dB"
    )


def test_an_existing_bundle_is_kept_unless_asked(pixels, tmp_path):
    *_, done = export(pixels, tmp_path / "b")
    before = (done.path / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="exists; fix: .*overwrit"):
        export(pixels, tmp_path / "b")
    assert (done.path / "manifest.json").read_bytes() == before
    export(pixels, tmp_path / "b", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("stage", ["load", "lower unet", "gate unet", "gate pipeline", "commit"])
def test_stopping_at_any_stage_leaves_nothing(stage, pixels, tmp_path):
    running = export_bundle(pixels, TARGET, tmp_path / "b", steps=2, measure_speed=False)
    for event in running:
        if event.stage == stage:
            running.close()
            break
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_nothing_that_looks_like_a_bundle(tiny_sd, pixels, tmp_path):
    """SIGKILL in the middle; the next export to the same place cleans up after it."""
    code = (
        "from fewstep.export import export_bundle\n"
        f"for event in export_bundle({str(tiny_sd)!r}, 'laptop-cpu', {str(tmp_path / 'b')!r}):\n"
        "    print(event.stage, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "lower unet":
            time.sleep(0.5)
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "b").exists()
    for leftover in tmp_path.iterdir():
        assert leftover.name.startswith(".b.tmp-")
        with pytest.raises(BundleError):
            Bundle.open(leftover)
    export(pixels, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
