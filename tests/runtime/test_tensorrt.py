"""NVIDIA's GPUs without one: a driver whose GPU is this machine's memory, and doubles of what runs on it.

Parsing and building are the real library's (TensorRT for RTX); only what needs the device is replaced.
"""

import ctypes
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fewstep.runtime import backends
from fewstep.runtime.backends import cudadriver
from fewstep.runtime.backends import tensorrt as backend
from fewstep.runtime.errors import BadInput, BundleError, FewstepError, MissingExtra
from fewstep.runtime.manifest import PartSpec, TensorSpec

FAKE = Path(__file__).with_name("fake_cuda.c")
SPEC = PartSpec(
    "tensorrt",
    "unet/model.onnx",
    (TensorSpec("x", "float32", (1, 4)),),
    (TensorSpec("y", "float32", (1, 4)), TensorSpec("z", "float32", (1, 4))),
    precision="float16",
    device="gpu",
)
X = np.array([[1, 2, 3, 4]], np.float32)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp("cuda") / "libcuda.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(file), str(FAKE)], check=True)
    return file


@pytest.fixture
def driver(library, tmp_path):
    """A fresh copy: its counters start at nothing."""
    file = tmp_path / "libcuda.so"
    file.write_bytes(library.read_bytes())
    return ctypes.CDLL(str(file))


def number(driver, name):
    return ctypes.c_int.in_dll(driver, name)


def graph(file, **changes):
    """y = x + 1, z = x * 2 in ONNX; `changes` set the operator of a node by its name."""
    operators = {"plus": "Add", "twice": "Mul", **changes}
    one = helper.make_tensor("one", TensorProto.FLOAT, (), [1.0])
    two = helper.make_tensor("two", TensorProto.FLOAT, (), [2.0])
    nodes = [
        helper.make_node(operators["plus"], ["x", "one"], ["y"], name="plus"),
        helper.make_node(operators["twice"], ["x", "two"], ["z"], name="twice"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4)) for name in "xyz"]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [one, two])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)
    return file


class Cache:
    def __init__(self):
        self.data = b""

    def deserialize(self, data):
        self.data = data

    def serialize(self):
        return self.data or b"kernels"


class Config:
    cuda_graph_strategy = None

    def create_runtime_cache(self):
        self.cache = Cache()
        return self.cache

    def set_runtime_cache(self, cache):
        assert cache is self.cache


class Engine:
    def create_runtime_config(self):
        return Config()

    def create_execution_context(self, config):
        Context.last = Context(config)
        return Context.last

    def get_tensor_shape(self, name):
        return (1, 4)


class Context:
    """Computes where the driver said the memory is."""

    last = None
    fails = ""

    def __init__(self, config):
        self.config, self.addresses, self.shapes, self.log = config, {}, {}, None

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return shape == (1, 4)

    def get_tensor_shape(self, name):
        return (1, 4)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream
        if Context.fails:
            Runtime.log.log(backend.trt.ILogger.ERROR, Context.fails)
            return False
        arrays = {
            name: np.ctypeslib.as_array((ctypes.c_float * 4).from_address(address))
            for name, address in self.addresses.items()
        }
        arrays["y"][:], arrays["z"][:] = arrays["x"] + 1, arrays["x"] * 2
        return True


class Runtime:
    """Refuses what no builder of this test wrote."""

    log = None
    refuses = ""
    loaded = 0

    def __init__(self, log):
        Runtime.log = log

    def deserialize_cuda_engine(self, data):
        Runtime.loaded += 1
        if Runtime.refuses:
            Runtime.log.log(backend.trt.ILogger.ERROR, Runtime.refuses)
            return None
        assert len(data) > 1000
        return Engine()


