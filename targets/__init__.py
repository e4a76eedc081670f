"""Targets: a device as data. One TOML file a device beside this module; a new device is a new file and no code."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..runtime.backends import ENGINES
from ..runtime.errors import BadInput
from .profile import Profile as Profile
from .profile import Rates as Rates

__all__ = [
    *("Backend", "Device", "Limits", "Profile", "Quality", "Rates", "Recipe", "Target"),
    *("known_targets", "load_target", "read_table"),
]

FOLDER = Path(__file__).parent

KINDS = ("cpu", "gpu", "npu")
MACHINES = ("any", "x86_64", "aarch64", "arm64", "wasm32")
"""arm64 is what macOS and iOS call an aarch64; wasm32 is a browser on whatever processor."""
PRECISIONS = ("float32", "bfloat16", "float16")
"""What a manifest may say, too (runtime/manifest.py)."""
RATED = (*PRECISIONS, "int8")
"""What rates are for; int8: inputs and weights are integers, and what computes in floats beside them."""
FLOORS = (*PRECISIONS, "int8", "int4")
"""What floors are for: a part computed in a precision, or quantized to integers of at least 8 bits, or of fewer."""


@dataclass(frozen=True)
class Device:
    name: str
    kind: str
    """cpu, gpu or npu: what the engine runs the graphs on."""
    memory_mib: int
    machine: str = "any"
    """What platform.machine() says there, one of MACHINES: elsewhere a bundle is converted, not executed."""


@dataclass(frozen=True)
class Backend:
    engine: str
    """The runtime backend that opens the graphs."""
    opset: int = 20
    """The ONNX operator set graphs are written in, where they are ONNX or come by way of it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What only this engine's lowering knows: the fields of `Options` in its module of export/."""


@dataclass(frozen=True)
class Limits:
    precisions: tuple[str, ...]
    """What the engine computes in there; a recipe picks one of them."""
    dynamic_shapes: bool
    """Whether batch and size stay free in the graphs."""
    peak_memory_mib: int
    part_mib: int
    """The largest single graph with its weights."""


@dataclass(frozen=True)
class Quality:
    """Floors of the gate."""

    part_relative_error: float
    """Largest RMS of the error over RMS of the original's output, over all inputs tried."""
    part_snr_db: float
    pipeline_psnr_db: float
    """Of decoded images in [0, 1] against the original pipeline with equal seeds."""


@dataclass(frozen=True)
class Recipe:
    """What an export does unless told otherwise."""

    passes: tuple[str, ...] = ()
    sampler: str = "model"
    """A traced sampler by name, or "model": the scheduler the checkpoint came with."""
    steps: int = 20
    fuse_attention: bool = True
    """Use the engine's fused attention kernel where it is one."""
    precision: str = "float32"
    """What the engine is asked to compute in. A host that lacks it computes in float32."""
    weights: str = "float32"
    """What weights are stored as: float32 or float16."""
    offered: tuple[int, ...] = ()
    """Steps of further plans, named steps_N, for runtimes that cannot trace one."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Pass -> its fields where they are not the pass's own defaults."""


