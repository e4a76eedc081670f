"""Lower one Part to a Core ML package: an ML program in .mlpackage form, converted where there is no Core ML.

coremltools reads the traced torch program; what comes out is written as a package of three files, equal bytes for equal
parts. [backend.options] of a target chooses the form of attention, the layout, what weights are stored as and how many
chunks they come in: see Options.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Part
from ..runtime.coremlfile import WEIGHTS
from ..runtime.errors import BadInput, CheckpointError
from ..runtime.manifest import PartSpec
from ..targets import Target
from . import mil_reference
from .coreml_chunks import chunked
from .coreml_layout import swift_layout
from .coreml_package import write_program
from .coreml_weights import Compression, compress
from .formats import Here
from .mil_reference import coremltools, silent
from .onnx import Traced, trace

__all__ = ["NAMES", "Options", "convert", "lower", "options_of", "stand_in"]

NAMES = {
    "text_encoder": "TextEncoder",
    "unet": "Unet",
    "transformer": "Transformer",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}
"""Part -> its package; those of Stable Diffusion are what Apple's ml-stable-diffusion looks for
(swift/StableDiffusion/pipeline/StableDiffusionPipeline+Resources.swift)."""


@dataclass(frozen=True)
class Options:
    """What [backend.options] of a Core ML target may say."""

    attention: str = "original"
    """original: one attention operator over [batch, heads, length, width], for the GPU. split_einsum: every head by
    itself over [batch, channels, 1, length], linear layers as convolutions, for the Neural Engine."""
    query_chunk: int = 0
    """Of split_einsum: so many queries at a time where there are more; 0: all at once."""
    layout: str = "diffusers"
    """swift: what Apple's Swift package feeds: two samples, encoder_hidden_states [2, width, 1, length]."""
    package_mib: int = 0
    """What a package may have in weights: a U-Net of more is cut into two that run one after the other. 0: any."""
    float32: tuple[str, ...] = ()
    """Parts that compute in float32 whatever the recipe's precision is: a decoder whose activations leave float16."""
    weights: str = "float"
    """float, palette (a table of 2^bits values) or linear (integers of 8 or 4 bits times a scale)."""
    bits: int = 6
    """Of a weight in a palette or on a linear grid, where `mixed` and `table` say nothing else."""
    group: int = 0
    """palette: output channels that share a table; 0: all. linear: inputs that share a scale; 0: a whole row."""
    mixed: tuple[str, ...] = ()
    """PATTERN=BITS for layers whose name, PART.LAYER, fits; the first that fits, 16 leaves a layer alone."""
    table: str = ""
    """A sensitivity table (fewstep sensitivity) to choose the bits of every layer of its part by."""
    average_bits: float = 0.0
    """With a table: the bits a weight may take on average."""


def options_of(target: Target) -> Options:
    """Raises BadInput for an option that is none, or that contradicts another."""
    where = f"targets/{target.id}.toml"
    options: Options = target.options_as(Options)

    def need(ok: bool, found: str, expected: str) -> None:
        if not ok:
            raise BadInput(f"{where}: [backend.options] {found}", expected=expected)

    for name, known in (
        ("attention", ("original", "split_einsum")),
        ("layout", ("diffusers", "swift")),
        ("weights", ("float", "palette", "linear")),
    ):
        value = getattr(options, name)
        need(value in known, f"{name} = {value!r}", " or ".join(known))
    bits = {"palette": (1, 2, 3, 4, 6, 8), "linear": (4, 8), "float": range(17)}[options.weights]
    need(
        options.bits in bits,
        f"bits = {options.bits} with weights = {options.weights!r}",
        f"one of {list(bits)}",
    )
    for entry in options.mixed:
        _, _, number = entry.rpartition("=")
        need(
            number.isdigit() and int(number) in (*bits, 16),
            f"mixed: {entry!r}",
            f"PATTERN=BITS, of {[*bits, 16]}",
        )
    need(bool(options.table) == (options.average_bits > 0), "table without average_bits", "both or neither")
    need(
        not options.query_chunk or options.attention == "split_einsum",
        "query_chunk",
        'attention = "split_einsum"',
    )
    need(min(options.query_chunk, options.group, options.package_mib) >= 0, "a negative number", "0 or more")
    return options


