"""From a model to a bundle: load, passes, lower each part, gate, plans, side files, speed, commit."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..model import Context, Model, load
from ..model.families import with_image_encoder
from ..model.libraries import hush
from ..model.load import Summary, summarize
from ..model.pairs import check_alike, with_small
from ..runtime.backends import open_session, require
from ..runtime.bundle import Bundle, BundleWriter
from ..runtime.files import remove, temporary_name
from ..runtime.manifest import Manifest, PartSpec, TokenizerSpec
from ..runtime.plan import Plan, plan
from ..runtime.process import DiscreteVP
from ..runtime.progress import Progress
from ..runtime.times import check_steps, find_grid
from ..runtime.two_graphs import SHARE
from ..targets import Target, load_target
from . import child, gate, parts, preflight, second, sidefiles, speed
from .foresee import Foreseen, check_fits, foresee, planned, sketched
from .formats import Here
from .passes import check_bits, run_passes, steps_of
from .plans import plan_of, plans_of, traced_sampler
from .preflight import gib

__all__ = ["Exported", "export_bundle"]


@dataclass(frozen=True)
class Exported:
    """The last event of an export: the bundle stands. It can be drawn like a Progress."""

    path: Path
    manifest: Manifest
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> how long it took."""
    peak_rss_bytes: Mapping[str, int] = field(default_factory=dict)
    """Process -> the most memory it had: "main", and one for each that lowered or ran a large part."""
    stage: str = "done"
    fraction: float | None = 1.0
    note: str = ""


