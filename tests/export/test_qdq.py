"""Integers of a part in its graph: what the engine computes is what the simulation computes, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")

from fewstep.export import onnx as writer  # noqa: E402
from fewstep.export.packing import planes  # noqa: E402
from fewstep.export.qdq import HEXAGON, PORTABLE, TENSORRT  # noqa: E402
from fewstep.model.model import Example, Part  # noqa: E402
from fewstep.model.quantized import Activations, Layer, Quantized, Weights  # noqa: E402
from fewstep.model.trajectories import run_part  # noqa: E402
from fewstep.quant.simulate import quantizable, simulated  # noqa: E402
from fewstep.runtime.errors import BadInput, CheckpointError  # noqa: E402
from fewstep.runtime.manifest import TensorSpec  # noqa: E402

OPSET = 23
WHOLE = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
AS_IT_IS = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
EXACT_DB = 110
"""Floating point alone: sums of 32 to 64 terms in another order."""
TIES_DB = 60
"""A value within 1e-7 of a tie may round the other way: one code of thousands."""


def weights(array, bits=8, group=0, zero=False, multiplier=False) -> Weights:
    """Nearest codes at the largest absolute value of a group; all that a description can say."""
    rows = array.reshape(len(array), -1)
    rows = rows.reshape(len(rows), -1, group or rows.shape[1])
    top = 2 ** (bits - 1) - 1
    scale = np.abs(rows).max(axis=2) / top
    steps = zeros = None
    if zero:  # a grid that lies off centre, each row's otherwise
        zeros = np.full(scale.shape, -2, np.int8)
        zeros[::2] = 1
    each = scale
    if multiplier:
        scale = scale.max(axis=1, keepdims=True) / 4
        steps = np.ceil(each / scale).astype(np.uint8)
        each = scale * steps
    codes = np.round(rows / each[:, :, None]) + (0 if zeros is None else zeros[:, :, None])
    codes = np.clip(codes, -top - (bits < 8), top).astype(np.int8).reshape(len(array), -1)
    return Weights(bits, codes, scale.astype(np.float32), array.shape, zeros, steps)


class Layers(torch.nn.Module):
    """Layers side by side, each with an output of its own: convolutions of a picture, the others of tokens."""

    def __init__(self, **layers):
        super().__init__()
        self.all = torch.nn.ModuleDict(layers)

    def forward(self, picture, tokens):
        return tuple(
            layer(picture if isinstance(layer, torch.nn.Conv2d) else tokens) for layer in self.all.values()
        )


def spec(name, shape, dtype="float32"):
    return TensorSpec(name, dtype, ("batch", *shape))


def part_of(module, inputs, outputs, ranges=None) -> Part:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    example = Example({"batch": (3, 2), "height": (6, 5), "width": (8, 4)}, ranges or {})
    return Part("net", module.eval(), tuple(inputs), tuple(outputs), example)


def layers_of(**layers) -> Part:
    outputs = [
        spec(name, (layer.out_channels, f"{name}_h", f"{name}_w"))
        if isinstance(layer, torch.nn.Conv2d)
        else spec(name, (5, layer.out_features))
        for name, layer in layers.items()
    ]
    inputs = [spec("picture", (16, "height", "width")), spec("tokens", (5, 32))]
    return part_of(Layers(**layers), inputs, outputs)


def conv(**how):
    return torch.nn.Conv2d(16, 12, **({"kernel_size": 3, "padding": 1} | how))


def linear():
    return torch.nn.Linear(32, 12)


def described(part, how, inputs=None) -> Part:
    """The part with the weights of layers by `how`, and `inputs` bits of their inputs, of the range one call shows."""
    seen = {}

    def see(name):
        return lambda _, arguments: seen.setdefault(name, arguments[0])

    found = quantizable(part)
    hooks = [module.register_forward_pre_hook(see(name)) for name, module in found.items()]
    run_part(part, part.example.feeds(part.inputs, part.example.default_sizes(), 0))
    for hook in hooks:
        hook.remove()
    layers = {}
    for name, module in found.items():
        label = name.removeprefix("all.")
        if isinstance(how, dict) and label not in how:
            continue
        x, rounding = seen[name], None
        if inputs is not None and x.is_floating_point():
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
            scale = float(np.float32((high - low) / (2**inputs - 1)))
            rounding = Activations(scale, round(-low / scale), inputs)
        options = how[label] if isinstance(how, dict) else {}
        layers[name] = Layer(weights(module.weight.detach().numpy(), **options), rounding)
    return replace(part, quantized=Quantized(layers))


def run(file, feeds, level=WHOLE, optimized=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = level
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )


def nodes(file) -> list:
    return list(onnx.load(file).graph.node)


def operators(file) -> list[str]:
    return [node.op_type for node in nodes(file)]


def snr(right, got) -> float:
    return float(10 * np.log10((right**2).sum() / max(((right - got) ** 2).sum(), 1e-30)))


def compared(part, folder, *, convention=None, optimized=None, traced=None, opset=OPSET) -> dict[str, float]:
    """Output -> decibels of the engine against the simulation, the lower of two batches and sizes."""
    traced = traced or writer.trace(part)
    if convention is None:
        writer.write(traced, folder, opset=opset)
    else:
        writer.write_graph(traced, folder, opset=opset, convention=convention)
    level = (
        WHOLE if convention is None else AS_IT_IS
    )  # of what other engines do with Q/DQ, nothing is assumed
    worst: dict[str, float] = {}
    for sizes in (part.example.default_sizes(), part.example.other_sizes()):
        feeds = part.example.feeds(part.inputs, sizes, 1)
        with simulated(part):
            right = run_part(part, feeds)
        for (name, wanted), got in zip(
            right.items(), run(folder / "model.onnx", feeds, level, optimized), strict=True
        ):
            worst[name] = min(worst.get(name, np.inf), snr(wanted, got))
    return worst


def low(found, least) -> dict[str, float]:
    return {name: value for name, value in found.items() if not value > least}


def test_planes_hold_every_bit_once():
    for bits in range(2, 8):
        codes = np.arange(128) % 2**bits
        parts = planes(codes, bits)
        assert sum(data.size for _, data in parts) == 128 * bits // 8
        left, joined = bits, np.zeros(128, int)
        for width, data in parts:
            left -= width
            shifts = width * np.arange(8 // width)
            joined += ((data[:, None] >> shifts) & (2**width - 1)).ravel() << left
        assert (joined == codes).all()


GRIDS = {
    **{f"bits{bits}": {"bits": bits} for bits in range(2, 9)},
    "zero": {"bits": 4, "zero": True},
    "group": {"bits": 4, "group": 8},  # a convolution's groups begin inside a channel
    "group_zero": {"bits": 4, "group": 8, "zero": True},
    "block": {"bits": 4, "group": 16},
    "block_zero": {"bits": 4, "group": 16, "zero": True},
    "block8": {"group": 16},
    "multiplier": {"bits": 4, "group": 8, "multiplier": True},
    "multiplier_zero": {"bits": 3, "group": 8, "multiplier": True, "zero": True},
    "group3": {"bits": 3, "group": 8, "zero": True},
}
"""All that weights can be."""


@pytest.fixture(scope="module")
def grids():
    made = {f"c_{name}": conv() for name in GRIDS} | {f"l_{name}": linear() for name in GRIDS}
    part = layers_of(**made)
    return part, writer.trace(part).program


@pytest.mark.parametrize("convention", [None, PORTABLE])
def test_weights_alone_are_exact(grids, convention, tmp_path):
    part, program = grids
    part = described(part, {f"{kind}_{name}": how for kind in "cl" for name, how in GRIDS.items()})
    found = compared(part, tmp_path, convention=convention, traced=writer.Traced(part, program))
    assert not low(found, EXACT_DB)
    if convention is None:  # the product keeps its integers in memory; a bias it adds is not added once more
        kept = {node.output[0] for node in nodes(tmp_path / "model.onnx") if node.op_type == "MatMulNBits"}
        assert kept == {f"l_{name}" for name in ("bits4", "zero", "block", "block_zero")}


@pytest.mark.parametrize("convention", [None, PORTABLE])
def test_weights_and_inputs_are_those_of_the_simulation(grids, convention, tmp_path):
    part, program = grids
    part = described(part, {f"{kind}_{name}": how for kind in "cl" for name, how in GRIDS.items()}, 8)
    found = compared(
        part,
        tmp_path,
        convention=convention,
        optimized=tmp_path / "optimized.onnx",
        traced=writer.Traced(part, program),
    )
    assert not low(found, TIES_DB)
    if convention is None:
        left = operators(tmp_path / "optimized.onnx")
        groups = sum("multiplier" not in how and "group" in how for how in GRIDS.values())
        assert left.count("MatMulIntegerToFloat") == 2 * (len(GRIDS) - groups)
        assert not {"BitShift", "BitwiseAnd", "BitwiseOr"} & set(left)  # unpacked once, when it was loaded
        assert not [name for name in left if name.startswith("QLinear")]


@pytest.mark.parametrize("convention", [None, PORTABLE])
def test_operator_sets_without_4_bits_say_the_same(grids, convention, tmp_path):
    part, program = grids
    part = described(part, {f"l_{name}": how for name, how in GRIDS.items()})
    traced = writer.Traced(part, program)
    assert not low(compared(part, tmp_path, convention=convention, traced=traced, opset=20), EXACT_DB)
    with pytest.raises(BadInput, match="opset 20"):
        writer.write_graph(traced, tmp_path, opset=20, convention=HEXAGON)


def test_a_layer_is_one_kernel_with_its_bias(tmp_path):
    part = described(layers_of(one=linear()), {"one": {}}, 8)
    assert not low(compared(part, tmp_path, optimized=tmp_path / "optimized.onnx"), TIES_DB)
    assert operators(tmp_path / "optimized.onnx") == ["QuantizeLinear", "MatMulIntegerToFloat"]


@pytest.mark.parametrize("convention", [None, PORTABLE])
def test_every_kind_of_convolution(convention, tmp_path):
    made = {
        "point": conv(kernel_size=1, padding=0),
        "stride": conv(stride=2),
        "point_stride": conv(kernel_size=1, padding=0, stride=2),
        "row": conv(kernel_size=(1, 3), padding=(0, 1)),
        "wide": conv(dilation=2, padding=2, bias=False),
        "bare": conv(padding=0),
        "even": conv(kernel_size=2, padding=1),
        "groups": conv(groups=4),
    }
    part = described(layers_of(**made), {name: {} for name in made}, 8)
    assert not low(compared(part, tmp_path, convention=convention), TIES_DB)


@pytest.mark.parametrize("convention", [None, PORTABLE, TENSORRT])
def test_inputs_of_few_bits_stay_within_their_codes(convention, tmp_path):
    part = layers_of(four=linear(), six=conv())
    bits = {"four": 4, "six": 6}
    layers = {}
    for name, width in bits.items():
        codes = weights(part.module.all[name].weight.detach().numpy())
        half = 2 ** (width - 1)
        layers[f"all.{name}"] = Layer(codes, Activations(1.5 / half, half, width))  # values reach 3
    part = replace(part, quantized=Quantized(layers))
    assert not low(compared(part, tmp_path, convention=convention), TIES_DB)


def test_tensorrt_gets_zeros_of_0_and_positive_scales(tmp_path):
    part = described(layers_of(one=linear(), two=conv()), {"one": {"bits": 4}, "two": {}}, 8)
    assert 128 not in [layer.input.zero for layer in part.quantized.layers.values()]
    found = compared(part, tmp_path, convention=TENSORRT)
    assert not low(found, 30)  # a range that lay off centre has grown
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    rounding = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(rounding) == 6
    for node in rounding:
        assert (constants[node.input[1]] > 0).all()
        zero = constants[node.input[2]] if len(node.input) > 2 else np.zeros(1, np.int8)
        assert zero.dtype == np.int8
        assert not zero.any()


@pytest.mark.parametrize("bits", [8, 16])
def test_hexagon_rounds_inputs_to_16_bits(bits, tmp_path):
    part = described(layers_of(one=linear(), two=conv()), {"one": {}, "two": {}}, bits)
    writer.write_graph(writer.trace(part), tmp_path, opset=OPSET, convention=HEXAGON)
    feeds = part.example.feeds(part.inputs, part.example.default_sizes(), 0)  # of which the ranges are
    with simulated(part, inputs=False):
        right = run_part(part, feeds)
    got = run(tmp_path / "model.onnx", feeds, AS_IT_IS)
    found = {name: snr(wanted, value) for (name, wanted), value in zip(right.items(), got, strict=True)}
    assert not low(found, 60)  # with 8 bits it is 45


def test_an_engine_of_8_bits_refuses_16(tmp_path):
    part = described(layers_of(one=linear()), {"one": {}}, 16)
    with pytest.raises(BadInput, match="16 bits"):
        writer.write(writer.trace(part), tmp_path, opset=OPSET)


class Small(torch.nn.Module):
    """Convolution, attention with a skip, and a time: what a U-Net is made of."""

    def __init__(self):
        super().__init__()
        self.begin = torch.nn.Conv2d(4, 16, 3, padding=1)
        self.norm = torch.nn.GroupNorm(4, 16)
        self.q, self.k, self.v = (torch.nn.Linear(16, 16, bias=False) for _ in range(3))
        self.out = torch.nn.Linear(16, 16)
        self.time = torch.nn.Linear(1, 16)
        self.end = torch.nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, sample, timestep):
        x = self.begin(sample) + self.time(timestep[:, None] / 1000)[:, :, None, None]
        batch, channels, height, width = x.shape
        flat = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        q, k, v = (layer(flat).reshape(batch, -1, 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, height * width, channels))
        skip = mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return self.end(torch.nn.functional.silu(torch.cat([x, skip], 1)))


@pytest.fixture(scope="module")
def small():
    inputs = [spec("sample", (4, "height", "width")), spec("timestep", ())]
    outputs = [spec("y", (4, "height", "width"))]
    part = part_of(Small(), inputs, outputs, {"timestep": (0.0, 1000.0)})
    return part, writer.trace(part).program


def test_a_small_network_is_as_simulated_with_attention_in_float(small, tmp_path):
    part, program = small
    part = described(part, None, 8)
    found = compared(
        part, tmp_path, optimized=tmp_path / "optimized.onnx", traced=writer.Traced(part, program)
    )
    assert not low(found, 40)
    left = operators(tmp_path / "optimized.onnx")
    assert left.count("MultiHeadAttention") == 1
    assert left.count("MatMulIntegerToFloat") == 7
    assert left.count("QuantizeLinear") == 5  # queries, keys and values share theirs
    assert not {"Conv", "MatMul", "Gemm", "Softmax", "DequantizeLinear"} & set(left)
    assert not [name for name in left if name.startswith("QLinear")]


def test_everything_else_of_a_description(small, tmp_path):
    """Smoothing, biases where there was one and where there was none, replaced parameters, drift over time."""
    part, program = small
    rng = np.random.default_rng(0)
    layers = dict(described(part, None, 8).quantized.layers)

    def changed(name, **how):
        layers[name] = replace(layers[name], **how)

    for name, width in (("end", 32), ("q", 16)):
        smooth = rng.uniform(0.5, 2, width).astype(np.float32)
        rows = part.module.get_submodule(name).weight.detach().numpy()
        column = smooth.reshape(-1, *[1] * (rows.ndim - 2))
        changed(name, smooth=smooth, weights=weights(rows * column))
    changed("q", bias=rng.standard_normal(16).astype(np.float32))
    changed("begin", bias=rng.standard_normal(16).astype(np.float32))
    changed("time", input=None)
    times = np.array([100, 400, 700], np.float32)
    quantized = Quantized(
        layers,
        params={"norm.weight": rng.standard_normal(16).astype(np.float32)},
        drift=(times, 10 * rng.standard_normal((3, 4)).astype(np.float32)),
    )
    for convention in (None, PORTABLE):
        whole = replace(part, quantized=quantized)
        writer_of = {"convention": convention, "traced": writer.Traced(whole, program)}
        assert not low(compared(whole, tmp_path, **writer_of), 40)
    still = replace(whole, quantized=replace(quantized, layers={}))
    writer.write(writer.Traced(still, program), tmp_path, opset=OPSET)
    feeds = still.example.feeds(still.inputs, {"batch": 5, "height": 6, "width": 8}, 1)
    feeds["timestep"] = np.array([0, 100, 250, 650, 999], np.float32)  # before, on, between, between, after
    with simulated(still):
        right = run_part(still, feeds)["y"]
    assert snr(right, run(tmp_path / "model.onnx", feeds)[0]) > EXACT_DB
    once = replace(quantized, drift=(times[:1], quantized.drift[1][:1]), layers={})
    assert not low(compared(replace(part, quantized=once), tmp_path), EXACT_DB)


class Normed(torch.nn.Module):
    """Norms that feed one layer, two that are smoothed alike, and two that are not; a line instead of a picture."""

    def __init__(self):
        super().__init__()
        self.group = torch.nn.GroupNorm(4, 16)
        self.line = torch.nn.Conv1d(16, 12, 3, padding=1, stride=2)
        self.alike, self.other = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
        self.one, self.two, self.three, self.four = (torch.nn.Linear(32, 12) for _ in range(4))

    def forward(self, picture, tokens):
        alike, other = self.alike(tokens), self.other(tokens)
        return self.line(self.group(picture.flatten(2))), (
            self.one(alike) + self.two(alike) + self.three(other) + self.four(other)
        )


@pytest.mark.parametrize("convention", [None, PORTABLE])
def test_a_norm_smooths_where_all_that_read_it_are_smoothed_alike(convention, tmp_path):
    inputs = [spec("picture", (16, "height", "width")), spec("tokens", (5, 32))]
    part = part_of(Normed(), inputs, [spec("line", (12, "length")), spec("y", (5, 12))])
    rng = np.random.default_rng(0)
    part, layers = described(part, None, 8), {}
    alike = rng.uniform(0.5, 2, 32).astype(np.float32)
    for name, layer in part.quantized.layers.items():
        smooth = {"line": rng.uniform(0.5, 2, 16), "four": rng.uniform(0.5, 2, 32), "three": None}.get(
            name, alike
        )
        smooth = None if smooth is None else smooth.astype(np.float32)
        layers[name] = replace(layer, smooth=smooth)
    part = replace(part, quantized=Quantized(layers))
    assert not low(compared(part, tmp_path, convention=convention), 45)
    left = operators(tmp_path / "model.onnx")
    if convention is None:
        assert left.count("Mul") == 1 + 4  # of the fourth layer; four make the numbers of pixels
        assert left.count("MatMulIntegerToFloat") == 5
    else:
        assert left.count("Mul") == 1


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(50, 16)
        self.places = torch.nn.Embedding(7, 16)

    def forward(self, ids):
        return self.words(ids) + self.places(torch.arange(7)[None])


@pytest.mark.parametrize(
    "how", [{}, {"bits": 4, "group": 8, "zero": True}, {"bits": 3, "group": 8, "multiplier": True}]
)
def test_a_table_is_unpacked_by_the_row(how, tmp_path):
    part = part_of(Words(), [spec("ids", (7,), "int64")], [spec("y", (7, 16))], {"ids": (0, 50)})
    part = described(part, {"words": how, "places": how})
    found = compared(part, tmp_path, optimized=tmp_path / "optimized.onnx")
    assert not low(found, EXACT_DB)
    left = onnx.load(tmp_path / "optimized.onnx").graph.initializer
    assert (
        max(item.dims[0] for item in left if item.data_type == onnx.TensorProto.FLOAT and len(item.dims) > 1)
        == 50
    )
    assert all(
        item.dims[1] < 16 for item in left if item.data_type == onnx.TensorProto.FLOAT and len(item.dims) == 2
    )  # scales, no table of floats


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(32, 32)
        self.two = torch.nn.Linear(32, 32)
        self.unread = torch.nn.Linear(4, 4)

    def forward(self, picture, tokens):
        return self.one(torch.relu(self.one(tokens))) @ self.two.weight


def twice():
    inputs = [spec("picture", (16, "height", "width")), spec("tokens", (5, 32))]
    return part_of(Twice(), inputs, [spec("y", (5, 32))])


def of(part, *names):
    modules = dict(part.module.named_modules())
    how = {name: Layer(weights(modules[name].weight.detach().numpy())) for name in names}
    return replace(part, quantized=Quantized(how))


def test_a_layer_called_twice_is_stored_once(tmp_path):
    part = of(twice(), "one", "unread")
    both = {
        name: replace(layer, input=Activations(0.05, 60)) for name, layer in part.quantized.layers.items()
    }
    part = replace(part, quantized=Quantized(both))
    assert not low(compared(part, tmp_path), 50)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [item.name for item in graph.initializer if item.data_type == onnx.TensorProto.INT8] == ["one"]


def test_what_cannot_be_written_is_refused(tmp_path):
    part = twice()
    one = of(part, "one").quantized.layers["one"]
    for name, error, said in (
        ("two", CheckpointError, "two are read by"),
        ("three", BadInput, "no layer three"),
    ):
        bad = replace(part, quantized=Quantized({name: one}))
        with pytest.raises(error, match=said):
            writer.write(writer.trace(bad), tmp_path, opset=OPSET)
    part.module.two.weight = part.module.one.weight
    with pytest.raises(BadInput, match="shares its weights"):
        writer.write(writer.trace(of(part, "two")), tmp_path, opset=OPSET)
    assert not list(tmp_path.iterdir())


def test_the_file_holds_the_bits_it_says_and_is_the_same_again(tmp_path):
    part = layers_of(big=torch.nn.Conv2d(16, 256, 3), wide=torch.nn.Linear(32, 1024))
    for bits in (8, 3):
        quantized = described(part, {"big": {"bits": bits}, "wide": {"bits": bits}})
        writer.write(writer.trace(quantized), tmp_path / str(bits), opset=OPSET)
        size = (tmp_path / str(bits) / "model.onnx").stat().st_size
        codes = bits * (16 * 256 * 9 + 32 * 1024) // 8
        sides = 2 * 4 * (256 + 1024)  # scales and biases
        assert codes + sides < size < codes + sides + 6000
        stored = writer.stored_bytes(tmp_path / str(bits) / "model.onnx")
        assert stored["int8" if bits == 8 else "uint8"] - codes in range(16)  # and how far to shift
        assert (stored["float"], sum(stored.values())) == (sides, size)
    writer.write(writer.trace(quantized), tmp_path / "again", opset=OPSET)
    same = [(tmp_path / folder / "model.onnx").read_bytes() for folder in ("3", "again")]
    assert same[0] == same[1]
    writer.write_plain(writer.trace(quantized), tmp_path / "plain")
    assert "Conv" in operators(tmp_path / "plain" / "model.onnx")
    assert (tmp_path / "plain" / "model.onnx").stat().st_size > 4 * (16 * 256 * 9 + 32 * 1024)
