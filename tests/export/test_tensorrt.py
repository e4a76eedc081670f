"""What TensorRT is given: types that say float16, integers it has kernels for, and an engine built to prove it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from fewstep.export import export_bundle, gate, parts
from fewstep.export import onnx as translation
from fewstep.export import tensorrt as lowering
from fewstep.export.halves import MAX_HALF, halve
from fewstep.model.quantized import Activations, Layer, Quantized
from fewstep.model.trajectories import run_part
from fewstep.quant.weights import nearest
from fewstep.runtime import Pipeline
from fewstep.runtime.backends import cudadriver
from fewstep.runtime.backends import tensorrt as backend
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput, GateFailed
from fewstep.runtime.graphfile import check_graph
from fewstep.targets import load_target

from .conftest import torch

TARGETS = ("rtx-4060-8gb", "jetson-orin", "h200")
RTX = "rtx-4060-8gb"
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


@pytest.fixture
def part(pixels):
    return parts.fixed(pixels).parts["unet"]


@pytest.fixture
def traced(part):
    return translation.trace(part)


def in_integers(part, **how):
    """Every layer but the first; a scale that the inputs of `cases` fit."""
    modules = dict(part.module.named_modules())
    layers = {
        name: Layer(
            nearest(modules[name].weight.detach().numpy(), **{"bits": 8, **how}), Activations(8 / 128, 128)
        )
        for name in modules
        if name.endswith(("qkv", "outward", "time"))
    }
    return replace(part, quantized=Quantized(layers))


def quality(part, spec, file):
    """Of the graph on this host against torch."""
    tried = gate.cases(part, few=False)
    session = lowering.on_this_host(file, spec)
    got = [session.run(case) for case in tried.values()]
    return gate.compare(part.name, list(tried), [run_part(part, case) for case in tried.values()], got)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_says_what_its_module_reads(target):
    own = lowering.options(load_target(target))
    assert own.compute_capability in ("8.9", "8.7", "9.0")
    assert (own.checked_for or own.compute_capability) in backend.capabilities()


@pytest.mark.parametrize("target", TARGETS)
def test_a_part_is_float16_between_float32_ends_and_is_as_close_as_that(traced, part, tmp_path, target):
    spec = lowering.lower(traced, tmp_path / "unet", load_target(target))
    assert (spec.engine, spec.graph, spec.precision, spec.device) == (
        *("tensorrt", "unet/model.onnx", "float16", "gpu"),
    )
    graph = ir.load(tmp_path / "unet/model.onnx").graph
    assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {FLOAT}
    stored = Counter(value.const_value.dtype for value in graph.initializers.values())
    assert stored[HALF] > 8
    assert 0 < quality(part, spec, tmp_path / "unet/model.onnx").relative_error < 5e-3
    check_graph(tmp_path / "unet/model.onnx", set())


def test_the_same_part_gives_the_same_bytes(traced, tmp_path):
    for name in ("a", "b"):
        lowering.lower(traced, tmp_path / name, load_target(RTX))
    assert (tmp_path / "a/model.onnx").read_bytes() == (tmp_path / "b/model.onnx").read_bytes()


def test_angles_of_the_timestep_stay_float32(tiny_sd, tmp_path):
    from fewstep.model import load

    unet = parts.fixed(load(tiny_sd)).parts["unet"]
    file = translation.write_graph(translation.trace(unet), tmp_path, opset=23, rewrite=halve)
    graph = ir.load(file).graph
    for node in graph:
        if node.op_type in ("Sin", "Cos"):
            above = [node]
            while above:
                inputs = [value for value in above.pop().inputs if value is not None]
                above += [value.producer() for value in inputs if value.producer() is not None]
                assert not {value.const_value.dtype for value in inputs if value.is_initializer()} & {HALF}
                assert not [
                    each for each in above if each.op_type == "Cast" and each.attributes["to"].as_int() == 10
                ]
    assert {"Sin", "Cos"} <= {node.op_type for node in graph}


def test_a_part_named_in_the_options_stays_float32(traced, part, tmp_path):
    target = load_target(RTX)
    options = {**target.backend.options, "float32": ["unet"]}
    target = replace(target, backend=replace(target.backend, options=options))
    spec = lowering.lower(traced, tmp_path, target)
    assert spec.precision == "float32"
    assert quality(part, spec, tmp_path / "model.onnx").relative_error < 1e-5


@pytest.mark.parametrize(
    "how", [{"bits": 8}, {"bits": 4, "group": 16, "multiplier": True, "symmetric": False}]
)
@pytest.mark.parametrize("opset", [20, 23])
def test_integers_have_positive_scales_and_zero_points_of_zero(part, tmp_path, how, opset):
    small = in_integers(part, **how)
    target = load_target(RTX)
    target = replace(target, backend=replace(target.backend, opset=opset))
    spec = lowering.lower(translation.trace(small), tmp_path, target)
    graph = ir.load(tmp_path / "model.onnx").graph
    quantizers = [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert Counter(node.op_type for node in quantizers)["DequantizeLinear"] == 6
    for node in quantizers:
        assert (node.inputs[1].const_value.numpy() > 0).all()
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            zero = node.inputs[2].const_value
            assert (zero.dtype, zero.numpy().any()) == (ir.DataType.INT8, False)
    assert 1e-3 < quality(part, spec, tmp_path / "model.onnx").relative_error < 0.2


def test_codes_of_few_bits_mean_the_same_as_bytes(part):
    small = in_integers(part, bits=4, group=16, multiplier=True, symmetric=False)
    taken = lowering.as_it_takes(small.quantized, small)
    for name, layer in small.quantized.layers.items():
        weights = taken.layers[name].weights
        assert (weights.bits, weights.zero, weights.multiplier) == (8, None, None)
        np.testing.assert_array_equal(weights.floats(), layer.weights.floats())


def test_a_table_of_integers_becomes_one_of_floats(labelled):
    part = parts.fixed(labelled).parts["unet"]
    name = next(name for name, module in part.module.named_modules() if type(module).__name__ == "Embedding")
    table = dict(part.module.named_modules())[name].weight.detach().numpy()
    part = replace(part, quantized=Quantized({name: Layer(nearest(table, 8))}))
    taken = lowering.as_it_takes(part.quantized, part)
    assert not taken.layers
    assert np.abs(taken.params[f"{name}.weight"] - table).max() < np.abs(table).max() / 100


def test_groups_with_scales_of_their_own_are_refused(part, tmp_path):
    small = in_integers(part, bits=4, group=16)
    with pytest.raises(BadInput, match=r"unet.*: groups of weights with scales of their own.*w8a8"):
        lowering.lower(translation.trace(small), tmp_path, load_target(RTX))


def test_sizes_left_free_are_refused(pixels, tmp_path):
    target = load_target(RTX)
    free = replace(target, limits=replace(target.limits, dynamic_shapes=True))
    with pytest.raises(BadInput, match=r"free sizes; expected dynamic_shapes = false"):
        lowering.lower(translation.trace(pixels.parts["unet"]), tmp_path, free)
    with pytest.raises(GateFailed, match=r"free sizes: .*sample.*engines here are of one size"):
        lowering.lower(translation.trace(pixels.parts["unet"]), tmp_path, target)


def test_bfloat16_is_another_targets(traced, tmp_path):
    target = load_target(RTX)
    target = replace(target, recipe=replace(target.recipe, precision="bfloat16"))
    with pytest.raises(
        BadInput, match=r"bfloat16 for TensorRT; expected float16 or float32; fix: .*cuda-aoti"
    ):
        lowering.lower(traced, tmp_path, target)


def test_a_weight_float16_cannot_hold_is_refused_by_name(part, tmp_path):
    with torch.no_grad():
        next(part.module.parameters()).view(-1)[0] = 1e6
    with pytest.raises(
        BadInput, match=r"weight holds 1e\+06, more than float16 can \(65504\); fix: precision"
    ):
        lowering.lower(translation.trace(part), tmp_path, load_target(RTX))


def test_what_float16_cannot_hold_on_the_way_fails_the_gate_by_node(part, tmp_path):
    first = next(module for module in part.module.modules() if isinstance(module, torch.nn.Conv2d))
    with torch.no_grad():
        first.weight.fill_(4e3)  # 27 of them on ones: 108,000
    spec = lowering.lower(translation.trace(part), tmp_path, load_target(RTX))
    feeds = {"sample": np.ones((1, 3, 8, 8), np.float32), "timestep": np.zeros(1, np.float32)}
    with pytest.raises(
        GateFailed, match=r'unet: conv2d comes to 1.08e\+05, and float16 ends at 65504.*float32 = \["unet"\]'
    ):
        lowering.on_this_host(tmp_path / "model.onnx", spec).run(feeds)


def test_what_stands_for_infinity_becomes_the_largest_number_of_float16(tmp_path):
    lowest = np.finfo(np.float32).min
    mask = helper.make_tensor("mask", TensorProto.FLOAT, (2,), [0.0, lowest])
    node = helper.make_node("Add", ["x", "mask"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2,)) for name in "xy"]
    model = ir.from_proto(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [mask])))
    halve(model)
    held = {value.name: value.const_value.numpy() for value in model.graph.initializers.values()}
    np.testing.assert_array_equal(held["mask.half"], np.array([0, -MAX_HALF], np.float16))


def test_a_scale_too_small_for_float16_does_not_become_zero(part, tmp_path):
    small = in_integers(part)
    (name, layer), *_ = small.quantized.layers.items()
    tiny = replace(layer, weights=replace(layer.weights, scale=np.full_like(layer.weights.scale, 1e-12)))
    small = replace(small, quantized=Quantized({name: tiny}))
    lowering.lower(translation.trace(small), tmp_path, load_target(RTX))  # TensorRT refuses scales of 0
    graph = ir.load(tmp_path / "model.onnx").graph
    scales = [node.inputs[1].const_value.numpy() for node in graph if node.op_type == "DequantizeLinear"]
    assert min(float(scale.min()) for scale in scales) == 2.0**-24


def test_what_tensorrt_refuses_fails_the_export_with_node_and_reason(part, tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "as_it_takes", lambda quantized, part: quantized)  # zero points stay
    small = in_integers(part, bits=8, symmetric=False)
    with pytest.raises(GateFailed, match=r"unet: model.onnx: TensorRT RTX .* refuses it: .*[zZ]ero.*keep = "):
        lowering.lower(translation.trace(small), tmp_path, load_target(RTX))


@pytest.fixture(scope="module")
def bundle(tiny_sd, tmp_path_factory):
    *_, done = export_bundle(tiny_sd, RTX, tmp_path_factory.mktemp("rtx") / "b", steps=2, measure_speed=False)
    return done.path


def test_a_whole_bundle_is_converted_and_draws_by_its_stand_in(bundle):
    manifest = Bundle.open(bundle).manifest
    for part in manifest.parts.values():
        assert (part.engine, part.executed, part.device) == ("tensorrt", "converted", "gpu")
    assert {quality["computed_in"] for quality in manifest.quality["parts"].values()} == {"float16"}
    assert manifest.quality["pipeline"]["psnr_db"] > 40
    assert manifest.sample.fixed
    files = {file.name for file in bundle.rglob("*") if file.is_file()}
    assert not [name for name in files if name.endswith((".engine", ".plan", ".trt"))]


def test_a_bundle_for_a_gpu_says_on_a_host_without_one_what_is_missing(bundle, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(cudadriver.ctypes, "CDLL", missing)
    with Pipeline.from_pretrained(bundle) as pipeline, pytest.raises(BadInput, match="no NVIDIA driver"):
        pipeline("a cat")
