"""Mixed precision: the options of least predicted error that a budget allows, and which layers to relax if it is not
enough.

Errors of layers add in squares, so the choice is a knapsack with one option for each layer: an integer programme of one
constraint, solved by HiGHS (Huangfu and Hall 2018) through scipy. With layers as small beside the whole as emoji-64's
greed finds what it finds; with few large ones it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import BadInput, MissingExtra
from .table import FLOAT, Table, bits_of, decibels

__all__ = [
    "PROTECTED",
    "Budget",
    "Pin",
    "Relaxed",
    "average_bits",
    "choose",
    "propose",
    "time_cost",
    "total_bytes",
]

Array = NDArray[Any]
Cost = Callable[[str, str], float]

WHOLE = 32
"""Bits that stand for floating point in a Pin."""

GAP = 1e-6
"""Between the best found and what is proven possible; predictions are good to a tenth."""

SECONDS = 60.0
"""After which the solver's best so far counts; it takes well under one for 133 layers of three options."""


@dataclass(frozen=True)
class Pin:
    """Least bits of the layers whose names fit a pattern."""

    pattern: str
    """As fnmatch has it: "*conv_in"."""
    weights: int = 0
    """WHOLE (32): they stay floats."""
    inputs: int = 0
    reason: str = ""

    def allows(self, layer: str, option: str) -> bool:
        if not fnmatchcase(layer, self.pattern):
            return True
        weights, inputs = (WHOLE if bits is None else bits for bits in bits_of(option))
        return weights >= self.weights and inputs >= self.inputs


PROTECTED = (
    Pin("*conv_in", 8, 8, "the first layer"),
    Pin("*conv_out", 8, 8, "the last layer"),
    Pin("*time_embedding.linear_*", 8, WHOLE, "the time embedding: its inputs stay floats"),
    Pin("*time_emb_proj", 0, WHOLE, "what the time embedding feeds: its inputs stay floats"),
)
"""What Q-Diffusion, QuEST and Qua2SeDiMo all keep at more bits than the rest."""


@dataclass(frozen=True)
class Budget:
    """At most `limit` of whatever `cost` counts, summed over the layers of a table."""

    limit: float
    cost: Cost
    """(layer, option) -> at least 0."""
    unit: str
    """For messages: "bits a weight"."""
    per: float = 1.0
    """What `limit` and messages divide the sum by."""


def average_bits(table: Table, bits: float) -> Budget:
    """Stored bits of a weight, scales included, on average over all weights of the table."""
    return Budget(bits, table.stored_bits, "bits a weight", float(sum(table.weights)))


def total_bytes(table: Table, size: int) -> Budget:
    """Of all weights, scales included."""
    return Budget(size, lambda layer, option: table.stored_bits(layer, option) / 8, "bytes")


def time_cost(
    table: Table, limit: float, relative: Mapping[str, float], unit: str = "multiply-accumulates"
) -> Budget:
    """Time as multiply-accumulates times what one costs under each option, as the engine runs it.

    limit     in the same unit, for one sample at one step
    relative  option -> cost of one: {"float": 1.0, "w8a8": 0.3}; those that are not named cost as much as "float"
    """
    macs, plain = dict(zip(table.layers, table.macs, strict=True)), relative.get(FLOAT, 1.0)
    return Budget(limit, lambda layer, option: macs[layer] * relative.get(option, plain), unit)


@dataclass(frozen=True)
class Relaxed:
    """One layer raised, and what that is predicted to give on top of those before it."""

    layer: str
    before: str
    after: str
    final_db: float
    """Predicted SQNR of the final latents with this and all before it."""
    bytes: int
    """More than before."""


