"""Hexagon's backend against a double of the plug-in: its NPU is not here, and its emulator is the gate's alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxruntime_qnn", reason="needs the qnn extra")

from fewstep.runtime.backends import qnn  # noqa: E402
from fewstep.runtime.errors import BadInput, BundleError  # noqa: E402
from fewstep.runtime.manifest import PartSpec, TensorSpec  # noqa: E402

SPEC = PartSpec(
    "qnn",
    "unet/model.onnx",
    (TensorSpec("sample", "float32", (1, 4)),),
    (TensorSpec("out_sample", "float32", (1, 4)),),
    precision="float16",
    device="npu",
)


class Plugin:
    """Stands in for onnxruntime: a device that adds 1, and a record of what it was asked for."""

    __version__ = "1.31.1"

    def __init__(self, left=()):
        self.left, self.opened, self.registered = left, [], []

    def register_execution_provider_library(self, name, path):
        self.registered.append(name)

    def get_ep_devices(self):
        def device(provider, kind):
            return SimpleNamespace(ep_name=provider, device=SimpleNamespace(type=SimpleNamespace(name=kind)))

        return [
            device("CPUExecutionProvider", "CPU"),
            device(qnn.PROVIDER, "GPU"),
            device(qnn.PROVIDER, "NPU"),
        ]

    class SessionOptions:
        def __init__(self):
            self.entries, self.devices, self.provider = {}, [], {}

        def add_session_config_entry(self, name, value):
            self.entries[name] = value

        def add_provider_for_devices(self, devices, options):
            self.devices, self.provider = devices, options

    def InferenceSession(self, path, options):
        data = Path(path).read_bytes()
        if data == b"refused":
            raise RuntimeError("QNN: graph prepare failed\nat line 5")
        self.opened.append((data, options))
        if "ep.context_file_path" in options.entries:
            Path(options.entries["ep.context_file_path"]).write_bytes(b"context of " + data)
        nodes = [SimpleNamespace(op_type=kind, name=f"node_{kind}") for kind in self.left]
        parts = [SimpleNamespace(ep_name=qnn.PROVIDER, get_nodes=list)]
        parts += [SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)] * bool(nodes)
        return SimpleNamespace(
            get_outputs=lambda: [SimpleNamespace(name="out_sample")],
            run=lambda names, feeds: [feeds["sample"] + 1 for _ in names],
            get_provider_graph_assignment_info=lambda: parts,
        )


@pytest.fixture
def phone(monkeypatch, tmp_path):
    """A Snapdragon 8 Gen 3 as this module sees one, and a graph."""
    plugin = Plugin()
    monkeypatch.setattr(qnn, "onnxruntime", plugin)
    monkeypatch.setattr(qnn.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(qnn, "soc_name", lambda: "SM8650")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    qnn._register.cache_clear()
    yield plugin
    qnn._register.cache_clear()


@pytest.fixture
def graph(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    return folder / "model.onnx"


def test_a_snapdragon_computes_on_its_npu_alone(phone):
    assert qnn.runs_in(SPEC) == "float16"
    assert qnn.runs_in(replace(SPEC, device="cpu")) is None


def test_no_other_host_is_a_snapdragon(monkeypatch, graph):
    monkeypatch.setattr(qnn.platform, "machine", lambda: "x86_64")
    assert qnn.runs_in(SPEC) is None  # though the plug-in lists its emulator
    with pytest.raises(BadInput, match="no Hexagon NPU"):
        qnn.open_session(graph, SPEC)


def test_a_graph_is_compiled_once_and_then_loaded_from_the_cache(phone, graph):
    session = qnn.open_session(graph, SPEC)
    assert [data for data, _ in phone.opened] == [b"graph", b"context of graph"]
    qnn.open_session(graph, SPEC).close()
    assert [data for data, _ in phone.opened[2:]] == [b"context of graph"]
    for _, options in phone.opened:
        assert [found.device.type.name for found in options.devices] == ["NPU"]
        assert options.provider["soc_model"] == "57"
        assert options.provider["htp_arch"] == "75"
    found = session.run({"sample": np.zeros((1, 4), np.float32)})
    assert found["out_sample"].tolist() == [[1, 1, 1, 1]]
    session.close()
    session.close()


def test_another_graph_chip_or_library_is_compiled_anew(phone, graph, monkeypatch):
    def compiled_again():
        phone.opened.clear()
        qnn.open_session(graph, SPEC)
        return len(phone.opened) == 2

    assert compiled_again()
    assert not compiled_again()
    graph.write_bytes(b"another")
    assert compiled_again()
    (graph.parent / "model.onnx_data").write_bytes(b"weights")
    assert compiled_again()
    monkeypatch.setattr(qnn, "soc_name", lambda: "SM8750")
    assert compiled_again()
    monkeypatch.setattr(qnn, "library_version", lambda: "99")
    assert compiled_again()


def test_a_changed_context_is_compiled_anew(phone, graph, tmp_path):
    qnn.open_session(graph, SPEC)
    (kept,) = (tmp_path / "cache").rglob("*.onnx")
    kept.write_bytes(b"somebody's program")
    phone.opened.clear()
    qnn.open_session(graph, SPEC)
    assert [data for data, _ in phone.opened] == [b"graph", b"context of graph"]


def test_operators_left_to_the_cpu_are_named_and_nothing_is_kept(phone, graph, tmp_path):
    phone.left = ("IsNaN", "Where")
    with pytest.raises(BundleError, match="unet: QNN leaves 2 operators to the CPU: IsNaN node_IsNaN, Where"):
        qnn.open_session(graph, SPEC)
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_what_qnn_refuses_is_said_in_its_words(phone, graph):
    graph.write_bytes(b"refused")
    with pytest.raises(BundleError, match="graph prepare failed"):
        qnn.open_session(graph, SPEC)


def test_a_chip_of_unknown_name_is_left_to_the_plugin(phone, graph, monkeypatch):
    monkeypatch.setattr(qnn, "soc_name", lambda: "SM9999")
    qnn.open_session(graph, SPEC)
    assert "soc_model" not in phone.opened[0][1].provider