def export_bundle(
    source: str | Path | Model,
    target: str,
    out: Path | str,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    times: str | None = None,
    recipe: Path | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_download: bool = False,
    config: Path | None = None,
    optimize: bool = True,
    measure_speed: bool = True,
    image_input: bool = False,
    small: str | Path | Model | None = None,
    share: float | None = SHARE,
    profile: Path | None = None,
) -> Iterator[Progress | Foreseen | Exported]:
    """Make a bundle of a model for a target; yields what it does and, at the end, Exported.

    source          what `model.load` takes, or a Model
    steps           of the default plan; otherwise what the recipe file says, what the model was made for, or what the
                    target's recipe says
    sampler         a traced sampler by name; otherwise the recipe's, which usually is the model's own scheduler
    times           a time grid by name in place of the model's own, also for plans traced later; the sampler is then
                    a traced one, the nearest to the model's scheduler where none was asked for
    recipe          a TOML file whose keys override the target's [recipe]
    quantize        a scheme, w8a8 for instance: the pass of that name comes last, or gets that scheme
    dry_run         say what would be done and what would come of it, Foreseen, and write nothing; no Exported event
    config          for a single .safetensors file: a diffusers folder of its family
    optimize        False: the graphs are what torch.onnx.export writes by itself, for comparison
    measure_speed   compare every part's speed with the un-optimized export's
    image_input     with the VAE's encoder, so that the bundle takes pictures to start from
    small           a smaller model of the same latents, whose denoiser comes along: see plans_of for the plans
    share           of the calls of the default plan that go to it; None: it is a student that draws alone
    profile         a TOML file whose rates replace the target's, of `fewstep bench --profile`
    Nothing appears at `out` before everything passed, whatever happens. Raises BadInput and its kinds for what the
    caller can mend, GateFailed where the graphs are not close enough to the original.
    """
    out = Path(out)
    device = load_target(target)
    if recipe is not None:
        own = device.recipe.steps
        device = device.with_recipe(Path(recipe))
        if steps is None and device.recipe.steps != own:
            steps = (
                device.recipe.steps
            )  # said in so many words, so it goes before what the model was made for
    if quantize is not None:
        device = device.with_pass("quantize", scheme=quantize)
    if profile is not None:
        device = device.with_profile(Path(profile))
    hush()
    require(device.backend.engine)
    check_steps(device.recipe.steps if steps is None else steps)
    check_bits(device)
    sampler = device.recipe.sampler if sampler is None else sampler
    if sampler != "model":
        plan(sampler, 1, DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000))  # refuses an unknown name
    if times == "auto":
        times = None
    if times is not None:
        find_grid(times)
    clock = _Clock()

    yield Progress("check", 0.0, str(source if not isinstance(source, Model) else source.name))
    summary = _summary(source, allow_download)
    if small is not None:
        summary = second.with_both(summary, _summary(small, allow_download), share)
    weights = {part: 4 * count for part, count in summary.weights.items()}
    needs = preflight.estimate(weights)
    preflight.check_room(needs, out)
    drawn = sketched(
        source, small, share, allow_download=allow_download, config=config, image_input=image_input
    )
    foreseen = foresee(*planned(drawn, device, sampler, steps, times), device)
    if dry_run:
        count = steps_of(drawn, device, steps)
        yield from _intentions(summary, weights, needs, device, out, sampler, count, foreseen)
        return
    if foreseen is not None:
        check_fits(foreseen)
    del drawn
    with BundleWriter(out, overwrite, size=needs.bundle_bytes) as writer:
        work, store = temporary_name(writer.dest), writer.dest.with_name(f"{writer.dest.name}.work")
        try:
            yield Progress("load", 0.02, summary.name)
            model = (
                source
                if isinstance(source, Model)
                else load(source, allow_download=allow_download, config=config)
            )
            other = model
            if small is not None:
                other = (
                    small
                    if isinstance(small, Model)
                    else load(small, allow_download=allow_download, config=config)
                )
                check_alike(other, model, ("small model", "large model"))
            clock.lap("load")
            if image_input:
                model = with_image_encoder(model)
            if times is not None:
                model = replace(model, grid=replace(model.grid, spacing=times))
                sampler = traced_sampler(model) if sampler == "model" else sampler
            first = plan_of(model, sampler, steps_of(model, device, steps))
            model = yield from run_passes(
                model, Context(device, first, work, store), sampler, steps, 0.02, 0.1
            )
            steps = steps_of(model, device, steps)
            if small is not None:
                context = Context(second.only_lowering(device), first, work, store)
                other = yield from run_passes(other, context, sampler, None, 0.1, 0.1)
                model = with_small(model, other, share)
            clock.lap("passes")
            if not device.limits.dynamic_shapes:
                model = parts.fixed(model)
            plans = plans_of(model, sampler, steps, device.recipe.offered)
            default = plans["default"]
            specs: dict[str, PartSpec] = {}
            local: dict[str, Here] = {}
            precisions: dict[str, str] = {}
            quality: dict[str, Any] = {"parts": {}}
            speeds: dict[str, Any] = {}
            wanted = {} if foreseen is None else foreseen.forecast.parts
            peaks: dict[str, int] = {}
            share = 0.75 / len(model.parts)
            for number, part in enumerate(model):
                begin = 0.1 + share * number
                large = part.weight_bytes() > speed.SKIP_BYTES
                baseline = (
                    work / "unoptimized" / part.name if measure_speed and optimize and not large else None
                )
                yield Progress(f"lower {part.name}", begin, f"{part.parameters():,} parameters")
                lowered = parts.lower(
                    part, writer.folder / part.name, device, work, baseline, optimize=optimize
                )
                here = local[part.name] = parts.here(lowered.spec, device)
                precisions[part.name] = parts.floors(part, lowered.spec, here.precision)
                specs[part.name] = replace(lowered.spec, executed=here.how)
                if lowered.separate:
                    peaks[f"lower {part.name}"] = lowered.peak_rss_bytes
                clock.lap(f"lower {part.name}")
                graph = writer.folder / lowered.spec.graph
                yield Progress(
                    f"gate {part.name}", begin + 0.7 * share, f"{gib(_size(graph.parent))} on disk"
                )
                checked, peak = parts.check(part, here, graph, work)
                if peak is not None:
                    peaks[f"gate {part.name}"] = peak
                gate.judge_part(part.name, checked, device, precisions[part.name], part.quantized)
                quality["parts"][part.name] = {**checked.to_json(), "computed_in": here.precision}
                clock.lap(f"gate {part.name}")
                note = f"relative error {checked.relative_error:.1e} ({checked.snr_db:.0f} dB)"
                yield Progress(f"speed {part.name}", begin + 0.9 * share, note)
                if here.how != "device":
                    speeds[part.name] = {"verdict": f"not measured: this host is no {device.device.name}"}
                elif baseline is not None:
                    speeds[part.name] = speed.measure(part, lowered.spec, graph, baseline / "model.onnx")
                    shutil.rmtree(baseline)
                else:
                    why = (
                        f"more than {gib(speed.SKIP_BYTES)} of weights; fewstep bench does"
                        if large
                        else "not asked"
                    )
                    speeds[part.name] = {"verdict": f"not measured: {why}"}
                if part.name in wanted:
                    speeds[part.name]["demand"] = wanted[part.name].demand.to_json()
                clock.lap(f"speed {part.name}")
            tokenizer = sidefiles.write_sidefiles(model, writer.folder)
            manifest = _manifest(model, device, specs, plans, sampler, tokenizer)
            yield Progress("gate pipeline", 0.87, f"{default.sampler}, {default.steps} steps, equal seeds")
            seen, golden = parts.check_pipeline(
                model,
                replace(manifest, parts={name: each.spec for name, each in local.items()}),
                writer.folder,
                sampler,
                steps,
                device,
                set(precisions.values()),
                work,
                {name: each.opener for name, each in local.items() if each.opener is not open_session},
            )
            quality |= {"pipeline": seen, "golden": golden}
            clock.lap("gate pipeline")
            yield Progress("commit", 0.98, f"{seen['psnr_db']:.1f} dB against the original")
            manifest = replace(manifest, quality=quality, speed=speeds)
            path = writer.commit(manifest)
            manifest = Bundle.open(path, check="size").manifest  # with its list of files
            remove(store)
            clock.lap("commit")
        finally:
            remove(work)
    peaks["main"] = child.peak_rss_bytes()
    yield Exported(path, manifest, clock.laps, peaks)