def choose(
    table: Table,
    budget: Budget,
    options: Sequence[str],
    *,
    pins: Sequence[Pin] = PROTECTED,
    fixed: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """An option for every layer: the predicted error of the final latents is least, and the budget is kept.

    options  to choose from: ("w8", "w4", "w3"), ("w8a8", "w4a8", "float")
    pins     a layer that they leave no option of those gets the nearest that they allow, as high as they demand
    fixed    layer -> option, whatever the pins say
    Raises BadInput for a budget that cannot be met, saying the nearest that can; for a layer that is not in the table
    or an option without figures; MissingExtra without scipy.
    """
    fixed = dict(fixed or {})
    if unknown := sorted(set(fixed) - set(table.layers)):
        raise BadInput(f"a fixed layer {unknown[0]!r}", expected=f"a layer of {table.part}")
    if bad := [layer for layer, option in fixed.items() if not table.takes(layer, option)]:
        raise BadInput(
            f"{bad[0]} as {fixed[bad[0]]}", expected=f"one of {', '.join(table.options)}, or float"
        )
    allowed = {
        layer: [fixed[layer]] if layer in fixed else _allowed(table, layer, options, pins)
        for layer in table.layers
    }
    errors = {layer: [table.error(layer, o) for o in allowed[layer]] for layer in table.layers}
    costs = {layer: [budget.cost(layer, o) / budget.per for o in allowed[layer]] for layer in table.layers}
    least = sum(min(each) for each in costs.values())
    if least > budget.limit * (1 + 1e-9):  # the rounding of a few thousand sums
        raise BadInput(
            f"a budget of {budget.limit:.6g} {budget.unit} for {table.part}",
            expected=f"at least {_up(least)} {budget.unit}, what {', '.join(options)} and the protected layers allow",
            fix=f"ask for {_up(least)}, or allow options of fewer bits",
        )
    picked = _solve([errors[n] for n in table.layers], [costs[n] for n in table.layers], budget.limit)
    return {layer: allowed[layer][i] for layer, i in zip(table.layers, picked, strict=True)}


def propose(
    table: Table,
    chosen: Mapping[str, str],
    floor_db: float,
    *,
    measured_db: float | None = None,
    options: Sequence[str] = (),
    pins: Sequence[Pin] = (),
) -> list[Relaxed]:
    """Which few layers to raise, in order, so that the final latents are predicted to reach a floor.

    chosen       layer -> option now; layers that are not named are float already
    floor_db     SQNR of the final latents
    measured_db  what they have now; None: what is predicted. The prediction is scaled to it.
    options      that layers may be raised to; "float" always is
    Each step takes the layer that loses most error. It goes to the smallest option that leaves a quarter of its error
    at most, which is what one bit more does to a uniform grid, or to float. [] where the floor is reached already.
    With `table.of_outputs()` the decibels are those of the part's output, which are predicted best: of 3.5 dB promised
    on emoji-64 at 4 bits 3.3 came, of 3.1 dB of final latents 1.5 (benchmarks/results/sensitivity.json).
    """
    now = dict(chosen)
    error = table.predicted(now)
    scale = 1.0 if measured_db is None or error == 0 else 10 ** (-measured_db / 10) / error
    target = 10 ** (-floor_db / 10) / scale
    steps: list[Relaxed] = []
    while error > target * (1 + 1e-9) and any(option != FLOAT for option in now.values()):  # rounding
        gained = {}
        for layer, option in now.items():
            if option != FLOAT:
                better = _next(table, layer, option, options, pins)
                gained[layer] = (table.error(layer, option) - table.error(layer, better), better)
        layer = max(gained, key=lambda name: gained[name][0])
        before, after = now[layer], gained[layer][1]
        now[layer] = after
        error = max(0.0, table.predicted(now))
        more = table.stored_bits(layer, after) - table.stored_bits(layer, before)
        steps.append(Relaxed(layer, before, after, round(decibels(error * scale), 2), math.ceil(more / 8)))
    return _merged(steps)


def _merged(steps: Sequence[Relaxed]) -> list[Relaxed]:
    """A layer that was raised more than once, once: where it came last."""
    merged: dict[str, Relaxed] = {}
    for step in steps:
        first = merged.pop(step.layer, None)
        more = step.bytes + (first.bytes if first else 0)
        before = first.before if first else step.before
        merged[step.layer] = Relaxed(step.layer, before, step.after, step.final_db, more)
    return list(merged.values())


def _next(table: Table, layer: str, option: str, options: Sequence[str], pins: Sequence[Pin]) -> str:
    error = table.error(layer, option)
    better = [
        other
        for other in options
        if table.takes(layer, other)
        and table.error(layer, other) <= error / 4
        and all(pin.allows(layer, other) for pin in pins)
    ]
    return min(better, key=lambda o: (table.stored_bits(layer, o), table.error(layer, o)), default=FLOAT)


def _allowed(table: Table, layer: str, options: Sequence[str], pins: Sequence[Pin]) -> list[str]:
    """Those of `options` that the layer can take and the pins allow, or the nearest above."""
    within = [o for o in options if table.takes(layer, o) and all(pin.allows(layer, o) for pin in pins)]
    if within:
        return within
    mine = [pin for pin in pins if fnmatchcase(layer, pin.pattern)]
    raised = []
    for option in options:
        weights, inputs = (WHOLE if bits is None else bits for bits in bits_of(option))
        weights = max([weights, *(pin.weights for pin in mine)])
        inputs = max([inputs, *(pin.inputs for pin in mine)])
        # an Embedding has no input to round
        either = [_named(weights, inputs), _named(weights, WHOLE)]
        raised.append(next((option for option in either if table.takes(layer, option)), FLOAT))
    return list(dict.fromkeys(raised))


def _named(weights: int, inputs: int) -> str:
    """The option of so many bits."""
    return (f"w{weights}" if weights < WHOLE else "") + (f"a{inputs}" if inputs < WHOLE else "") or FLOAT


def _solve(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> list[int]:
    """For each layer the index of its option: least sum of errors with the sum of costs within the limit."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ModuleNotFoundError:
        raise MissingExtra.of("scipy", "quant") from None
    start = _greedy(errors, costs, limit)
    bound = sum(row[i] for row, i in zip(errors, start, strict=True))
    if bound == 0:
        return start
    # the solver's tolerances are absolute: errors in units where the greedy sum is a thousand
    objective = np.array([e for row in errors for e in row]) * (1000 / bound)
    cost = np.array([c for row in costs for c in row]) / max(limit, np.finfo(np.float64).tiny)
    lengths = [len(row) for row in errors]
    owner = np.repeat(np.arange(len(errors)), lengths)
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    # an option that alone is worse than the greedy answer is in no best one
    upper = (objective <= 1000 * (1 + 1e-9)).astype(float)
    found = milp(
        np.minimum(objective, 1e4),
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, upper),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(cost[None, :]), -np.inf, 1),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        return start
    begins = np.cumsum([0, *lengths[:-1]])
    picked = [int(np.argmax(found.x[b : b + n])) for b, n in zip(begins, lengths, strict=True)]
    spent = sum(row[i] for row, i in zip(costs, picked, strict=True))
    better = sum(row[i] for row, i in zip(errors, picked, strict=True)) <= bound
    return picked if better and spent <= limit * (1 + 1e-9) else start


def _greedy(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> list[int]:
    """From the cheapest options upwards, always the step that saves most error for its cost."""
    picked = [min(range(len(c)), key=lambda i: (c[i], e[i])) for e, c in zip(errors, costs, strict=True)]
    spent = sum(row[i] for row, i in zip(costs, picked, strict=True))
    while True:
        best, which = 0.0, None
        for n, (e, c) in enumerate(zip(errors, costs, strict=True)):
            now = picked[n]
            for i in range(len(e)):
                saved, more = e[now] - e[i], c[i] - c[now]
                if saved <= 0 or spent + more > limit:
                    continue
                rate = saved / more if more > 0 else math.inf
                if rate > best:
                    best, which = rate, (n, i)
        if which is None:
            return picked
        n, i = which
        spent += costs[n][i] - costs[n][picked[n]]
        picked[n] = i


def _up(value: float) -> str:
    """Rounded up to what the user may type and be let through: hundredths, or whole numbers where large."""
    return f"{math.ceil(value):,}".replace(",", "") if value >= 1000 else f"{math.ceil(value * 100) / 100:g}"
