"""Parts in float16: what the graph holds, and what stays as it was."""

import numpy as np
import onnx
import pytest

from fewstep.export import export_bundle
from fewstep.export.onnx import trace, write
from fewstep.model import Model
from fewstep.model.trajectories import run_part
from fewstep.runtime.backends import open_session
from fewstep.runtime.errors import BadInput

from .conftest import LINEAR, Pixels


@pytest.fixture
def part():
    model = Model.from_module(Pixels(), sample_shape=(3, 16, 16), process=LINEAR, dynamic=("height", "width"))
    return next(iter(model))


def test_weights_are_float16_between_float32_ends(part, tmp_path):
    spec = write(trace(part), tmp_path / part.name, opset=23, half=True)
    graph = onnx.load(tmp_path / spec.graph).graph
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer if len(t.dims) > 1}
    assert kinds == {"FLOAT16"}
    ends = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert set(ends) == {onnx.TensorProto.FLOAT}


def test_the_graph_is_the_network_to_three_digits(part, tmp_path):
    spec = write(trace(part), tmp_path / part.name, opset=23, half=True)
    sizes = part.example.other_sizes() | {"batch": 2}
    feeds = part.example.feeds(part.inputs, sizes, seed=1)
    session = open_session(tmp_path / spec.graph, spec)
    for name, right in run_part(part, feeds).items():
        error = session.run(feeds)[name] - right
        relative = np.sqrt(np.mean(error**2) / np.mean(right**2))
        assert 1e-6 < relative < 5e-3  # float16 keeps 11 bits; float32 would be below the first


def test_integers_and_float16_are_one_too_many(tmp_path):
    model = Model.from_module(Pixels(), sample_shape=(3, 16, 16), process=LINEAR, dynamic=("height", "width"))
    events = export_bundle(model, "web-webgpu", tmp_path / "b", quantize="w8a8", measure_speed=False)
    with pytest.raises(
        BadInput, match="is quantized, and its precision is to be float16; expected one of both"
    ):
        list(events)
    assert not (tmp_path / "b").exists()
