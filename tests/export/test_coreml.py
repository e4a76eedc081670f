"""Core ML packages made here: what they compute when their MIL is evaluated, what they hold, what is refused."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fewstep.export import coreml, export_bundle, gate, parts
from fewstep.export.coreml_attention import split_einsum
from fewstep.export.coreml_layout import lay_out
from fewstep.export.coreml_weights import Compression, integers, kmeans, palette
from fewstep.export.mil_reference import coremltools
from fewstep.export.onnx import Traced, trace
from fewstep.model import load
from fewstep.model.model import Example, Part
from fewstep.model.quantized import Quantized
from fewstep.model.trajectories import run_part
from fewstep.model.wrappers import TextDenoiser
from fewstep.quant.table import Table
from fewstep.runtime import Pipeline
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput, BundleError, OutputError
from fewstep.runtime.manifest import TensorSpec
from fewstep.targets import Backend, load_target

from .conftest import torch


def target(precision="float32", **options):
    plain = load_target("mac-m-series")
    backend = Backend("coreml", 20, options)
    return replace(plain, backend=backend, recipe=replace(plain.recipe, precision=precision))


@pytest.fixture(scope="module")
def tiny(tiny_sd):
    return parts.fixed(load(tiny_sd))


@pytest.fixture(scope="module")
def unet():
    """A U-Net of one level with all its kinds of layers, which converts in a second."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        attention_head_dim=2,
        cross_attention_dim=48,
        norm_num_groups=8,
    ).eval()
    sample = TensorSpec("sample", "float32", (1, 4, 8, 8))
    states = TensorSpec("encoder_hidden_states", "float32", (1, 6, 48))
    inputs = (sample, TensorSpec("timestep", "float32", (1,)), states)
    sizes = {"batch": (1,), "height": (8,), "width": (8,)}
    example = Example(sizes, {"timestep": (0.0, 999.0)})
    return Part("unet", TextDenoiser(network), inputs, (replace(sample, name="out_sample"),), example)


def lowered(part, folder, precision="float32", **options):
    """The spec, its decibels against torch on two cases, and the folder of its packages."""
    chosen = target(precision, **options)
    spec = coreml.lower(trace(part), folder / part.name, chosen)
    here = coreml.stand_in(spec, chosen)
    cases = gate.cases(part, few=True)
    got = gate.run_graph(folder / spec.graph, here.spec, list(cases.values()), here.opener)
    found = gate.compare(part.name, list(cases), [run_part(part, case) for case in cases.values()], got)
    return spec, found.snr_db, folder / part.name


@pytest.fixture(scope="module")
def whole(unet, tmp_path_factory):
    """In float32, as it is."""
    return lowered(unet, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def halves(unet, tmp_path_factory):
    return lowered(unet, tmp_path_factory.mktemp("halves"), "float16")


def program_of(package):
    spec = coremltools("coremltools.proto.Model_pb2").Model()
    spec.ParseFromString((package / "Data" / "com.apple.CoreML" / "model.mlmodel").read_bytes())
    return spec


def operations(package):
    main = next(iter(program_of(package).mlProgram.functions.values()))
    return list(next(iter(main.block_specializations.values())).operations)


def shapes(package):
    inputs = program_of(package).description.input
    return {entry.name: tuple(entry.type.multiArrayType.shape) for entry in inputs}


def weight_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("weight.bin"))


def size(package):
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_every_part_of_stable_diffusion_is_what_torch_computes(tiny, name, tmp_path):
    spec, snr_db, folder = lowered(tiny.parts[name], tmp_path)
    assert snr_db >= 100
    assert (spec.engine, spec.precision, spec.device) == ("coreml", "float32", "gpu")
    assert [path.name for path in folder.iterdir()] == [f"{coreml.NAMES[name]}.mlpackage"]


def test_a_class_conditional_model_with_attention_of_its_own_converts(labelled, tmp_path):
    part = parts.fixed(labelled).parts["unet"]
    assert lowered(part, tmp_path)[1] >= 100