@pytest.fixture
def gpu(driver, tmp_path, monkeypatch):
    """A host with a GPU whose library is TensorRT for RTX."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    real = backend.trt
    monkeypatch.setattr(backend, "trt", SimpleNamespace(**{**vars(real), "Runtime": Runtime}))
    monkeypatch.setattr(backend, "open_device", lambda: cudadriver.open_device(driver))
    for kind, name, value in ((Runtime, "refuses", ""), (Runtime, "loaded", 0), (Context, "fails", "")):
        monkeypatch.setattr(kind, name, value)
    return driver


@pytest.fixture
def builds(monkeypatch):
    """Counts the engines built."""
    built = []
    real = backend.build_engine
    monkeypatch.setattr(
        backend,
        "build_engine",
        lambda path, capability=None: built.append(capability) or real(path, capability),
    )
    return built


@pytest.mark.parametrize(
    ("double", "real"),
    [
        (Runtime, "Runtime"),
        (Engine, "ICudaEngine"),
        (Context, "IExecutionContext"),
        (Config, "IRuntimeConfig"),
        (Cache, "IRuntimeCache"),
    ],
)
def test_what_the_doubles_answer_to_is_what_the_library_has(double, real):
    ours = {name for name in vars(double) if not name.startswith("_")} - {
        "last",
        "fails",
        "log",
        "refuses",
        "loaded",
    }
    assert ours <= set(dir(getattr(backend.trt, real)))


def test_a_graph_runs_on_the_device_and_gives_back_all_it_took(gpu, tmp_path):
    session = backend.open_session(graph(tmp_path / "b/unet/model.onnx"), SPEC)
    assert {name: each.tolist() for name, each in session.run({"x": X}).items()} == {
        "y": [[2, 3, 4, 5]],
        "z": [[2, 4, 6, 8]],
    }
    again = session.run({"x": 2 * X}, ["z"])
    assert list(again) == ["z"]
    assert again["z"].tolist() == [[4, 8, 12, 16]]
    assert number(gpu, "fake_live").value == 3
    session.close()
    session.close()
    for name in ("fake_live", "fake_streams", "fake_contexts"):
        assert number(gpu, name).value == 0


def test_the_engine_is_built_for_the_device_once(gpu, tmp_path, builds):
    file = graph(tmp_path / "b/unet/model.onnx")
    for _ in range(2):
        backend.open_session(file, SPEC).close()
    assert builds == ["8.9"]
    graph(file, plus="Sub")
    backend.open_session(file, SPEC).close()
    number(gpu, "fake_version").value = 13010  # another driver
    backend.open_session(file, SPEC).close()
    assert len(builds) == 3


def test_an_engine_that_was_changed_is_never_loaded(gpu, tmp_path, builds):
    file = graph(tmp_path / "b/unet/model.onnx")
    backend.open_session(file, SPEC).close()
    (engine,) = (tmp_path / "cache/tensorrt").glob("*.bin")
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    backend.open_session(file, SPEC).close()
    assert len(builds) == 2


def test_an_engine_lying_in_the_bundle_is_not_looked_at(gpu, tmp_path, builds):
    file = graph(tmp_path / "b/unet/model.onnx")
    for name in ("model.engine", "model.plan", "model.bin"):
        file.with_name(name).write_bytes(b"x" * 2000)
    backend.open_session(file, SPEC).close()
    assert len(builds) == 1


def test_kernels_compiled_at_the_first_run_are_there_at_the_next_start(gpu, tmp_path):
    file = graph(tmp_path / "b/unet/model.onnx")
    first = backend.open_session(file, SPEC)
    assert Context.last.config.cache.data == b""
    first.run({"x": X})
    first.close()
    backend.open_session(file, SPEC).close()
    assert Context.last.config.cache.data == b"kernels"
    assert Context.last.config.cuda_graph_strategy == backend.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def test_a_size_the_engine_is_not_for_is_refused(gpu, tmp_path):
    session = backend.open_session(graph(tmp_path / "b/unet/model.onnx"), SPEC)
    with pytest.raises(BadInput, match=r"x of shape \(2, 4\), and the graph takes \(1, 4\)"):
        session.run({"x": np.ones((2, 4), np.float32)})
    assert session.run({"x": X})["y"].tolist() == [[2, 3, 4, 5]]


def test_a_host_without_a_driver_is_told_so(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(cudadriver.ctypes, "CDLL", missing)
    with pytest.raises(BadInput, match=r"no NVIDIA driver .* install the driver"):
        cudadriver.open_device()
    assert backend.runs_in(SPEC) is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (100, "finds no GPU.*CUDA_VISIBLE_DEVICES"),
        (803, "do not fit each other.*MISMATCH.*restart"),
        (999, "does not start.*error 999.*nvidia-smi"),
    ],
)
def test_a_driver_without_a_gpu_is_told_apart_from_a_broken_one(driver, code, message):
    number(driver, "fake_init").value = code
    with pytest.raises(BadInput, match=message):
        cudadriver.open_device(driver)


def test_a_driver_too_old_for_the_library_is_refused_before_anything_is_built(gpu, tmp_path, builds):
    number(gpu, "fake_version").value = 12040
    with pytest.raises(BadInput, match=r"knows CUDA 12.4, and tensorrt_rtx_cu13 needs 13.0; fix: update"):
        backend.open_session(graph(tmp_path / "model.onnx"), SPEC)
    assert not builds
    assert number(gpu, "fake_contexts").value == 0


def test_no_room_for_inputs_says_how_much_was_asked_for(gpu, tmp_path):
    session = backend.open_session(graph(tmp_path / "model.onnx"), SPEC)
    number(gpu, "fake_room").value = 8
    with pytest.raises(FewstepError, match=r"Fake RTX 4060 has no room.*low_memory=True"):
        session.run({"x": X})
    number(gpu, "fake_room").value = 1 << 20
    assert session.run({"x": X})["y"].tolist() == [[2, 3, 4, 5]]


def test_no_room_for_the_engine_says_how_much_there_is(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(Runtime, "refuses", "[defaultAllocator] Requested amount of GPU memory: OutOfMemory")
    with pytest.raises(FewstepError, match=r"cannot load the engine: Fake RTX 4060 has .* of 1,024 MiB free"):
        backend.open_session(graph(tmp_path / "model.onnx"), SPEC)
    assert number(gpu, "fake_contexts").value == 0


def test_what_goes_wrong_on_the_device_is_said_in_the_librarys_words(gpu, tmp_path, monkeypatch):
    session = backend.open_session(graph(tmp_path / "model.onnx"), SPEC)
    monkeypatch.setattr(Context, "fails", "Cuda failure: an illegal memory access")
    with pytest.raises(FewstepError, match="cannot run: Cuda failure: an illegal memory access"):
        session.run({"x": X})


def test_a_host_without_the_library_is_told_what_to_install(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fewstep.runtime.backends.tensorrt")
    with pytest.raises(
        MissingExtra, match=r"tensorrt is not installed; fix: pip install 'fewstep\[tensorrt\]'"
    ):
        backends.require("tensorrt")


def test_a_host_with_the_full_library_takes_that(monkeypatch):
    """Not the library itself, which cannot be installed here: that its name is what is imported, and no other."""
    full = SimpleNamespace(**{**vars(backend.trt), "__name__": "tensorrt", "__version__": "11.4"})
    del full.ComputeCapability
    monkeypatch.setattr(backends, "tensorrt", backend)  # importing another sets it; this puts it back
    monkeypatch.setitem(sys.modules, "tensorrt", full)
    monkeypatch.delitem(sys.modules, "fewstep.runtime.backends.tensorrt")
    other = import_module("fewstep.runtime.backends.tensorrt")
    assert other.library_version() == "11.4"
    assert not other.FOR_RTX
    assert other.capabilities() == ()


@pytest.mark.parametrize("capability", ["8.6", "8.9", "12.0"])
def test_an_engine_is_built_ahead_of_time_for_a_gpu_that_is_not_here(tmp_path, capability):
    assert capability in backend.capabilities()
    assert len(backend.build_engine(graph(tmp_path / "model.onnx"), capability)) > 1000


def test_a_gpu_the_library_does_not_build_for_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"compute capability 9.0; expected .* 8.6, 8.9, 12.0"):
        backend.build_engine(graph(tmp_path / "model.onnx"), "9.0")


def test_a_graph_the_library_refuses_is_refused_by_node_and_reason(tmp_path):
    with pytest.raises(
        BundleError, match=r"model.onnx: TensorRT RTX [\d.]+ refuses it: node 'plus' \(Nonsense\): "
    ):
        backend.build_engine(graph(tmp_path / "model.onnx", plus="Nonsense"), "8.9")
