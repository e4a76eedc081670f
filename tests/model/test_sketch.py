"""A model without its weights is the model in all but that."""

import shutil

import pytest
import torch

from fewstep.model.load import load, sketch
from fewstep.runtime.errors import CheckpointError


def shapes(model):
    return {part.name: [(n, tuple(t.shape)) for n, t in part.module.named_parameters()] for part in model}


def test_a_sketch_has_the_shapes_and_no_memory(tiny_sd):
    model, drawn = load(tiny_sd), sketch(tiny_sd)
    assert shapes(drawn) == shapes(model)
    assert all(t.device.type == "meta" for part in drawn for t in part.module.parameters())
    assert drawn.process.to_json() == model.process.to_json()
    for name in ("name", "task", "denoiser", "sample", "grid", "guidance", "scheduler"):
        assert getattr(drawn, name) == getattr(model, name)


def test_no_weight_is_read(tiny_sd, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    [file] = (folder / "unet").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-4:] = b"\xff\xff\xff\xff"  # a NaN, which loading refuses
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="NaN"):
        load(folder)
    assert sketch(folder).denoiser == "unet"


def test_a_full_size_architecture_takes_no_memory():
    model = sketch("arch:sd15")
    assert model.parts["unet"].parameters() == 859_520_964
    assert next(model.parts["unet"].module.parameters()).device == torch.device("meta")


def test_what_is_no_model_is_refused_as_by_load(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        sketch(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="unknown architecture"):
        sketch("arch:sd99")