def test_in_float16_the_angles_of_the_time_embedding_stay_float32(halves):
    spec, snr_db, folder = halves
    assert snr_db >= 45
    assert spec.precision == "float16"
    kinds = {op.type: op.outputs[0].type.tensorType.dataType for op in operations(folder / "Unet.mlpackage")}
    assert (kinds["sin"], kinds["conv"]) == (11, 10)  # MIL.proto: FLOAT32, FLOAT16


def test_the_tanh_form_of_gelu_stays_what_it_is(tmp_path):
    class Gelu(torch.nn.Module):
        def forward(self, sample, timestep):
            return torch.nn.functional.gelu(3 * sample + timestep[:, None, None, None], approximate="tanh")

    from fewstep.model import Model
    from fewstep.runtime import DiscreteVP

    process = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)
    model = Model.from_module(Gelu(), sample_shape=(3, 8, 8), process=process)
    assert lowered(parts.fixed(model).parts["unet"], tmp_path)[1] >= 100


def test_split_attention_is_the_same_function(unet):
    """In float64, where rounding leaves 1e-12."""
    module = unet.module.double()
    try:
        feeds = [
            torch.from_numpy(array).double()
            for array in next(iter(gate.cases(unet, few=True).values())).values()
        ]
        with torch.no_grad():
            right = module(*feeds)
            for chunk in (0, 48):
                rewritten = split_einsum(module, chunk)
                assert torch.allclose(rewritten(*feeds), right, rtol=0, atol=1e-12)
                assert {p.data_ptr() for p in rewritten.parameters()} <= {
                    p.data_ptr() for p in module.parameters()
                }
    finally:
        unet.module.float()


def test_split_attention_keeps_the_names_of_layers(unet):
    from fewstep.quant.simulate import weights_of

    rewritten = replace(unet, module=split_einsum(unet.module))
    assert set(weights_of(rewritten)) == set(weights_of(unet))


def test_split_attention_has_convolutions_and_an_einsum_for_every_head(unet, whole, tmp_path):
    _, snr_db, folder = lowered(unet, tmp_path, attention="split_einsum")
    plain = Counter(op.type for op in operations(whole[2] / "Unet.mlpackage"))
    split = Counter(op.type for op in operations(folder / "Unet.mlpackage"))
    assert snr_db >= 100
    assert plain["scaled_dot_product_attention"] > 0
    assert split["scaled_dot_product_attention"] == 0
    assert split["einsum"] >= 2 * plain["scaled_dot_product_attention"]
    assert split["linear"] < plain["linear"]
    assert split["conv"] > plain["conv"]


def test_the_layout_of_apples_swift_package_takes_two_samples_and_channels_first(unet, tmp_path):
    spec, snr_db, folder = lowered(unet, tmp_path, layout="swift")
    sample, _, states = (tensor.shape for tensor in unet.inputs)
    assert snr_db >= 100
    assert shapes(folder / "Unet.mlpackage") == {
        "sample": (2, *sample[1:]),
        "timestep": (2,),
        "encoder_hidden_states": (2, states[2], 1, states[1]),
    }
    assert [tensor.shape[0] for tensor in (*spec.inputs, *spec.outputs)] == ["batch"] * 4


def test_that_layout_with_split_attention_has_no_transpose_of_the_text(unet, tmp_path):
    _, snr_db, folder = lowered(unet, tmp_path, layout="swift", attention="split_einsum")
    assert snr_db >= 100
    firsts = [op for op in operations(folder / "Unet.mlpackage") if "encoder_hidden_states" in str(op.inputs)]
    assert {op.type for op in firsts} == {"conv"}


def test_a_unet_over_the_limit_comes_in_two_chunks_that_compute_the_same(unet, whole, tmp_path):
    _, whole_db, one = whole
    spec, snr_db, folder = lowered(unet, tmp_path, package_mib=2)
    first, second = (folder / f"UnetChunk{number}.mlpackage" for number in (1, 2))
    assert spec.graph == "unet/UnetChunk1.mlpackage/Manifest.json"
    assert snr_db == pytest.approx(whole_db, abs=3)
    assert max(size(first), size(second)) < 0.6 * size(one / "Unet.mlpackage")
    given = set(shapes(second)) - {tensor.name for tensor in unet.inputs}
    assert given <= {entry.name for entry in program_of(first).description.output}
    assert [entry.name for entry in program_of(second).description.output] == ["out_sample"]


