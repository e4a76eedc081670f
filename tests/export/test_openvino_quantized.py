"""Quantized parts as OpenVINO IR: the bits the file takes, the kernels the engine takes, and what comes out."""

import platform
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from fewstep.export import onnx as translation
from fewstep.model.model import Example, Part
from fewstep.model.quantized import Activations, Layer, Quantized
from fewstep.quant.simulate import simulated
from fewstep.quant.weights import nearest
from fewstep.runtime.backends import open_session
from fewstep.runtime.irfile import check_ir
from fewstep.runtime.manifest import TensorSpec

from .conftest import torch

ov = pytest.importorskip("openvino", reason="needs the openvino extra")

from fewstep.export import openvino as lowering  # noqa: E402
from fewstep.export.openvino_weights import packed  # noqa: E402

X86 = platform.machine() == "x86_64"
CODES = {"u2": (0, 4), "u3": (0, 8), "i4": (-8, 8), "u6": (0, 64), "i8": (-128, 128)}
FORMS = {
    "8 bits": {"bits": 8},
    "6 bits": {"bits": 6},
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
    "4 bits from a zero": {"bits": 4, "symmetric": False},
    "4 bits, groups with multipliers": {"bits": 4, "group": 16, "multiplier": True},
    "3 bits, groups with multipliers": {"bits": 3, "group": 16, "multiplier": True},
    "4 bits, groups of floats": {"bits": 4, "group": 16},
    "3 bits, groups of floats from zeros": {"bits": 3, "group": 16, "symmetric": False},
}


