"""The gate for .tflite files: real graphs pass, each known attack is refused with the name of what is at fault."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.runtime.errors import BundleError
from fewstep.runtime.tflitefile import check_tflite

schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs the litert extra")

from fewstep.export.litert_file import Stored, written  # noqa: E402

Model = Any
FLOAT32, INT32, INT8 = 0, 2, 9


def tensor(shape: list[int], kind: int = FLOAT32, buffer: int = 0) -> Any:
    made = schema.TensorT()
    made.shape, made.type, made.buffer = shape, kind, buffer
    return made


def operator(code: int, options: str, inputs: list[int], outputs: list[int]) -> Any:
    made = schema.OperatorT()
    made.opcodeIndex, made.inputs, made.outputs = code, inputs, outputs
    made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
    made.builtinOptions = getattr(schema, f"{options}T")()
    return made


def named(name: str, number: int) -> Any:
    made = schema.TensorMapT()
    made.name, made.tensorIndex = name, number
    return made


def model() -> Model:
    """out = pad(weights x), with int8 weights of a scale a row."""
    made = schema.ModelT()
    made.version, made.description = 3, "test"
    made.operatorCodes = []
    for code in (9, 34):  # FULLY_CONNECTED, PAD
        made.operatorCodes.append(schema.OperatorCodeT())
        made.operatorCodes[-1].builtinCode = made.operatorCodes[-1].deprecatedBuiltinCode = code
    pads = np.array([[0, 0], [1, 2]], np.int32)
    made.buffers = [Stored(), Stored(bytes(range(12))), Stored(pads.tobytes())]
    graph = schema.SubGraphT()
    graph.tensors = [
        *(tensor([1, 4]), tensor([3, 4], INT8, 1), tensor([1, 3]), tensor([2, 2], INT32, 2), tensor([1, 6])),
    ]
    how = graph.tensors[1].quantization = schema.QuantizationParametersT()
    how.scale, how.zeroPoint = np.array([0.5, 1, 2], np.float32), np.zeros(3, np.int64)
    graph.operators = [
        operator(0, "FullyConnectedOptions", [0, 1, -1], [2]),
        operator(1, "PadOptions", [2, 3], [4]),
    ]
    graph.inputs, graph.outputs = [0], [4]
    made.subgraphs = [graph]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.inputs, signature.outputs = (
        "serving_default",
        [named("x", 0)],
        [named("y", 4)],
    )
    made.signatureDefs = [signature]
    return made


@pytest.fixture
def check(tmp_path: Path) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        (tmp_path / "model.tflite").write_bytes(data)
        check_tflite(tmp_path / "model.tflite")

    return run


def test_a_graph_that_litert_runs_passes(check: Callable[[bytes], None], tmp_path: Path) -> None:
    from fewstep.runtime.backends import open_session
    from fewstep.runtime.manifest import PartSpec, TensorSpec

    made = model()
    made.subgraphs[0].tensors[0].name, made.subgraphs[0].tensors[4].name = "x", "y"
    check(written(made))
    spec = PartSpec(
        "litert", "model.tflite", (TensorSpec("x", "float32", (1, 4)),), (TensorSpec("y", "float32", (1, 6)),)
    )
    got = open_session(tmp_path / "model.tflite", spec).run({"x": np.ones((1, 4), np.float32)})["y"]
    rows = np.arange(12).reshape(3, 4).sum(1) * [0.5, 1, 2]
    np.testing.assert_allclose(got, [[0, *rows, 0, 0]], rtol=1e-2)  # the input is rounded to 8 bits


def change(path: str, value: Any) -> Callable[[Model], None]:
    """Set a.b[2].c of the model, or of its graph where that has an a."""

    def run(made: Model) -> None:
        at: Any = made.subgraphs[0] if hasattr(made.subgraphs[0], path.split(".")[0].split("[")[0]) else made
        *steps, last = path.replace("[", ".").replace("]", "").split(".")
        for step in steps:
            at = at[int(step)] if step.isdigit() else getattr(at, step)
        if last.isdigit():
            at[int(last)] = value
        else:
            setattr(at, last, value)

    return run


ATTACKS: dict[str, tuple[Callable[[Model], None], str]] = {
    "a loop": (change("operatorCodes[0].builtinCode", 119), "operator 119"),
    "a custom operator": (change("operatorCodes[0].builtinCode", 32), "operator 32"),
    "a custom operator beside a known code": (change("operatorCodes[0].customCode", "Flex"), "has field 1"),
    "state": (change("operatorCodes[0].builtinCode", 142), "operator 142"),
    "an operator that sizes its output": (change("operatorCodes[0].builtinCode", 94), "operator 94"),
    "custom options": (change("operators[0].customOptions", [1, 2]), "has field 5"),
    "options of another operator": (change("operators[0].builtinOptionsType", 1), "options of kind 1"),
    "a code that is not there": (change("operators[0].opcodeIndex", 7), "has code 7"),
    "an input that is not there": (change("operators[0].inputs", [0, 99, -1]), "reads tensor 99"),
    "an input left out that is none of a bias": (
        change("operators[0].inputs", [-1, 1, -1]),
        "reads tensor -1",
    ),
    "an input that comes later": (change("operators[0].inputs", [4, 1, -1]), "reads tensor 4"),
    "an output that is a constant": (change("operators[0].outputs", [1]), "writes tensor 1"),
    "an output that is written twice": (change("operators[1].outputs", [2]), "writes tensor 2"),
    "an operator without output": (change("operators[1].outputs", []), "has no output"),
    "an output of the graph that nothing writes": (change("operators[1].outputs", [0]), "writes tensor 0"),
    "an input of the graph that is not there": (change("inputs", [77]), "input or output 77"),
    "an input given twice": (change("inputs", [0, 0]), "given twice"),
    "a constant that is too short": (change("buffers[1]", Stored(bytes(11))), "holds 11 bytes; expected 12"),
    "a constant that is missing": (change("tensors[1].buffer", 0), "reads tensor 1"),
    "a buffer that is not there": (change("tensors[1].buffer", 2**31), "has buffer"),
    "a first buffer that holds something": (change("buffers[0]", Stored(b"1234")), "buffer 0 is not empty"),
    "a shape that overflows": (change("tensors[2].shape", [2**31 - 1] * 4), "needs"),
    "a negative size": (change("tensors[2].shape", [1, -3]), "sizes from 1"),
    "too many sizes": (change("tensors[2].shape", [1] * 9), "9 entries"),
    "a text": (change("tensors[2].type", 5), "element type 5"),
    "a variable": (change("tensors[2].isVariable", True), "from run to run"),
    "an external buffer": (change("tensors[2].externalBuffer", 3), "elsewhere"),
    "scales of another axis": (
        change("tensors[1].quantization.quantizedDimension", 1),
        "3 scales along axis 1",
    ),
    "an axis that is not there": (change("tensors[1].quantization.quantizedDimension", -1), "axis -1"),
    "a scale of 0": (change("tensors[1].quantization.scale", np.zeros(3, np.float32)), "no positive number"),
    "a scale that is no number": (
        change("tensors[1].quantization.scale", np.full(3, np.nan, np.float32)),
        "no positive number",
    ),
    "too few zero points": (
        change("tensors[1].quantization.zeroPoint", np.zeros(1, np.int64)),
        "1 zero points",
    ),
    "a size beyond memory": (
        change("buffers[2]", Stored(np.array([0, 0, 1, 2**30], np.int32).tobytes())),
        "asks for a size of 1,073,741,824",
    ),
    "another version": (change("version", 4), "schema version 4"),
    "metadata": (change("metadataBuffer", [1]), "the model has field 5"),
    "no signature": (change("signatureDefs", []), "0 signatures"),
    "a signature of other tensors": (
        change("signatureDefs[0].inputs[0].tensorIndex", 2),
        "names other inputs",
    ),
    "two graphs": (lambda made: made.subgraphs.append(made.subgraphs[0]), "2 subgraphs"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_the_name_of_what_is_at_fault(
    check: Callable[[bytes], None], name: str
) -> None:
    spoil, found = ATTACKS[name]
    made = model()
    spoil(made)
    with pytest.raises(BundleError, match="model.tflite") as caught:
        check(written(made))
    assert found in str(caught.value)
    assert "do not run" in str(caught.value)


def test_a_file_cut_short_at_any_byte_is_refused(check: Callable[[bytes], None]) -> None:
    data = written(model())
    for length in range(0, len(data), 4):
        with pytest.raises(BundleError):
            check(data[:length])


def test_a_changed_word_is_refused_or_changes_no_place_in_the_file(check: Callable[[bytes], None]) -> None:
    """Whatever is in it, the gate answers with its own error or none: it follows no offset unchecked."""
    rng, data = random.Random(0), written(model())
    refused = 0
    for _ in range(1500):
        at = rng.randrange(0, len(data) // 4) * 4
        word = rng.choice([0, 1, 3, 0x7F, 0x10000, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)])
        try:
            check(data[:at] + struct.pack("<I", word) + data[at + 4 :])
        except BundleError:
            refused += 1
    assert refused > 500


def test_what_is_no_litert_graph_is_refused(check: Callable[[bytes], None]) -> None:
    for data in (b"", b"<html></html>", bytes(64), b"version https://git-lfs.github.com/spec/v1\n"):
        with pytest.raises(BundleError):
            check(data)


def test_constants_off_their_alignment_are_refused(check: Callable[[bytes], None]) -> None:
    data = bytearray(written(model()))
    at = data.index(bytes(range(12))) - 4  # where their count is, which some offset leads to
    offset = next(i for i in range(0, len(data), 4) if i + struct.unpack_from("<I", data, i)[0] == at)
    struct.pack_into("<I", data, offset, at + 4 - offset)
    data[at + 4 : at + 20] = struct.pack("<I", 12) + bytes(range(12))  # over the padding behind them
    with pytest.raises(BundleError, match="begins at byte"):
        check(bytes(data))