class _Clock:
    """Seconds between calls, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now


def _summary(source: str | Path | Model, allow_download: bool) -> Summary:
    if isinstance(source, Model):
        scheduler = (source.scheduler or {}).get("_class_name", "none")
        weights = {part.name: part.parameters() for part in source}
        return Summary(source.name, source.task, scheduler, weights, source.steps)
    return summarize(source, allow_download=allow_download)


def _intentions(
    summary: Summary,
    weights: Mapping[str, int],
    needs: preflight.Estimate,
    target: Target,
    out: Path,
    sampler: str,
    steps: int,
    foreseen: Foreseen | None,
) -> Iterator[Progress | Foreseen]:
    """What a run would do, in its order, and what would come of it."""
    yield Progress("load", None, f"{summary.name}, {summary.task}, scheduler {summary.scheduler}")
    for part, count in summary.weights.items():
        where = "in a process of its own" if weights[part] > preflight.LARGE_BYTES else "here"
        yield Progress(
            f"lower {part}", None, f"{count:,} parameters, {gib(weights[part])} in float32, {where}"
        )
    for name in target.recipe.passes:
        yield Progress("pass", None, name)
    floors = target.quality[target.recipe.precision]
    note = f"parts at least {floors.part_snr_db:g} dB, images at least {floors.pipeline_psnr_db:g} dB"
    yield Progress("gate", None, note)
    yield Progress("plan", None, f"{summary.scheduler if sampler == 'model' else sampler}, {steps} steps")
    limits = f"limits {gib(target.limits.part_mib << 20)} a part, {gib(target.limits.peak_memory_mib << 20)} in all"
    yield Progress("target", None, f"{target.id}: {target.device.name}, {target.backend.engine}, {limits}")
    yield Progress("memory", None, f"about {gib(needs.memory_bytes)} while exporting")
    yield Progress("disk", None, f"{out}: {gib(needs.bundle_bytes)}, {gib(needs.disk_bytes)} while exporting")
    if foreseen is None:
        yield Progress("bundle", None, "not foreseen: a network looks at the values of its tensors")
    else:
        yield foreseen


def _manifest(
    model: Model,
    target: Target,
    specs: Mapping[str, PartSpec],
    plans: Mapping[str, Plan],
    sampler: str,
    tokenizer: TokenizerSpec | None,
) -> Manifest:
    return Manifest(
        name=model.name,
        task=model.task,
        process=model.process.to_json(),
        prediction=model.prediction,
        denoiser=model.denoiser,
        parts=specs,
        sample=model.sample,
        plans={name: table.to_json() for name, table in plans.items()},
        sampler=traced_sampler(model) if sampler == "model" else sampler,
        grid=model.grid,
        guidance=model.guidance,
        tokenizer=tokenizer,
        classes=model.classes,
        target=target.to_json(),
        history=tuple(model.history),
        license=model.license,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (
        "fewstep",
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnxscript",
        "onnx-ir",
        "onnxruntime",
        "openvino",
        "litert-torch",
        "ai-edge-litert",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
