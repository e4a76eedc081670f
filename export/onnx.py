"""Lower one Part to an ONNX graph that ONNX Runtime's CPU runs well.

torch.export traces the part once, with free axes where its TensorSpecs name them; torch.onnx translates it; clean.py
rewrites what the engine is slow at. Weights are written once, straight from torch's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model.libraries import library, quiet, torch
from ..model.model import Part
from ..runtime.errors import BadInput, CheckpointError, FewstepError, MissingExtra
from ..runtime.manifest import PartSpec
from ..targets import Target
from .formats import Here
from .retrace import as_traced, simplify

if TYPE_CHECKING:
    from .qdq import Convention

__all__ = [
    *("DEFAULT_OPSET", "Traced", "lower", "stand_in", "stored_bytes", "trace"),
    *("write", "write_graph", "write_plain"),
]

DEFAULT_OPSET = 20
"""What torch.onnx.export writes when not told otherwise (torch 2.13): the export whose speed ours is compared with."""

INLINE_BYTES = 64 << 20
"""Graphs with more weights than this keep them in model.onnx_data beside the graph. Protobuf ends at 2 GiB; below that
external weights are mapped instead of parsed, and copied once instead of twice. Smaller graphs are one file, which is
easier to ship. optimum writes external data from 2 GB on and reads both."""


class Traced:
    """A part traced by torch.export: one trace serves several translations."""

    def __init__(self, part: Part, program: Any) -> None:
        self.part, self.program = part, program


def trace(part: Part) -> Traced:
    """Trace a part with the free axes of its TensorSpecs. Raises CheckpointError where torch cannot."""
    th = torch()
    sizes = (
        part.example.other_sizes()
    )  # batch is not 1 and height not width: equal sizes would be taken for one axis
    feeds = part.example.feeds(part.inputs, sizes, seed=0)
    arguments = tuple(th.from_numpy(array) for array in feeds.values())
    free = tuple(
        {axis: th.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in part.inputs
    )
    try:
        with quiet(), th.no_grad():
            program = th.export.export(part.module, arguments, dynamic_shapes=free, strict=False)
    except Exception as error:
        raise CheckpointError(
            f"torch.export cannot trace {part.name} ({type(error).__name__}: {_cause(error)})",
            expected="tensor code without branches on values",
            fix="for a network of your own, leave fewer axes free (Model.from_module(..., dynamic=()))",
        ) from error
    simplify(program)
    return Traced(part, program)


def lower(traced: Traced, folder: Path, target: Target) -> PartSpec:
    """For ONNX Runtime on `target`; see `write`. Inputs and outputs are float32 in every precision."""
    recipe, part = target.recipe, traced.part
    if recipe.precision == "float16" and part.quantized is not None:
        raise BadInput(
            f"{part.name} is quantized, and its precision is to be float16",
            expected="one of both",
            fix='take quantize out of [recipe] passes, or set precision = "float32" in a --recipe',
        )
    spec = write(
        traced,
        folder,
        opset=target.backend.opset,
        fuse_attention=recipe.fuse_attention,
        half=recipe.precision == "float16",
    )
    return replace(spec, device=target.device.kind, precision=recipe.precision)


def stand_in(spec: PartSpec, target: Target) -> Here:
    """ONNX Runtime on this host's CPU."""
    return Here(replace(spec, device="cpu"), spec.precision)


def write(
    traced: Traced, folder: Path, *, opset: int, fuse_attention: bool = True, half: bool = False
) -> PartSpec:
    """Write folder/model.onnx, and folder/model.onnx_data where the weights are large; returns its spec.

    opset           the ONNX operator set
    fuse_attention  use ONNX Runtime's fused attention kernel
    half            compute in float16 between float32 inputs and outputs
    The same part gives the same bytes. Raises CheckpointError where torch.onnx cannot translate the part.
    """
    clean = _clean()
    graph = _translate(traced, opset)
    if traced.part.quantized is not None:
        _qdq().quantize(graph, traced.part, _qdq().ONNXRUNTIME)
    if half:
        from .halves import halve

        halve(graph)
    clean.spell_out_group_norm(graph)
    if fuse_attention:
        clean.fuse_attention(graph)
    clean.tidy(graph)
    clean.strip(graph)
    return _save(traced.part, graph, folder)


