import json
import math

import pytest

from fewstep.runtime.errors import BadInput
from fewstep.targets import FOLDER, known_targets, load_target, read_target


@pytest.mark.parametrize("name", known_targets())
def test_every_target_file_is_complete(name):
    target = load_target(name)
    assert target.id == name
    assert target.limits.part_mib <= target.limits.peak_memory_mib <= target.device.memory_mib
    assert target.recipe.precision in target.limits.precisions
    for precision, floor in target.quality.items():
        assert floor.pipeline_psnr_db >= {"float32": 50, "int8": 24, "int4": 20}.get(precision, 30)
        # one floor, said twice
        assert floor.part_snr_db == pytest.approx(-20 * math.log10(floor.part_relative_error), abs=0.1)
    assert target.to_json()["backend"]["engine"] == target.backend.engine
    assert json.loads(json.dumps(target.to_json())) == target.to_json()
    for line in (FOLDER / f"{name}.toml").read_text().split("[limits]")[1].split("[recipe]")[0].splitlines():
        assert "=" not in line or "#" in line, f"{line}: a limit says where it comes from"


def test_there_is_at_least_the_laptop():
    assert "laptop-cpu" in known_targets()


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(
        BadInput, match=r"unknown target 'toaster'; expected .*laptop-cpu.*; fix: fewstep targets"
    ):
        load_target("toaster")


@pytest.mark.parametrize("name", ["../laptop-cpu", "", "laptop-cpu.toml"])
def test_a_target_is_a_name_not_a_path(name):
    with pytest.raises(BadInput, match="unknown target"):
        load_target(name)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("memory_mib = 8192", "", r"\[device\] lacks memory_mib"),
        (
            "memory_mib = 8192",
            "memory_mib = 8192\nram = 1",
            r"\[device\] has unknown keys: ram; expected kind, machine, memory_mib",
        ),
        ("memory_mib = 8192", "memory_mib = '8 GB'", r"\[device\] memory_mib is '8 GB'; expected int"),
        ("dynamic_shapes = true", "dynamic_shapes = 1", r"\[limits\] dynamic_shapes is 1; expected bool"),
        (
            'precisions = ["float32"]',
            "precisions = 32",
            r"\[limits\] precisions is 32; expected a list of str",
        ),
        ("[device]", "[machine]", "top level has unknown keys: machine"),
        ('kind = "cpu"', 'kind = "toaster"', r"\[device\] kind: 'toaster'; expected cpu or gpu or npu"),
        (
            'kind = "cpu"',
            'kind = "cpu"\nmachine = "vax"',
            r"machine: 'vax'; expected any or x86_64 or aarch64",
        ),
        (
            'engine = "onnxruntime"',
            'engine = "abacus"',
            r"\[backend\] engine: 'abacus'; expected onnxruntime",
        ),
        (
            'precisions = ["float32"]',
            'precisions = ["float8"]',
            r"\[limits\] precisions: 'float8'; expected float32",
        ),
        (
            'precisions = ["float32"]',
            'precisions = ["bfloat16"]',
            r"\[recipe\] precision: 'float32'; expected bfloat16",
        ),
        ("[quality.float32]", "[quality.float16]", r"a precision without \[quality\]: 'float32'"),
        ("[quality.float32]", "[quality]", r"quality.part_relative_error is 0.0001; expected a table"),
        (
            "fuse_attention = true",
            'weights = "int3"',
            r"\[recipe\] weights: 'int3'; expected float32 or float16",
        ),
        ("[device]", "[device", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_file_table_and_key(old, new, said, tmp_path):
    file = tmp_path / "mine.toml"
    text = (FOLDER / "laptop-cpu.toml").read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(BadInput, match=said) as caught:
        read_target(file)
    assert str(file) in str(caught.value)


def test_a_recipe_file_overrides_only_the_keys_it_has(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[recipe]\nsteps = 7\n")
    target = load_target("laptop-cpu")
    changed = target.with_recipe(file)
    assert changed.recipe.steps == 7
    assert changed.recipe.sampler == target.recipe.sampler
    file.write_text("steps = 9")  # the keys may stand alone
    assert target.with_recipe(file).recipe.steps == 9


def test_a_recipe_file_may_not_ask_for_what_the_device_lacks(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('precision = "bfloat16"')
    with pytest.raises(BadInput, match=r"mine.toml: \[recipe\] precision: 'bfloat16'; expected float32"):
        load_target("laptop-cpu").with_recipe(file)


def test_an_unknown_recipe_key_is_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[recipe]\nstep = 7\n")
    with pytest.raises(BadInput, match=r"mine.toml: \[recipe\] has unknown keys: step; expected .*steps"):
        load_target("laptop-cpu").with_recipe(file)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"gone.toml cannot be read .*fix: check the path"):
        load_target("laptop-cpu").with_recipe(tmp_path / "gone.toml")
