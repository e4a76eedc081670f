"""Write nodes into an onnx-ir graph: short names, every small constant once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["Writer", "integer", "integers"]

Array = NDArray[Any]


class Writer:
    """Adds nodes one after the other before the node `before`, at the end of the graph where that is None."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.before: ir.Node | None = None
        self.opset = graph.opset_imports.get("", 1)
        self._prefix, self._count = prefix, 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def add(
        self,
        operator: str,
        *inputs: ir.Value | None,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The output of a new node."""
        node = ir.node(operator, inputs, attributes=attributes, domain=domain, name=self._name())
        node.outputs[0].name = node.name
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, array: Array) -> ir.Value:
        """A small initializer; equal ones are one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(self._name(), array)
        return self._constants[key]

    def sizes(self, *sizes: int) -> ir.Value:
        return self.constant(np.array(sizes, np.int64))

    def weight(self, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """The initializer of that name, made of `array` at the first call."""
        if name not in self.graph.initializers:
            # not ascontiguousarray, which makes vectors of scalars: Range refuses those where it knows the sizes
            data = ir.tensor(np.asarray(array, order="C"), dtype, name=name)
            self.graph.register_initializer(ir.Value(name=name, const_value=data))
        return self.graph.initializers[name]

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count}"


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    attribute: Any = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def integers(node: ir.Node, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    attribute: Any = node.attributes.get(name)
    return default if attribute is None else tuple(attribute.as_ints())
