"""AOTInductor: compiled here for this CPU; on a GPU the session replays a CUDA graph, which doubles stand in for."""

import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewstep.runtime.atenfile import GRAPH, WEIGHTS, read_aten
from fewstep.runtime.backends import aoti as backend
from fewstep.runtime.backends import open_session
from fewstep.runtime.errors import BadInput, BundleError, FewstepError
from fewstep.runtime.manifest import PartSpec, TensorSpec

SPEC = PartSpec(
    "aoti",
    f"unet/{GRAPH}",
    (TensorSpec("sample", "float32", (1, 4)),),
    (TensorSpec("out", "float32", (1, 2)), TensorSpec("rest", "float32", (1, 2))),
)
X = np.array([[1, -2, 3, -4]], np.float32)
NODES = [
    ["h", "aten.linear.default", [{"value": "sample"}, {"weight": "w"}], {}],
    ["low", "aten.clamp.default", [{"value": "h"}, {"infinity": -1}, 3.0], {}],
    ["parts", "aten.chunk.default", [{"value": "low"}, 2, -1], {}],
    ["a", "item", [{"value": "parts"}, 0], {}],
    ["b", "item", [{"value": "parts"}, 1], {}],
    [
        "ones",
        "aten.full.default",
        [[1, 2], 1.0],
        {"dtype": {"dtype": "float32"}, "device": {"device": "own"}},
    ],
    ["c", "aten.add.Tensor", [{"value": "b"}, {"value": "ones"}], {}],
]


def write(folder, nodes=NODES):
    """sample -> the halves of min(2 sample, 3), the second one plus 1."""
    weights = 2 * np.eye(4, dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    graph = {
        "fewstep_aten": 1,
        "inputs": [["sample", "float32", [1, 4]]],
        "nodes": nodes,
        "outputs": ["a", "c"],
    }
    (folder / GRAPH).write_text(json.dumps(graph))
    header = {"w": {"dtype": "F32", "shape": list(weights.shape), "data_offsets": [0, weights.nbytes]}}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + weights.tobytes())
    return folder / GRAPH


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all: compiling takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(cache))


def test_a_graph_is_compiled_for_this_cpu_and_computes_what_it_says(tmp_path, cache):
    session = open_session(write(tmp_path), SPEC, threads=1)
    assert {name: each.tolist() for name, each in session.run({"sample": X}).items()} == {
        "out": [[2, -4]],
        "rest": [[4, -7]],
    }
    assert list(session.run({"sample": X}, ["rest"])) == ["rest"]
    session.close()
    session.close()
    left = sorted(file.suffix for file in (cache / "aoti").iterdir())
    assert left == ["", ".json", ".pt2"]  # the secret, the record, the package: nothing of torch's own caches


def test_what_was_compiled_is_there_the_next_time(tmp_path, monkeypatch):
    file = write(tmp_path)
    open_session(file, SPEC, threads=1).close()
    monkeypatch.setattr(backend, "_compile", None)
    assert open_session(file, SPEC, threads=1).run({"sample": X})["out"].tolist() == [[2, -4]]
    with pytest.raises(TypeError):  # another number of threads is another program
        open_session(file, SPEC, threads=2)


def test_another_size_is_refused(tmp_path):
    session = open_session(write(tmp_path), SPEC, threads=1)
    with pytest.raises(BadInput, match=r"sample of shape \(2, 4\), and the graph takes \(1, 4\)"):
        session.run({"sample": np.ones((2, 4), np.float32)})


def test_a_changed_graph_meets_the_gate_before_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "program", None)
    nodes = [["h", "aten.from_file.default", ["a", False, 4], {}], *NODES[1:]]
    with pytest.raises(BundleError, match=r"aten.json: node 'h' is 'aten.from_file.default'"):
        open_session(write(tmp_path, nodes), SPEC, threads=1)


