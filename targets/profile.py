"""What a device is known to reach, and what follows for a network: a sum of shares, one for each class of work.

    seconds of a call = sum over classes of (amount / rate), over the cores that take part
    memory            = the process + for each part its graph, its weights and its activations

A class is what one kind of kernel does: products of convolutions, of linear layers, of attention, values moved by all
else, bytes of weights read, kernels started. It is a roofline whose parts are added where a roofline takes the largest:
an engine runs operator after operator, some of them bound by one thing and some by another (Williams et al. 2009,
"Roofline", section 3, for the bound). benchmarks/preflight.py finds the rates and how far the sum is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

__all__ = ["CLASSES", "Demand", "Profile", "Rates"]

CLASSES = (
    *("convolution", "linear", "attention"),
    *("moved", "gathered", "spilled", "weights", "cached"),
    *("operators", "calls"),
)
"""Amounts of a Demand, in this order: operations, bytes, and kernels started."""


@dataclass(frozen=True)
class Demand:
    """What one call of a part asks of a device."""

    convolution: float = 0.0
    """Operations, two for each product and its sum."""
    linear: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    """Bytes read and written by norms, activation functions, sums and copies."""
    gathered: float = 0.0
    """Bytes copied where an engine spells an integer convolution as a gather of pixels and a product."""
    spilled: float = 0.0
    """The same where they do not fit into the last cache."""
    weights: float = 0.0
    """Bytes of weights read from memory."""
    cached: float = 0.0
    """Bytes of weights read where all of them stay in the last cache from call to call."""
    operators: float = 0.0
    """Kernels started."""
    calls: float = 1.0
    alive: float = 0.0
    """Bytes of activations at the worst moment."""
    held: float = 0.0
    """Bytes of weights as they are stored, or as an engine unpacks them."""
    parsed: float = 0.0
    """Bytes of a file that is in memory beside what is made of it, while it is loaded."""

    def at(self, batch: int) -> Demand:
        """Of so many samples in one call: weights and kernels are the same."""
        grow = ("convolution", "linear", "attention", "moved", "gathered", "spilled", "alive")
        return replace(self, **{name: batch * getattr(self, name) for name in grow})

    def amounts(self) -> tuple[float, ...]:
        """By CLASSES."""
        return tuple(getattr(self, name) for name in CLASSES)

    def sizes(self) -> tuple[float, ...]:
        """What memory goes by: weights held, activations alive, kernels, parts."""
        return self.held, self.alive, self.operators, 1.0

    def to_json(self) -> dict[str, float]:
        return {name: round(value) for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Demand:
        names = {item.name for item in fields(cls)}
        return cls(**{name: float(value) for name, value in data.items() if name in names})


@dataclass(frozen=True)
class Rates:
    """Of one core, or of a whole GPU or NPU, in one precision. A rate of 0 takes no time."""

    convolution_gops: float = 0.0
    """10^9 operations a second."""
    linear_gops: float = 0.0
    attention_gops: float = 0.0
    moved_gb_s: float = 0.0
    """10^9 bytes a second."""
    gathered_gb_s: float = 0.0
    spilled_gb_s: float = 0.0
    weights_gb_s: float = 0.0
    cached_gb_s: float = 0.0
    operator_us: float = 0.0
    """Microseconds a kernel takes whatever it does."""
    call_us: float = 0.0
    held: float = 1.0
    """Bytes in memory for each byte of stored weights: engines lay them out anew."""
    alive: float = 1.0
    """Bytes in memory for each byte of activations alive at once."""
    operator_kib: float = 0.0
    """Memory a kernel takes whatever it does: its node, its compiled code."""
    part_mib: float = 0.0
    """Memory a loaded part takes whatever is in it."""

    def seconds(self) -> tuple[float, ...]:
        """By CLASSES: of one operation, byte, kernel or call."""
        rates = (
            *(self.convolution_gops, self.linear_gops, self.attention_gops),
            *(self.moved_gb_s, self.gathered_gb_s, self.spilled_gb_s, self.weights_gb_s, self.cached_gb_s),
        )
        return (
            *(1e-9 / rate if rate else 0.0 for rate in rates),
            self.operator_us * 1e-6,
            self.call_us * 1e-6,
        )

    def bytes(self) -> tuple[float, ...]:
        """Of one held byte, byte alive, kernel and part, as `Demand.sizes` has them."""
        return self.held, self.alive, self.operator_kib * 1024, self.part_mib * 2**20

    @classmethod
    def of_seconds(cls, seconds: tuple[float, ...], memory: Rates) -> Rates:
        """The inverse of `seconds`; what memory is taken is that of other rates."""
        names = [f"{name}_gops" for name in CLASSES[:3]] + [f"{name}_gb_s" for name in CLASSES[3:8]]
        found = {name: 1e-9 / each if each else 0.0 for name, each in zip(names, seconds, strict=False)}
        found |= {"operator_us": seconds[8] * 1e6, "call_us": seconds[9] * 1e6}
        return replace(memory, **{name: float(f"{value:.4g}") for name, value in found.items()})


@dataclass(frozen=True)
class Profile:
    cores: int = 1
    """That run the engine; 1 for a GPU or an NPU, whose rates are the whole device's."""
    parallel: float = 1.0
    """Share of a core's speed that each core beyond the first adds."""
    base_mib: float = 0.0
    """Memory of a process with the runtime and the engine in it and no network."""
    between_us: float = 0.0
    """Microseconds of the runtime itself for each call of a network: tokens, noise, the sampler, copies."""
    gathers: bool = False
    """Whether an integer convolution is a gather of pixels and a product there."""
    inline_mib: float = 0.0
    """Float32 weights of a part up to which they lie inside its graph, which is parsed as a whole."""
    cache_mib: float = 32.0
    """The last cache of a processor: gathers of more are slow, and weights of less are read quickly."""
    unpacks: bool = False
    """Whether weights that alone are integers lie in memory as floats."""
    stored_bits: float = 0.0
    """Of every weight on disk and in memory, where the format compresses them whatever the recipe says; 0: it does
    not."""
    node_bytes: int = 640
    """Of a graph on disk, for each operator torch calls: 350 to 1,000 in ONNX files (benchmarks/preflight.py)."""
    schemes: tuple[str, ...] = ("w8a8", "w4a8")
    """Quantizations to try where a model does not fit, the better picture first."""
    rates: Mapping[str, Rates] = field(default_factory=dict)
    """float32, bfloat16 or float16, and int8 for parts whose inputs are integers as well."""

    def of(self, precision: str) -> Rates:
        """The rates of a precision; where there are none, those of the nearest one that is known."""
        for name in (precision, "float16", "bfloat16", "float32", *self.rates):
            if name in self.rates:
                return self.rates[name]
        return Rates()

    def seconds(self, demand: Demand, precision: str, cores: int | None = None) -> float:
        """Of one call on so many cores; None: on all."""
        speed = 1 + self.parallel * ((cores or self.cores) - 1)
        each = zip(demand.amounts(), self.of(precision).seconds(), strict=True)
        return sum(amount * seconds for amount, seconds in each) / speed

    def shares(self, demand: Demand, precision: str) -> dict[str, float]:
        """Class -> what of a call's time it takes, those that take any."""
        each = dict(
            zip(CLASSES, zip(demand.amounts(), self.of(precision).seconds(), strict=True), strict=True)
        )
        spent = {name: amount * seconds for name, (amount, seconds) in each.items()}
        total = sum(spent.values())
        return {name: value / total for name, value in spent.items() if value} if total else {}

    def memory(self, demand: Demand, precision: str) -> float:
        """Bytes that a part takes once it has run."""
        each = zip(demand.sizes(), self.of(precision).bytes(), strict=True)
        return sum(amount * size for amount, size in each)
