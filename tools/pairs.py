"""The same picture drawn by a reference and by candidates: same prompt, same noise, same plan where they have one.

Two questions are kept apart. On its own trajectory a candidate's errors add up and feed on each other: that is what a
user sees. Led along the reference's trajectory, every network call is asked about exactly the reference's state, and
answers alone: that is the network's own error, drift taken out.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..export.quality import SSIM_WINDOW, psnr_db, sqnr_db, ssim
from ..runtime.backends import Session, open_session
from ..runtime.bundle import Bundle
from ..runtime.errors import BadInput
from ..runtime.manifest import Manifest
from ..runtime.pipeline import Pipeline
from ..runtime.plan import Plan
from ..runtime.request import check_graphs
from .console import human_seconds, needs
from .subjects import Subject, read_picture

__all__ = [
    "Artist",
    "How",
    "Pair",
    "Picture",
    "Subject",
    "Tick",
    "check_alike",
    "open_artist",
    "pairs",
    "same_path",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class How:
    """What all are asked for alike; None leaves it to each bundle, and the size to the reference."""

    steps: int | None = None
    sampler: str | None = None
    times: str | None = None
    plan: str | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None


@dataclass
class Tap:
    """Keeps the outputs of a bundle's denoisers; with `leader` set they still compute, but give the leader's outputs.

    Equal start noise and equal outputs make equal states, so that a sampler led this way visits the leader's states.
    """

    outputs: list[Array] = field(default_factory=list)
    leader: Sequence[Array] | None = None


@dataclass(frozen=True)
class Tapped:
    """One of the sessions a tap is on."""

    inner: Session
    tap: Tap

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        found, tap = self.inner.run(feeds, outputs), self.tap
        name = next(iter(found))
        given = found[name] if tap.leader is None else tap.leader[len(tap.outputs)]
        tap.outputs.append(found[name])
        return {name: given.copy()}  # a guided denoiser writes into it

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Artist:
    """A bundle, or the model it came from in its clothes, with one plan to draw by."""

    label: str
    pipeline: Pipeline
    tap: Tap
    plan: Plan
    guidance: float
    """1 where the model has none."""

    @property
    def manifest(self) -> Manifest:
        return self.pipeline.manifest


@dataclass(frozen=True)
class Picture:
    states: list[Array]
    """After each step, [1, channels, ...]; the last is the clean sample."""
    outputs: list[Array]
    """Of each network call."""
    image: Array
    """[height, width, channels] in 0..1; the clean sample again where nothing was decoded."""


@dataclass(frozen=True)
class Pair:
    """One candidate's picture against the reference's."""

    candidate: str
    subject: Subject
    metrics: dict[str, float]
    own_sqnr_db: list[float]
    """Of the state after each step, on the candidate's own trajectory; empty where the plans differ."""
    led_sqnr_db: list[float]
    """Of the network's output at each call, on the reference's trajectory; empty where plans or guidance differ."""
    images: tuple[Array, Array]
    """The reference's and the candidate's."""


@dataclass(frozen=True)
class Tick:
    fraction: float
    note: str
    pair: Pair | None = None


@dataclass
class _Clock:
    whole: int
    done: int = 0
    began: float = field(default_factory=time.perf_counter)

    def step(self, note: str, pair: Pair | None = None) -> Tick:
        self.done += pair is None
        left = (time.perf_counter() - self.began) * (self.whole - self.done) / max(1, self.done)
        return Tick(self.done / self.whole, f"{note}, about {human_seconds(left)} left", pair)


def open_artist(
    label: str, bundle: Bundle, how: How, *, checkpoint: Path | None = None, threads: int | None = None
) -> Artist:
    """Load a bundle's denoiser and settle the plan it draws by.

    checkpoint  a model whose torch modules take the place of the bundle's graphs; manifest, tokenizer and plans stay
    """
    pipeline = _original(checkpoint, bundle) if checkpoint else Pipeline(bundle, threads=threads)
    manifest, sessions = pipeline.manifest, pipeline._sessions
    plan, tap = pipeline.plan(how.steps, how.sampler, how.times, how.plan), Tap()
    check_graphs(manifest, plan)
    for name in {manifest.graphs[call.graph] for call in plan.calls}:
        if name not in sessions:
            spec = manifest.parts[name]
            sessions[name] = open_session(pipeline.bundle.file(spec.graph), spec, threads=threads)
        sessions[name] = Tapped(sessions[name], tap)
    own = 1.0 if manifest.guidance.kind == "none" else manifest.guidance.scale
    return Artist(label, pipeline, tap, plan, own if how.guidance is None else how.guidance)


