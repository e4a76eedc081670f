"""Symbols that samplers run on when they are compiled: linear combinations of named values."""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import NotLinear

Term = tuple[str, int, float]
Terms = tuple[Term, ...]
"""(kind, index, coefficient): "x" is a state, "d" the data prediction of a call, "n" a fresh noise, "y" a given array,
"z" the noise a run starts from."""


class Linear:
    """A combination of values that adds, subtracts and scales; anything else is not linear and says so."""

    __array_ufunc__ = None  # numpy's scalars then leave scalar * Linear to __rmul__
    __slots__ = ("_c",)

    def __init__(self, coefficients: dict[tuple[str, int], float]) -> None:
        self._c = coefficients

    @classmethod
    def atom(cls, kind: str, index: int) -> Linear:
        return cls({(kind, index): 1.0})

    @property
    def terms(self) -> Terms:
        """States, predictions, noises, given arrays, each oldest first; terms that cancelled exactly are left out."""
        if not self._c:
            raise NotLinear("a sampler whose state is constant zero")
        order = "xdny"
        kept = {key: c for key, c in self._c.items() if c != 0.0} or dict(list(self._c.items())[:1])
        return tuple(
            (k, i, c) for (k, i), c in sorted(kept.items(), key=lambda e: (order.index(e[0][0]), e[0][1]))
        )

    def become(self, atom: tuple[str, int]) -> None:
        """Stand for a value that has just been given a name of its own."""
        self._c = {atom: 1.0}

    def __add__(self, other: Any) -> Linear:
        if not isinstance(other, Linear):
            _scalar_only("add", other)
        total = dict(self._c)
        for key, c in other._c.items():
            total[key] = total.get(key, 0.0) + c
        return Linear(total)

    def __mul__(self, factor: Any) -> Linear:
        if isinstance(factor, Linear):
            _scalar_only("multiply", factor)
        return Linear({key: c * float(factor) for key, c in self._c.items()})

    def __neg__(self) -> Linear:
        return Linear({key: -c for key, c in self._c.items()})

    def __sub__(self, other: Any) -> Linear:
        if not isinstance(other, Linear):
            _scalar_only("subtract", other)
        return self + -other

    def __truediv__(self, divisor: Any) -> Linear:
        if isinstance(divisor, Linear):
            _scalar_only("divide by", divisor)
        return Linear({key: c / float(divisor) for key, c in self._c.items()})

    __rmul__ = __mul__


def _scalar_only(verb: str, other: object) -> NoReturn:
    raise NotLinear(
        f"a sampler that wants to {verb} a {type(other).__name__}",
        expected="sums of samples and products with numbers",
        fix="run it as a Python function instead of compiling it to a plan",
    )
