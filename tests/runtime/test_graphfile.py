"""The gate for ONNX files: real graphs pass, each known attack is refused with the name of what is at fault."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.runtime import onnxproto
from fewstep.runtime.errors import BundleError
from fewstep.runtime.graphfile import check_graph

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

Model = Any


def value(name: str, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model() -> Model:
    """x -> x * weight + bias, with one weight as raw bytes and one as a typed list."""
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "weight")
    bias = helper.make_tensor("bias", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    constant = helper.make_node(
        "Constant", [], ["two"], name="two", value=numpy_helper.from_array(np.array([2], np.int64), "two")
    )
    nodes = [
        constant,
        helper.make_node("MatMul", ["x", "weight"], ["xw"], name="multiply"),
        helper.make_node("Add", ["xw", "bias"], ["y"], name="add"),
    ]
    graph = helper.make_graph(nodes, "g", [value("x", ["n", 2])], [value("y", ["n", 3])], [weight, bias])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def external(m: Model, name: str = "weight", **entries: str) -> Model:
    """Move one initializer into model.onnx_data, with the given entries instead of the right ones."""
    tensor = next(tensor for tensor in m.graph.initializer if tensor.name == name)
    right = {"location": "model.onnx_data", "offset": "0", "length": "24"}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {**right, **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return m


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., None]:
    (tmp_path / "model.onnx_data").write_bytes(bytes(100))

    def run(m: Model | bytes, files: set[str] | None = None) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(m if isinstance(m, bytes) else m.SerializeToString())
        check_graph(path, {"model.onnx_data"} if files is None else files)

    return run


def test_a_plain_graph_passes(check: Callable[..., None]) -> None:
    check(model())


def test_a_graph_with_external_data_passes(check: Callable[..., None]) -> None:
    check(external(model()))


def test_tied_weights_may_share_their_bytes(check: Callable[..., None]) -> None:
    m = external(model())
    twin = m.graph.initializer.add()
    twin.CopyFrom(m.graph.initializer[0])
    twin.name = "twin"
    check(m)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TensorProto.FLOAT, [1.0, 2.0, 3.0]),
        (TensorProto.DOUBLE, [1.0, 2.0, 3.0]),
        (TensorProto.FLOAT16, [1.0, 2.0, 3.0]),
        (TensorProto.INT64, [-1, 2, 1 << 40]),
        (TensorProto.INT32, [-1, 2, 3]),
        (TensorProto.INT8, [-1, 2, 3]),
        (TensorProto.UINT8, [255, 2, 3]),
        (TensorProto.UINT64, [255, 2, 3]),
        (TensorProto.BOOL, [1, 0, 1]),
        (TensorProto.INT4, [1, 0, 7]),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_values_of_every_type_pass_inline(
    check: Callable[..., None], kind: int, values: list[float], raw: bool
) -> None:
    m = model()
    tensor = helper.make_tensor("more", kind, [3], values)
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "more")
    m.graph.initializer.append(tensor)
    check(m)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64])
def test_an_empty_tensor_and_a_scalar_pass(check: Callable[..., None], kind: int) -> None:
    m = model()
    m.graph.initializer.append(helper.make_tensor("none", kind, [0], []))
    m.graph.initializer.append(helper.make_tensor("one", kind, [], [1]))
    check(m)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch about itself
def test_an_exported_module_passes(tmp_path: Path, check: Callable[..., None]) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.GroupNorm(2, 8)).eval()
    program = torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), dynamo=True, verbose=False)
    program.save(tmp_path / "exported.onnx", external_data=True)
    check_graph(tmp_path / "exported.onnx", {"exported.onnx.data"})


def test_cutting_the_file_anywhere_is_noticed(check: Callable[..., None]) -> None:
    whole = external(model()).SerializeToString()
    for size in range(len(whole)):
        with pytest.raises(BundleError, match=r"model\.onnx"):
            check(whole[:size])


def test_random_damage_is_refused_or_harmless_but_never_another_error(check: Callable[..., None]) -> None:
    whole = external(model()).SerializeToString()
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            check(bytes(data))
        except BundleError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize("junk", [b"", b"\x00", b"x", b"\xff" * 100, random.Random(1).randbytes(1000)])
def test_what_is_not_onnx_is_refused(check: Callable[..., None], junk: bytes) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx"):
        check(junk)


def test_a_git_lfs_pointer_is_named(check: Callable[..., None]) -> None:
    with pytest.raises(BundleError, match="git lfs pull"):
        check(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def test_a_web_page_is_named(check: Callable[..., None]) -> None:
    with pytest.raises(BundleError, match="web page"):
        check(b"<!doctype html><title>404</title>")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.onnx"):
        check_graph(tmp_path / "none.onnx", set())


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_bytes(model().SerializeToString())
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    with pytest.raises(BundleError, match="is a link"):
        check_graph(tmp_path / "link.onnx", set())


@pytest.mark.parametrize("how", ["symlink", "hardlink", "fifo", "folder"])
def test_a_data_file_that_is_no_plain_file_is_refused(
    check: Callable[..., None], tmp_path: Path, how: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(100))
    data = tmp_path / "model.onnx_data"
    data.unlink()
    match how:
        case "symlink":
            data.symlink_to("secret")
        case "hardlink":
            data.hardlink_to(tmp_path / "secret")
        case "fifo":
            os.mkfifo(data)
        case "folder":
            data.mkdir()
    with pytest.raises(BundleError, match=r"model\.onnx_data is a link, a folder or a device"):
        check(external(model()))


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/passwd",
        "sub/model.onnx_data",
        "*/_ORT_MEM_ADDR_/*",
        "",
        ".",
        "..",
        "C:x",
        "model.onnx",
        "a\\b",
    ],
)
def test_a_location_other_than_the_data_file_is_refused(check: Callable[..., None], location: str) -> None:
    with pytest.raises(BundleError, match="tensor 'weight' lies in"):
        check(external(model(), location=location))


@pytest.mark.parametrize("location", ["../secret", "*", "a/b"])
def test_a_location_that_is_no_plain_name_is_refused_even_if_listed(
    check: Callable[..., None], location: str
) -> None:
    with pytest.raises(BundleError, match="tensor 'weight' lies in"):
        check(external(model(), location=location), {location})


def test_two_data_files_are_refused(check: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(100))
    m = external(model())
    twin = m.graph.initializer.add()
    twin.CopyFrom(m.graph.initializer[0])
    twin.name = "twin"
    twin.external_data[0].value = "other"
    with pytest.raises(BundleError, match="one data file for all"):
        check(m, {"model.onnx_data", "other"})


def test_a_location_given_twice_is_refused(check: Callable[..., None]) -> None:
    m = external(model())
    entry = m.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "../secret"
    with pytest.raises(BundleError, match="'location' is given twice"):
        check(m)


def test_an_unknown_external_data_key_is_refused(check: Callable[..., None]) -> None:
    with pytest.raises(BundleError, match="unknown external data key 'basepath'"):
        check(external(model(), basepath="/"))


@pytest.mark.parametrize(("offset", "end"), [("77", "101"), ("1000000000000", "1,000,000,000,024")])
def test_external_data_outside_the_file_is_refused(check: Callable[..., None], offset: str, end: str) -> None:
    with pytest.raises(
        BundleError, match=f"'weight' ends at byte {end} of model.onnx_data; expected at most 100"
    ):
        check(external(model(), offset=offset))


@pytest.mark.parametrize("number", ["-1", "1e3", "", " 1", "0x10", "9" * 20, "१"])
def test_an_offset_that_is_no_whole_number_is_refused(check: Callable[..., None], number: str) -> None:
    with pytest.raises(BundleError, match="whole numbers"):
        check(external(model(), offset=number))


@pytest.mark.parametrize("length", ["23", "25", "0", "1099511627776"])
def test_a_length_that_contradicts_the_shape_is_refused(check: Callable[..., None], length: str) -> None:
    with pytest.raises(BundleError, match="24 for its shape"):
        check(external(model(), length=length))


def test_a_missing_length_is_refused(check: Callable[..., None]) -> None:
    with pytest.raises(BundleError, match="length ''"):
        check(external(model(), length=""))


def test_overlapping_tensors_are_refused(check: Callable[..., None]) -> None:
    m = external(model())
    twin = m.graph.initializer.add()
    twin.CopyFrom(m.graph.initializer[0])
    twin.name = "twin"
    twin.external_data[1].value = "8"
    with pytest.raises(BundleError, match="overlap"):
        check(m)


@pytest.mark.parametrize(
    "dims", [[2**31, 2**31], [2**62], [2**32, 2**32, 2], [2**40, 2**40, 0, 2**63 - 1][:2]]
)
def test_a_huge_declared_shape_is_refused_with_numbers(check: Callable[..., None], dims: list[int]) -> None:
    m = external(model())
    del m.graph.initializer[0].dims[:]
    m.graph.initializer[0].dims.extend(dims)
    with pytest.raises(BundleError, match=r"'weight' of shape \[\d+.* needs [\d,]+ bytes"):
        check(m)


def test_a_huge_input_is_refused_with_numbers(check: Callable[..., None]) -> None:
    m = model()
    m.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**50
    with pytest.raises(BundleError, match=r"value 'x' of shape \[1125899906842624\] needs"):
        check(m)


def test_a_negative_size_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.graph.initializer[0].dims[0] = -2
    with pytest.raises(BundleError, match="'weight' has a negative size"):
        check(m)


def test_millions_of_empty_fields_are_refused_before_they_cost_time(
    check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxproto.Reader.__init__, "__defaults__", (1000,))
    m = model()
    for _ in range(1000):
        m.graph.node[1].attribute.add()
    with pytest.raises(BundleError, match="fields"):
        check(m)


def test_ten_thousand_dimensions_are_refused(check: Callable[..., None]) -> None:
    m = model()
    m.graph.initializer[0].dims.extend([1] * 10_000)
    with pytest.raises(BundleError, match="dimensions"):
        check(m)


@pytest.mark.parametrize("size", [0, 23, 25])
def test_raw_data_that_contradicts_the_shape_is_refused(check: Callable[..., None], size: int) -> None:
    m = model()
    m.graph.initializer[0].raw_data = bytes(size)
    with pytest.raises(BundleError, match=rf"'weight' of shape \[2, 3\] holds {size} bytes; expected 24"):
        check(m)


def test_a_tensor_without_values_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.graph.initializer[0].ClearField("raw_data")
    with pytest.raises(BundleError, match="holds no values"):
        check(m)


def test_a_typed_list_of_the_wrong_length_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.graph.initializer[1].float_data.append(4.0)
    with pytest.raises(BundleError, match=r"'bias' of shape \[3\] holds 4 in float_data; expected 3"):
        check(m)


@pytest.mark.parametrize("kind", [0, TensorProto.STRING, TensorProto.COMPLEX64, 99])
def test_an_element_type_that_is_no_number_is_refused(check: Callable[..., None], kind: int) -> None:
    m = model()
    m.graph.initializer[0].data_type = kind
    with pytest.raises(BundleError, match="element type"):
        check(m)


def test_values_in_two_places_are_refused(check: Callable[..., None]) -> None:
    m = external(model())
    m.graph.initializer[0].raw_data = bytes(24)
    with pytest.raises(BundleError, match="here and in a data file"):
        check(m)


def test_a_name_given_to_two_tensors_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.graph.initializer[1].name = "weight"
    with pytest.raises(BundleError, match="'weight' is given twice"):
        check(m)


def test_a_tensor_of_an_attribute_is_checked_too(check: Callable[..., None]) -> None:
    m = model()
    tensor = m.graph.node[0].attribute[0].t
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    with pytest.raises(BundleError, match=r"tensor 'two' of node 'two' \(Constant\) lies in '/etc/passwd'"):
        check(m)


@pytest.mark.parametrize("op", ["If", "Loop", "Scan", "EPContext"])
def test_control_flow_and_engine_contexts_are_refused(check: Callable[..., None], op: str) -> None:
    m = model()
    m.graph.node[1].op_type = op
    with pytest.raises(BundleError, match=rf"node 'multiply' \({op}\)"):
        check(m)


def test_a_graph_inside_a_node_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.graph.node[1].attribute.append(helper.make_attribute("body", m.graph))
    with pytest.raises(BundleError, match="attribute that holds a graph"):
        check(m)


@pytest.mark.parametrize("domain", ["ai.onnx.contrib", "custom", "com.microsoft.nchwc"])
def test_a_foreign_operator_is_refused(check: Callable[..., None], domain: str) -> None:
    m = model()
    m.graph.node[2].domain = domain
    m.opset_import.append(helper.make_opsetid(domain, 1))
    with pytest.raises(BundleError, match=f"node 'add' .* '{domain}'"):
        check(m)


def test_an_operator_whose_set_is_not_imported_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.graph.node[2].domain = "com.microsoft"
    with pytest.raises(BundleError, match="not imported"):
        check(m)


def test_an_unused_foreign_import_is_harmless(check: Callable[..., None]) -> None:
    m = model()
    m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    check(m)


@pytest.mark.parametrize("version", [0, 6, 99])
def test_an_operator_set_out_of_range_is_refused_with_the_range(
    check: Callable[..., None], version: int
) -> None:
    m = model()
    m.opset_import[0].version = version
    with pytest.raises(BundleError, match=rf"operator set ai\.onnx {version}; expected 7 to 26"):
        check(m)


@pytest.mark.parametrize("version", [0, 3, 99])
def test_an_ir_version_out_of_range_is_refused_with_the_range(
    check: Callable[..., None], version: int
) -> None:
    m = model()
    m.ir_version = version
    with pytest.raises(BundleError, match=f"IR version {version}; expected 4 to 13"):
        check(m)


def test_a_function_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.functions.append(helper.make_function("custom", "F", ["a"], ["a"], [], []))
    with pytest.raises(BundleError, match="holds functions"):
        check(m)


def test_training_info_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.training_info.add().algorithm.CopyFrom(m.graph)
    with pytest.raises(BundleError, match="holds training_info"):
        check(m)


def test_a_sparse_tensor_is_refused(check: Callable[..., None]) -> None:
    m = model()
    m.graph.sparse_initializer.add()
    with pytest.raises(BundleError, match="sparse"):
        check(m)


def test_a_second_graph_is_refused(check: Callable[..., None]) -> None:
    # protobuf parsers merge it into the first
    data = model().SerializeToString()
    with pytest.raises(BundleError, match="given twice"):
        check(data + data)


def test_a_field_of_the_wrong_wire_type_is_refused(check: Callable[..., None]) -> None:
    # protobuf parsers skip it as unknown, and would read another model than the gate
    with pytest.raises(BundleError, match="unknown field 1"):
        check(b"\x0a\x01\x0a" + model().SerializeToString())


@pytest.mark.parametrize("name", [b"xw", b"bias", b"value"])
def test_a_name_that_is_not_utf8_is_refused(check: Callable[..., None], name: bytes) -> None:
    data = model().SerializeToString()
    assert name in data
    with pytest.raises(BundleError, match="not UTF-8"):
        check(data.replace(name, b"\xff" * len(name)))


def test_a_model_without_a_graph_is_refused(check: Callable[..., None]) -> None:
    with pytest.raises(BundleError, match="no graph"):
        check(helper.make_model(helper.make_graph([], "", [], []), ir_version=10).SerializeToString()[:2])