def _original(source: Path, stand_in: Bundle) -> Pipeline:
    """The torch modules of a checkpoint in the place of a bundle's graphs."""
    with needs("export"):
        from ..model import Part, load
        from ..model.trajectories import run_part

        model = load(source)
    manifest = stand_in.manifest
    if set(model.parts) != set(manifest.parts):
        raise BadInput(
            f"{source} has the parts {', '.join(sorted(model.parts))}",
            expected=f"{', '.join(sorted(manifest.parts))}, as {stand_in.path.name} has",
            fix="compare with the model the bundle came from",
        )

    @dataclass(frozen=True)
    class Torch:
        part: Part

        def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
            every = run_part(self.part, feeds)
            return {name: every[name] for name in outputs or every}

        def close(self) -> None:
            """The module belongs to the model."""

    specs = {
        n: replace(manifest.parts[n], inputs=p.inputs, outputs=p.outputs) for n, p in model.parts.items()
    }
    sessions: dict[str, Session] = {name: Torch(part) for name, part in model.parts.items()}
    return Pipeline(Bundle(stand_in.path, replace(manifest, parts=specs)), _sessions=sessions)


def check_alike(reference: Artist, candidate: Artist, how: How) -> None:
    """Raises BadInput where the two cannot draw the same picture."""
    a, b = reference.manifest, candidate.manifest
    family = "compare bundles of one family: these latents have no common space"
    rows: list[tuple[str, Any, Any, str]] = [
        ("task", a.task, b.task, "compare models that are asked in the same way"),
        ("classes", a.classes, b.classes, "compare models of the same classes"),
        ("channels of the sample", a.sample.channels, b.sample.channels, family),
        ("pixels a latent cell", a.sample.factor, b.sample.factor, family),
    ]
    if how.height is None and how.width is None:
        wanted, found = ((s.width, s.height) for s in (a.sample, b.sample))
        rows.append(
            ("width and height", wanted, found, "name a size that both can draw: --width and --height")
        )
    for what, wanted, found, fix in rows:
        if found != wanted:
            raise BadInput(
                f"{candidate.label} has {what} {found}",
                expected=f"{wanted}, as {reference.label} has",
                fix=fix,
            )


def same_plan(a: Artist, b: Artist) -> bool:
    """Whether step by step both are at the same noise level."""
    return (a.plan.init, a.plan.calls) == (b.plan.init, b.plan.calls)


def same_path(a: Artist, b: Artist) -> bool:
    """Whether equal network outputs would take both through equal states."""
    return same_plan(a, b) and a.guidance == b.guidance


def pairs(
    reference: Artist, candidates: Sequence[Artist], subjects: Sequence[Subject], how: How
) -> Iterator[Tick]:
    """Draw every subject by all of them and compare; a tick a network step, and one with each finished Pair."""
    size = (how.height or reference.manifest.sample.height, how.width or reference.manifest.sample.width)
    same = [same_plan(reference, c) for c in candidates]
    led = [same_path(reference, c) for c in candidates]
    steps = sum(c.plan.states * (1 + leads) for c, leads in zip(candidates, led, strict=True))
    clock = _Clock(len(subjects) * (reference.plan.states + steps))
    for number, subject in enumerate(subjects):
        note = f"picture {number + 1} of {len(subjects)}"
        right = yield from _draw(reference, subject, size, clock, note)
        for candidate, alike, leads in zip(candidates, same, led, strict=True):
            got = yield from _draw(candidate, subject, size, clock, note)
            answers: list[Array] = []
            if leads:
                answers = (yield from _draw(candidate, subject, size, clock, note, right.outputs)).outputs
            metrics = _metrics(right, got)
            own = [sqnr_db(a, b) for a, b in zip(right.states, got.states, strict=True)] if alike else []
            # a network that learned its variance has twice the channels; the sampler reads the first half
            channels = right.states[0].shape[1]
            network = [
                sqnr_db(a[:, :channels], b[:, :channels])
                for a, b in zip(right.outputs, answers, strict=bool(answers))
            ]
            if network:
                metrics["network_sqnr_db"] = min(network)
            yield clock.step(
                note, Pair(candidate.label, subject, metrics, own, network, (right.image, got.image))
            )


def _draw(
    artist: Artist,
    subject: Subject,
    size: tuple[int, int],
    clock: _Clock,
    note: str,
    leader: Sequence[Array] | None = None,
) -> Generator[Tick, None, Picture]:
    """leader  a reference's network outputs: the candidate then follows its trajectory, and nothing is decoded."""
    artist.tap.outputs, artist.tap.leader = [], leader
    running = artist.pipeline.generate(
        subject.prompt,
        class_labels=subject.label,
        observation=None if subject.observation is None else read_picture(subject.observation),
        guidance_scale=artist.guidance,
        height=size[0],
        width=size[1],
        seed=subject.seed,
        output_type="np" if leader is None else "latent",
        plan=artist.plan,
    )
    states = []
    while True:
        try:
            states.append(next(running).x)
        except StopIteration as end:
            return Picture(states, artist.tap.outputs, end.value.images[0])
        yield clock.step(f"{note}, {artist.label}")


def _metrics(right: Picture, got: Picture) -> dict[str, float]:
    metrics = {
        "image_psnr_db": psnr_db(right.image, got.image, peak=1.0),
        "latent_psnr_db": psnr_db(right.states[-1], got.states[-1]),
        "latent_sqnr_db": sqnr_db(right.states[-1], got.states[-1]),
    }
    if min(right.image.shape[:2]) >= SSIM_WINDOW:
        metrics["ssim"] = ssim(right.image, got.image)
    return metrics
