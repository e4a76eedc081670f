"""The gate before torch: what a graph of ATen operators may say."""

import json

import numpy as np
import pytest

from fewstep.runtime.atenfile import GRAPH, WEIGHTS, check_aten, read_aten
from fewstep.runtime.atenops import ITEM, OPERATORS
from fewstep.runtime.errors import BundleError

GOOD = {
    "fewstep_aten": 1,
    "inputs": [["sample", "float32", [1, 4]]],
    "nodes": [
        ["h", "aten.linear.default", [{"value": "sample"}, {"weight": "w"}, None], {}],
        ["parts", "aten.chunk.default", [{"value": "h"}, 2, -1], {}],
        ["half", "item", [{"value": "parts"}, 0], {}],
        [
            "y",
            "aten.full_like.default",
            [{"value": "half"}, {"infinity": -1}],
            {"dtype": {"dtype": "float16"}},
        ],
    ],
    "outputs": ["y"],
}
TENSORS = {"w": ("F32", [4, 4])}
SIZES = {"F32": 4, "F16": 2, "F64": 8}


def safetensors(tensors=TENSORS, change=None, tail=b""):
    """A file of ones; `change` edits its header."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end) + tail


@pytest.fixture
def refused(tmp_path):
    """Why the gate refuses a graph, as (what is wrong)."""

    def why(graph=GOOD, weights=None):
        path, beside = tmp_path / GRAPH, tmp_path / WEIGHTS
        path.write_bytes(graph if isinstance(graph, bytes) else json.dumps(graph).encode())
        beside.write_bytes(safetensors() if weights is None else weights)
        with pytest.raises(BundleError) as error:
            check_aten(path, beside)
        assert str(error.value).startswith(("aten.json: ", "aten.safetensors: "))
        return str(error.value)

    return why


def changed(place, value):
    graph = json.loads(json.dumps(GOOD))
    where = graph
    for step in place[:-1]:
        where = where[step]
    where[place[-1]] = value
    return graph


def test_a_graph_and_its_weights_are_read(tmp_path):
    (tmp_path / GRAPH).write_text(json.dumps(GOOD))
    (tmp_path / WEIGHTS).write_bytes(safetensors())
    graph = read_aten(tmp_path / GRAPH, tmp_path / WEIGHTS)
    assert graph.inputs == (("sample", "float32", (1, 4)),)
    assert [node.operator for node in graph.nodes][:2] == ["aten.linear.default", "aten.chunk.default"]
    assert graph.weights["w"].shape == (4, 4)
    assert graph.weights["w"].stop - graph.weights["w"].start == 64


OPERATOR, ARGUMENTS = ["nodes", 0, 1], ["nodes", 0, 2]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["fewstep_aten"], 2, "version 2"),
        (["more"], 1, "no graph of fewstep"),
        (["inputs"], [], "inputs is no list"),
        (["inputs", 0], ["sample", "float32"], "not .name, type, sizes."),
        (["inputs", 0, 0], "a b", "letters, digits"),
        (["inputs", 0, 1], "object", "of type 'object'"),
        (["inputs", 0, 2], [1, -4], "has sizes"),
        (["inputs", 0, 2], [2**20, 2**20], "elements in all"),
        (["inputs", 0, 2], [1] * 33, "has sizes"),
        (["inputs", 0, 2], ["batch", 4], "has sizes"),
        (["inputs", 0, 2], [True, 4], "has sizes"),
        (["nodes", 0], ["h", "aten.linear.default", []], "not .name, operator"),
        (["nodes", 1, 0], "h", "given twice"),
        (["nodes", 0, 0], "sample", "given twice"),
        (OPERATOR, "aten.from_file.default", "one of the operators"),
        (OPERATOR, "aten.as_strided.default", "one of the operators"),
        (OPERATOR, "aten.linear", "one of the operators"),
        (OPERATOR, "prims.add.default", "one of the operators"),
        (OPERATOR, "os.system", "one of the operators"),
        (OPERATOR, ["aten.linear.default"], "one of the operators"),
        (["nodes", 0, 3], {"__class__": 1, "a b": 2}, "letters, digits"),
        (["nodes", 0, 3], [], "no arguments that fit"),
        (ARGUMENTS, [0] * 33, "no arguments that fit"),
        ([*ARGUMENTS, 0], {"value": "y"}, "an input or an earlier node"),
        ([*ARGUMENTS, 0], {"value": ["sample"]}, "has the argument"),
        ([*ARGUMENTS, 0], {"weight": "v"}, "which is not there"),
        ([*ARGUMENTS, 1], None, "weight 'w' is read by no node"),
        ([*ARGUMENTS, 2], {"dtype": "complex64"}, "has the argument"),
        ([*ARGUMENTS, 2], {"device": "cuda:1"}, "has the argument"),
        ([*ARGUMENTS, 2], {"infinity": 2}, "has the argument"),
        ([*ARGUMENTS, 2], {"eval": "1"}, "has the argument"),
        ([*ARGUMENTS, 2], {}, "has the argument"),
        ([*ARGUMENTS, 2], {"value": "sample", "weight": "w"}, "has the argument"),
        ([*ARGUMENTS, 2], "__import__('os')", "a word, or an equation"),
        ([*ARGUMENTS, 2], "a" * 101, "a word, or an equation"),
        ([*ARGUMENTS, 2], 2**63, "63 bits"),
        ([*ARGUMENTS, 2], [2**20, 2**20], "asks for sizes"),
        ([*ARGUMENTS, 2], [-(2**20), 2**20], "asks for sizes"),
        ([*ARGUMENTS, 2], [[[1]]], "too deep"),
        (["outputs"], ["x"], "of no node"),
        (["outputs"], [1], "letters, digits"),
    ],
)
def test_what_a_network_has_no_need_of_is_refused(refused, place, value, message):
    import re

    assert re.search(message, refused(changed(place, value)))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\x80\x04.",
        b'{"a": 1, "a": 2}',
        b"[" * 100,
        b"version https://git-lfs.github.com/spec/v1",
    ],
)
def test_what_is_no_such_json_is_refused(refused, text):
    refused(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["w"].update(dtype="F8_E4M3"), "of type"),
        (lambda h: h["w"].update(shape=[4, 5]), "holds 64 bytes"),
        (lambda h: h["w"].update(shape=[-4, -4]), "sizes or offsets"),
        (lambda h: h["w"].update(shape=[2**62, 2**62]), "holds 64 bytes"),
        (lambda h: h["w"].update(data_offsets=[64, 0]), "holds -64"),
        (lambda h: h["w"].update(data_offsets=[8, 72]), "overlap, or leave a hole"),
        (lambda h: h["w"].update(data_offsets=[0]), "sizes or offsets"),
        (lambda h: h["w"].update(more=1), "not exactly"),
        (lambda h: h.update(v={"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}), "overlap"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(refused, change, message):
    assert message in refused(weights=safetensors(change=change))


@pytest.mark.parametrize(
    "weights",
    [b"", b"\x00" * 4, b"\xff" * 8 + b"{}", safetensors(tail=b"x"), safetensors()[:-1], safetensors()[:20]],
)
def test_a_damaged_file_of_weights_is_refused(refused, weights):
    refused(weights=weights)


def test_every_cut_of_the_graph_is_refused(refused):
    text = json.dumps(GOOD).encode()
    for end in range(0, len(text), 7):
        refused(text[:end])


def test_links_are_refused(tmp_path):
    for name, data in ((GRAPH, json.dumps(GOOD).encode()), (WEIGHTS, safetensors())):
        (tmp_path / name).write_bytes(data)
    for name in (GRAPH, WEIGHTS):
        (tmp_path / name).rename(tmp_path / "there")
        (tmp_path / name).symlink_to("there")
        with pytest.raises(BundleError, match="link"):
            check_aten(tmp_path / GRAPH, tmp_path / WEIGHTS)
        (tmp_path / name).unlink()
        (tmp_path / "there").rename(tmp_path / name)


def test_the_operators_are_torchs_own_and_change_nothing():
    import torch

    for name in OPERATORS - {ITEM}:
        _, operator, overload = name.split(".")
        schema = getattr(getattr(torch.ops.aten, operator), overload)._schema
        assert not schema.is_mutable, name
        kinds = {str(argument.type).strip("Optional[]?") for argument in schema.arguments}
        assert not kinds & {"Generator", "Storage", "Stream"}, name
        assert "filename" not in {argument.name for argument in schema.arguments}, name
