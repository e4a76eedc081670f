"""OpenVINO's backend and the gate for its IR: what is run, what is refused, and by whom."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.runtime import backends
from fewstep.runtime.denoiser import Denoiser
from fewstep.runtime.errors import BadInput, BundleError, MissingExtra
from fewstep.runtime.irfile import MAX_FILE, check_ir
from fewstep.runtime.manifest import PartSpec, TensorSpec

ov = pytest.importorskip("openvino", reason="needs the openvino extra")

WEIGHT = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype(np.float32)
IMAGE = TensorSpec("sample", "float32", ("batch", 3, "height", "width"))
STEP = TensorSpec("timestep", "float32", ("batch",))
SPEC = PartSpec(
    "openvino", "model.xml", (IMAGE, STEP), (dataclasses.replace(IMAGE, name="out_sample"),), "float32"
)


def save(folder: Path, shape: tuple[int, ...] = (-1, 3, -1, -1)) -> Path:
    """out_sample = convolution of sample + timestep, as an IR with its weights beside it."""
    from openvino import opset13 as op

    sample = op.parameter(list(shape), np.float32, name="sample")
    time = op.parameter([shape[0]], np.float32, name="timestep")
    mixed = op.convolution(sample, op.constant(WEIGHT), [1, 1], [1, 1], [1, 1], [1, 1])
    out = op.add(mixed, op.unsqueeze(time, op.constant(np.array([1, 2, 3]))))
    for node, name in ((sample, "sample"), (time, "timestep"), (out, "out_sample")):
        node.output(0).set_names({name})
    ov.save_model(ov.Model([op.result(out)], [sample, time], "part"), folder / "model.xml", False)
    return folder / "model.xml"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("ir"))


def feeds(batch: int, height: int, width: int) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    sample = rng.standard_normal((batch, 3, height, width)).astype(np.float32)
    return {"sample": sample, "timestep": rng.standard_normal(batch).astype(np.float32)}


def convolved(given: dict[str, Any]) -> Any:
    """The same by definition."""
    x = np.pad(given["sample"].astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, WEIGHT) + given["timestep"][:, None, None, None]


# the session


def test_a_session_computes_the_graph_at_any_sizes_in_any_order(file: Path) -> None:
    session = backends.open_session(file, SPEC, threads=1)
    for sizes in ((1, 8, 8), (2, 8, 12), (1, 8, 8), (3, 5, 4), (2, 8, 12)):
        given = feeds(*sizes)
        out = session.run(given)["out_sample"]
        np.testing.assert_allclose(out, convolved(given), atol=2e-5)
    session.close()
    session.close()


def test_what_a_session_gave_stays_as_it_is_when_it_runs_again(file: Path) -> None:
    session = backends.open_session(file, SPEC)
    first = session.run(feeds(1, 8, 8), ["out_sample"])["out_sample"]
    kept = first.copy()
    session.run(feeds(2, 8, 8))
    session.run({name: value + 1 for name, value in feeds(1, 8, 8).items()})
    np.testing.assert_array_equal(first, kept)


def test_inputs_that_do_not_lie_in_one_piece_are_taken_too(file: Path) -> None:
    session = backends.open_session(file, SPEC)
    given = feeds(2, 8, 8)
    turned = given | {"sample": given["sample"].transpose(0, 1, 3, 2)}
    np.testing.assert_allclose(session.run(turned)["out_sample"], convolved(turned), atol=2e-5)


def test_a_large_graph_is_compiled_once_at_a_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.runtime.backends import openvino as backend

    monkeypatch.setattr(backend, "LARGE_BYTES", 0)
    session = backend.open_session(file, SPEC)
    for sizes in ((1, 8, 8), (2, 8, 8), (1, 8, 8)):
        given = feeds(*sizes)
        np.testing.assert_allclose(session.run(given)["out_sample"], convolved(given), atol=2e-5)
        assert len(session._requests) == 1


def test_half_precision_runs_as_what_the_processor_has(file: Path) -> None:
    spec = dataclasses.replace(SPEC, precision="bfloat16")
    able = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert backends.runs_in(spec) == ("bfloat16" if able else "float32")
    assert backends.runs_in(SPEC) == "float32"
    given = feeds(2, 16, 16)
    out, right = backends.open_session(file, spec).run(given)["out_sample"], convolved(given)
    error = np.sqrt(np.mean((out - right) ** 2) / np.mean(right**2))
    # bfloat16 keeps 8 bits: half a step is 2^-9 of a value at most, and errors of many terms average out
    assert (1e-4 if able else 0) <= error < 2**-8


def test_a_graph_of_fixed_sizes_takes_a_guided_batch_one_by_one(tmp_path: Path) -> None:
    fixed = [
        TensorSpec("sample", "float32", (1, 3, 8, 8)),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("out_sample", "float32", (1, 3, 8, 8)),
    ]
    spec = dataclasses.replace(SPEC, inputs=tuple(fixed[:2]), outputs=(fixed[2],))
    session = backends.open_session(save(tmp_path, (1, 3, 8, 8)), spec)
    denoiser = Denoiser(session, spec, {})
    given = feeds(3, 8, 8)
    got = denoiser._network(given["sample"], 0.5, {})
    np.testing.assert_allclose(got, convolved(given | {"timestep": np.full(3, 0.5)}), atol=2e-5)


def test_a_missing_package_comes_with_its_pip_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fewstep.runtime.backends.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        MissingExtra, match=r"openvino is not installed; fix: pip install 'fewstep\[openvino\]'"
    ):
        backends.open_session(file, SPEC)


def test_a_device_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(BadInput, match=r"OpenVINO finds no NPU on this host, only CPU.*fewstep targets"):
        backends.open_session(file, dataclasses.replace(SPEC, device="npu"))


@pytest.mark.parametrize(
    "inputs",
    [
        (dataclasses.replace(IMAGE, dtype="float16"), STEP),
        (dataclasses.replace(IMAGE, name="picture"), STEP),
        (IMAGE,),
    ],
)
def test_a_graph_with_other_inputs_than_the_manifest_says_is_refused(file: Path, inputs: Any) -> None:
    with pytest.raises(BundleError, match=r"model\.xml has .*'sample': 'float32'.*; expected"):
        backends.open_session(file, dataclasses.replace(SPEC, inputs=inputs))


def test_what_openvino_refuses_is_one_line_of_ours(file: Path, tmp_path: Path) -> None:
    damaged = file.read_text().replace('type="Add"', 'type="Addd"')
    (tmp_path / "model.xml").write_text(damaged)
    (tmp_path / "model.bin").write_bytes(file.with_suffix(".bin").read_bytes())
    with pytest.raises(BundleError, match=r"model\.xml: OpenVINO .* cannot read it") as caught:
        backends.open_session(tmp_path / "model.xml", SPEC)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("engine", "name"), [("openvino", "model.onnx"), ("onnxruntime", "model.ort")])
def test_a_format_the_bundles_gate_does_not_read_is_not_opened(
    tmp_path: Path, engine: str, name: str
) -> None:
    pytest.importorskip(engine)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=f"{name} is no"):
        backends.open_session(tmp_path / name, dataclasses.replace(SPEC, engine=engine))


# the gate


def attacks() -> dict[str, tuple[Callable[[str], str], str]]:
    """What is done to a good IR -> what the gate says of it."""

    def swap(old: str, new: str) -> Callable[[str], str]:
        return lambda text: text.replace(old, new, 1)

    const = 'element_type="f32" shape="3, 3, 3, 3" offset="0" size="324"'
    entity = '<!DOCTYPE net [<!ENTITY a "aaaa"><!ENTITY b SYSTEM "file:///etc/passwd">]><net '
    body = '<layer id="99" name="l" type="Relu" version="opset1"><body><layers/></body></layer></layers>'
    return {
        "cut off": (lambda text: text[:-20], "not XML"),
        "nothing": (lambda text: "", "0 bytes; expected 1 to"),
        "random bytes": (lambda text: "\x08\x07\x12", "not XML"),
        "web page": (lambda text: "<html></html>", "<html> in <>"),
        "entities": (swap("<net ", entity), "a DOCTYPE"),
        "processing instruction": (swap("<layers>", "<?php x ?><layers>"), "processing instruction"),
        "nesting": (
            swap("<rt_info>", "<rt_info>" + "<a>" * 100 + "</a>" * 100),
            "nested too deeply",
        ),
        "another IR version": (swap('version="11"', 'version="10"'), "IR version '10'; expected 11"),
        "an offset past the end": (swap('offset="0"', 'offset="1000"'), r"ends at byte 1,324 of model\.bin"),
        "a negative offset": (swap('offset="0"', 'offset="-8"'), "its offset is '-8'"),
        "an offset beyond 64 bits": (
            swap('offset="0"', f'offset="{2**64}"'),
            "its offset is '18446744073709551616'",
        ),
        "no offset": (swap('offset="0" ', ""), "its offset is ''"),
        "a longer shape than bytes": (
            swap(const, const.replace("3, 3, 3, 3", "30, 3, 3, 3")),
            r"324 bytes of f32 .* expected 3,240 for its shape and type",
        ),
        "a shape no memory holds": (
            swap(const, const.replace("3, 3, 3, 3", "4294967296, 4294967296")),
            "needs 73,786,976,294,838,206,464 bytes",
        ),
        "another element type": (
            swap(const, const.replace("f32", "f64")),
            "324 bytes of f64 .* expected 648",
        ),
        "text for numbers": (swap(const, const.replace("f32", "string")), "element type 'string'"),
        "a free size in a constant": (
            swap(const, const.replace("3, 3, 3, 3", "?, 3, 3, 3")),
            r"a size is '\?'",
        ),
        "an input no memory holds": (
            swap('shape="?,3,?,?"', 'shape="1000000000,1000000000"'),
            "needs 4,000,000,000,000,000,000 bytes",
        ),
        "a result no memory holds": (swap("<dim>3</dim>", "<dim>99999999999999</dim>"), "needs 99,999"),
        "a size that is no number": (swap("<dim>3</dim>", "<dim>three</dim>"), "a size is 'three'"),
        "one id twice": (swap('id="1"', 'id="0"'), "id '0'; expected a number of its own"),
        "an operator from elsewhere": (
            swap('type="Add" version="opset1"', 'type="Add" version="/tmp/x.so"'),
            "is of '/tmp/x.so'; expected opset1",
        ),
        "a loop": (swap('type="Add"', 'type="Loop"'), r"\(Loop\); expected no control flow and no state"),
        "state": (swap('type="Add"', 'type="ReadValue"'), "no state"),
        "a body": (swap("</layers>", body), "<body> in <layer>"),
        "weights by another name": (swap("</layers>", "</layers><blobs/>"), "<blobs> in <net>"),
    }


@pytest.fixture
def copy(file: Path, tmp_path: Path) -> Path:
    for suffix in (".xml", ".bin"):
        (tmp_path / "model").with_suffix(suffix).write_bytes(file.with_suffix(suffix).read_bytes())
    return tmp_path / "model.xml"


@pytest.mark.parametrize("name", attacks())
def test_the_gate_refuses(copy: Path, name: str) -> None:
    change, said = attacks()[name]
    text = copy.read_text()
    assert change(text) != text
    check_ir(copy, copy.with_suffix(".bin"))
    copy.write_text(change(text))
    with pytest.raises(BundleError, match=said) as caught:
        check_ir(copy, copy.with_suffix(".bin"))
    assert str(caught.value).startswith("model.xml: ")


def test_the_gate_refuses_constants_that_overlap_in_part(copy: Path) -> None:
    text = copy.read_text()
    assert 'offset="324" size="24"' in text
    copy.write_text(text.replace('offset="324" size="24"', 'offset="320" size="24"'))
    with pytest.raises(BundleError, match=r"overlap in model\.bin"):
        check_ir(copy, copy.with_suffix(".bin"))


def test_the_gate_refuses_a_large_file_unread(copy: Path) -> None:
    with open(copy, "r+b") as opened:
        opened.truncate(MAX_FILE + 1)
    with pytest.raises(BundleError, match=r"67,108,865 bytes; expected 1 to 67,108,864"):
        check_ir(copy, copy.with_suffix(".bin"))


def test_the_gate_refuses_more_layers_than_any_network_has(copy: Path) -> None:
    many = "".join(f'<layer id="{i}" name="l" type="Relu" version="opset1"/>' for i in range(100, 20200))
    copy.write_text(copy.read_text().replace("</layers>", many + "</layers>"))
    with pytest.raises(BundleError, match="too many layers; expected at most 20,000"):
        check_ir(copy, copy.with_suffix(".bin"))


@pytest.mark.parametrize("which", [".xml", ".bin"])
def test_the_gate_refuses_a_hard_link(copy: Path, which: str) -> None:
    (copy.parent / "other").hardlink_to(copy.with_suffix(which))
    with pytest.raises(BundleError, match="is a link"):
        check_ir(copy, copy.with_suffix(".bin"))


def test_the_gate_refuses_missing_weights(copy: Path) -> None:
    copy.with_suffix(".bin").unlink()
    with pytest.raises(BundleError, match=r"model\.bin"):
        check_ir(copy, copy.with_suffix(".bin"))


def test_every_cut_and_every_changed_digit_is_refused_or_harmless_to_the_engine(copy: Path) -> None:
    """Whatever passes the gate must be read by OpenVINO without a crash, for which there is no `except`."""
    text, rng = copy.read_bytes(), np.random.default_rng(0)
    passed = 0
    for _ in range(400):
        changed, where = bytearray(text), int(rng.integers(len(text)))
        changed[where] = int(rng.integers(32, 127))
        copy.write_bytes(bytes(changed))
        try:
            check_ir(copy, copy.with_suffix(".bin"))
            passed += 1
            backends.open_session(copy, SPEC).close()
        except BundleError:
            continue
    assert passed > 0
