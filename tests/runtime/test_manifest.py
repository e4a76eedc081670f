"""The manifest: written one way, read strictly.

`python tests/runtime/test_manifest.py` writes spec/manifest.schema.json anew from the dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fewstep.runtime import manifest as m
from fewstep.runtime.errors import BundleError
from fewstep.runtime.manifest import Manifest
from fewstep.runtime.paths import check_path, check_paths

SCHEMA = Path(__file__).parents[2] / "runtime/spec/manifest.schema.json"


def example() -> Manifest:
    latent = m.TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
    return Manifest(
        name="tiny",
        task="text-to-image",
        process={"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
        prediction="epsilon",
        denoiser="unet",
        parts={"unet": m.PartSpec("onnxruntime", "unet/model.onnx", (latent,), (latent,))},
        sample=m.SampleSpec(height=512, width=512, channels=4, factor=8, multiple=64, scaling_factor=0.18215),
        plans={"default": {"rows": []}},
        sampler="dpmpp_2m",
        tokenizer=m.TokenizerSpec("tokenizer/tokenizer.json", 77, 49407),
        history=({"pass": "int8_weights", "min_size": 2048},),
        files={
            "unet/model.onnx": m.FileSpec("0" * 64, 7),
            "tokenizer/tokenizer.json": m.FileSpec("f" * 64, 0),
        },
    )


def changed(edit: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(example().to_json())
    edit(data)
    return json.dumps(data)


def dynamic(**changes: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(m.DynamicShift()), **changes}


def test_a_manifest_survives_json() -> None:
    assert Manifest.from_json(example().to_json()) == example()
    grid = m.GridSpec(
        "karras", 1, "sigma_min", 3.0, m.DynamicShift("linear"), 0.1, 0.03, 14.6, "leading", 5.0
    )
    shifted = dataclasses.replace(example(), grid=grid)
    assert Manifest.from_json(shifted.to_json()) == shifted


def test_text_bytes_and_a_parsed_dict_read_the_same() -> None:
    text = example().to_json()
    assert Manifest.from_json(text.encode()) == Manifest.from_json(json.loads(text)) == example()


def test_equal_manifests_give_equal_bytes() -> None:
    a = dataclasses.replace(example(), versions={"a": "1", "b": "2"})
    b = dataclasses.replace(example(), versions={"b": "2", "a": "1"})
    assert a.to_json() == b.to_json()


def test_the_keys_are_sorted_and_the_version_is_at_the_top_level() -> None:
    data = json.loads(example().to_json())
    assert list(data) == sorted(data)
    assert data["fewstep_bundle"] == 1


def test_a_whole_number_is_read_where_a_float_is_meant() -> None:
    read = Manifest.from_json(changed(lambda d: d["guidance"].update(scale=7)))
    assert type(read.guidance.scale) is float


def test_other_writing_systems_stay_readable_text() -> None:
    text = dataclasses.replace(example(), name="模型").to_json()
    assert "模型" in text
    assert Manifest.from_json(text).name == "模型"


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_an_unknown_schema_version_is_refused(version: Any) -> None:
    with pytest.raises(BundleError, match=r"schema version .*; expected 1; fix: update fewstep"):
        Manifest.from_json(changed(lambda d: d.update(fewstep_bundle=version)))


def test_another_tools_manifest_is_refused_as_such() -> None:
    with pytest.raises(BundleError, match=r"no 'fewstep_bundle'.*run fewstep export"):
        Manifest.from_json('{"name": "an Android app"}')


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(BundleError, match="sample: no field 'height'"):
        Manifest.from_json(changed(lambda d: d["sample"].pop("height")))


def test_a_missing_field_is_refused_even_if_it_has_a_default() -> None:
    with pytest.raises(BundleError, match="no field 'license'"):
        Manifest.from_json(changed(lambda d: d.pop("license")))


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(BundleError, match=r"\['unet'\]: unknown field 'provider'"):
        Manifest.from_json(changed(lambda d: d["parts"]["unet"].update(provider="/tmp/x.so")))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(name=7), "name is 7; expected text"),
        (lambda d: d.update(parts=[]), r"parts is \[\]; expected an object"),
        (lambda d: d["sample"].update(height="512"), "height is '512'; expected a whole number"),
        (lambda d: d["sample"].update(height=True), "height is True; expected a whole number"),
        (lambda d: d["sample"].update(height=512.0), "height is 512.0; expected a whole number"),
        (lambda d: d["sample"].update(fixed=1), "fixed is 1; expected true or false"),
        (lambda d: d["guidance"].update(scale="7"), "scale is '7'; expected a number"),
        (lambda d: d["parts"]["unet"].update(inputs={}), r"inputs is \{\}; expected a list"),
        (lambda d: d["parts"]["unet"]["inputs"][0].update(shape=[None]), "expected number or name"),
        (lambda d: d.update(tokenizer=[]), r"tokenizer is \[\]; expected an object"),
        (lambda d: d.update(history=["fold"]), "expected an object"),
    ],
)
def test_a_wrong_type_is_refused(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(changed(edit))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(task="poetry"), "task is 'poetry'; expected one of text-to-image"),
        (lambda d: d.update(prediction="x0"), "prediction is 'x0'"),
        (lambda d: d["grid"].update(spacing="spiral"), "grid.spacing"),
        (lambda d: d["grid"].update(final="maybe"), "grid.final"),
        (lambda d: d["grid"].update(ends="karras"), "grid.ends"),
        (lambda d: d["grid"].update(shift=0), "grid.shift is 0"),
        (lambda d: d["grid"].update(terminal=1), "grid.terminal is 1"),
        (lambda d: d["grid"].update(rho=-7), "grid.rho is -7"),
        (lambda d: d["grid"].update(sigma_min=0), "grid.sigma_min is 0"),
        (lambda d: d["grid"].update(dynamic=dynamic(kind="cubic")), "grid.dynamic.kind is 'cubic'"),
        (lambda d: d["grid"].update(dynamic=dynamic(base_tokens=4096)), "grid.dynamic.base_tokens"),
        (lambda d: d["guidance"].update(kind="pag"), "guidance.kind"),
        (
            lambda d: d.update(denoiser="transformer"),
            "denoiser is 'transformer'; expected one of the parts: unet",
        ),
        (lambda d: d.update(classes=0), "classes is 0"),
        (lambda d: d["sample"].update(width=0), "sample.width is 0"),
        (lambda d: d["sample"].update(scaling_factor=0), "scaling_factor is 0"),
        (lambda d: d["parts"]["unet"].update(engine="/tmp/x.so"), "engine of unet"),
        (lambda d: d["parts"]["unet"].update(graph="vae/model.onnx"), "graph of unet"),
        (lambda d: d["parts"].update({"a b": d["parts"]["unet"]}), "name of a part"),
        (lambda d: d["parts"]["unet"]["inputs"][0].update(dtype="object"), "dtype of unet sample"),
        (lambda d: d["parts"]["unet"]["inputs"][0].update(shape=[-1]), "shape of unet sample"),
        (lambda d: d["parts"]["unet"]["inputs"][0].update(shape=[""]), "shape of unet sample"),
        (lambda d: d["parts"]["unet"]["inputs"].append(d["parts"]["unet"]["inputs"][0]), "different names"),
        (lambda d: d["tokenizer"].update(file="x.json"), "tokenizer.file"),
        (lambda d: d["tokenizer"].update(max_length=2), "max_length"),
        (lambda d: d["tokenizer"].update(pad_id=-1), "pad_id"),
        (lambda d: d["files"]["unet/model.onnx"].update(sha256="0" * 63), "64 hex digits"),
        (lambda d: d["files"]["unet/model.onnx"].update(sha256="A" * 64), "64 hex digits"),
        (lambda d: d["files"]["unet/model.onnx"].update(bytes=-1), "size of unet/model.onnx"),
    ],
)
def test_a_value_out_of_its_range_is_refused(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(changed(edit))


def test_a_key_given_twice_is_refused() -> None:
    text = example().to_json().replace('"name": "tiny"', '"name": "tiny", "name": "other"')
    with pytest.raises(BundleError, match="key 'name' appears twice"):
        Manifest.from_json(text)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_number_that_is_not_finite_is_refused(literal: str) -> None:
    text = example().to_json().replace("0.18215", literal)
    with pytest.raises(BundleError, match="finite"):
        Manifest.from_json(text)


@pytest.mark.parametrize("digits", ["1" + "0" * 20, "1" * 5000, "18446744073709551616"])
def test_a_number_beyond_64_bits_is_refused(digits: str) -> None:
    with pytest.raises(BundleError, match=r"64 bits|not JSON"):
        Manifest.from_json(example().to_json().replace("49407", digits))


@pytest.mark.parametrize("depth", [33, 1000, 100_000])
def test_a_nesting_bomb_is_refused(depth: int) -> None:
    with pytest.raises(BundleError, match="nested too deeply"):
        Manifest.from_json("[" * depth + "]" * depth)


def test_nesting_in_a_dict_handed_over_is_bounded_too() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(BundleError, match="nested too deeply"):
        Manifest.from_json(loop)


def test_more_than_16_mb_are_refused() -> None:
    with pytest.raises(BundleError, match="at most 16,777,216"):
        Manifest.from_json(b" " * (16 * 1024 * 1024 + 1))


@pytest.mark.parametrize("text", ["", "  ", "{", "x", '{"a" 1}', "[1]", "null", b"\xff\xfe{}", "\ufeff{}"])
def test_what_is_not_our_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Manifest.from_json(text)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(BundleError, match="lone surrogate"):
        Manifest.from_json(example().to_json().replace("tiny", "\\ud800"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"x", object(), {1: 2}, "\ud800"])
def test_what_json_cannot_carry_is_refused_at_writing(value: Any) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        dataclasses.replace(example(), quality={"psnr": value}).to_json()


GOOD_PATHS = [
    "a",
    "unet/model.onnx",
    "vae_decoder/model.onnx_data",
    "a b.txt",
    ".gitattributes",
    "模型/é.bin",
]
BAD_PATHS = {
    "empty": "",
    "parent": "../secret.bin",
    "parent inside": "unet/../../secret.bin",
    "parent at the end": "unet/..",
    "here": "./unet",
    "absolute": "/etc/passwd",
    "drive": "C:/x",
    "drive relative": "C:x",
    "backslash": "unet\\model.onnx",
    "UNC": "\\\\host\\share",
    "NUL": "a\0b",
    "newline": "a\nb",
    "delete": "a\x7f",
    "empty step": "a//b",
    "trailing slash": "a/",
    "too long": "a" * 201,
    "10 kB": "a/" * 5000 + "a",
    "not NFC": "e\u0301.bin",
    "surrogate": "a\ud800",
    "device": "con",
    "device with ending": "unet/NUL.txt",
    "numbered device": "com1.onnx",
    "trailing dot": "a./b",
    "trailing space": "a ",
    "leading space": " a",
    "stream": "a:b",
    "wildcard": "*/_ORT_MEM_ADDR_/*",
    "three dots": "...",
}


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_a_plain_relative_path_is_taken(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize("path", BAD_PATHS.values(), ids=BAD_PATHS)
def test_an_unsafe_path_is_refused(path: str) -> None:
    with pytest.raises(BundleError, match="file"):
        check_path(path)


@pytest.mark.parametrize(
    "twins", [["a", "A"], ["straße", "STRASSE"], ["x/a.bin", "X/a.bin"], ["Manifest.JSON"]]
)
def test_names_that_differ_only_in_case_are_refused(twins: list[str]) -> None:
    with pytest.raises(BundleError, match="one file where case does not count"):
        check_paths(twins)


@pytest.mark.parametrize("paths", [["a", "a/b"], ["a/b", "A"]])
def test_a_file_that_is_also_a_folder_is_refused(paths: list[str]) -> None:
    with pytest.raises(BundleError, match="both a file and the folder"):
        check_paths(paths)


def test_the_manifest_refuses_an_unsafe_path_in_its_list() -> None:
    with pytest.raises(BundleError, match=r"'\.\./secret'"):
        Manifest.from_json(changed(lambda d: d["files"].update({"../secret": d["files"]["unet/model.onnx"]})))


def schema() -> dict[str, Any]:
    """The JSON Schema of a manifest: shapes and types; ranges and paths are in spec/bundle.md."""
    kinds: dict[str, Any] = {}
    top = _schema_of(Manifest, kinds)
    kinds.pop("Manifest")
    top["properties"] = dict(
        sorted({**top["properties"], m.VERSION_KEY: {"const": m.SCHEMA_VERSION}}.items())
    )
    top["required"] = sorted([*top["required"], m.VERSION_KEY])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest.json of a fewstep bundle",
        **top,
        "$defs": dict(sorted(kinds.items())),
    }


def _schema_of(kind: Any, kinds: dict[str, Any]) -> dict[str, Any]:
    plain = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if kind in plain:
        return {"type": plain[kind]}
    if origin is tuple:
        return {"type": "array", "items": _schema_of(arguments[0], kinds)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], kinds)}
    if origin is types.UnionType:
        return {"anyOf": [_schema_of(argument, kinds) for argument in arguments]}
    hints = typing.get_type_hints(kind)
    body = {
        "type": "object",
        "properties": {name: _schema_of(hint, kinds) for name, hint in sorted(hints.items())},
        "required": sorted(hints),
        "additionalProperties": False,
    }
    kinds[kind.__name__] = body
    return body if kind is Manifest else {"$ref": f"#/$defs/{kind.__name__}"}


def test_the_json_schema_says_what_the_dataclasses_say() -> None:
    assert json.loads(SCHEMA.read_text()) == schema()


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=2) + "\n")
