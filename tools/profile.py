"""Rates of this host from what was measured on it: what `fewstep bench --profile` writes and `--dry-run` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import BadInput
from ..runtime.files import atomic_write
from ..runtime.manifest import Manifest, PartSpec
from ..runtime.plan import Plan
from ..targets import Profile, Rates, known_targets, load_target
from ..targets.profile import Demand

__all__ = ["Call", "Measured", "fit", "fit_memory", "host_profile", "stages_of", "write_profile"]

TRUST = 0.02
"""Weight of what was known before against one measurement: with as many measurements as classes it hardly counts, and
a class that none of them has much of keeps its ratio to what is known."""

TURNS = 4000
"""Of coordinate descent: nine unknowns settle in a few hundred."""

LEAST = 0.2
"""Share of a call's time that is its network's at least, where the runtime's own is not known well."""

STAGES = {"text": "text_encoder", "decode": "vae_decoder"}
"""Stage of a picture -> the part that runs in it; the rest is the denoiser's."""

FALLBACK = "laptop-cpu"
"""Whose rates a fit starts from, for bundles of a target that is not known here."""

Array = NDArray[np.float64]
Call = tuple[Demand, float]
"""What one call asked for, and the seconds, or bytes, it took."""


@dataclass(frozen=True)
class Measured:
    """One bundle on this host."""

    manifest: Manifest
    stages: Mapping[str, float]
    """Stage (text, denoise, decode) -> seconds in a picture."""
    peak_rss_bytes: int | None


def fit(calls: Sequence[Call], known: Rates, trust: float = TRUST) -> Rates:
    """The rates that explain the seconds best, by relative error, none negative, near those `known` where it can be."""
    before = np.array(known.seconds())
    amounts = np.array([demand.amounts() for demand, _ in calls])
    measured = np.array([seconds for _, seconds in calls])
    scale = _scales(amounts * before / measured[:, None], trust)
    return Rates.of_seconds(tuple(float(each) for each in before * scale), known)


def fit_memory(calls: Sequence[Call], known: Rates, base: float, trust: float = TRUST) -> Rates:
    """The same for bytes that parts took beside the `base` of their process, by the relative error of both together,
    which is what a device has room for or not.
    """
    before = np.array(known.bytes())
    measured = np.array([size for _, size in calls])
    rows = np.array([demand.sizes() for demand, _ in calls]) * before / measured[:, None]
    held, alive, operator, part = before * _scales(rows, trust, 1 - base / measured)
    found = {"held": held, "alive": alive, "operator_kib": operator / 1024, "part_mib": part / 2**20}
    return replace(known, **{name: float(f"{value:.4g}") for name, value in found.items()})


def _scales(rows: Array, trust: float, target: Array | None = None) -> Array:
    """Factors x >= 0 of what was known with rows @ x nearest to the target (ones), and x near 1: coordinate descent."""
    count = rows.shape[1]
    goal = np.ones(len(rows)) if target is None else target
    matrix = np.concatenate([rows, np.eye(count) * trust**0.5])
    wanted = np.concatenate([goal, np.full(count, trust**0.5)])
    square, right, x = matrix.T @ matrix, matrix.T @ wanted, np.ones(count)
    for _ in range(TURNS):
        before = x.copy()
        for j in range(count):
            x[j] = max(0.0, x[j] + (right[j] - square[j] @ x) / square[j, j])
        if np.abs(x - before).max() < 1e-9:
            break
    return x


def stages_of(manifest: Manifest) -> dict[str, tuple[str, str, Demand, int]]:
    """Stage -> its part, the table of rates it goes by, what one call asks for, and its calls in a picture.

    As far as the manifest says: bundles made before it did have no stage here. A plan that calls two networks has no
    denoising stage, for their shares of it are not told apart.
    """
    guided = manifest.guidance.kind != "none" and manifest.guidance.scale != 1.0
    calls = Plan.from_json(manifest.plans["default"]).calls
    batch = 2 if guided and all(call.guided for call in calls) else 1
    found = {"text": (1, 2 if guided else 1), "decode": (1, 1)}
    if all(call.graph == "denoiser" for call in calls) and (batch == 2 or not guided):
        one = manifest.parts[manifest.denoiser].inputs[0].shape[0] == 1  # it takes one sample a call
        found["denoise"] = (1, batch * len(calls)) if one else (batch, len(calls))
    stages = {}
    for stage, (samples, count) in found.items():
        name = STAGES.get(stage, manifest.denoiser)
        demand = manifest.speed.get(name, {}).get("demand") if name in manifest.parts else None
        if demand:
            table = table_of(manifest.parts[name])
            stages[stage] = (name, table, Demand.from_json(demand).at(samples), count)
    return stages