@dataclass(frozen=True)
class Target:
    id: str
    """The file's name without .toml; what --target takes."""
    device: Device
    backend: Backend
    limits: Limits
    quality: Mapping[str, Quality]
    """What of FLOORS -> its floors: the precision the gate's host computed in, or a part's integers."""
    recipe: Recipe = field(default_factory=Recipe)
    profile: Profile = field(default_factory=Profile)
    """What it reaches, for predictions; without rates nothing is said of time."""

    def to_json(self) -> dict[str, Any]:
        """Name and limits as the manifest of a bundle carries them."""
        tables = ("device", "backend", "limits")
        plain = {table: _plain(dataclasses.asdict(getattr(self, table))) for table in tables}
        floors = {precision: dataclasses.asdict(quality) for precision, quality in self.quality.items()}
        return {"id": self.id, **plain, "quality": floors}

    def with_recipe(self, file: Path) -> Target:
        """This target with what another TOML file says put over its own. Raises BadInput.

        Its keys are [recipe]'s, in that table or alone; [quality.NAME] sets floors, [backend.options] what the engine's
        lowering knows; every other table holds the fields of the pass it is named after.
        """
        found = _read(file)
        tables = {name: value for name, value in found.items() if isinstance(value, Mapping)}
        keys = {name: value for name, value in found.items() if name not in tables}
        keys |= tables.pop("recipe", {})
        quality = dict(self.quality)
        for name, floors in tables.pop("quality", {}).items():
            quality[name] = read_table(Quality, floors, file, f"quality.{name}", over=quality.get(name))
        recipe = read_table(Recipe, keys, file, "recipe", over=self.recipe)
        backend, given = self.backend, tables.pop("backend", {})
        if given:
            options = {**backend.options, **given.get("options", {})}
            backend = replace(read_table(Backend, given, file, "backend", over=backend), options=options)
        for name in tables:
            if name not in recipe.passes:
                raise BadInput(
                    f"{file}: a table [{name}] and no such pass",
                    expected=f"[recipe], [quality.NAME] or one of passes = {list(recipe.passes)}",
                    fix=f'write passes = ["{name}"] if that was meant',
                )
        recipe = replace(recipe, options={**recipe.options, **tables})
        target = replace(self, backend=backend, recipe=recipe, quality=quality)
        _check(target, file)
        return target

    def with_profile(self, file: Path) -> Target:
        """This target with what another TOML file, of `fewstep bench --profile` for instance, says of its speed.

        Its keys are [profile]'s; a table [profile.float32] replaces those of the target's own it names, key by key.
        Raises BadInput.
        """
        found = _read(file)
        _same_keys(file, "top level", set(found), {"profile"}, {"profile"})
        return replace(self, profile=_profile(found["profile"], file, over=self.profile))

    def options_as(self, kind: type) -> Any:
        """[backend.options] as the dataclass `kind`. Raises BadInput naming the keys at fault."""
        return read_table(kind, self.backend.options, f"targets/{self.id}.toml", "backend.options")

    def with_pass(self, name: str, **fields: Any) -> Target:
        """This target with a pass in its recipe, at the end where it had none, and some of its fields set."""
        recipe = self.recipe
        passes = recipe.passes if name in recipe.passes else (*recipe.passes, name)
        options = {**recipe.options, name: {**recipe.options.get(name, {}), **fields}}
        return replace(self, recipe=replace(recipe, passes=passes, options=options))


def known_targets() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in FOLDER.glob("*.toml")))


def load_target(name: str) -> Target:
    """Read targets/NAME.toml. Raises BadInput naming the file, the table and the keys at fault."""
    if name not in known_targets():
        raise BadInput(
            f"unknown target {name!r}", expected=" or ".join(known_targets()), fix="fewstep targets"
        )
    return read_target(FOLDER / f"{name}.toml")


def read_target(file: Path) -> Target:
    """Read any target file; see `load_target`."""
    tables = _read(file)
    kinds = {"device": Device, "backend": Backend, "limits": Limits, "recipe": Recipe}
    known = {*kinds, "quality", "profile"}
    _same_keys(file, "top level", set(tables), known, known - {"recipe", "profile"})
    read = {name: read_table(kind, tables.get(name, {}), file, name) for name, kind in kinds.items()}
    floors = tables["quality"]
    if not isinstance(floors, Mapping):
        raise BadInput(f"{file}: quality is {floors!r}", expected="a table [quality.float32]")
    quality = {name: read_table(Quality, table, file, f"quality.{name}") for name, table in floors.items()}
    profile = _profile(tables.get("profile", {}), file)
    target = Target(file.stem, **read, quality=quality, profile=profile)
    _check(target, file)
    return target


