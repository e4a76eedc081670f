import numpy as np
import onnx
import pytest

from fewstep.export import clean, gate
from fewstep.export import onnx as lowering
from fewstep.model import Model
from fewstep.model.trajectories import run_part
from fewstep.runtime.errors import CheckpointError

from .conftest import LINEAR, Pixels, torch


def operators(file):
    return [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]


@pytest.fixture(scope="module")
def part():
    model = Model.from_module(
        Pixels(), sample_shape=(3, 8, 8), process=LINEAR, name="pixels", dynamic=("height", "width")
    )
    return model.parts["unet"]


@pytest.fixture(scope="module")
def traced(part):
    return lowering.trace(part)


def check(part, spec, file):
    tried = gate.cases(part, few=False)
    got = gate.run_graph(file, spec, list(tried.values()))
    return gate.compare("unet", list(tried), [run_part(part, case) for case in tried.values()], got)


def test_a_lowered_part_computes_what_torch_computes_at_every_size(part, traced, tmp_path):
    spec = lowering.write(traced, tmp_path, opset=23)
    assert check(part, spec, tmp_path / "model.onnx").relative_error < 1e-5
    found = operators(tmp_path / "model.onnx")
    assert "MultiHeadAttention" in found
    assert "Attention" not in found
    assert "InstanceNormalization" in found
    assert "GroupNormalization" not in found


def test_attention_stays_explicit_when_not_fused(part, traced, tmp_path):
    spec = lowering.write(traced, tmp_path, opset=23, fuse_attention=False)
    assert "Attention" in operators(tmp_path / "model.onnx")
    assert check(part, spec, tmp_path / "model.onnx").relative_error < 1e-5


def test_the_unoptimized_export_is_torchs_own(part, traced, tmp_path):
    spec = lowering.write_plain(traced, tmp_path)
    found = operators(tmp_path / "model.onnx")
    assert "Softmax" in found
    assert "MultiHeadAttention" not in found
    assert check(part, spec, tmp_path / "model.onnx").relative_error < 1e-5


def test_going_the_long_way_gives_the_same_function(part, monkeypatch, tmp_path):
    def nothing_to_skip(name):
        raise ImportError(name)

    monkeypatch.setattr("fewstep.export.retrace.library", nothing_to_skip)
    spec = lowering.write(lowering.trace(part), tmp_path, opset=23)
    assert "MultiHeadAttention" in operators(tmp_path / "model.onnx")
    assert check(part, spec, tmp_path / "model.onnx").relative_error < 1e-5


def test_two_exports_are_the_same_bytes_and_name_no_local_path(part, traced, tmp_path):
    lowering.write(traced, tmp_path / "a", opset=23)
    lowering.write(lowering.trace(part), tmp_path / "b", opset=23)
    first = (tmp_path / "a" / "model.onnx").read_bytes()
    assert first == (tmp_path / "b" / "model.onnx").read_bytes()
    for trace in (b"site-packages", b"conftest", b"stack_trace", b"/work", b"/home", b"/tmp"):
        assert trace not in first


def test_large_weights_lie_beside_the_graph(part, traced, monkeypatch, tmp_path):
    monkeypatch.setattr(lowering, "INLINE_BYTES", 1)
    spec = lowering.write(traced, tmp_path, opset=23)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data"}
    assert check(part, spec, tmp_path / "model.onnx").relative_error < 1e-5


def test_axes_have_the_names_of_the_specs(part, traced, tmp_path):
    lowering.write(traced, tmp_path, opset=23)
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output)
    }
    specs = {spec.name: spec.shape for spec in (*part.inputs, *part.outputs)}
    assert shapes == specs
    assert {value.name for value in graph.value_info} <= {weight.name for weight in graph.initializer}


def test_a_network_that_cannot_be_traced_is_named(tmp_path):
    class Branches(torch.nn.Module):
        def forward(self, sample, timestep):
            return sample * 2 if float(sample.sum()) > 0 else sample

    model = Model.from_module(Branches(), sample_shape=(3, 8, 8), process=LINEAR)
    with pytest.raises(
        CheckpointError, match=r"torch.export cannot trace unet .*expected tensor code without branches"
    ):
        lowering.trace(model.parts["unet"])


class Masked(torch.nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, sample, timestep):
        x = sample.flatten(2).transpose(1, 2).unsqueeze(1)
        return (
            torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=self.causal)
            .squeeze(1)
            .transpose(1, 2)
            .reshape(sample.shape)
        )


def test_causal_attention_is_left_as_it_is(tmp_path):
    model = Model.from_module(Masked(True), sample_shape=(3, 4, 4), process=LINEAR)
    part = model.parts["unet"]
    spec = lowering.write(lowering.trace(part), tmp_path, opset=23)
    assert "MultiHeadAttention" not in operators(tmp_path / "model.onnx")
    assert check(part, spec, tmp_path / "model.onnx").relative_error < 1e-5


def test_group_norm_keeps_its_epsilon():
    import onnx_ir as ir

    x = ir.Value(name="x", shape=ir.Shape(["batch", 4, "h", "w"]), type=ir.TensorType(ir.DataType.FLOAT))
    scale, bias = (
        ir.Value(name=name, const_value=ir.tensor(np.full(4, value, np.float32), name=name))
        for name, value in (("scale", 2.0), ("bias", 1.0))
    )
    node = ir.node("GroupNormalization", [x, scale, bias], attributes={"num_groups": 2, "epsilon": 0.25})
    node.outputs[0].name = "y"
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[scale, bias], opset_imports={"": 23}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    assert clean.spell_out_group_norm(model) == 1
    kinds = {node.op_type: node for node in model.graph}
    assert kinds["InstanceNormalization"].attributes["epsilon"].as_float() == 0.25
    assert model.graph.outputs[0].producer() is kinds["BatchNormalization"]
