"""Parts as graphs for Hexagon: what its emulator makes of them, and what is refused before any work."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxruntime_qnn", reason="needs the qnn extra")

from fewstep.export import export_bundle, gate, parts, qnn  # noqa: E402
from fewstep.export import onnx as translation  # noqa: E402
from fewstep.export.passes import configured  # noqa: E402
from fewstep.model.model import Example, Part  # noqa: E402
from fewstep.model.quantized import Layer, Quantized  # noqa: E402
from fewstep.model.trajectories import run_part  # noqa: E402
from fewstep.quant.grid import codes_of_range  # noqa: E402
from fewstep.quant.simulate import quantizable, simulated  # noqa: E402
from fewstep.quant.weights import nearest  # noqa: E402
from fewstep.runtime import Bundle, Pipeline  # noqa: E402
from fewstep.runtime.backends import runs_in  # noqa: E402
from fewstep.runtime.errors import BadInput, BundleError  # noqa: E402
from fewstep.runtime.manifest import TensorSpec  # noqa: E402
from fewstep.targets import known_targets, load_target  # noqa: E402

from .conftest import LINEAR, Model, Pixels  # noqa: E402

TARGET = load_target("snapdragon-8-gen3")


class Tokens(torch.nn.Module):
    """What HTP must take: a picture that becomes tokens, a norm of 16 rows, a table, and a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(10, 8)
        self.conv = torch.nn.Conv2d(8, 32, 3, padding=1)
        self.group = torch.nn.GroupNorm(4, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.one, self.two = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32, bias=False)

    def forward(self, sample, timestep, label):
        x = sample + self.words(label)[:, :, None, None] + timestep[:, None, None, None] / 1000
        x = torch.nn.functional.silu(self.group(self.conv(x))).flatten(2).transpose(1, 2)
        return self.two(torch.nn.functional.gelu(self.one(self.norm(x))))


SPECS = (
    TensorSpec("sample", "float32", (1, 8, 4, 4)),
    TensorSpec("timestep", "float32", (1,)),
    TensorSpec("label", "int64", (1,)),
)


def tokens() -> Part:
    example = Example({}, {"timestep": (0, 999), "label": (0, 10)})
    return Part("unet", Tokens().eval(), SPECS, (TensorSpec("out_sample", "float32", (1, 16, 32)),), example)


def described(part: Part, bits: int = 16, weights: int = 8) -> Part:
    """Ranges are of the very inputs that are tried."""
    feeds, ends = part.example.feeds(part.inputs, {}, 0), {}

    def look(name):
        def hook(_, given, found):
            ends[name] = [codes_of_range(float(x.min()), float(x.max()), bits) for x in (given[0], found)]

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in quantizable(part).items()]
    run_part(part, feeds)
    for hook in hooks:
        hook.remove()
    layers = {}
    for name, module in quantizable(part).items():
        table = isinstance(module, torch.nn.Embedding)
        given, found = (None, None) if table else ends[name]
        layers[name] = Layer(nearest(module.weight.detach().numpy(), weights), given, output=found)
    return replace(part, quantized=Quantized(layers))


def emulated(part: Part, tmp_path):
    """What the emulator gives, and the graph it was compiled from."""
    spec = qnn.lower(translation.trace(part), tmp_path / "unet", TARGET)
    here = qnn.stand_in(spec, TARGET)
    assert here.how == "emulated"
    feeds = part.example.feeds(part.inputs, {}, 0)
    (got,) = gate.run_graph(tmp_path / "unet" / "model.onnx", here.spec, [feeds], here.opener)
    return got["out_sample"], feeds, onnx.load(tmp_path / "unet" / "model.onnx").graph


def snr(right, got):
    return gate.decibels(gate.relative_error(right, got)[0])


def test_a_part_in_float16_is_half_as_large_and_as_close_as_half_precision_is(tmp_path):
    part = tokens()
    got, feeds, graph = emulated(part, tmp_path)
    assert snr(run_part(part, feeds)["out_sample"], got) > 40  # of 11 bits
    stored = {item.name: item.data_type for item in graph.initializer}
    assert stored["one.bias.half"] == onnx.TensorProto.FLOAT16


def test_w8a16_computes_what_the_simulation_does(tmp_path):
    part = described(tokens())
    got, feeds, graph = emulated(part, tmp_path)
    with simulated(part):
        right = run_part(part, feeds)["out_sample"]
    assert snr(right, got) > 50
    kinds = {item.name: item.data_type for item in graph.initializer}
    assert kinds["one"] == onnx.TensorProto.INT8
    assert kinds["words"] == onnx.TensorProto.FLOAT16  # HTP gathers no integers
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:  # an integer kernel has codes on both sides
        if node.op_type == "Conv":
            assert made[node.input[0]].op_type == made[node.input[1]].op_type == "DequantizeLinear"
            assert [after.op_type for after in graph.node if node.output[0] in after.input] == [
                "QuantizeLinear"
            ]


def test_a_norm_of_16_rows_is_two_of_8(tmp_path):
    """QNN 2.51 puts the rows of one into the wrong places; this fails without split_layer_norms."""
    *_, graph = emulated(described(tokens()), tmp_path)
    assert [node.op_type for node in graph.node].count("LayerNormalization") == 2


def test_the_same_part_gives_the_same_bytes(tmp_path):
    part = described(tokens())
    for folder in ("a", "b"):
        qnn.lower(translation.trace(part), tmp_path / folder, TARGET)
    assert (tmp_path / "a/model.onnx").read_bytes() == (tmp_path / "b/model.onnx").read_bytes()