def _profile(data: Any, file: Path, over: Profile = Profile()) -> Profile:  # noqa: B008 - frozen
    if not isinstance(data, Mapping):
        raise BadInput(f"{file}: profile is {data!r}", expected="a table [profile]")
    tables = {name: value for name, value in data.items() if isinstance(value, Mapping)}
    keys = {name: value for name, value in data.items() if name not in tables}
    _same_keys(file, "[profile]", set(tables), set(RATED), set())
    rates = dict(over.rates)
    for name, table in tables.items():
        rates[name] = read_table(Rates, table, file, f"profile.{name}", over=rates.get(name, Rates()))
        for key, value in dataclasses.asdict(rates[name]).items():
            if not 0 <= value < float("inf"):
                raise BadInput(
                    f"{file}: [profile.{name}] {key} is {value!r}", expected="a number, not below 0"
                )
    profile: Profile = read_table(Profile, keys, file, "profile", over=replace(over, rates=rates))
    sizes = (
        profile.base_mib,
        profile.between_us,
        profile.stored_bits,
        profile.inline_mib,
        profile.cache_mib,
        profile.node_bytes,
    )
    if (
        profile.cores < 1
        or not 0 <= profile.parallel <= 1
        or not all(0 <= each < float("inf") for each in sizes)
    ):
        said = f"cores {profile.cores}, parallel {profile.parallel}, base_mib {profile.base_mib}"
        raise BadInput(
            f"{file}: [profile] {said}", expected="at least one core, a share of 0 to 1, no negative memory"
        )
    return profile


def _check(target: Target, file: Path) -> None:
    """What the types do not say. Raises BadInput."""
    limits, recipe = target.limits, target.recipe
    for where, values, known in (
        ("[device] kind", (target.device.kind,), KINDS),
        ("[device] machine", (target.device.machine,), MACHINES),
        ("[backend] engine", (target.backend.engine,), tuple(ENGINES)),
        ("[limits] precisions", limits.precisions, PRECISIONS),
        ("[recipe] precision", (recipe.precision,), limits.precisions),
        ("[recipe] weights", (recipe.weights,), ("float32", "float16")),
        # a host without the recipe's precision computes in float32: both have floors
        ("a precision without [quality]", (recipe.precision, "float32"), tuple(target.quality)),
        ("[quality]", tuple(target.quality), FLOORS),
    ):
        for value in values:
            if value not in known:
                raise BadInput(f"{file}: {where}: {value!r}", expected=" or ".join(known))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} cannot be read ({error})", fix="check the path") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{file} is not valid TOML: {error}", fix="correct that line") from None


def read_table(kind: type, data: Any, file: Path | str, name: str, over: Any = None) -> Any:
    """One table, of TOML for instance, as the dataclass `kind`. Raises BadInput naming the keys at fault.

    over  gives the values of keys that are absent
    A field that is a dataclass itself is a table in the table, put over the field's default.
    """
    if not isinstance(data, Mapping):
        raise BadInput(f"{file}: {name} is {data!r}", expected=f"a table [{name}]")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    needed = {
        key
        for key, item in fields.items()
        if item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
        and over is None
    }
    _same_keys(file, f"[{name}]", set(data), set(fields), needed)
    hints = get_type_hints(kind)
    values = {}
    for key, value in data.items():
        if dataclasses.is_dataclass(hints[key]):
            default = fields[key].default if over is None else getattr(over, key)
            values[key] = read_table(hints[key], value, file, f"{name}.{key}", over=default)
        else:
            values[key] = _value(value, hints[key], f"{file}: [{name}] {key}")
    return kind(**values) if over is None else replace(over, **values)


def _same_keys(file: Path | str, where: str, found: set[str], known: set[str], needed: set[str]) -> None:
    if found - known:
        unknown = ", ".join(sorted(found - known))
        raise BadInput(f"{file}: {where} has unknown keys: {unknown}", expected=", ".join(sorted(known)))
    if needed - found:
        raise BadInput(
            f"{file}: {where} lacks {', '.join(sorted(needed - found))}", expected=", ".join(sorted(known))
        )


def _value(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not isinstance(value, list) or not all(isinstance(entry, item) for entry in value):
            raise BadInput(f"{where} is {value!r}", expected=f"a list of {item.__name__}")
        return tuple(value)
    if get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise BadInput(f"{where} is {value!r}", expected="a table")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise BadInput(f"{where} is {value!r}", expected=f"{kind.__name__}")
    return value


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
