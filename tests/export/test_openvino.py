import json
import platform
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fewstep.export import export_bundle, gate, parts
from fewstep.export import onnx as translation
from fewstep.model.model import Example, Part
from fewstep.runtime import Pipeline
from fewstep.runtime.backends import open_session, runs_in
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BundleError, GateFailed, MissingExtra
from fewstep.runtime.irfile import check_ir
from fewstep.runtime.manifest import TensorSpec
from fewstep.targets import load_target

from .conftest import torch

ov = pytest.importorskip("openvino", reason="needs the openvino extra")

from fewstep.export import openvino as lowering  # noqa: E402
from fewstep.model.trajectories import run_part  # noqa: E402

TARGET = "intel-cpu"
X86 = platform.machine() == "x86_64"


def export(model, out, target=TARGET, **options):
    return list(export_bundle(model, target, out, **{"steps": 2, "measure_speed": False, **options}))


def operators(file):
    return Counter(re.findall(r'type="(\w+)" version="opset', file.read_text()))


@pytest.fixture(scope="module")
def bundle(tiny_sd, tmp_path_factory):
    """As the target's recipe says: bfloat16, weights in float16."""
    *_, done = export(tiny_sd, tmp_path_factory.mktemp("ov") / "b")
    return done.path


@pytest.fixture
def traced(pixels):
    return translation.trace(pixels.parts["unet"])


# a whole pipeline


def test_a_bundle_for_openvino_holds_ir_by_the_names_other_tools_look_for(bundle):
    manifest = Bundle.open(bundle).manifest
    for name, part in manifest.parts.items():
        assert (part.engine, part.graph) == ("openvino", f"{name}/openvino_model.xml")
        assert (part.precision, part.device, part.executed) == (
            "bfloat16",
            "cpu",
            "device" if X86 else "converted",
        )
        assert (bundle / name / "openvino_model.bin").exists()
        assert {file.suffix for file in (bundle / name).iterdir()} == {".xml", ".bin", ".json"}
    assert "openvino" in manifest.versions
    text = (bundle / "manifest.json").read_text()
    graphs = "".join((bundle / part.graph).read_text() for part in manifest.parts.values())
    assert "/tmp" not in text + graphs
    assert str(bundle.parent) not in text + graphs


def test_what_a_bundle_was_computed_in_is_measured_and_written_down(bundle):
    manifest = Bundle.open(bundle).manifest
    floors = load_target(TARGET).quality
    for name, quality in manifest.quality["parts"].items():
        assert quality["computed_in"] == runs_in(manifest.parts[name])
        assert quality["relative_error"] < floors[quality["computed_in"]].part_relative_error
    assert manifest.quality["pipeline"]["psnr_db"] > 30
    assert manifest.quality["golden"]["tolerance"] == 5e-2


def test_attention_is_one_operator_and_weights_are_halves(bundle, tiny_bundle):
    found = operators(bundle / "unet/openvino_model.xml")
    assert found["ScaledDotProductAttention"] == 2 * 4  # self and cross attention of four blocks
    assert found["Softmax"] == 0
    large = re.findall(
        r'element_type="f32" shape="([^"]*)"', (bundle / "unet/openvino_model.xml").read_text()
    )
    assert all(np.prod([int(size or 1) for size in shape.split(",")]) <= 16 for shape in large)
    ours, theirs = (bundle / "unet/openvino_model.bin"), (tiny_bundle / "unet/model.onnx")
    assert ours.stat().st_size < 0.6 * theirs.stat().st_size


def test_the_bundle_draws_the_picture_of_the_onnx_one(bundle, tiny_bundle):
    drawn = []
    for path in (bundle, tiny_bundle):
        with Pipeline.from_pretrained(path) as pipeline:
            drawn.append(
                pipeline("a dog", num_inference_steps=4, sampler="ddim", seed=3, output_type="np").images
            )
    assert gate.psnr_db(drawn[1], drawn[0]) > 35


