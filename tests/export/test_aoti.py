"""What AOTInductor is given: operators and weights as data, in the precision of the recipe."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from fewstep.export import aoti as lowering
from fewstep.export import export_bundle, gate, parts
from fewstep.export import onnx as translation
from fewstep.model import Model
from fewstep.model.quantized import Quantized
from fewstep.model.trajectories import run_part
from fewstep.runtime import Pipeline
from fewstep.runtime.atenfile import GRAPH, WEIGHTS, check_aten, read_aten
from fewstep.runtime.backends import aoti as backend
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput, BundleError, CheckpointError
from fewstep.targets import load_target

from .conftest import LINEAR, Actions, torch

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@pytest.fixture
def part(pixels):
    return parts.fixed(pixels).parts["unet"]


def quality(part, folder):
    """Of the graph as torch reads it back, operator by operator, against the part."""
    weights = folder / WEIGHTS
    module = backend.program(read_aten(folder / GRAPH, weights), weights, "cpu").module()
    tried, got = gate.cases(part, few=False), []
    for feeds in tried.values():
        with torch.no_grad():
            found = module(*(torch.from_numpy(array) for array in feeds.values()))
        got.append({spec.name: value.numpy() for spec, value in zip(part.outputs, found, strict=True)})
    return gate.compare(part.name, list(tried), [run_part(part, case) for case in tried.values()], got)


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-6), ("float16", 5e-3), ("bfloat16", 5e-2)])
def test_a_part_is_as_close_as_its_precision(part, tmp_path, precision, most):
    spec = lowering.write(translation.trace(part), tmp_path, precision=precision)
    assert (spec.engine, spec.graph, spec.precision) == ("aoti", f"unet/{GRAPH}", precision)
    assert quality(part, tmp_path).relative_error < most
    header = (tmp_path / WEIGHTS).read_bytes()
    stored = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    halves = [item for item in stored.values() if item["dtype"] == TYPES[precision]]
    assert len(halves) >= len(stored) - 2


@pytest.fixture(scope="module")
def traced(tiny_sd):
    from fewstep.model import load

    return {part.name: translation.trace(part) for part in parts.fixed(load(tiny_sd))}


@pytest.mark.parametrize("precision", sorted(TYPES))
def test_every_part_of_a_pipeline_is_data_and_close(traced, tmp_path, precision):
    most = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}[precision]
    for name, each in traced.items():
        lowering.write(each, tmp_path / name, precision=precision)
        assert quality(each.part, tmp_path / name).relative_error < most
        assert {file.name for file in (tmp_path / name).iterdir()} == {GRAPH, WEIGHTS}


def test_angles_of_the_timestep_stay_float32(traced, tmp_path):
    lowering.write(traced["unet"], tmp_path, precision="float16")
    nodes = {node[0]: node for node in json.loads((tmp_path / GRAPH).read_text())["nodes"]}
    angles = [node for node in nodes.values() if node[1] in ("aten.sin.default", "aten.cos.default")]
    assert angles
    for node in angles:
        above = [node]
        while above:
            each = above.pop()
            assert {"dtype": "float16"} not in (*each[2], *each[3].values())
            named = [item.get("value") for item in each[2] if isinstance(item, dict)]
            above += [nodes[name] for name in named if name in nodes]


def test_the_same_part_gives_the_same_bytes(part, tmp_path):
    for name in ("a", "b"):
        lowering.write(translation.trace(part), tmp_path / name, precision="float16")
    for file in (GRAPH, WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_class_conditional_models_and_policies_lower_too(labelled, tmp_path):
    policy = Model.from_module(Actions(), sample_shape=(7, 16), process=LINEAR, name="policy")
    for number, model in enumerate((labelled, policy)):
        part = parts.fixed(model).parts["unet" if "unet" in model.parts else model.denoiser]
        folder = tmp_path / str(number)
        lowering.write(translation.trace(part), folder, precision="float16")
        assert quality(part, folder).relative_error < 5e-3


def test_other_tools_read_the_weights(part, tmp_path):
    from safetensors.numpy import load_file

    lowering.write(translation.trace(part), tmp_path, precision="float16")
    found = load_file(tmp_path / WEIGHTS)
    for name, tensor in part.module.state_dict().items():
        if name in found:
            np.testing.assert_array_equal(found[name], tensor.numpy().astype(np.float16))
    assert len(found) >= 8


class Odd(torch.nn.Module):
    def forward(self, sample, timestep):
        return torch.linalg.solve(torch.eye(8).expand(1, 3, 8, 8), sample) * timestep[:, None, None, None]


def test_an_operator_no_graph_may_hold_is_named(tmp_path):
    model = parts.fixed(Model.from_module(Odd(), sample_shape=(3, 8, 8), process=LINEAR, name="odd"))
    with pytest.raises(CheckpointError, match=r"is aten\S+, which graphs of ATen operators may not hold"):
        lowering.write(translation.trace(model.parts[model.denoiser]), tmp_path)


def test_a_weight_float16_cannot_hold_is_refused_by_name(part, tmp_path):
    with torch.no_grad():
        next(part.module.parameters()).view(-1)[0] = 1e6
    with pytest.raises(BadInput, match=r"weight holds 1e\+06, more than torch.float16 can; fix: .*bfloat16"):
        lowering.write(translation.trace(part), tmp_path, precision="float16")


def test_free_sizes_and_integers_are_refused(pixels, part, tmp_path):
    target = load_target("cuda-aoti")
    free = replace(target, limits=replace(target.limits, dynamic_shapes=True))
    with pytest.raises(BadInput, match=r"free sizes; expected dynamic_shapes = false"):
        lowering.lower(translation.trace(part), tmp_path, free)
    with pytest.raises(BadInput, match=r"unet is quantized.*leave out --quantize"):
        lowering.lower(translation.trace(replace(part, quantized=Quantized({}))), tmp_path, target)


def test_a_part_named_in_the_options_stays_float32(part, tmp_path):
    target = load_target("cuda-aoti")
    target = replace(target, backend=replace(target.backend, options={"float32": ["unet"]}))
    spec = lowering.lower(translation.trace(part), tmp_path, target)
    assert (spec.precision, spec.device) == ("float32", "gpu")
    here = lowering.stand_in(spec, target)
    assert (here.spec.device, here.how, here.precision) == ("cpu", "converted", "float32")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "how"), [("cpu-aoti", "device"), ("cuda-aoti", "converted")])
def test_a_whole_bundle_is_compiled_gated_and_drawn_here(tiny_sd, tmp_path, monkeypatch, target, how):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    *_, done = export_bundle(tiny_sd, target, tmp_path / "b", steps=2, measure_speed=False)
    manifest = Bundle.open(done.path).manifest
    assert {part.executed for part in manifest.parts.values()} == {how}
    assert manifest.quality["pipeline"]["psnr_db"] > (80 if how == "device" else 40)
    names = {file.name for file in done.path.rglob("*") if file.is_file()}
    assert not [name for name in names if name.endswith((".so", ".pt2", ".cpp", ".pt"))]
    if how == "device":
        with Pipeline.from_pretrained(done.path) as pipeline:
            assert pipeline("a cat", seed=1).images[0].size == (manifest.sample.width, manifest.sample.height)


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py, and no `common` of anyone else's."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("common", "gpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield import_module("gpu")
    for name in ("common", "gpu"):
        sys.modules.pop(name, None)


class Eager:
    """The graph run operator by operator: compiling it takes a minute."""

    def __init__(self, path, spec):
        weights = path.with_name(WEIGHTS)
        self.module = backend.program(read_aten(path, weights), weights, "cpu").module()
        self.spec = spec

    def run(self, feeds, outputs=None):
        with torch.no_grad():
            found = self.module(*(torch.from_numpy(feeds[spec.name]) for spec in self.spec.inputs))
        return {spec.name: value.numpy() for spec, value in zip(self.spec.outputs, found, strict=True)}


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # about a cache in diffusers' code
@pytest.mark.parametrize("arch", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_gpu_benchmark_runs_end_to_end_on_a_cpu(gpu, monkeypatch, arch):
    monkeypatch.setattr(gpu, "open_session", Eager)
    found = gpu.main(["--device", "cpu", "--tiny", "--arch", arch, "--rounds", "1", "--no-save"])
    assert set(found["ms"]) == {"eager diffusers", "torch.compile", "ours (aoti)"}
    assert found["faster_than"]["ours (aoti)"] == 1
    for quality in found["psnr_db_of_float32"].values():
        assert quality > 30
    assert found["roofline"]["operations"] > 1e6


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
@pytest.mark.slow
def test_the_gpu_benchmark_compiles_on_a_cpu(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    found = gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--no-save"])
    assert found["psnr_db_of_float32"]["ours (aoti)"] > 30


def test_the_gpu_benchmark_says_where_there_is_no_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_a_bundle_whose_graph_was_changed_is_refused_when_opened(part, tmp_path):
    lowering.write(translation.trace(part), tmp_path)
    text = (tmp_path / GRAPH).read_text()
    (tmp_path / GRAPH).write_text(text.replace("aten.silu.default", "aten.from_file.default"))
    with pytest.raises(BundleError, match="from_file"):
        check_aten(tmp_path / GRAPH, tmp_path / WEIGHTS)