def lower(traced: Traced, folder: Path, target: Target) -> PartSpec:
    """Write folder/NAME.mlpackage, or NAMEChunk1 and NAMEChunk2, as the target's options say; returns the spec.

    The same part gives the same bytes. Raises BadInput for options or sizes that do not fit, CheckpointError for what
    coremltools cannot convert.
    """
    options, part = options_of(target), traced.part
    half = target.recipe.precision == "float16" and part.name not in options.float32
    shown = _shown(part, options)
    if shown is not part:
        traced = trace(shown)
    program = convert(traced, half=half)
    del traced
    compression = Compression.of(part, options.weights, options.bits, options.group, options.mixed)
    if options.table:
        compression = compression.by_table(part, Path(options.table), options.average_bits)
    said = compress(program, shown, compression)
    name = NAMES.get(part.name, part.name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as work:
        whole = Path(work) / f"{name}.mlpackage"
        write_program(program, whole)
        del program
        packages = _within(whole, options.package_mib, Path(work)) if part.name == "unet" else [whole]
        names = [f"{name}Chunk{number}" for number in (1, 2)] if len(packages) > 1 else [name]
        for package, given in zip(packages, names, strict=True):
            package.rename(folder / f"{given}.mlpackage")
    batch = "batch" if options.layout == "swift" and part.name == "unet" else None
    inputs, outputs = (
        tuple(replace(spec, shape=(batch, *spec.shape[1:])) if batch else spec for spec in specs)
        for specs in (part.inputs, part.outputs)
    )
    kind = target.device.kind
    return PartSpec(
        "coreml",
        f"{part.name}/{names[0]}.mlpackage/Manifest.json",
        inputs,
        outputs,
        precision="float16" if half else "float32",
        device="gpu" if kind == "npu" and not half else kind,  # the Neural Engine has no float32
        quantization=said,
    )


def _within(package: Path, mib: int, work: Path) -> list[Path]:
    """The package, or two that it is cut into where its weights take more than `mib`. Raises BadInput if that is not
    enough."""

    def size(of: Path) -> int:
        return -(-(of / "Data" / WEIGHTS / "weight.bin").stat().st_size // 2**20)

    if mib == 0 or size(package) <= mib:
        return [package]
    halves = chunked(package, work)
    largest = max(size(half) for half in halves)
    if largest > mib:
        raise BadInput(
            f"half of {package.stem} has {largest:,} MiB of weights",
            expected=f"at most {mib:,}, package_mib of the target's [backend.options]",
            fix='store them in fewer bits: weights = "palette" and bits = 6 there, or fewer',
        )
    return halves


def stand_in(spec: PartSpec, target: Target) -> Here:
    """The package reloaded and evaluated by torch on this host's processor, half precision kept; see mil_reference."""
    return Here(spec, spec.precision, "converted", mil_reference.open_session)


def _shown(part: Part, options: Options) -> Part:
    """The part as it is traced: its modules rewritten, its inputs as the package takes them; itself if unchanged."""
    if any(not isinstance(size, int) for spec in part.inputs for size in spec.shape):
        raise BadInput(
            f"{part.name} has free sizes",
            expected="fixed ones",
            fix="dynamic_shapes = false in the target's [limits]",
        )
    if part.quantized is not None:
        raise BadInput(
            f"{part.name} is quantized by a pass, whose integers a Core ML package does not take",
            expected="weights, bits and group under [backend.options] of a --recipe",
            fix='leave --quantize out, and write weights = "palette" and bits = 6 there',
        )
    if options.attention == "split_einsum" and part.name != "text_encoder":
        from .coreml_attention import split_einsum

        part = replace(part, module=split_einsum(part.module, options.query_chunk))
    if options.layout == "swift" and part.name == "unet":
        part = swift_layout(part)
    return part


def convert(traced: Traced, *, half: bool) -> Any:
    """The traced part as a MIL program of fixed sizes; its inputs and outputs stay float32 and int32.

    half  computes in float16, but for the angles of the time embedding: 999 times 0.68 has an error of 0.25 there
    Raises CheckpointError where coremltools cannot convert it.
    """
    ct, part = coremltools(), traced.part
    precision: Any = ct.precision.FLOAT32
    if half:
        precision = ct.transform.FP16ComputePrecision(op_selector=lambda op: not _is_angle(op))
    try:
        with silent():
            converted = ct.convert(
                _decomposed(traced.program),
                convert_to="milinternal",
                minimum_deployment_target=ct.target.iOS18,
                inputs=[
                    ct.TensorType(
                        name=spec.name,
                        shape=spec.shape,
                        dtype=np.int32 if np.issubdtype(np.dtype(spec.dtype), np.integer) else np.float32,
                    )
                    for spec in part.inputs
                ],
                outputs=[ct.TensorType(name=spec.name) for spec in part.outputs],
                compute_precision=precision,
            )
            for function in converted.functions.values():
                # what is made here has no place in the source; coremltools would demand one of every operator
                function._essential_scope_sources = []
            _exact_norms(converted)
    except Exception as error:
        raise CheckpointError(
            f"coremltools {ct.__version__} cannot convert {part.name} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})",
            fix="replace the operation it names, or report it with the model's configuration",
        ) from error
    return converted


def _decomposed(program: Any) -> Any:
    """Without operators coremltools does not know because they do nothing, and without one it takes for another."""
    aten = torch().ops.aten
    program = program.run_decompositions({aten.gelu.default: _gelu})
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program


def _gelu(x: Any, *, approximate: str = "none") -> Any:
    """The approximation by tanh spelt out, which a pass of coremltools puts together again: its reader of exported
    programs overlooks the keyword and writes the exact function (78 dB for cifar-dit)."""
    if approximate == "none":
        return NotImplemented
    return 0.5 * x * (1 + torch().tanh(0.7978845608028654 * (x + 0.044715 * x.pow(3))))  # sqrt(2 / pi)


def _is_angle(op: Any, depth: int = 8) -> bool:
    """Whether an operator makes, of the timestep, nothing but what sines and cosines are taken of."""
    if op.op_type in ("sin", "cos"):
        return True
    if depth == 0 or op.op_type in ("linear", "conv", "matmul"):
        return False
    after = [child for var in op.outputs for child in var.child_ops]
    return bool(after) and all(_is_angle(child, depth - 1) for child in after)


def _exact_norms(program: Any) -> None:
    """Let batch norms that coremltools made of a factor and a summand divide by 1, not by sqrt(1 + epsilon).

    It writes a variance of 1 and an epsilon of 1e-5, which is 5e-6 too little at every norm: 102 dB for emoji-64's
    U-Net in place of 123 (benchmarks/coreml.py).
    """
    mb = coremltools("coremltools.converters.mil").Builder
    for function in program.functions.values():
        for op in [op for op in function.operations if op.op_type == "batch_norm"]:
            variance, epsilon = op.variance, np.float32(op.epsilon.val)
            if variance.val is None or variance.val.dtype != np.float32 or not np.all(variance.val == 1):
                continue
            with function:
                exact = mb.const(
                    val=variance.val - epsilon, before_op=variance.op, name=f"{variance.name}_exact"
                )
            function.replace_uses_of_var_after_op(anchor_op=variance.op, old_var=variance, new_var=exact)
            function.remove_ops([variance.op])
