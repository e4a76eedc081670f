"""Let torch.onnx translate a traced program as it is, instead of tracing it again first.

torch.onnx.export runs every program through `run_decompositions`, which traces it twice more: with free axes that is
three quarters of an export (12 of 16 CPU seconds for a 0.8 M parameter U-Net, torch 2.13). It exists for operators
ONNX has no translation of. The networks here need a handful of no-ops taken out, which `simplify` does; where that is
not enough the translation fails loudly, and `onnx.write` goes the long way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..model.libraries import library, torch

__all__ = ["as_traced", "simplify"]


def simplify(program: Any) -> None:
    """Take operators out of an ExportedProgram that change nothing in inference; in place.

    dropout, contiguous, clone, detach, alias, casts to the type a tensor already has, assertions about metadata
    """
    aten = torch().ops.aten
    same = {
        *(aten.dropout.default, aten.contiguous.default, aten.clone.default),
        *(aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default),
    }
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in same:
            _drop(graph, node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in (aten.to.dtype, aten.to.device):
            dtype = node.args[1] if node.target is aten.to.dtype else node.args[2]
            if node.args[0].meta["val"].dtype == dtype:
                _drop(graph, node)
            else:
                node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": dtype}
    program.graph_module.recompile()


def _drop(graph: Any, node: Any) -> None:
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


@contextmanager
def as_traced() -> Iterator[bool]:
    """Inside, torch.onnx.export does not trace again. Gives False where this torch has no such step to skip."""
    try:
        passes = library("torch.onnx._internal.exporter._fx_passes")
        original = passes.decompose_with_registry
    except (ImportError, AttributeError):  # private names: another torch may have moved them
        yield False
        return
    passes.decompose_with_registry = lambda program, registry: program
    try:
        yield True
    finally:
        passes.decompose_with_registry = original
