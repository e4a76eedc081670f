"""Make runtime/web/tests/fixtures/refused.json: python -m tests.runtime.golden_refused

What a reader must refuse, and what it must not: manifests and plans with every field changed in every way, file lists,
JSON texts and ONNX graphs, each with what Python's reader says about it (null: it takes it).
"""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

from fewstep.runtime import DiscreteVP, Plan, manifest, plan, planfile
from fewstep.runtime.errors import BadInput
from fewstep.runtime.graphfile import check_graph
from fewstep.runtime.linear import Term
from fewstep.runtime.manifest import Manifest
from fewstep.runtime.paths import check_paths
from fewstep.runtime.policy import Clip, LearnedVariance, Threshold, TimeShift
from fewstep.runtime.strictjson import loads

from .test_graphfile import external, model
from .test_manifest import BAD_PATHS, GOOD_PATHS, dynamic, example

FILE = Path(__file__).parents[2] / "runtime/web/tests/fixtures/refused.json"
LITERALS = (
    "null",
    "true",
    "7",
    "7.5",
    "1.0",
    "-1",
    "0",
    '"x"',
    '""',
    "[]",
    "{}",
    "1e999",
    "18446744073709551616",
)
HOLE = "@@"


def verdict(read: Callable[[], Any]) -> str | None:
    """What was found wrong; None where nothing was."""
    try:
        read()
    except BadInput as error:
        return error.found
    return None


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield at
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(item, (*at, key))


def edited(base: Any, at: tuple[str | int, ...], literal: str | None) -> str:
    """The text with a value replaced by a literal, or (None) left out."""
    data = json.loads(json.dumps(base))
    inside = data
    for key in at[:-1]:
        inside = inside[key]
    if literal is None:
        del inside[at[-1]]
        return json.dumps(data)
    inside[at[-1]] = HOLE
    return json.dumps(data).replace(f'"{HOLE}"', literal)


def edits(base: Any, read: Callable[[str], Any], more: dict[str, tuple[str, ...]]) -> list[Any]:
    """[place, [[literal, verdict], ...]] for every place; `more` literals for fields of those names."""

    def trial(at: tuple[str | int, ...], literal: str | None) -> list[str | None]:
        return [literal, verdict(lambda: read(edited(base, at, literal)))]

    found = []
    for at in places(base):
        if at:
            tries = [None, *LITERALS, *more.get(str(at[-1]), ())]
            found.append([at, [trial(at, literal) for literal in tries]])
        if isinstance(_value(base, at), dict):
            found.append([(*at, "unknown"), [trial((*at, "unknown"), "1")]])
    return found


def _value(base: Any, at: tuple[str | int, ...]) -> Any:
    for key in at:
        base = base[key]
    return base


def full_manifest() -> dict[str, Any]:
    made = dataclasses.replace(
        example(),
        classes=10,
        grid=manifest.GridSpec(
            "karras", 1, "first", 3.0, manifest.DynamicShift(), 0.1, 0.03, 14.6, "leading", 5.0
        ),
        versions={"fewstep": "1"},
    )
    data: dict[str, Any] = json.loads(made.to_json())
    return {**data, "grid": {**data["grid"], "dynamic": dynamic()}}


def full_plan() -> dict[str, Any]:
    """A plan of two calls with every policy, noise and a given array."""
    table = plan("ddpm", 2, DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000))
    policies = (Clip(), Threshold(), TimeShift(((1.0, 1.0, 1.0, 1.0, 0.0),)), LearnedVariance(0.1))
    given: Term = ("y", 0, 0.5)
    first = dataclasses.replace(table.calls[0], policies=policies, input=(*table.calls[0].input, given))
    return dataclasses.replace(table, calls=(first, *table.calls[1:])).to_json()


