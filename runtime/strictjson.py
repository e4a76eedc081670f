"""JSON read as data from a stranger: everything Python's json lets through by kindness is refused here.

`loads` checks the text, `decode` the shape (against a frozen dataclass), `dumps` writes one fixed form.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

from .errors import BundleError

__all__ = ["MAX_BYTES", "decode", "dumps", "encode", "loads"]

MAX_BYTES = 16 * 1024 * 1024
"""A manifest is tens of kilobytes, the largest CLIP tokenizer 4 MB."""

MAX_DEPTH = 32
"""A manifest nests 6 deep; this leaves room for reports and keeps every recursion short."""

MAX_INT = 2**64 - 1

T = TypeVar("T")


def loads(text: str | bytes, where: str) -> Any:
    """Parse `text`; `where` names it in errors.

    Raises BundleError for more than 16 MB, bytes that are not UTF-8, a syntax error, a key given twice,
    NaN, Infinity or a number out of range, nesting deeper than 32 and lone surrogates (they cannot be
    written back).
    """

    def refuse(found: str, expected: str = "") -> NoReturn:
        raise BundleError(f"{where}: {found}", expected=expected, fix="export it again, or download it again")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            keys = [key for key, _ in items]
            refuse(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice in one object")
        return result

    def constant(name: str) -> NoReturn:
        refuse(f"the number {name}", "finite numbers only")

    def floating(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(f"the number {digits[:40]}", "finite numbers only")

    def integer(digits: str) -> int:
        # Python itself refuses more than 4300 digits with a ValueError; no field of ours needs more
        # than 64 bits
        if len(digits) > 20 or not -MAX_INT <= (value := int(digits)) <= MAX_INT:
            refuse(f"the number {digits[:40]}", "at most 64 bits")
        return value

    if len(text) > MAX_BYTES:
        refuse(f"{len(text):,} bytes of JSON", f"at most {MAX_BYTES:,}")
    if not text.strip():
        refuse("the file is empty", "JSON")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_float=floating, parse_int=integer
        )
    except BundleError:
        raise
    except RecursionError:
        refuse("its JSON is nested too deeply", f"at most {MAX_DEPTH} levels")
    except ValueError as error:
        refuse(f"it is not JSON ({error})")
    check_plain(value, where)
    return value


def check_plain(value: Any, where: str) -> None:
    """Raise BundleError unless `value` holds only what JSON can carry, wherever it came from."""
    stack: list[tuple[Any, int]] = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise BundleError(
                f"{where}: its JSON is nested too deeply", expected=f"at most {MAX_DEPTH} levels"
            )
        if isinstance(item, Mapping):
            if not all(isinstance(key, str) for key in item):
                raise BundleError(f"{where}: a key that is not text", expected="what JSON can carry")
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            stack += [(part, depth + 1) for part in item]
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise BundleError(
                    f"{where}: lone surrogate in {item[:40]!r}", expected="valid Unicode"
                ) from None
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise BundleError(f"{where}: the number {item}", expected="finite numbers only")
        elif item is not None and not isinstance(item, bool | int):
            raise BundleError(f"{where}: a {type(item).__name__}", expected="what JSON can carry")


def dumps(value: Any) -> str:
    """One fixed form, equal bytes for equal values: sorted keys, two spaces, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def encode(value: Any) -> Any:
    """Dataclasses, mappings and tuples as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [encode(part) for part in value]
    return value


def decode(kind: type[T], value: Any, where: str) -> T:
    """A plain JSON value as an instance of the dataclass `kind`; every field must be there and no other.

    `where` names the value in errors: "manifest.json: sample.height". Raises BundleError.
    """
    return typing.cast(T, _decode(kind, value, where))


@lru_cache
def _fields(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        fields = _fields(typing.cast(type, kind))
        given = set(_expect(value, dict, "an object", where))
        if missing := sorted(fields.keys() - given):
            raise BundleError(
                f"{where}: no field {missing[0]!r}", fix="update fewstep, or export the bundle again"
            )
        if extra := sorted(given - fields.keys()):
            raise BundleError(
                f"{where}: unknown field {extra[0][:80]!r}", fix="update fewstep, or remove the field"
            )
        build: Any = kind  # to mypy a dataclass found at run time is not callable
        return build(**{name: _decode(h, value[name], f"{where}: {name}") for name, h in fields.items()})
    if origin is tuple:
        items = _expect(value, list, "a list", where)
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is Mapping:
        items = _expect(value, dict, "an object", where)
        return {key: _decode(arguments[1], item, f"{where}[{key[:80]!r}]") for key, item in items.items()}
    if origin in (Union, types.UnionType):
        if type(value) in arguments:
            return value
        rest = [option for option in arguments if option is not types.NoneType]  # X | None, or int | str
        return _decode(rest[0], value, where) if len(rest) == 1 else _wrong(value, "number or name", where)
    if kind is float and type(value) is int:
        return float(value)  # other languages write 1.0 as 1
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return _expect(value, kind, names[kind], where)


def _expect(value: Any, kind: type, name: str, where: str) -> Any:
    # type(), not isinstance(): True is no whole number here
    return value if type(value) is kind else _wrong(value, name, where)


def _wrong(value: Any, expected: str, where: str) -> NoReturn:
    shown = repr(value)
    raise BundleError(
        f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}",
        expected=expected,
        fix="export the bundle again",
    )
