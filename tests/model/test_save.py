"""A model, cut or whole, goes to a diffusers folder and comes back the same; a folder tampered with is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.model import Model, load  # noqa: E402
from fewstep.model.libraries import quiet  # noqa: E402
from fewstep.model.save import save_folder  # noqa: E402
from fewstep.model.structure import Structure, without  # noqa: E402
from fewstep.model.trajectories import run_part  # noqa: E402
from fewstep.runtime.errors import BadInput, CheckpointError, OutputError  # noqa: E402
from fewstep.runtime.process import DiscreteVP  # noqa: E402

REMOVED = (
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0.transformer_blocks.0.attn1",
    "mid_block.resnets.0",
    "up_blocks.0.resnets.0",
)


@pytest.fixture(scope="module")
def whole(tiny_sd):
    return load(tiny_sd)


@pytest.fixture(scope="module")
def cut(whole):
    part = without(whole.parts["unet"], REMOVED)
    return replace(whole, parts={**whole.parts, "unet": part}, history=({"pass": "CutBlocks", "ratio": 0.5},))


@pytest.fixture(scope="module")
def written(cut, tmp_path_factory):
    """Read it, copy it before changing it."""
    return save_folder(cut, tmp_path_factory.mktemp("saved") / "cut", "float32")


def feeds(part):
    return part.example.feeds(part.inputs, part.example.default_sizes(), seed=1)


def same(a, b):
    values = feeds(a)
    one, two = run_part(a, values), run_part(b, values)
    return all(np.array_equal(one[name], two[name]) for name in one)


def changed(written, tmp_path, file, **changes):
    folder = shutil.copytree(written, tmp_path / "changed")
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**data, **changes}))
    return folder


def test_a_cut_model_comes_back_with_equal_output(cut, written):
    back = load(written)
    assert back.parts["unet"].parameters() == cut.parts["unet"].parameters()
    for name in cut.parts:
        assert same(back.parts[name], cut.parts[name])
    assert back.parts["unet"].config["_structure"]["removed"] == sorted(REMOVED)
    assert back.history == cut.history


def test_the_pipeline_of_what_was_loaded_draws_with_the_cut_network(written):
    model = load(written)
    assert model.original.unet is model.parts["unet"].module.network


def test_a_cut_model_written_again_is_the_same_folder(written, tmp_path):
    again = save_folder(load(written), tmp_path / "again", "float32")
    names = sorted(str(file.relative_to(written)) for file in written.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(again)) for file in again.rglob("*") if file.is_file())
    for name in names:
        assert (again / name).read_bytes() == (written / name).read_bytes(), name


def test_a_whole_model_loads_in_plain_diffusers(whole, tmp_path):
    folder = save_folder(replace(whole, history=({"pass": "None"},), steps=4), tmp_path / "whole", "float32")
    with quiet():
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    mine = whole.parts["unet"].module.network.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert load(folder).steps == 4


def test_halves_are_written_as_halves(whole, tmp_path):
    back = load(save_folder(whole, tmp_path / "half"))
    mine = whole.parts["unet"].module.state_dict()
    for name, tensor in back.parts["unet"].module.state_dict().items():
        assert torch.equal(tensor, mine[name].half().float())


def test_what_belongs_to_the_model_and_not_to_its_pipeline_is_written(whole, tmp_path):
    scheduler = {**whole.scheduler, "_class_name": "LCMScheduler"}
    guidance = replace(whole.guidance, scale=1.0)
    changed = replace(whole, scheduler=scheduler, guidance=guidance, steps=2, prompts=("a cat", "a dog"))
    back = load(save_folder(changed, tmp_path / "few"))
    assert (back.scheduler["_class_name"], back.guidance.scale, back.steps) == ("LCMScheduler", 1.0, 2)
    assert back.prompts == ("a cat", "a dog")


def test_the_callers_model_is_as_it_was_after_writing(whole, tmp_path):
    values = feeds(whole.parts["unet"])
    before = run_part(whole.parts["unet"], values)
    save_folder(whole, tmp_path / "out")
    assert np.array_equal(run_part(whole.parts["unet"], values)["out_sample"], before["out_sample"])


def test_nothing_is_replaced_without_being_asked_and_never_what_is_no_checkpoint(whole, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        save_folder(whole, tmp_path / "other", overwrite=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["other", "thesis.txt"]


def test_weights_too_large_for_halves_are_refused_and_nothing_is_left(whole, tmp_path):
    part = without(whole.parts["unet"], [])
    with torch.no_grad():
        part.module.network.conv_in.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(BadInput, match=r"conv_in.weight is not finite in float16"):
        save_folder(replace(whole, parts={**whole.parts, "unet": part}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_pipeline_is_refused(tmp_path):
    process = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    model = Model.from_module(
        network, sample_shape=(3, 8, 8), process=process, call=lambda module, sample, _: module(sample)
    )
    with pytest.raises(BadInput, match="diffusers"):
        save_folder(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ({"removed": ["conv_in"]}, "conv_in"),
        ({"removed": ["mid_block.resnets.7"]}, "mid_block.resnets.7"),
        ({"removed": "all"}, "removed"),
        ({"removed": [1]}, "removed"),
        ({"code": "import os"}, "code"),
        ([], "an object"),
        ({"removed": list(REMOVED[:3])}, "up_blocks.0.resnets.0"),
        ({"removed": [*REMOVED, "up_blocks.1.resnets.0"]}, "up_blocks.1.resnets.0"),
        ({"removed": list(REMOVED), "heads": {"mid_block.attentions.0": 2}}, "no Attention"),
        ({"removed": list(REMOVED), "groups": {"conv_norm_out": 5}}, "5 groups"),
        ({"removed": list(REMOVED), "groups": {"conv_norm_out": 0}}, "groups"),
    ],
)
def test_a_structure_that_does_not_fit_the_weights_is_refused(written, tmp_path, structure, said):
    folder = changed(written, tmp_path, "unet/config.json", _structure=structure)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_a_configuration_that_does_not_fit_the_weights_is_refused(written, tmp_path):
    folder = changed(written, tmp_path, "unet/config.json", layers_per_block=2)
    with pytest.raises(CheckpointError, match="by config.json"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("_steps", 0), ("_steps", True), ("_steps", "2"), ("_history", {}), ("_history", [{"fields": 1}])],
)
def test_keys_of_ours_that_make_no_sense_are_refused(written, tmp_path, key, value):
    with pytest.raises(CheckpointError, match=key):
        load(changed(written, tmp_path, "model_index.json", **{key: value}))


def test_a_structure_is_the_same_after_json():
    structure = Structure(("a", "b.c"), {"d": 2}, {"e": 4})
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))) == structure
    assert structure.without(["a.x", "b"]).removed == ("a", "b")