def texts() -> Iterator[bytes]:
    deep = "[" * 32 + "]" * 32
    yield from (
        t.encode()
        for t in ("", " ", "{", "}", "[1,]", '{"a":1,}', '{"a" 1}', '{"a":1 "b":2}', "[1 2]", "nul")
    )
    yield from (
        t.encode()
        for t in ("01", "1.", ".5", "+1", "-", "1e", "1e5", "-0", "-0.0", "0x1", "NaN", "-Infinity")
    )
    yield from (
        t.encode() for t in ('"\\u12"', '"\\x"', '"\t"', '"a', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\ude00"')
    )
    yield from (
        t.encode() for t in ('{"a":1,"a":2}', '{"__proto__":1}', '{"__proto__":1,"__proto__":1}', "[1]x")
    )
    yield from (
        t.encode() for t in (deep, f"[{deep}]", deep.replace("[]", "[1]"), "[" * 5000, '{"\\ud800":1}')
    )
    yield from (
        b"\xff",
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b'"\xed\xa0\x80"',
        b"1" * 20,
        b"-" + b"9" * 21,
        b"[1e400]",
    )


def graphs() -> Iterator[tuple[bytes, dict[str, int]]]:
    """A graph and the files beside it."""

    def tensor(edit: Callable[[Any, Any], Any]) -> Any:
        m = model()
        edit(m, m.graph.initializer[0])
        return m

    def twin(**entries: str) -> Any:
        m = external(model())
        other = m.graph.initializer.add()
        other.CopyFrom(m.graph.initializer[0])
        other.name = "twin"
        for entry in other.external_data:
            entry.value = entries.get(entry.key, entry.value)
        return m

    def node(edit: Callable[[Any, Any], Any]) -> Any:
        m = model()
        edit(m, m.graph.node[1])
        return m

    def dims(*sizes: int) -> Any:
        return tensor(lambda m, t: (t.ClearField("dims"), t.dims.extend(sizes)))

    plain, whole = model(), model().SerializeToString()
    made = [plain, external(model()), twin(), twin(offset="24"), twin(offset="8"), twin(location="other")]
    locations = (
        "../secret",
        "/etc/passwd",
        "sub/model.onnx_data",
        "*",
        "",
        ".",
        "..",
        "C:x",
        "a\\b",
        "unknown",
    )
    made += [external(model(), location=location) for location in locations]
    made += [
        external(model(), offset=n) for n in ("-1", "1e3", "", " 1", "9" * 20, "77", "76", "1000000000000")
    ]
    made += [external(model(), length=n) for n in ("23", "", "1099511627776")]
    made += [external(model(), basepath="/"), external(model(), checksum="0")]
    made += [
        dims(2**31, 2**31),
        dims(2**62),
        dims(-2),
        dims(*[1] * 33),
        dims(*[1] * 10_000),
        dims(3, 2),
        dims(0),
    ]
    made += [tensor(lambda m, t, n=n: setattr(t, "raw_data", bytes(n))) for n in (0, 23, 25)]
    made += [tensor(lambda m, t, k=k: setattr(t, "data_type", k)) for k in (0, 8, 14, 99, 6, 10)]
    made += [tensor(lambda m, t: t.ClearField("raw_data")), tensor(lambda m, t: t.float_data.append(1))]
    made += [
        tensor(lambda m, t: setattr(t, "name", "bias")),
        tensor(lambda m, t: setattr(t, "data_location", 1)),
    ]
    made += [tensor(lambda m, t: m.graph.initializer[1].float_data.append(4.0))]
    made += [tensor(lambda m, t: m.graph.initializer[1].int32_data.append(4))]
    for kind in ("FLOAT", "DOUBLE", "FLOAT16", "INT64", "INT8", "UINT64", "BOOL", "INT4"):
        one = helper.make_tensor("more", getattr(TensorProto, kind), [3], [1, 0, 1])
        made.append(tensor(lambda m, t, one=one: m.graph.initializer.append(one)))
    made += [
        node(lambda m, n, op=op: setattr(n, "op_type", op)) for op in ("If", "Loop", "Scan", "EPContext")
    ]
    made += [node(lambda m, n, d=d: setattr(n, "domain", d)) for d in ("custom", "com.microsoft", "ai.onnx")]
    made += [node(lambda m, n: n.attribute.append(helper.make_attribute("body", m.graph)))]
    made += [
        node(lambda m, n: setattr(n, "overload", "x")),
        node(lambda m, n: m.graph.sparse_initializer.add()),
    ]
    made += [node(lambda m, n, v=v: setattr(m.opset_import[0], "version", v)) for v in (0, 6, 7, 26, 27)]
    made += [node(lambda m, n, v=v: setattr(m, "ir_version", v)) for v in (3, 4, 13, 14)]
    made += [
        node(lambda m, n, d=d: m.opset_import.append(helper.make_opsetid(d, 3))) for d in ("", "ai.onnx.ml")
    ]
    made += [node(lambda m, n: m.training_info.add().algorithm.CopyFrom(m.graph))]
    made += [node(lambda m, n: m.functions.append(helper.make_function("custom", "F", ["a"], ["a"], [], [])))]
    made += [node(lambda m, n: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 2**50))]
    for m in made:
        yield m.SerializeToString(), {"model.onnx_data": 100, "other": 100}
    raw = [
        b"",
        b"\0",
        b"\xff" * 30,
        b"<!doctype html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        whole + whole,
    ]
    raw += [
        b"\x0a\x01\x0a" + whole,
        whole.replace(b"xw", b"\xff\xff"),
        whole[:-1],
        b"\x80" * 12,
        b"\x08" + b"\xff" * 11,
    ]
    rng = random.Random(0)
    for _ in range(150):
        data = bytearray(external(model()).SerializeToString())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        raw.append(bytes(data))
    for data in raw:
        yield data, {"model.onnx_data": 100}