def test_in_float32_with_whole_weights_the_original_is_met_as_by_onnx_runtime(tiny_sd, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('precision = "float32"\nweights = "float32"')
    *_, done = export(tiny_sd, tmp_path / "b", recipe=file)
    for name, quality in done.manifest.quality["parts"].items():
        assert quality["relative_error"] < 1e-5, name
        assert done.manifest.parts[name].precision == "float32"
    assert done.manifest.quality["pipeline"]["psnr_db"] > 80
    assert done.manifest.quality["golden"]["tolerance"] == 1e-3


def test_a_large_part_goes_through_processes_of_its_own(pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LARGE_BYTES", 0)
    *_, done = export(pixels, tmp_path / "b")
    assert "gate unet" in done.peak_rss_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


# devices that are not here


def test_a_bundle_for_an_npu_is_of_fixed_sizes_and_says_it_was_not_executed(labelled, tmp_path):
    *_, done = export(labelled, tmp_path / "b", "intel-npu", measure_speed=True)
    part = done.manifest.parts["unet"]
    assert (part.device, part.executed, part.precision) == ("npu", "converted", "float16")
    assert [spec.shape for spec in part.inputs] == [(1, 3, 8, 8), (1,), (1,)]
    assert part.outputs[0].shape == (1, 3, 8, 8)
    assert done.manifest.sample.fixed
    assert done.manifest.speed["unet"]["verdict"] == "not measured: this host is no Intel NPU"
    # the very graph, on this host's processor: a guided call of two samples is two runs
    local = replace(part, device="cpu")
    with Pipeline(
        Bundle.open(done.path), _sessions={"unet": open_session(done.path / part.graph, local)}
    ) as p:
        assert p(class_labels=[3, 4], output_type="np").images.shape == (2, 8, 8, 3)


def test_a_bundle_for_another_machine_is_checked_here_and_says_so(pixels, tmp_path):
    *_, done = export(pixels, tmp_path / "b", "raspberry-pi-5")
    part = done.manifest.parts["unet"]
    assert (part.engine, part.executed) == (
        "onnxruntime",
        "device" if platform.machine() == "aarch64" else "converted",
    )
    assert done.manifest.quality["parts"]["unet"]["relative_error"] < 1e-5


# one part


def test_the_same_part_gives_the_same_bytes(traced, tmp_path):
    for name in ("one", "two"):
        lowering.write(traced, tmp_path / name, opset=23, weights="float16")
    for file in ("openvino_model.xml", "openvino_model.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert [file.name for file in sorted((tmp_path / "one").iterdir())] == [
        "openvino_model.bin",
        "openvino_model.xml",
    ]


def test_a_model_that_was_compressed_already_is_stored_as_it_is(pixels, traced, tmp_path):
    from openvino import opset13

    model = lowering.convert(traced, tmp_path, opset=23)
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    largest = max(constants, key=lambda node: node.data.size)
    steps = np.abs(largest.data).max() / 127
    eighth = opset13.constant(np.rint(largest.data / steps).astype(np.int8))
    whole = opset13.multiply(opset13.convert(eighth, np.float32), opset13.constant(np.float32(steps)))
    for port in largest.output(0).get_target_inputs():
        port.replace_source_output(whole.output(0))
    spec = lowering.write(traced, tmp_path / "out", opset=23, model=model)
    text = (tmp_path / "out/openvino_model.xml").read_text()
    assert 'element_type="i8"' in text
    part = pixels.parts["unet"]
    case = next(iter(gate.cases(part, few=True).values()))
    got = gate.run_graph(tmp_path / "out/openvino_model.xml", spec, [case])
    relative, _ = gate.relative_error(run_part(part, case)["out_sample"], got[0]["out_sample"])
    assert 1e-5 < relative < 0.05  # 8 bits


@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_what_is_written_passes_the_gate_for_ir(traced, tmp_path, weights):
    lowering.write(traced, tmp_path, opset=23, weights=weights)
    check_ir(tmp_path / "openvino_model.xml", tmp_path / "openvino_model.bin")


def test_angles_are_exact_in_bfloat16(tmp_path):
    """A timestep near 1000 has no digits left for an angle in bfloat16; marked, only what follows is rounded."""

    class Times(torch.nn.Module):
        def forward(self, timestep):
            waves = timestep[:, None] * torch.exp(-torch.arange(16) / 4)[None]
            return torch.cat([waves.sin(), waves.cos()], 1) @ torch.eye(32)

    spec = TensorSpec("timestep", "float32", ("batch",))
    out = TensorSpec("out", "float32", ("batch", 32))
    part = Part("times", Times(), (spec,), (out,), Example({"batch": (2, 3)}, {"timestep": (900, 1000)}))
    written = lowering.write(
        translation.trace(part), tmp_path, opset=23, weights="float16", precision="bfloat16"
    )
    case = {"timestep": np.array([999.0, 901.0, 977.0], np.float32)}
    (got,) = gate.run_graph(tmp_path / "openvino_model.xml", written, [case])
    assert gate.relative_error(run_part(part, case)["out"], got["out"])[0] < 2**-8


# refusals


def test_weights_changed_after_the_export_are_noticed(bundle, tmp_path):
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy")
    file = copy / "unet/openvino_model.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"unet/openvino_model\.bin has been changed or damaged"):
        Bundle.open(copy)


def test_a_graph_that_asks_for_more_than_its_weights_is_refused_on_opening(bundle, tmp_path):
    """Hashes are no help against who writes both: the gate reads what they protect."""
    import hashlib
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy")
    file = copy / "unet/openvino_model.xml"
    text = file.read_text()
    file.write_text(re.sub(r'offset="\d+"', f'offset="{2**40}"', text, count=1))
    manifest = json.loads((copy / "manifest.json").read_text())
    raw = file.read_bytes()
    manifest["files"]["unet/openvino_model.xml"] = {
        "bytes": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"ends at byte 1,099,.* of openvino_model\.bin"):
        Bundle.open(copy)


def test_a_failed_gate_names_the_precision_and_publishes_nothing(pixels, tmp_path, monkeypatch):
    right = gate.run_graph
    monkeypatch.setattr(gate, "run_graph", lambda *a: [{k: v * 1.2 for k, v in c.items()} for c in right(*a)])
    with pytest.raises(GateFailed, match=r"unet: out_sample at .*float.*relax \[quality\.b?float") as caught:
        export(pixels, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_noticed_before_the_work(pixels, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "fewstep.runtime.backends.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        MissingExtra, match=r"openvino is not installed; fix: pip install 'fewstep\[openvino\]'"
    ):
        next(export_bundle(pixels, TARGET, tmp_path / "b"))