def test_what_halves_do_not_fit_is_said(tiny, tmp_path):
    with pytest.raises(BadInput, match=r"half of Unet has .* MiB of weights; expected at most 1,.*palette"):
        coreml.lower(trace(tiny.parts["unet"]), tmp_path, target(package_mib=1))
    assert not any(tmp_path.rglob("*.mlpackage"))


def test_equal_parts_give_equal_bytes(unet, tmp_path):
    options = {"weights": "palette", "bits": 4, "attention": "split_einsum"}
    found = []
    for name in ("one", "two"):
        folder = lowered(unet, tmp_path / name, "float16", **options)[2]
        found.append({f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()})
    assert found[0] == found[1]


# weights


def test_kmeans_finds_the_best_two_centres():
    rng = np.random.default_rng(0)
    values = np.unique(rng.standard_normal(200))
    counts = rng.integers(1, 5, len(values))

    def error(cut):
        return sum(
            float((w * (v - np.average(v, weights=w)) ** 2).sum())
            for v, w in ((values[:cut], counts[:cut]), (values[cut:], counts[cut:]))
        )

    centres, labels = kmeans(values, counts, 2)
    got = float((counts * (values - centres[labels]) ** 2).sum())
    assert got == pytest.approx(min(error(cut) for cut in range(1, len(values))), rel=1e-6)


def test_kmeans_of_a_normal_density_has_the_error_of_the_optimal_quantizer():
    """Max 1960, "Quantizing for minimum distortion", table I: 16 levels leave 0.009497 of a unit variance."""
    values = np.linspace(-6, 6, 20_001)
    counts = np.exp(-(values**2) / 2) * 1e6
    centres, labels = kmeans(values, counts, 16)
    error = (counts * (values - centres[labels]) ** 2).sum() / counts.sum()
    assert error == pytest.approx(0.009497, rel=2e-3)


def test_a_palette_of_as_many_values_as_there_are_is_exact():
    rng = np.random.default_rng(0)
    table = rng.standard_normal(16).astype(np.float16)
    weights = rng.choice(table, (32, 64))
    indices, tables = palette(weights, 4, 32)
    assert np.array_equal(tables[0][indices].astype(np.float16), weights)


def test_a_palette_for_each_group_of_channels_is_nearer_than_one_for_all():
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((32, 256)) * np.repeat([1, 0.01], 16)[:, None]).astype(np.float16)

    def error(group):
        indices, tables = palette(weights, 3, group)
        rows = np.repeat(np.arange(len(tables)), group)
        return float(
            np.mean((tables[rows[:, None], indices] - weights) ** 2 / np.mean(weights**2.0, 1, keepdims=True))
        )

    assert error(16) < 0.1 * error(32)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 16), (4, 32)])