def table_of(spec: PartSpec) -> str:
    """Which of a profile's tables a part goes by."""
    inputs = set(spec.quantization.get("layers_by_input_bits", {})) - {"float"}
    return "int8" if inputs else spec.precision


def host_profile(bundles: Sequence[Measured], threads: int) -> Profile:
    """What this host reaches with the threads the bundles were measured with. Raises BadInput."""
    target = str(bundles[0].manifest.target.get("id"))
    engines = {spec.engine for each in bundles for spec in each.manifest.parts.values()}
    if len(engines) > 1:
        raise BadInput(
            f"bundles of {' and '.join(sorted(engines))}",
            expected="one engine: a profile is of an engine on a host",
            fix="measure the bundles of each engine by themselves",
        )
    known = load_target(target if target in known_targets() else FALLBACK).profile
    if not known.rates:
        known = replace(load_target(FALLBACK).profile, base_mib=known.base_mib)
    speed = 1 + known.parallel * (threads - 1)
    calls: dict[str, list[Call]] = {}
    for each in bundles:
        for stage, (_, table, demand, count) in stages_of(each.manifest).items():
            if each.stages.get(stage):
                inside = each.stages[stage] / count - known.between_us * 1e-6
                calls.setdefault(table, []).append(
                    (demand, max(inside, LEAST * each.stages[stage] / count) * speed)
                )
    if not calls:
        raise BadInput(
            "these bundles do not say what their networks do",
            expected="bundles that this version of fewstep exported",
            fix="export them again",
        )
    # the host as a whole first: what no bundle has much of keeps its ratio to the rest
    ratios = {
        table: median(seconds / np.dot(d.amounts(), known.of(table).seconds()) for d, seconds in mine)
        for table, mine in calls.items()
    }
    rates = {}
    for table in {**known.rates, **calls}:
        start, ratio = known.of(table), float(ratios.get(table, median(ratios.values())))
        slower = Rates.of_seconds(tuple(ratio * each for each in start.seconds()), start)
        rates[table] = fit(calls[table], slower) if table in calls else slower
    found = replace(known, cores=threads, rates=rates)
    return replace(found, rates=_with_memory(bundles, found))


def _with_memory(bundles: Sequence[Measured], profile: Profile) -> dict[str, Rates]:
    """All memory figures times one factor: how much more or less processes took here than was foreseen."""
    factors = []
    for each in bundles:
        stages = stages_of(each.manifest).values()
        if each.peak_rss_bytes and {name for name, *_ in stages} == set(each.manifest.parts):
            spent = sum(profile.memory(demand, table) for _, table, demand, _ in stages)
            loading = max(demand.parsed for _, _, demand, _ in stages)
            factors.append((each.peak_rss_bytes - profile.base_mib * 2**20 - loading) / spent)
    factor = max(median(factors), 0.0) if factors else 1.0
    names = ("held", "alive", "operator_kib", "part_mib")
    return {
        table: replace(rates, **{name: float(f"{getattr(rates, name) * factor:.4g}") for name in names})
        for table, rates in profile.rates.items()
    }


def write_profile(profile: Profile, file: Path, about: Sequence[str]) -> None:
    """As TOML that `--profile` reads. Raises OutputError.

    about  lines of comment: where it was measured, and with what
    """
    lines = [f"# {line}" for line in about]
    lines += ["", "[profile]"]
    plain = {key: value for key, value in asdict(profile).items() if key != "rates"}
    lines += [f"{key} = {_toml(value)}" for key, value in plain.items()]
    for table, rates in profile.rates.items():
        lines += [
            "",
            f"[profile.{table}]",
            *(f"{key} = {_toml(value)}" for key, value in asdict(rates).items()),
        ]
    atomic_write(file, ("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return f"{value}"