class Net(torch.nn.Module):
    """A convolution, then a linear of its channels and a square one: weights by row, and by column in the graph."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(16, 32, 3, padding=1)
        self.wide, self.square = torch.nn.Linear(32, 64), torch.nn.Linear(64, 64, bias=False)

    def forward(self, sample):
        x = torch.tanh(self.conv(sample)).flatten(2).transpose(1, 2)
        return self.square(torch.tanh(self.wide(x)))


@pytest.fixture(scope="module")
def part():
    torch.manual_seed(0)
    inputs = (TensorSpec("sample", "float32", ("batch", 16, 8, 8)),)
    outputs = (TensorSpec("out", "float32", ("batch", 64, 64)),)
    return Part("net", Net().eval(), inputs, outputs, Example({"batch": (2, 3)}))


def quantized(part, form, inputs):
    layers = {}
    for name in ("conv", "wide", "square"):
        weights = nearest(getattr(part.module, name).weight.detach().numpy(), **form)
        # a tanh lies in -1 to 1, the sample in -4 to 4
        how = Activations(8 / 255 if name == "conv" else 2 / 255, 128) if inputs else None
        layers[name] = Layer(weights, how)
    return replace(part, quantized=Quantized(layers))


@cache
def program(module):
    return translation.trace(module.part).program


def written(made, folder, **options):
    made.module.part = made
    traced = translation.Traced(made, program(made.module))  # one trace serves several translations
    spec = lowering.write(traced, folder, opset=23, **options)
    check_ir(folder / "openvino_model.xml", folder / "openvino_model.bin")
    return open_session(folder / "openvino_model.xml", spec, threads=1)


def error(made, session):
    x = made.example.feeds(made.inputs, {"batch": 2}, seed=1)
    with simulated(made), torch.no_grad():
        wanted = made.module(torch.from_numpy(x["sample"])).numpy()
    return float(np.linalg.norm(session.run(x)["out"] - wanted) / np.linalg.norm(wanted))


def kernels(session):
    (request,) = session._requests.values()
    nodes = request.get_compiled_model().get_runtime_model().get_ordered_ops()
    found = [
        {key: node.get_rt_info()[key].astype(str) for key in ("layerType", "primitiveType")} for node in nodes
    ]
    return Counter(
        one["primitiveType"].rpartition("_")[2]
        for one in found
        if one["layerType"] in ("Convolution", "FullyConnected", "MatMul")
    )


@pytest.mark.parametrize("kind", CODES)
def test_packed_codes_are_unpacked_by_the_engine_as_they_were(kind):
    codes = np.random.default_rng(0).integers(*CODES[kind], 1000).astype(np.int8)
    ops = pytest.importorskip("openvino.opset13")
    tensor = ov.Tensor(packed(codes, kind), ov.Shape([1000]), getattr(ov.Type, kind))
    unpacked = ops.convert(pytest.importorskip("openvino.op").Constant(tensor, False), np.int8)
    compiled = ov.Core().compile_model(ov.Model([unpacked], []), "CPU")
    np.testing.assert_array_equal(compiled({})[0], codes)


@pytest.mark.parametrize("form", FORMS)
def test_weights_alone_mean_what_they_meant(part, form, tmp_path):
    made = quantized(part, FORMS[form], inputs=False)
    # behind weights it can leave in 8 or 4 bits the engine rounds a linear's input to 8 bits, 32 values to a scale
    assert error(made, written(made, tmp_path)) < 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_with_rounded_inputs_a_row_s_scale_gives_integer_kernels_and_the_file_takes_the_bits(
    part, form, tmp_path
):
    made = quantized(part, FORMS[form], inputs=True)
    session = written(made, tmp_path)
    assert error(made, session) < 2e-3
    if X86 and "floats" not in form:
        assert kernels(session) == {"I8": 3}
    stored = sum(layer.weights.stored_bits() for layer in made.quantized.layers.values()) / 8
    biases, rest = 4 * (32 + 64), 1024  # scales and zeros of the inputs, shapes: a few dozen numbers
    assert stored <= (tmp_path / "openvino_model.bin").stat().st_size < stored + biases + rest


def test_equal_codes_of_two_layers_are_not_taken_for_one_another(part, tmp_path):
    made = quantized(part, {"bits": 4, "symmetric": False}, inputs=False)
    layers = dict(made.quantized.layers)
    for name, zero in (("wide", 0), ("square", 3)):
        weights = layers[name].weights
        even = replace(weights, codes=np.full_like(weights.codes, 2), zero=np.full_like(weights.zero, zero))
        layers[name] = replace(layers[name], weights=even)
    made = replace(made, quantized=Quantized(layers))
    assert error(made, written(made, tmp_path)) < 1e-2


def test_scales_too_small_for_float16_stay_float32_beside_halved_weights(part, tmp_path):
    tiny = Net().eval()
    with torch.no_grad():
        for module in (tiny.wide, tiny.square):
            module.weight *= 1e-4
    made = quantized(replace(part, module=tiny), {"bits": 8}, inputs=False)
    layers = {name: layer for name, layer in made.quantized.layers.items() if name != "conv"}
    made = replace(made, quantized=Quantized(layers))
    # scales of 1e-7 would be 1.2e-7 in float16; the convolution's weights keep 11 bits
    assert error(made, written(made, tmp_path, weights="float16")) < 1e-2


def test_the_mean_error_is_subtracted_by_the_exact_time(tmp_path):
    """In bfloat16 999 is 1000: on a slope of one a step that is one."""

    class Timed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Conv2d(4, 4, 1)

        def forward(self, sample, timestep):
            return self.net(sample) * 0

    inputs = (
        TensorSpec("sample", "float32", ("batch", 4, 8, 8)),
        TensorSpec("timestep", "float32", ("batch",)),
    )
    outputs = (TensorSpec("out", "float32", ("batch", 4, 8, 8)),)
    example = Example({"batch": (2, 3)}, {"timestep": (0, 999)})
    weights = nearest(np.ones((4, 4, 1, 1), np.float32), 8)
    drift = (
        np.array([990.0, 1000.0], np.float32),
        np.repeat(np.array([[0.0], [10.0]], np.float32), 4, axis=1),
    )
    made = Part(
        "net",
        Timed().eval(),
        inputs,
        outputs,
        example,
        quantized=Quantized({"net": Layer(weights)}, drift=drift),
    )
    session = written(made, tmp_path, precision="bfloat16")
    feeds = {"sample": np.zeros((2, 4, 8, 8), np.float32), "timestep": np.array([993.0, 999.0], np.float32)}
    got = session.run(feeds)["out"]
    np.testing.assert_allclose(got[:, 0, 0, 0], [-3, -9], atol=0.05)


class Normed(torch.nn.Module):
    """A decoder's beginning: a convolution whose mean is far from 0, normed in groups."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.GroupNorm(4, 32)
        self.last = torch.nn.Conv2d(32, 8, 1)
        with torch.no_grad():
            self.conv.bias += 2
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.uniform_(-1, 1)

    def forward(self, sample):
        return self.last(self.norm(self.conv(sample)))


def test_a_quantized_decoder_is_normed_by_channel_with_the_same_result_at_any_size(tmp_path):
    torch.manual_seed(0)
    inputs = (TensorSpec("sample", "float32", ("batch", 16, "height", "width")),)
    outputs = (TensorSpec("out", "float32", ("batch", 8, "height", "width")),)
    example = Example({"batch": (2, 3), "height": (8, 12), "width": (8, 10)})
    part = Part("vae_decoder", Normed().eval(), inputs, outputs, example)
    weights = nearest(part.module.conv.weight.detach().numpy(), 8)
    made = replace(part, quantized=Quantized({"conv": Layer(weights)}))
    session = written(made, tmp_path)
    assert "GroupNormalization" not in (tmp_path / "openvino_model.xml").read_text()
    for sizes in ({"batch": 1, "height": 8, "width": 8}, {"batch": 2, "height": 6, "width": 10}):
        x = example.feeds(inputs, sizes, seed=1)
        with simulated(made), torch.no_grad():
            wanted = made.module(torch.from_numpy(x["sample"])).numpy()
        np.testing.assert_allclose(session.run(x)["out"], wanted, rtol=1e-4, atol=1e-4)