def write_graph(
    traced: Traced,
    folder: Path,
    *,
    opset: int,
    convention: Convention | None = None,
    rewrite: Callable[[Any], None] | None = None,
) -> Path:
    """Write folder/model.onnx for another converter to read: standard operators, whole ones where there are any.

    convention  how its engine takes integers; None: as bytes without a sign (qdq.PORTABLE)
    rewrite     changes the onnx-ir model in place, while its values still have their types
    """
    clean, graph = _clean(), _translate(traced, opset)
    if traced.part.quantized is not None:
        _qdq().quantize(graph, traced.part, convention or _qdq().PORTABLE)
    if rewrite is not None:
        rewrite(graph)
    clean.tidy(graph)
    clean.strip(graph)
    _save(traced.part, graph, folder)
    return folder / "model.onnx"


def write_plain(traced: Traced, folder: Path) -> PartSpec:
    """The un-optimized export: the operators torch.onnx.export writes when told nothing."""
    return _save(traced.part, _translate(traced, DEFAULT_OPSET, quantized=False), folder)


def stored_bytes(file: Path) -> dict[str, int]:
    """What an ONNX file and the data beside it consist of: bytes of the constants by type, and of the rest, `graph`.

    Codes of fewer than 8 bits are uint8, several to a byte, or int4.
    """
    ir = library("onnx_ir")
    found: dict[str, int] = {}
    for value in ir.load(file).graph.initializers.values():
        kind = value.const_value.dtype.name.lower()
        found[kind] = found.get(kind, 0) + value.const_value.nbytes
    sizes = [beside.stat().st_size for beside in (file, file.with_name("model.onnx_data")) if beside.exists()]
    return dict(sorted(found.items())) | {"graph": sum(sizes) - sum(found.values())}


def _clean() -> Any:
    try:
        from . import clean
    except ModuleNotFoundError as error:
        raise MissingExtra.of("onnx-ir", "export") from error
    return clean


def _qdq() -> Any:
    _clean()  # onnx-ir may be missing
    from . import qdq

    return qdq


def _save(part: Part, graph: Any, folder: Path) -> PartSpec:
    ir = library("onnx_ir")
    _name_axes(ir, graph, part)
    folder.mkdir(parents=True, exist_ok=True)
    external = part.weight_bytes() > INLINE_BYTES
    # one worker: tensors lie in the file in the graph's order, and only one of them is in flight
    ir.save(
        graph, folder / "model.onnx", external_data="model.onnx_data" if external else None, max_workers=1
    )
    return PartSpec("onnxruntime", f"{part.name}/model.onnx", part.inputs, part.outputs)


def _translate(traced: Traced, opset: int, *, quantized: bool = True) -> Any:
    """The program as an onnx-ir model; `quantized`: ready for qdq.quantize, where the part is."""
    quantized = quantized and traced.part.quantized is not None
    with quiet():
        try:
            with as_traced() as possible:
                if possible:
                    return _translated(traced, opset, quantized)
        except FewstepError:
            raise
        except Exception:
            pass
        try:
            return _translated(traced, opset, quantized)
        except FewstepError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"torch.onnx cannot translate {traced.part.name} ({type(error).__name__}: {_cause(error)})",
                fix="replace the operation it names, or report it with the model's configuration",
            ) from error


def _translated(traced: Traced, opset: int, quantized: bool) -> Any:
    program = torch().onnx.export(
        traced.program,
        dynamo=True,
        opset_version=opset,
        input_names=[spec.name for spec in traced.part.inputs],
        output_names=[spec.name for spec in traced.part.outputs],
        verbose=False,
        optimize=not quantized,
    )
    if quantized:  # folding constants hides whose weights they were
        _qdq().hide(program.model, traced.part)
        program.optimize()
    return program.model


def _name_axes(ir: Any, graph: Any, part: Part) -> None:
    """Give inputs and outputs the shapes of the specs: torch.export calls free axes s53."""
    for values, specs in ((graph.graph.inputs, part.inputs), (graph.graph.outputs, part.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]
