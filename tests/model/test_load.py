import json
import shutil

import numpy as np
import pytest

from fewstep.model import load
from fewstep.model.fingerprint import fingerprint, model_fingerprint
from fewstep.model.load import summarize
from fewstep.runtime.errors import BadInput, CheckpointError


@pytest.fixture
def copy(tiny_sd, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(tiny_sd, tmp_path / "copy")


def edit(file, **changes):
    data = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v is not ...}))


def refused(source, *said, **options):
    with pytest.raises(CheckpointError) as caught:
        load(source, **options)
    message = str(caught.value)
    for text in said:
        assert text in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_a_diffusers_folder_says_everything_itself(tiny_sd):
    model = load(tiny_sd)
    assert (model.task, model.denoiser, model.prediction) == ("text-to-image", "unet", "epsilon")
    assert list(model.parts) == ["unet", "vae_decoder", "text_encoder"]
    assert (model.sample.height, model.sample.width, model.sample.channels) == (16, 16, 4)
    assert (model.sample.factor, model.sample.multiple, model.sample.fixed) == (2, 4, False)
    assert model.sample.scaling_factor == 0.18215
    assert (model.grid.spacing, model.grid.steps_offset, model.grid.final) == ("leading", 1, "first")
    assert (model.guidance.kind, model.guidance.scale) == ("cfg", 7.5)
    assert model.process.to_json()["beta_schedule"] == "scaled_linear"
    assert model.scheduler["_class_name"] == "DDIMScheduler"
    assert (model.tokenizer.max_length, model.tokenizer.pad_id) == (77, 519)
    unet = model.parts["unet"]
    assert [spec.name for spec in unet.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert [spec.name for spec in unet.outputs] == ["out_sample"]
    assert [spec.name for spec in model.parts["vae_decoder"].inputs] == ["latent_sample"]
    assert str(tiny_sd) not in json.dumps([part.config for part in model], default=str)


def test_a_summary_needs_no_weights_and_counts_as_the_model_does(tiny_sd):
    model, summary = load(tiny_sd), summarize(tiny_sd)
    assert dict(summary.weights) == {part.name: part.parameters() for part in model}
    assert (summary.task, summary.scheduler) == ("text-to-image", "DDIMScheduler")


def test_the_process_is_the_schedulers_to_float32(tiny_sd):
    model = load(tiny_sd)
    theirs = model.original.scheduler.alphas_cumprod.double().numpy()
    ours = model.process.alpha(np.arange(1, 1001)) ** 2
    assert np.abs(ours / theirs - 1).max() < 2e-5


def test_zero_terminal_snr_betas_are_kept_as_they_are(copy):
    edit(
        copy / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    model = load(copy)
    assert model.prediction == "v_prediction"
    assert "betas" in model.process.to_json()
    assert model.process.alpha(1000) < 1e-6


def set_guidance(folder, value):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_guidance_scale": value}))


def test_a_model_can_name_its_guidance_and_diffusers_does_not_mind(copy):
    import diffusers

    set_guidance(copy, 3)
    assert load(copy).guidance.scale == 3.0
    diffusers.StableDiffusionPipeline.from_pretrained(copy, safety_checker=None)


def test_guidance_that_is_no_number_is_refused(copy):
    set_guidance(copy, "strong")
    refused(copy, "_guidance_scale is 'strong'", "correct or remove it")


def test_a_licence_travels_with_the_model(copy):
    (copy / "README.md").write_text("---\nlicense: ofl-1.1\n---\n# tiny\n")
    (copy / "LICENSE.txt").write_text("words")
    model = load(copy)
    assert model.license == "ofl-1.1"
    assert [file.name for file in model.license_files] == ["LICENSE.txt"]


def test_float16_weights_are_computed_in_float32(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    parameters = load(copy).parts["unet"].module.parameters()
    assert {str(parameter.dtype) for parameter in parameters} == {"torch.float32"}


def test_a_missing_folder_is_refused():
    refused("/nowhere/at/all", "/nowhere/at/all does not exist", "fix: check the path")


def test_a_foreign_folder_says_what_it_holds(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    refused(tmp_path, "has no model_index.json, only: holiday.jpg", "save_pretrained")


def test_a_bundle_is_no_checkpoint(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    refused(tmp_path, "is a bundle already", "fewstep run")
    (tmp_path / "model_index.json").write_text("{}")  # as bundles have for optimum
    refused(tmp_path, "is a bundle already", "fewstep run")


def test_one_component_is_no_pipeline(tiny_sd):
    refused(tiny_sd / "unet", "is one component, not a pipeline", "Model.from_module")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(component, copy):
    shutil.rmtree(copy / component)
    refused(copy, f"{component} is missing", "fix: download the model again")


def test_a_component_the_index_forgot_is_named(copy):
    edit(copy / "model_index.json", vae=...)
    refused(copy, "names no vae, which a StableDiffusionPipeline needs")


def test_a_broken_index_is_named(copy):
    (copy / "model_index.json").write_text("{")
    refused(copy, "model_index.json is not valid JSON")


def test_an_unknown_pipeline_names_those_that_are_known(copy):
    edit(copy / "model_index.json", _class_name="WanPipeline")
    refused(copy, "pipeline WanPipeline", "StableDiffusionPipeline", "Model.from_module")


@pytest.mark.parametrize(
    "pair", [["os", "system"], ["diffusers", "FluxTransformer2DModel"], ["unet.py", "Mine"]]
)
def test_no_class_outside_the_list_is_ever_loaded(pair, copy):
    (copy / "unet" / "unet.py").write_text("raise SystemExit('code from a checkpoint ran')")
    edit(copy / "model_index.json", unet=pair)
    refused(copy, "model_index.json: unet is", "expected one of diffusers.UNet2DConditionModel", "never run")


def test_an_unknown_scheduler_is_named(copy):
    edit(copy / "model_index.json", scheduler=["diffusers", "MagicScheduler"])
    refused(copy, "scheduler MagicScheduler is not in diffusers", "DDIMScheduler")


def test_a_scheduler_config_that_makes_no_sense_is_named(copy):
    edit(copy / "scheduler/scheduler_config.json", beta_schedule="cubic")
    refused(copy, "scheduler_config.json: DDIMScheduler refuses it", "cubic")


def test_truncated_weights_are_named(copy):
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(copy, "unet/diffusion_pytorch_model.safetensors is truncated", "fix: download the file again")


def test_nan_weights_are_named_with_their_count(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    refused(copy, "tensor decoder.conv_in.weight has 9 NaN or infinite values out of", "earlier checkpoint")


def test_weights_that_are_not_there_are_no_random_numbers(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.weight"]
    save_file(tensors, file)
    refused(copy, "unet lacks 1 weights of its UNet2DConditionModel, first conv_out.weight")


def test_weights_of_another_shape_are_refused(copy):
    edit(copy / "unet/config.json", block_out_channels=[32, 96])
    refused(copy, "unet cannot be loaded as UNet2DConditionModel")


def test_a_pickle_is_never_opened(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"cos\nsystem\n(S'touch /tmp/fewstep-was-here'\ntR.")
    refused(file, "model.ckpt is a pickle, which can run code")


def test_a_hub_name_is_looked_for_in_the_cache_only(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused("nobody/nothing", "nobody/nothing is neither a folder nor cached", "fetch it with --download")


def test_an_unknown_architecture_lists_the_known_ones():
    refused("arch:sd99", "unknown architecture 'arch:sd99'", "arch:sd15, arch:bk-sdm-small, arch:bk-sdm-tiny")


@pytest.mark.parametrize(
    ("name", "unet"),
    [
        ("sd15", 859_520_964),  # the published count of Stable Diffusion 1.5's U-Net
        (
            "bk-sdm-small",
            482_346_884,
        ),  # Kim et al. 2023, arXiv:2305.15798, table 1: 0.49 B and 0.33 B, VAE included
        ("bk-sdm-tiny", 323_384_964),
    ],
)
def test_architectures_have_their_published_size(name, unet):
    weights = summarize(f"arch:{name}").weights
    assert weights["unet"] == unet
    assert weights["text_encoder"] == 123_060_480  # CLIP ViT-L/14's text model
    assert weights["vae_decoder"] == pytest.approx(49.5e6, rel=0.01)


def test_prompts_come_with_a_folder_that_has_them(copy):
    assert load(copy).prompts == ()
    (copy / "prompts.txt").write_text("a cat\n\n a dog \n", encoding="utf-8")
    assert load(copy).prompts == ("a cat", "a dog")
    (copy / "prompts.txt").write_text("\n \n")
    with pytest.raises(BadInput, match=r"prompts.txt holds no prompt; expected one a line"):
        load(copy)


def test_a_fingerprint_is_of_the_weights_alone(tiny_sd, copy):
    one, again = load(tiny_sd), load(copy)
    assert model_fingerprint(one) == model_fingerprint(again)
    weight = again.parts["unet"].module.network.conv_in.weight.data
    weight[0, 0, 0, 0] *= 1.000001
    assert fingerprint(one.parts["unet"]) != fingerprint(again.parts["unet"])
    assert model_fingerprint(one) != model_fingerprint(again)
    assert model_fingerprint(one, ["text_encoder"]) == model_fingerprint(again, ["text_encoder"])