def test_arguments_that_do_not_fit_their_operator_are_refused(tmp_path):
    nodes = [["h", "aten.linear.default", [{"value": "sample"}, 3], {}], *NODES[1:]]
    nodes.insert(1, ["unused", "aten.t.default", [{"weight": "w"}], {}])
    with pytest.raises(BundleError, match=r"cannot compile .*aten.json .*linear.*export the bundle again"):
        open_session(write(tmp_path, nodes), SPEC, threads=1)


def test_a_result_no_memory_holds_is_refused_before_it_is_compiled(tmp_path):
    wide = [["big", "aten.expand.default", [{"value": "sample"}, [2**20, 4]], {}]]
    wide += [["tall", "aten.unsqueeze.default", [{"value": "big"}, 1], {}]]
    wide += [["huge", "aten.mul.Tensor", [{"value": "big"}, {"value": "tall"}], {}]]
    file = write(tmp_path, [*wide, *NODES])
    with pytest.raises(BundleError, match=r"would have sizes \(1048576, 1048576, 4\)"):
        backend.program(read_aten(file, file.with_name(WEIGHTS)), file.with_name(WEIGHTS), "cpu")


def test_another_file_is_no_graph(tmp_path):
    with pytest.raises(BundleError, match=r"model.pt2 is no graph of ATen operators"):
        backend.open_session(tmp_path / "model.pt2", SPEC)


def test_a_host_without_a_compiler_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match=r"no C\+\+ compiler .*install g\+\+"):
        open_session(write(tmp_path), SPEC, threads=1)


def on_gpu(spec=SPEC):
    return PartSpec(spec.engine, spec.graph, spec.inputs, spec.outputs, device="gpu")


def test_a_host_without_a_gpu_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.runs_in(on_gpu()) is None
    with pytest.raises(BadInput, match=r"finds no NVIDIA GPU.*torch.version.cuda"):
        backend.open_session(write(tmp_path), on_gpu())


class Recorder:
    """CUDA's streams and graphs: what is computed while a graph is recorded runs again at each replay."""

    def __init__(self, monkeypatch):
        self.recording, self.calls, self.replays, self.warm = False, 0, 0, 0
        for name, value in {
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": self.stream,
            "CUDAGraph": lambda: self,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def stream(self, stream):
        yield

    @contextmanager
    def graph(self, graph):
        assert graph is self
        self.recording = True
        yield
        self.recording = False

    def network(self, x):
        self.calls += 1
        if not self.recording:
            self.warm += 1
            return 2 * x
        self.held, self.result = x, 2 * x
        return self.result

    def replay(self):
        self.replays += 1
        self.result.copy_(2 * self.held)


def test_on_a_gpu_the_network_is_recorded_once_and_replayed_at_each_step(monkeypatch):
    recorder = Recorder(monkeypatch)
    spec = PartSpec("aoti", SPEC.graph, SPEC.inputs, (TensorSpec("out", "float32", (1, 4)),), device="gpu")
    session = backend.AotiSession(recorder.network, spec, SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, copy=False: self.clone())
    for step in range(4):
        assert session.run({"sample": step * X})["out"].tolist() == (2 * step * X).tolist()
    assert (recorder.calls, recorder.warm, recorder.replays) == (backend.WARM_UP + 1, backend.WARM_UP, 4)
    session.close()
    with pytest.raises(AssertionError, match="closed"):
        session.run({"sample": X})


def test_results_of_a_replay_do_not_change_at_the_next(monkeypatch):
    recorder = Recorder(monkeypatch)
    spec = PartSpec("aoti", SPEC.graph, SPEC.inputs, (TensorSpec("out", "float32", (1, 4)),), device="gpu")
    session = backend.AotiSession(recorder.network, spec, SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, copy=False: self.clone())
    first = session.run({"sample": X})["out"]
    session.run({"sample": 3 * X})
    assert first.tolist() == (2 * X).tolist()


def test_a_gpu_out_of_memory_says_what_to_do():
    def network(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    session = backend.AotiSession(network, SPEC, torch.device("cpu"))
    with pytest.raises(
        FewstepError, match=r"the GPU has no room to run the network .*2.00 GiB.*low_memory=True"
    ):
        session.run({"sample": X})