@pytest.mark.parametrize(("bits", "weights"), [(8, 8), (16, 4)])
def test_integers_that_hexagon_has_no_kernels_for_are_refused(bits, weights, tmp_path):
    part = described(tokens(), bits, weights)
    with pytest.raises(BadInput, match=f"weights of {weights} bits and inputs of .* bits.*w8a16"):
        qnn.lower(translation.trace(part), tmp_path, TARGET)
    assert not list(tmp_path.iterdir())


def test_free_sizes_are_refused(tmp_path):
    part = Model.from_module(Pixels(), sample_shape=(3, 8, 8), process=LINEAR).parts["unet"]
    with pytest.raises(BadInput, match=r"unet leaves batch free.*dynamic_shapes = false"):
        qnn.lower(translation.trace(part), tmp_path, TARGET)


class Left(torch.nn.Module):
    def forward(self, sample, timestep):
        return torch.erf(sample) + torch.bitwise_xor(timestep.to(torch.int64), 3)[:, None, None, None]


def test_operators_that_the_npu_lacks_are_named(tmp_path):
    model = parts.fixed(Model.from_module(Left(), sample_shape=(3, 8, 8), process=LINEAR))
    spec = qnn.lower(translation.trace(model.parts["unet"]), tmp_path / "unet", TARGET)
    here = qnn.stand_in(spec, TARGET)
    with pytest.raises(BundleError, match=r"unet: QNN leaves \d+ operators to the CPU: .*BitwiseXor"):
        here.opener(tmp_path / "unet" / "model.onnx", here.spec)


def test_a_model_of_ones_own_becomes_a_bundle_that_says_it_was_emulated(tmp_path):
    model = Model.from_module(Pixels(), sample_shape=(3, 16, 16), process=LINEAR)
    *_, done = export_bundle(model, "snapdragon-8-elite", tmp_path / "out", steps=2, measure_speed=False)
    part = done.manifest.parts["unet"]
    assert (part.engine, part.executed, part.device, part.precision) == ("qnn", "emulated", "npu", "float16")
    assert part.inputs[0].shape == (1, 3, 16, 16)
    assert done.manifest.target["backend"]["options"] == {"soc_model": 69, "htp_arch": 79}
    assert done.manifest.quality["parts"]["unet"]["snr_db"] > 40
    assert sorted(file.name for file in (done.path / "unet").iterdir()) == ["model.onnx"]  # and no program
    assert runs_in(part) is None
    with pytest.raises(BadInput, match="no Hexagon NPU"), Pipeline(Bundle.open(done.path)) as pipeline:
        pipeline(num_inference_steps=1)


def test_what_would_take_the_emulator_hours_is_compiled_and_run_on_the_cpu(tmp_path):
    model = parts.fixed(Model.from_module(Pixels(), sample_shape=(3, 40, 40), process=LINEAR))
    part = model.parts["unet"]
    spec = qnn.lower(translation.trace(part), tmp_path / "unet", TARGET)
    here = qnn.stand_in(spec, TARGET)
    assert here.how == "converted"
    feeds = part.example.feeds(part.inputs, {}, 0) | {"timestep": np.array([500], np.float32)}
    (got,) = gate.run_graph(tmp_path / "unet" / "model.onnx", spec, [feeds], here.opener)
    assert snr(run_part(part, feeds)["out_sample"], got["out_sample"]) > 50
    left = parts.fixed(Model.from_module(Left(), sample_shape=(3, 40, 40), process=LINEAR)).parts["unet"]
    qnn.lower(translation.trace(left), tmp_path / "left", TARGET)
    with pytest.raises(BundleError, match="left: QNN leaves"):
        here.opener(tmp_path / "left" / "model.onnx", spec)


def test_w8a16_of_a_recipe_is_judged_by_the_floors_of_int8(tmp_path):
    model = Model.from_module(Pixels(width=32), sample_shape=(3, 8, 8), process=LINEAR)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'passes = ["quantize"]\n[quantize]\nscheme = "w8a16"\nkeep = ["unet.*time"]\nsamples = 2\n'
    )
    *_, done = export_bundle(
        model, "snapdragon-8-gen3", tmp_path / "out", steps=2, recipe=recipe, measure_speed=False
    )
    said = done.manifest.parts["unet"].quantization
    assert said["weights_by_bits"].keys() == {"8"}
    assert said["layers_by_input_bits"] == {"16": 3}
    assert done.manifest.quality["parts"]["unet"]["snr_db"] > 34


def test_a_linear_layer_of_one_input_is_refused_in_integers(tmp_path):
    """QNN 2.51 never ends compiling it."""
    model = parts.fixed(Model.from_module(Pixels(), sample_shape=(3, 8, 8), process=LINEAR))
    with pytest.raises(
        BadInput, match=r'unet.module.time is a linear layer of one input.*keep = \["unet.module.time"'
    ):
        qnn.lower(translation.trace(described(model.parts["unet"])), tmp_path, TARGET)


def test_quantize_of_a_snapdragon_means_every_part():
    passes = dict(configured(TARGET.with_pass("quantize", scheme="w8a16")))
    assert {passes["quantize"].scheme, passes["quantize"].decoder, passes["quantize"].text} == {"w8a16"}


@pytest.mark.parametrize("name", [name for name in known_targets() if name.startswith("snapdragon")])
def test_every_snapdragon_names_a_chip_that_the_runtime_knows(name):
    from fewstep.runtime.backends.qnn import SOCS

    options = qnn.options_of(load_target(name))
    assert (options.soc_model, options.htp_arch) in [(soc.model, soc.arch) for soc in SOCS.values()]


def test_options_that_are_no_numbers_are_refused():
    wrong = replace(TARGET, backend=replace(TARGET.backend, options={"soc_model": "SM8650", "htp_arch": 75}))
    with pytest.raises(BadInput, match=r"\[backend.options\] soc_model is 'SM8650'; expected int"):
        qnn.options_of(wrong)
