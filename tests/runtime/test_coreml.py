"""Core ML's gate and backend. Core ML is on macOS alone: in its place stands a double of coremltools' MLModel."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="needs the coreml extra")

from fewstep.export.coreml_package import write, write_program
from fewstep.export.mil_reference import coremltools, silent
from fewstep.runtime import backends
from fewstep.runtime.coremlcalls import chained, fitted
from fewstep.runtime.coremlfile import check_packages, packages_of
from fewstep.runtime.errors import BadInput, BundleError
from fewstep.runtime.manifest import PartSpec, TensorSpec

WEIGHT = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype(np.float32)
IMAGE = TensorSpec("sample", "float32", (1, 3, 8, 8))
SPEC = PartSpec(
    "coreml",
    "unet/Unet.mlpackage/Manifest.json",
    (IMAGE,),
    (dataclasses.replace(IMAGE, name="out"),),
    device="npu",
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """out = a convolution of sample."""
    with silent():
        ct, mil = coremltools(), coremltools("coremltools.converters.mil")

        @mil.Builder.program(  # type: ignore[untyped-decorator]
            input_specs=[mil.Builder.TensorSpec(shape=(1, 3, 8, 8))], opset_version=ct.target.iOS18
        )
        def program(sample: Any) -> Any:
            return mil.Builder.conv(x=sample, weight=WEIGHT, pad_type="same", name="out")

    path = tmp_path_factory.mktemp("coreml") / "Unet.mlpackage"
    write_program(program, path)
    return path


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "Unet.mlpackage"))


def model_of(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def weights_of(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def edit(package: Path, change: Callable[[Any], None]) -> None:
    """Change the protobuf of a package through protobuf itself."""
    spec = coremltools("coremltools.proto.Model_pb2").Model()
    spec.ParseFromString(model_of(package).read_bytes())
    change(spec)
    model_of(package).write_bytes(spec.SerializeToString())


def operations(spec: Any) -> Any:
    return next(iter(spec.mlProgram.functions["main"].block_specializations.values())).operations


def blob(spec: Any) -> Any:
    found = [v.blobFileValue for op in operations(spec) for v in op.attributes.values()]
    return next(value for value in found if value.fileName)


def test_a_package_that_was_just_written_passes_the_gate(package: Path) -> None:
    check_packages(package / "Manifest.json")


def test_a_package_has_three_files_and_no_date(package: Path) -> None:
    files = sorted(file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file())
    assert files == [
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
        "Manifest.json",
    ]
    assert b"2026" not in model_of(package).read_bytes()


def manifest_with(**changes: Any) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        file = package / "Manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def path_as(text: str) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        file = package / "Manifest.json"
        file.write_text(file.read_text().replace("com.apple.CoreML/weights", text))

    return change


def deep(package: Path) -> None:
    (package / "Manifest.json").write_text("[" * 10_000 + "]" * 10_000)


def linked(package: Path) -> None:
    weights_of(package).unlink()
    os.symlink("/etc/hostname", weights_of(package))


def changed(change: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda package: edit(package, change)


def add_loop(spec: Any) -> None:
    operations(spec)[-1].type = "while_loop"


def add_block(spec: Any) -> None:
    operations(spec)[-1].blocks.add()


def add_state(spec: Any) -> None:
    operations(spec)[-1].outputs[0].type.stateType.wrappedType.tensorType.rank = 1


def file_name(spec: Any) -> None:
    blob(spec).fileName = "@model_path/../../../etc/passwd"


def far_offset(spec: Any) -> None:
    blob(spec).offset = 1 << 40


def odd_offset(spec: Any) -> None:
    blob(spec).offset += 1


def huge(spec: Any) -> None:
    operations(spec)[-1].outputs[0].type.tensorType.dimensions[0].constant.size = 1 << 50


def longer(spec: Any) -> None:
    for op in operations(spec):
        for value in op.attributes.values():
            if value.blobFileValue.fileName:
                value.type.tensorType.dimensions[0].constant.size += 1


def version(spec: Any) -> None:
    spec.specificationVersion = 99


def network(spec: Any) -> None:
    spec.neuralNetwork.layers.add().name = "x"


def updatable(spec: Any) -> None:
    spec.isUpdatable = True


def custom(spec: Any) -> None:
    operations(spec)[-1].type = "custom_layer"


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "path out of the package": (path_as("../../../etc"), "the path '../../../etc'"),
    "another key": (manifest_with(more=1), "other keys"),
    "another version": (manifest_with(fileFormatVersion="2.0.0"), "'2.0.0'"),
    "no root": (manifest_with(rootModelIdentifier="x"), "the root is not the model"),
    "one item": (manifest_with(itemInfoEntries={}), "0 items"),
    "deep JSON": (deep, "nested too deeply"),
    "another file": (lambda p: (p / "run.sh").write_text("x") and None, "'run.sh' does not belong there"),
    "no weights": (lambda p: weights_of(p).unlink(), "is an empty folder"),
    "weights cut short": (lambda p: os.truncate(weights_of(p), 10), "cut short"),
    "weights cut": (lambda p: os.truncate(weights_of(p), 200), "ends at byte"),
    "weights replaced": (lambda p: weights_of(p).write_bytes(bytes(4096)) and None, "has no weights at byte"),
    "a link": (linked, "symbolic link"),
    "no program": (lambda p: model_of(p).write_bytes(b"") and None, "a program of 0 bytes"),
    "a loop": (changed(add_loop), "'while_loop'"),
    "a block": (changed(add_block), "holds a block"),
    "state": (changed(add_state), "has state"),
    "a custom operator": (changed(custom), "'custom_layer'"),
    "weights elsewhere": (changed(file_name), "has weights in '@model_path/../../../etc/passwd'"),
    "weights outside": (changed(far_offset), "has weights at byte 1,099,511,627,776"),
    "weights between": (changed(odd_offset), "has weights at byte"),
    "a huge tensor": (changed(huge), "has a tensor of shape"),
    "a shape of more values": (changed(longer), "bytes of weights"),
    "a version to come": (changed(version), "specification version 99"),
    "a neural network": (changed(network), "unknown field 500"),
    "training": (changed(updatable), "trained on the device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_gate_refuses(name: str, copy: Path) -> None:
    change, said = REFUSED[name]
    change(copy)
    with pytest.raises(BundleError) as refused:
        check_packages(copy / "Manifest.json")
    assert said in str(refused.value)
    assert "fix:" in str(refused.value)


def test_a_program_cut_anywhere_or_with_any_byte_changed_is_refused_or_read_without_a_crash(
    copy: Path,
) -> None:
    whole, rng = model_of(copy).read_bytes(), np.random.default_rng(0)
    refused = 0
    for number in range(400):
        bad = bytearray(whole)
        if number % 2:
            bad = bad[: int(rng.integers(len(whole)))]
        else:
            bad[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        model_of(copy).write_bytes(bytes(bad))
        try:
            check_packages(copy / "Manifest.json")
        except BundleError:
            refused += 1
    assert refused > 200


def test_another_kind_of_graph_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="no Core ML package"):
        check_packages(tmp_path / "model.onnx")


def test_chunks_follow_their_first_in_order(package: Path, tmp_path: Path) -> None:
    for name in ("UnetChunk2", "UnetChunk1", "VAEDecoder"):
        shutil.copytree(package, tmp_path / f"{name}.mlpackage")
    first = tmp_path / "UnetChunk1.mlpackage" / "Manifest.json"
    assert [each.name for each in packages_of(first)] == ["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"]
    (model_of(tmp_path / "UnetChunk2.mlpackage")).write_bytes(b"\xff")
    with pytest.raises(BundleError, match="UnetChunk2"):
        check_packages(first)


def test_writing_a_package_moves_its_weights(tmp_path: Path, package: Path) -> None:
    spec = coremltools("coremltools.proto.Model_pb2").Model()
    spec.ParseFromString(model_of(package).read_bytes())
    weights = tmp_path / "w.bin"
    weights.write_bytes(weights_of(package).read_bytes())
    write(spec, weights, tmp_path / "A.mlpackage")
    assert not weights.exists()
    check_packages(tmp_path / "A.mlpackage" / "Manifest.json")


# the calls


def test_a_batch_of_three_goes_through_a_package_of_two_in_two_calls() -> None:
    seen: list[np.ndarray] = []

    def call(feeds: Any) -> Any:
        seen.append(feeds["x"])
        return {"y": 2 * feeds["x"]}

    x = np.arange(6.0).reshape(3, 2)
    got = fitted(call, {"x": (2, 2)}, {"x": x}, ["y"])
    assert np.array_equal(got["y"], 2 * x)
    assert [given.shape for given in seen] == [(2, 2), (2, 2)]


def test_conditions_are_laid_out_channels_first_where_the_package_has_them_so() -> None:
    states = np.random.default_rng(0).standard_normal((2, 5, 3))
    got = fitted(lambda feeds: {"y": feeds["s"]}, {"s": (2, 3, 1, 5)}, {"s": states}, ["y"])
    assert np.array_equal(got["y"][:, :, 0], states.transpose(0, 2, 1))


def test_another_size_than_the_packages_is_an_error_that_names_both() -> None:
    with pytest.raises(BadInput, match=r"\(1, 4, 9, 8\).*\(1, 4, 8, 8\)"):
        fitted(dict, {"x": (1, 4, 8, 8)}, {"x": np.zeros((1, 4, 9, 8))}, ["x"])


def test_a_later_chunk_gets_the_inputs_and_what_came_before() -> None:
    calls = [lambda f: {"h": f["x"] + 1}, lambda f: {"y": f["h"] * f["x"]}]
    assert chained(calls)({"x": np.float64(3)}) == {"y": 12}


# the backend, on a double of MLModel


class Double:
    """What coremltools' MLModel is to the backend: loads, describes itself, predicts. Twice the sample."""

    loaded: list[tuple[str, Any]] = []  # noqa: RUF012 - what the class is asked for, in order

    def __init__(self, path: str, compute_units: Any) -> None:
        Double.loaded.append((Path(path).name, compute_units.name))
        self.spec = coremltools("coremltools.proto.Model_pb2").Model()
        self.spec.ParseFromString(model_of(Path(path)).read_bytes())

    def get_spec(self) -> Any:
        return self.spec

    def predict(self, feeds: dict[str, Any]) -> dict[str, Any]:
        value, *_ = feeds.values()
        assert value.dtype == np.float32
        assert value.flags.c_contiguous
        return {"out": 2 * value, "h": value}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(coremltools().models, "MLModel", Double)
    Double.loaded.clear()


