"""LiteRT's backend: what is run, what is refused, and by whom."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.runtime import backends
from fewstep.runtime.errors import BadInput, BundleError, MissingExtra
from fewstep.runtime.manifest import PartSpec, TensorSpec

schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs the litert extra")

from fewstep.export.litert_file import Stored, written  # noqa: E402

TABLE = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
SPEC = PartSpec(
    "litert",
    "model.tflite",
    (TensorSpec("ids", "int32", (3,)), TensorSpec("shift", "float32", (3, 4))),
    (TensorSpec("rows", "float32", (3, 4)), TensorSpec("moved", "float32", (3, 4))),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rows = table[ids], moved = rows + shift."""
    made = schema.ModelT()
    made.version, made.operatorCodes = 3, []
    for code in (7, 0):  # EMBEDDING_LOOKUP, ADD
        made.operatorCodes.append(schema.OperatorCodeT())
        made.operatorCodes[-1].builtinCode = made.operatorCodes[-1].deprecatedBuiltinCode = code
        made.operatorCodes[-1].version = 1
    made.buffers = [Stored(), Stored(TABLE.tobytes())]
    graph = schema.SubGraphT()
    graph.tensors = []
    for name, shape, kind, buffer in (
        ("ids", [3], 2, 0),
        ("shift", [3, 4], 0, 0),
        ("table", [5, 4], 0, 1),
        ("rows", [3, 4], 0, 0),
        ("moved", [3, 4], 0, 0),
    ):
        graph.tensors.append(schema.TensorT())
        tensor = graph.tensors[-1]
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, shape, kind, buffer
    graph.operators = [schema.OperatorT(), schema.OperatorT()]
    graph.operators[0].inputs, graph.operators[0].outputs = [0, 2], [3]
    graph.operators[1].opcodeIndex, graph.operators[1].inputs, graph.operators[1].outputs = 1, [3, 1], [4]
    graph.operators[1].builtinOptionsType = schema.BuiltinOptions.AddOptions
    graph.operators[1].builtinOptions = schema.AddOptionsT()
    graph.inputs, graph.outputs = [0, 1], [3, 4]
    made.subgraphs = [graph]
    path = tmp_path_factory.mktemp("tflite") / "model.tflite"
    path.write_bytes(written(made))
    return path


def feeds(seed: int = 0) -> dict[str, Any]:
    shift = np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32)
    return {"ids": np.array([4, 0, seed % 5], np.int64), "shift": shift}


def test_a_session_computes_the_graph_and_takes_whole_numbers_of_64_bits(file: Path) -> None:
    session = backends.open_session(file, SPEC, threads=1)
    given = feeds()
    got = session.run(given)
    np.testing.assert_array_equal(got["rows"], TABLE[[4, 0, 0]])
    np.testing.assert_array_equal(got["moved"], TABLE[[4, 0, 0]] + given["shift"])
    assert list(session.run(given, ["moved"])) == ["moved"]
    session.close()
    session.close()


def test_what_a_session_gave_stays_as_it_is_when_it_runs_again(file: Path) -> None:
    session = backends.open_session(file, SPEC)
    first = session.run(feeds(), ["moved"])["moved"]
    kept = first.copy()
    session.run(feeds(1))
    np.testing.assert_array_equal(first, kept)


def test_another_size_is_refused_with_the_one_it_takes(file: Path) -> None:
    session = backends.open_session(file, SPEC)
    with pytest.raises(BadInput, match=r"shift of shape \(4, 4\).*\(3, 4\)"):
        session.run({**feeds(), "shift": np.zeros((4, 4), np.float32)})


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(file: Path) -> None:
    other = dataclasses.replace(SPEC, inputs=(TensorSpec("label", "int32", (3,)), SPEC.inputs[1]))
    with pytest.raises(BundleError, match="ids"):
        backends.open_session(file, other)
    wide = dataclasses.replace(SPEC, inputs=(TensorSpec("ids", "int64", (3,)), SPEC.inputs[1]))
    with pytest.raises(BundleError, match="int32"):
        backends.open_session(file, wide)


def test_what_is_no_litert_graph_is_refused_without_a_word_of_the_library(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.tflite").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(BundleError, match="LiteRT .* cannot load it"):
        backends.open_session(tmp_path / "model.tflite", SPEC)
    (tmp_path / "model.onnx").write_bytes(file.read_bytes())
    with pytest.raises(BundleError, match="no LiteRT graph"):
        backends.open_session(tmp_path / "model.onnx", SPEC)
    backends.open_session(file, SPEC).run(feeds())
    assert capfd.readouterr() == ("", "")


def test_it_runs_on_the_cpu_of_any_host_and_nowhere_else(file: Path) -> None:
    assert backends.runs_in(SPEC) == "float32"
    npu = dataclasses.replace(SPEC, device="npu")
    assert backends.runs_in(npu) is None
    with pytest.raises(BadInput, match="npu"):
        backends.open_session(file, npu)


class Missing:
    """Finds no ai_edge_litert."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "ai_edge_litert":
            raise ModuleNotFoundError("No module named 'ai_edge_litert'", name="ai_edge_litert")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "ai_edge_litert" or name == "fewstep.runtime.backends.litert":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(MissingExtra, match=r"fewstep\[litert\]"):
        backends.open_session(file, SPEC)
