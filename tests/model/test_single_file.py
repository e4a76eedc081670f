import shutil

import pytest
import torch

from fewstep.model import load
from fewstep.model.load import summarize
from fewstep.runtime.errors import CheckpointError

from . import single_file


@pytest.fixture
def one_file(tiny_sd, tmp_path):
    return single_file.write(tiny_sd, tmp_path / "tiny.safetensors")


def test_one_file_holds_the_same_model_as_the_folder(one_file, tiny_sd):
    model, right = load(one_file, config=tiny_sd), load(tiny_sd)
    assert (model.name, model.task, model.scheduler["_class_name"]) == (
        "tiny",
        "text-to-image",
        "DDIMScheduler",
    )
    for part in right:
        feeds = part.example.feeds(part.inputs, part.example.default_sizes(), seed=0).values()
        inputs = [torch.from_numpy(array) for array in feeds]
        with torch.no_grad():
            wanted, got = (module(*inputs) for module in (part.module, model.parts[part.name].module))
        wanted, got = (value[0] if isinstance(value, tuple) else value for value in (wanted, got))
        assert torch.equal(wanted, got), part.name


def test_a_file_in_its_folder_needs_no_other_word(one_file, tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "folder")
    moved = one_file.rename(folder / "tiny.safetensors")
    assert load(moved).sample == load(folder).sample


def test_a_file_alone_says_what_it_lacks(one_file):
    with pytest.raises(
        CheckpointError, match=r"tiny.safetensors holds weights alone; expected a diffusers folder"
    ):
        load(one_file)


def test_a_file_is_counted_by_part(one_file, tiny_sd):
    assert dict(summarize(one_file).weights) == dict(summarize(tiny_sd).weights)


def test_a_file_of_one_component_is_no_model(tiny_sd):
    with pytest.raises(
        CheckpointError, match="has no unet and no vae_decoder and no text_encoder: its tensors are"
    ):
        load(tiny_sd / "unet/diffusion_pytorch_model.safetensors")
