"""Parts as .tflite graphs: what they compute, what their integers are, and what is refused before any work."""

import dataclasses
import platform
from dataclasses import replace

import numpy as np
import pytest

from fewstep.export import export_bundle, gate, parts
from fewstep.export import onnx as translation
from fewstep.model.model import Example, Part
from fewstep.model.quantized import Activations, Layer, Quantized
from fewstep.model.trajectories import run_part
from fewstep.quant.simulate import simulated
from fewstep.quant.weights import nearest
from fewstep.runtime import Pipeline
from fewstep.runtime.backends import open_session
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput, CheckpointError
from fewstep.runtime.manifest import TensorSpec
from fewstep.runtime.tflitefile import check_tflite
from fewstep.targets import load_target

from .conftest import LINEAR, Actions, Model, torch

schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs the litert extra")

from fewstep.export import litert, litert_file  # noqa: E402

TARGET = load_target("android-cpu")
HOW = "device" if platform.machine() == "aarch64" else "converted"


class Net(torch.nn.Module):
    """Each form of weights, and what the converter folds into them: a norm in front, a factor behind, an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(10, 16)
        self.places = torch.nn.Embedding(64, 32)
        self.conv = torch.nn.Conv2d(16, 32, 3, padding=1)
        self.apart = torch.nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = torch.nn.LayerNorm(32)
        self.wide, self.square = torch.nn.Linear(32, 64), torch.nn.Linear(64, 64, bias=False)
        self.register_buffer("order", torch.arange(64))
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.uniform_(-0.5, 0.5)

    def forward(self, sample, timestep, label):
        x = sample + self.words(label)[:, :, None, None] + timestep[:, None, None, None] / 1000
        x = self.apart(torch.tanh(self.conv(x))).flatten(2).transpose(1, 2)
        x = self.norm(x + self.places(self.order))
        return torch.tanh(0.125 * self.square(torch.tanh(self.wide(x))))


FEEDS = {
    "sample": np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32),
    "timestep": np.array([700], np.float32),
    "label": np.array([3], np.int64),
}


@pytest.fixture(scope="module")
def part():
    inputs = tuple(TensorSpec(name, str(array.dtype), array.shape) for name, array in FEEDS.items())
    outputs = (TensorSpec("out", "float32", (1, 64, 64)),)
    ranges = {"timestep": (0.0, 999.0), "label": (0.0, 10.0)}
    return Part("net", Net().eval(), inputs, outputs, Example({}, ranges))


def quantized(part, *, inputs=True, **how):
    """All layers at 8 bits, with smoothing where it is asked for by name."""
    smooth = how.pop("smooth", {})
    layers = {}
    for name in ("words", "places", "conv", "apart", "wide", "square"):
        weights = getattr(part.module, name).weight.detach().numpy()
        if name in smooth:
            weights = weights * smooth[name].reshape(1, -1, *[1] * (weights.ndim - 2))
        # the sample lies in -5 to 5, a tanh in -1 to 1, behind the norm -4 to 4
        scale = {"conv": 10 / 255, "wide": 8 / 255}.get(name, 2 / 255)
        rounded = Activations(scale, 128) if inputs and name not in ("words", "places", "apart") else None
        layers[name] = Layer(nearest(weights, **{"bits": 8, **how}), rounded, smooth.get(name))
    return replace(part, quantized=Quantized(layers))


def lowered(part, folder):
    spec = litert.lower(translation.Traced(part, None), folder, TARGET)
    check_tflite(folder / litert.GRAPH)
    return open_session(folder / litert.GRAPH, spec, threads=1), spec


def error(part, session):
    with simulated(part), torch.no_grad():
        wanted = part.module(*(torch.from_numpy(array) for array in FEEDS.values())).numpy()
    return gate.relative_error(wanted, session.run(FEEDS)["out"])[0]


def graph(folder):
    model = litert_file.read((folder / litert.GRAPH).read_bytes())
    names = litert_file.operator_names(model)
    return model, [names[operator.opcodeIndex] for operator in model.subgraphs[0].operators]


def constants(model, kind):
    tensors = [tensor for tensor in model.subgraphs[0].tensors if tensor.type == kind]
    return [(t, model.buffers[t.buffer].data) for t in tensors if model.buffers[t.buffer].data is not None]


# floats


@pytest.fixture(scope="module")
def floats(part, tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    return folder, *lowered(part, folder)


def test_a_part_computes_what_torch_does_and_says_which_types_it_takes(part, floats):
    _, session, spec = floats
    assert error(part, session) < 1e-5
    assert [tensor.dtype for tensor in spec.inputs] == ["float32", "float32", "int32"]
    assert (spec.engine, spec.graph, spec.device) == ("litert", "net/model.tflite", "cpu")


def test_the_same_part_gives_the_same_bytes_with_no_names_in_them(part, floats, tmp_path):
    lowered(part, tmp_path)
    first, second = ((folder / litert.GRAPH).read_bytes() for folder in (floats[0], tmp_path))
    assert first == second
    for word in (b"torch", b"Linear", b"test_litert", b"/home", b"/work", b"/tmp"):
        assert word not in first
    weights = part.weight_bytes() - part.module.order.nbytes
    assert len(first) < weights + 20_000


def test_a_convolution_along_a_line_and_a_linear_of_one_column_are_lowered(tmp_path):
    model = parts.fixed(Model.from_module(Actions(), sample_shape=(7, 16), process=LINEAR))
    made = model.parts[model.denoiser]
    layers = {
        name: Layer(nearest(module.weight.detach().numpy(), bits=8), Activations(8 / 255, 128))
        for name, module in made.module.named_modules()
        if isinstance(module, torch.nn.Conv1d | torch.nn.Linear)
    }
    for each, most in ((made, 1e-5), (replace(made, quantized=Quantized(layers)), 0.05)):
        session, _ = lowered(each, tmp_path)
        feeds = each.example.feeds(each.inputs, each.example.default_sizes(), seed=1)
        feeds["timestep"] = np.ones_like(feeds["timestep"])
        (wanted,) = run_part(each, feeds).values()
        (got,) = session.run(feeds).values()
        assert gate.relative_error(wanted, got)[0] < most


# integers


def test_weights_of_8_bits_are_the_descriptions_own_and_read_as_floats(part, tmp_path):
    made = quantized(part, inputs=False)
    session, _ = lowered(made, tmp_path)
    assert error(made, session) < 1e-5
    model, operators = graph(tmp_path)
    found = {np.sort(np.frombuffer(data, np.int8)).tobytes() for _, data in constants(model, 9)}
    assert found == {
        np.sort(layer.weights.codes.ravel()).tobytes() for layer in made.quantized.layers.values()
    }
    assert operators.count("DEQUANTIZE") == 5  # all but the rows of a table, which are read one by one
    assert all(len(data) < 1024 for _, data in constants(model, 0))  # biases and norms alone are floats


def test_layers_with_rounded_inputs_run_on_integers_and_the_module_stays_as_it_was(part, tmp_path):
    before = {name: tensor.clone() for name, tensor in part.module.state_dict().items()}
    made = quantized(part)
    session, _ = lowered(made, tmp_path)
    assert error(made, session) < 0.05
    assert error(made, session) > 1e-4  # the engine rounds by the range it sees, not by the one described
    _, operators = graph(tmp_path)
    assert (
        operators.count("DEQUANTIZE") == 2
    )  # a convolution by channel and a table that is added: no integer kernels
    assert "MINIMUM" not in operators  # the bounds that kept the converter from folding are gone
    assert all(torch.equal(tensor, before[name]) for name, tensor in part.module.state_dict().items())
    assert not part.module.conv._forward_pre_hooks


def test_smoothing_biases_parameters_and_drift_of_a_description_are_in_the_graph(part, tmp_path):
    rng = np.random.default_rng(1)
    smooth = {
        name: rng.uniform(0.5, 4, size).astype(np.float32) for name, size in (("conv", 16), ("wide", 32))
    }
    made = quantized(part, inputs=False, smooth=smooth)
    layers = dict(made.quantized.layers)
    layers["conv"] = replace(layers["conv"], bias=np.linspace(-1, 1, 32).astype(np.float32))
    means = rng.standard_normal((3, 64)).astype(np.float32)
    times = np.array([100, 600, 900], np.float32)
    params = {"norm.weight": rng.uniform(1, 2, 32).astype(np.float32)}
    whole = replace(
        made, quantized=replace(made.quantized, layers=layers, params=params, drift=(times, means))
    )
    session, _ = lowered(whole, tmp_path)
    assert error(whole, session) < 1e-5
    assert error(made, session) > 0.1


# what is refused


def test_free_sizes_are_refused_before_any_work(part, tmp_path):
    inputs = (replace(part.inputs[0], shape=("batch", 16, 8, 8)), *part.inputs[1:])
    with pytest.raises(BadInput, match="net leaves batch free.*dynamic_shapes = false"):
        lowered(replace(part, inputs=inputs), tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_beyond_a_flatbuffer_are_refused_with_what_would_fit(part, tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "MAX_BYTES", litert.GRAPH_BYTES + part.weight_bytes() // 2)
    with pytest.raises(BadInput, match="one flatbuffer.*--quantize w8a8"):
        lowered(part, tmp_path)
    litert.check(quantized(part))


@pytest.mark.parametrize(
    "form", [{"bits": 4}, {"bits": 8, "symmetric": False}, {"bits": 8, "group": 8}], ids=str
)
def test_integers_without_a_kernel_are_refused_by_the_layers_name(part, tmp_path, form):
    with pytest.raises(
        BadInput, match=r"net: words has weights of . bits.*8 bits, and one scale a row.*w8a8"
    ):
        lowered(quantized(part, **form), tmp_path)


def test_inputs_of_fewer_bits_and_shared_weights_are_refused(part, tmp_path):
    made = quantized(part)
    layers = dict(made.quantized.layers)
    layers["wide"] = replace(layers["wide"], input=Activations(0.1, 8, bits=4))
    with pytest.raises(BadInput, match="wide has inputs of 4 bits"):
        lowered(replace(made, quantized=Quantized(layers)), tmp_path)
    with pytest.raises(BadInput, match="no layer nowhere"):
        lowered(replace(made, quantized=Quantized({"nowhere": layers["conv"]})), tmp_path)


def test_a_network_the_converter_cannot_read_is_refused_with_its_reason(tmp_path):
    class Sorts(torch.nn.Module):
        def forward(self, sample):
            return torch.linalg.svdvals(sample)

    spec = TensorSpec("sample", "float32", (3, 3))
    part = Part("sorts", Sorts().eval(), (spec,), (TensorSpec("out", "float32", (3,)),), Example({}))
    with pytest.raises(CheckpointError, match="litert_torch cannot convert sorts"):
        lowered(part, tmp_path)


@pytest.mark.parametrize("scheme", ["w4a8", "w3.5", "w8a16"])
def test_a_scheme_without_kernels_is_refused_before_the_model_is_read(scheme, tmp_path):
    with pytest.raises(BadInput, match=f"scheme '{scheme}' on android-cpu.*w8a8 or w8"):
        list(export_bundle(tmp_path / "nothing", "android-cpu", tmp_path / "b", quantize=scheme))


def test_options_are_refused_by_name():
    target = replace(TARGET, backend=dataclasses.replace(TARGET.backend, options={"fast": True}))
    with pytest.raises(BadInput, match="fast"):
        litert.lower(translation.Traced(None, None), None, target)


# a whole pipeline


@pytest.mark.parametrize("scheme", ["w8a8", "w8"])
def test_a_bundle_for_android_draws_and_says_what_ran_it(labelled, scheme, tmp_path):
    *_, done = export_bundle(
        labelled, "android-cpu", tmp_path / "b", steps=2, quantize=scheme, measure_speed=False
    )
    manifest = Bundle.open(tmp_path / "b").manifest
    (spec,) = manifest.parts.values()
    assert (spec.engine, spec.executed, spec.precision) == ("litert", HOW, "float32")
    assert manifest.sample.fixed
    assert manifest.quality["pipeline"]["psnr_db"] > TARGET.quality["int8"].pipeline_psnr_db
    assert done.manifest.parts == manifest.parts
    with Pipeline.from_pretrained(tmp_path / "b", threads=1) as pipeline:
        images = pipeline(class_labels=[3, 1], seed=0, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