def test_off_macos_there_is_no_such_device(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert backends.runs_in(SPEC) is None
    with pytest.raises(BadInput, match="Core ML has no npu on Linux"):
        backends.open_session(package / "Manifest.json", SPEC)


def test_an_intel_mac_has_no_neural_engine(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert backends.runs_in(SPEC) is None
    assert backends.runs_in(dataclasses.replace(SPEC, device="gpu", precision="float16")) == "float16"


@pytest.mark.parametrize(
    ("device", "units"), [("npu", "CPU_AND_NE"), ("gpu", "CPU_AND_GPU"), ("cpu", "CPU_ONLY")]
)
def test_on_a_mac_the_package_is_loaded_for_the_specs_device(
    mac: None, package: Path, device: str, units: str
) -> None:
    session = backends.open_session(package / "Manifest.json", dataclasses.replace(SPEC, device=device))
    sample = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    assert np.array_equal(session.run({"sample": sample})["out"], 2 * sample.astype(np.float32))
    assert Double.loaded == [("Unet.mlpackage", units)]
    session.close()
    session.close()


def test_on_a_mac_a_damaged_package_is_refused_before_core_ml_sees_it(mac: None, copy: Path) -> None:
    model_of(copy).write_bytes(b"\x00")
    with pytest.raises(BundleError):
        backends.open_session(copy / "Manifest.json", SPEC)
    assert Double.loaded == []


def test_what_core_ml_cannot_load_is_our_error_with_its_words(
    mac: None, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error compiling model: needs macOS 15")

    monkeypatch.setattr(coremltools().models, "MLModel", fail)
    with pytest.raises(BundleError, match="needs macOS 15"):
        backends.open_session(package / "Manifest.json", SPEC)