def test_integers_are_within_half_a_step(bits, group):
    weights = np.random.default_rng(0).standard_normal((6, 64, 3, 3)).astype(np.float32)
    codes, scale = integers(weights, bits, 1, group)
    assert scale.shape == (6, 64 // group, 1, 1)
    step = np.repeat(scale, group, axis=1)
    inside = np.abs(codes) < 2 ** (bits - 1) - 1
    assert np.all(
        np.abs(codes * step - weights)[inside] <= 0.501 * np.broadcast_to(step, weights.shape)[inside]
    )


@pytest.mark.parametrize(
    ("options", "least_db", "share"),
    [
        ({"weights": "palette", "bits": 8}, 30, 0.6),
        ({"weights": "palette", "bits": 6, "group": 8}, 25, 0.5),
        ({"weights": "palette", "bits": 3}, 5, 0.35),
        ({"weights": "linear", "bits": 8}, 30, 0.6),
        ({"weights": "linear", "bits": 4, "group": 32}, 8, 0.45),
    ],
)
def test_compressed_packages_are_smaller_and_run(unet, halves, options, least_db, share, tmp_path):
    spec, snr_db, folder = lowered(unet, tmp_path, "float16", **options)
    assert snr_db >= least_db
    assert weight_bytes(folder) < share * weight_bytes(halves[2])
    assert spec.quantization["bits_per_weight"] < options["bits"] + 1.5
    assert spec.quantization["weights_by_bits"].keys() == {str(options["bits"])}


def test_the_first_pattern_that_fits_decides_a_layers_bits(unet, tmp_path):
    mixed = ["unet.*attn1.to_v=8", "*attn1*=16", "*ff.net*=3"]
    spec, _, _ = lowered(unet, tmp_path, "float16", weights="palette", bits=4, mixed=mixed)
    assert spec.quantization["weights_by_bits"].keys() == {"8", "3", "4"}
    assert any(".attn1.to_q" in layer for layer in spec.quantization["left_alone"])
    assert not any(".attn1.to_v" in layer for layer in spec.quantization["left_alone"])


@pytest.fixture(scope="module")
def table_file(unet, tmp_path_factory):
    """A made-up table: one layer is a thousand times as sensitive as the others."""
    from fewstep.quant.simulate import weights_of

    layers = weights_of(unet)
    worst = next(name for name in layers if name.endswith("attn1.to_v"))
    options, counts = ("w3", "w4", "w8"), [int(np.prod(shape)) for shape in layers.values()]
    nsr = np.array([[[(1e3 if name == worst else 1) * 4.0**-bits] for bits in (3, 4, 8)] for name in layers])
    stored = np.array([[bits * count for bits in (3, 4, 8)] for count in counts])
    names, ones = tuple(layers), np.ones(1)
    table = Table("unet", "exact", names, options, (0,), nsr, stored, tuple(counts), tuple(counts), ones)
    file = tmp_path_factory.mktemp("table") / "sensitivity.json"
    file.write_text(json.dumps({"table": table.to_json(), "chosen": {}}))
    return file, worst


def test_a_sensitivity_table_chooses_the_bits_of_every_layer(unet, table_file, tmp_path):
    file, worst = table_file
    plain = Compression.of(unet, "palette", 6, 0, ())
    chosen = plain.by_table(unet, file, 4.0)
    assert chosen.by_layer[worst] == 8
    assert set(chosen.by_layer.values()) == {3, 4, 8}
    spec, _, _ = lowered(unet, tmp_path, "float16", weights="palette", table=str(file), average_bits=4.0)
    assert spec.quantization["bits_per_weight"] < 4.6  # tables of 2^bits halves a layer on top


def test_a_table_of_another_part_changes_nothing(tiny, table_file):
    part = tiny.parts["vae_decoder"]
    plain = Compression.of(part, "palette", 6, 0, ())
    assert plain.by_table(part, table_file[0], 4.0) == plain


def test_a_file_that_is_no_table_is_refused(unet, tmp_path):
    (tmp_path / "x.json").write_text('{"layers": 1}')
    with pytest.raises(BadInput, match="is no sensitivity table"):
        Compression.of(unet, "palette", 6, 0, ()).by_table(unet, tmp_path / "x.json", 4.0)


# options and refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "flash"}, "attention = 'flash'; expected original or split_einsum"),
        ({"layout": "nhwc"}, "layout = 'nhwc'"),
        ({"weights": "int8"}, "weights = 'int8'"),
        ({"weights": "palette", "bits": 5}, "bits = 5 with weights = 'palette'"),
        ({"weights": "linear", "bits": 6}, "bits = 6 with weights = 'linear'"),
        ({"weights": "palette", "mixed": ["*conv_in"]}, "mixed: '*conv_in'"),
        ({"weights": "palette", "mixed": ["*conv_in=5"]}, "mixed: '*conv_in=5'"),
        ({"table": "x.json"}, "table without average_bits"),
        ({"query_chunk": 512}, 'expected attention = "split_einsum"'),
        ({"group": -1}, "a negative number"),
        ({"chunk": 2}, "unknown keys: chunk"),
    ],
)
def test_options_that_are_none_are_named(options, said):
    with pytest.raises(BadInput) as refused:
        coreml.options_of(target(**options))
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["iphone-15-pro", "ipad-m4", "mac-m-series"])
def test_the_targets_options_can_be_read(name):
    assert coreml.options_of(load_target(name)).attention in ("original", "split_einsum")


