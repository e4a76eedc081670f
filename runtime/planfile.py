"""Reading a plan from JSON: every number checked before anything runs. spec/plan.md is what is checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import PlanError
from .linear import Term, Terms
from .manifest import IDENTIFIER
from .plan import MAX_CALLS, Call, Plan
from .policy import policies_from_json
from .times import check_steps

MAX_GIVEN = 16
"""Arrays a caller may have to bring; published processes need one, exact inversions two."""


def read(data: Mapping[str, Any] | str) -> Plan:
    """See Plan.from_json."""
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except ValueError as error:
            raise PlanError(f"a plan that is not JSON ({error})") from None
    if not isinstance(data, Mapping) or set(data) != _PLAN_FIELDS:
        found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise PlanError(f"a plan with {found}", expected=", ".join(sorted(_PLAN_FIELDS)))
    rows = data["calls"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_CALLS:
        raise PlanError("a plan whose calls are missing or too many", expected=f"1 to {MAX_CALLS} rows")
    if not isinstance(data["sampler"], str) or not isinstance(data["prediction"], str):
        raise PlanError("a plan whose sampler or prediction is not a name")
    check_steps(data["steps"])
    init = _terms(data["init"], {"z": 1, "y": MAX_GIVEN}, "init")
    calls, states = [], 1
    for k, row in enumerate(rows):
        calls.append(_call(row, k, states))
        states += calls[-1].next is not None
    if calls[-1].next is None:
        raise PlanError("a plan whose last call leads to no state", expected="a next state in the last row")
    return Plan(data["sampler"], data["steps"], data["prediction"], init, tuple(calls))


_PLAN_FIELDS = {"sampler", "steps", "prediction", "init", "calls"}
_FIELDS = {"t", "timestep", "input", "scale", "x0", "next", "graph", "guided", "policies"}


def _call(row: Any, k: int, states: int) -> Call:
    if not isinstance(row, Mapping) or set(row) != _FIELDS:
        raise PlanError(f"call {k} of a plan", expected=f"the fields {', '.join(sorted(_FIELDS))}")
    named = isinstance(row["graph"], str) and IDENTIFIER.fullmatch(row["graph"])
    if not named or not isinstance(row["guided"], bool):
        raise PlanError(f"call {k} of a plan", expected="graph as a name and guided as true or false")
    if not isinstance(row["x0"], list) or len(row["x0"]) != 3:
        raise PlanError(f"call {k} of a plan", expected="x0 as three numbers")
    a, b, c = (_number(value, f"call {k}: x0") for value in row["x0"])
    known = {"x": states, "d": k, "n": MAX_CALLS, "y": MAX_GIVEN}
    return Call(
        t=_number(row["t"], f"call {k}: t"),
        timestep=_number(row["timestep"], f"call {k}: timestep"),
        input=_terms(row["input"], known, f"call {k}: input"),
        scale=_number(row["scale"], f"call {k}: scale"),
        x0=(a, b, c),
        next=None if row["next"] is None else _terms(row["next"], {**known, "d": k + 1}, f"call {k}: next"),
        graph=row["graph"],
        guided=row["guided"],
        policies=policies_from_json(row["policies"], f"call {k} of a plan"),
    )


def _terms(data: Any, known: dict[str, int], where: str) -> Terms:
    """`known` counts the states, predictions and noises that exist when these terms are read."""
    if not isinstance(data, list) or not 1 <= len(data) <= 3 * MAX_CALLS:
        raise PlanError(f"{where} of a plan", expected="at least one [kind, index, coefficient]")
    terms: list[Term] = []
    for term in data:
        if not isinstance(term, list) or len(term) != 3:
            raise PlanError(f"{where} of a plan has the term {term!r}", expected="[kind, index, coefficient]")
        kind, i, c = term
        known_kind = isinstance(kind, str) and kind in known
        if not known_kind or type(i) is not int or not 0 <= i < known[kind]:
            raise PlanError(f"{where} of a plan reads {kind!r} {i!r}, which does not exist yet")
        terms.append((kind, i, _number(c, where)))
    return tuple(terms)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlanError(f"{where} of a plan is {value!r}", expected="a finite number")
    return float(value)