def _checked(data: bytes, beside: dict[str, int]) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        for name, size in beside.items():
            (Path(folder) / name).write_bytes(bytes(size))
        (Path(folder) / "model.onnx").write_bytes(data)
        return verdict(lambda: check_graph(Path(folder) / "model.onnx", set(beside)))


def make() -> dict[str, Any]:
    whole, table = full_manifest(), full_plan()
    ranges = {
        "task": ('"poetry"',),
        "max_length": ("2", "65537"),
        "dtype": ('"float32"',),
        "shift": ("1001", "1000"),
        "executed": ('"emulated"',),
        "sha256": (f'"{"A" * 64}"', f'"{"a" * 64}"'),
        "bytes": ("9223372036854775808",),
        "height": ("65536", "65537"),
    }
    terms = {
        "next": ("[[null, 0, 1]]", '[["z", 0, 1]]', '[["d", 1, 1]]', '[["n", 4000, 1]]', '[["x", 0.0, 1]]')
    }
    lists = [[p] for p in [*GOOD_PATHS, *BAD_PATHS.values()]]
    lists += [
        ["a", "A"],
        ["straße", "STRASSE"],
        ["x/a", "X/a"],
        ["Manifest.JSON"],
        ["a", "a/b"],
        ["a/b", "A"],
        ["a/b", "a/c"],
    ]
    read_plan: Callable[[str], Plan] = lambda text: planfile.read(loads(text, "plan"))  # noqa: E731
    return {
        "manifest": whole,
        "manifests": edits(whole, Manifest.from_json, ranges),
        "plan": table,
        "plans": edits(table, read_plan, {**terms, "steps": ("1001",), "graph": ('"a b"',)}),
        "paths": [[paths, verdict(lambda paths=paths: check_paths(paths))] for paths in lists],
        "texts": [[_base64(text), verdict(lambda text=text: loads(text, "x.json"))] for text in texts()],
        "graphs": [[_base64(data), beside, _checked(data, beside)] for data, beside in graphs()],
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main() -> None:
    data = make()
    lines = ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in data.items())
    FILE.write_text(f"{{{lines}}}\n", encoding="utf-8")
    print({key: len(value) for key, value in data.items()}, f"{FILE.stat().st_size / 1024:.0f} KiB")


def _lines(value: Any) -> str:
    """A case a line."""
    if isinstance(value, dict):
        return json.dumps(value, separators=(",", ":"))
    return "[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in value) + "\n]"


if __name__ == "__main__":
    main()