def test_free_sizes_are_refused(tiny_sd, tmp_path):
    part = load(tiny_sd).parts["vae_decoder"]
    with pytest.raises(BadInput, match="has free sizes.*dynamic_shapes = false"):
        coreml.lower(trace(part), tmp_path, target())


def test_integers_of_a_pass_are_refused(tiny, tmp_path):
    part = replace(tiny.parts["vae_decoder"], quantized=Quantized({}))
    with pytest.raises(BadInput, match="quantized by a pass.*leave --quantize out"):
        coreml.lower(Traced(part, None), tmp_path, target(weights="float"))
    assert not list(tmp_path.iterdir())


def test_the_swift_layout_is_for_text_conditioned_networks_alone(labelled, tmp_path):
    part = parts.fixed(labelled).parts["unet"]
    with pytest.raises(BadInput, match="takes sample, timestep, class_labels"):
        coreml.lower(trace(part), tmp_path, target(layout="swift"))


def test_an_operator_coremltools_lacks_is_our_error(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, sample, timestep):
            return torch.special.bessel_j0(sample) + timestep[:, None, None, None]

    from fewstep.model import Model
    from fewstep.runtime import DiscreteVP
    from fewstep.runtime.errors import CheckpointError

    process = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)
    part = parts.fixed(Model.from_module(Odd(), sample_shape=(3, 8, 8), process=process)).parts["unet"]
    with pytest.raises(CheckpointError, match="cannot convert unet"):
        coreml.lower(trace(part), tmp_path, target())
    assert list(tmp_path.iterdir()) == []


# the whole bundle


@pytest.fixture(scope="module")
def bundle(tiny_sd, tmp_path_factory):
    """For a phone: split attention, Apple's layout, palettes."""
    out = tmp_path_factory.mktemp("phone") / "b"
    *_, done = export_bundle(tiny_sd, "iphone-15-pro", out, steps=2, measure_speed=False)
    return Bundle.open(done.path)


def test_a_bundle_says_that_it_was_converted_and_how_near_it_is(bundle):
    manifest = bundle.manifest
    assert {part.executed for part in manifest.parts.values()} == {"converted"}
    assert {name: (p.precision, p.device) for name, p in manifest.parts.items()} == {
        "text_encoder": ("float16", "npu"),
        "unet": ("float16", "npu"),
        "vae_decoder": ("float32", "gpu"),
    }
    assert manifest.quality["pipeline"]["psnr_db"] >= 20
    assert manifest.parts["unet"].quantization["weights_by_bits"].keys() == {"6"}


def test_a_bundle_needs_a_mac_to_run(bundle):
    with pytest.raises(BadInput, match="Core ML has no"), Pipeline(bundle) as pipeline:
        pipeline("a cat")


def test_what_apples_swift_package_loads_is_laid_out_from_the_bundle(bundle, tmp_path):
    found = lay_out(bundle, tmp_path / "resources")
    assert [path.name for path in found] == [
        *("TextEncoder.mlpackage", "Unet.mlpackage", "VAEDecoder.mlpackage", "merges.txt", "vocab.json")
    ]
    vocabulary = json.loads((tmp_path / "resources" / "vocab.json").read_text())
    assert vocabulary["<|endoftext|>"] > 0
    lines = (tmp_path / "resources" / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version")
    assert all(len(line.split(" ")) == 2 for line in lines[1:])
    with pytest.raises(OutputError, match="exists"):
        lay_out(bundle, tmp_path / "resources")


def test_a_bundle_for_another_engine_has_no_such_layout(tiny_bundle, tmp_path):
    with pytest.raises(BadInput, match="no text-to-image bundle for Core ML"):
        lay_out(Bundle.open(tiny_bundle), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_package_is_refused_when_the_bundle_is_checked(bundle, tmp_path):
    from fewstep.export.mil_reference import open_session

    package = tmp_path / "VAEDecoder.mlpackage"
    import shutil

    spec = bundle.manifest.parts["vae_decoder"]
    shutil.copytree(bundle.file(spec.graph).parent, package)
    with open(package / "Data" / "com.apple.CoreML" / "model.mlmodel", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(BundleError):
        open_session(package / "Manifest.json", spec)
