"""What a checkpoint's files can be instead of weights. Pure Python: no torch here."""

import json

import numpy as np
import pytest

from fewstep.model.checks import check_finite, read_header, read_json, weight_files
from fewstep.runtime.errors import CheckpointError


def write(file, tensors, metadata=None):
    """A safetensors file by hand: {name: array}."""
    header, data = {}, b""
    for name, array in tensors.items():
        kind = {"float32": "F32", "float16": "F16", "int64": "I64", "uint16": "BF16"}[array.dtype.name]
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


@pytest.fixture
def weights(tmp_path):
    arrays = {"a.weight": np.ones((2, 3), np.float32), "b.bias": np.ones(4, np.float16)}
    return write(tmp_path / "model.safetensors", arrays, {"format": "pt"})


def test_a_whole_file_lists_its_tensors(weights):
    found = {tensor.name: (tensor.dtype, tensor.shape, tensor.count()) for tensor in read_header(weights)}
    assert found == {"a.weight": ("F32", (2, 3), 6), "b.bias": ("F16", (4,), 4)}
    check_finite([weights])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\x01", "has 1 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS pointer.*fix: run git lfs pull",
        ),
        (b"<!DOCTYPE html><html>Not found</html>", "is a web page, not weights"),
        (b"PK\x03\x04" + bytes(60), "is a pickle, which can run code"),
        (b"\x80\x02}q\x00." + bytes(60), "is a pickle, which can run code"),
        ((1 << 63).to_bytes(8, "little") + bytes(60), "claims a header of 9,223,372,036,854,775,808"),
        ((200 << 20).to_bytes(8, "little") + bytes(60), "claims a header of 209,715,200"),
        ((4).to_bytes(8, "little") + b"abcd", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "damaged"),
        ((9).to_bytes(8, "little") + b'{"a":"b"}', "tensor 'a' is described as"),
    ],
)
def test_what_is_not_weights_is_named(content, said, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert caught.value.fix or caught.value.expected


def test_every_cut_of_a_file_is_refused(weights):
    whole = weights.read_bytes()
    for length in range(len(whole)):
        weights.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_header(weights)


def test_a_truncated_file_says_how_many_bytes_it_needs(weights):
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    with pytest.raises(
        CheckpointError, match=f"truncated: it has {len(whole) - 3} bytes; expected {len(whole)} for"
    ):
        read_header(weights)


def test_trailing_bytes_are_refused(weights):
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(weights)


@pytest.mark.parametrize(
    ("array", "count"),
    [
        (np.array([1, np.nan, np.inf, -np.inf], np.float32), 3),
        (np.array([1, np.nan, 65504, 0], np.float16), 1),
        (np.array([0x3F80, 0x7FC0, 0x7F80, 0x8000], np.uint16), 2),  # bfloat16: 1, NaN, inf, -0
    ],
)
def test_nan_and_infinity_are_counted_and_named(array, count, tmp_path):
    file = write(tmp_path / "m.safetensors", {"fine": np.ones(3, np.float32), "mid_block.weight": array})
    with pytest.raises(
        CheckpointError, match=f"m.safetensors: tensor mid_block.weight has {count} NaN or infinite.* 4"
    ):
        check_finite([file])


def test_integers_are_never_nan(tmp_path):
    check_finite([write(tmp_path / "m.safetensors", {"ids": np.full(3, -1, np.int64)})])


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bin, a pickle.*fix: convert it"):
        weight_files(tmp_path)


def test_a_component_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors"):
        weight_files(tmp_path)


def test_fp16_files_are_taken_only_when_there_are_no_others(tmp_path):
    (tmp_path / "model.fp16.safetensors").touch()
    assert [file.name for file in weight_files(tmp_path)] == ["model.fp16.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds list; expected a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_json_that_is_none_is_named(content, said, tmp_path):
    file = tmp_path / "model_index.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=said):
        read_json(file)
