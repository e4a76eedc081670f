"""What a student learns on: clean latents with the prompt or label each belongs to, kept on disk between runs.

They are the teacher's own unless pictures are given: distillation then needs no data (and learns what the teacher
draws under guidance, not what it was trained on).
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import BadInput
from ...runtime.files import output_errors
from ...runtime.noise import Noise
from ...runtime.plan import plan
from ...runtime.progress import Progress
from ..checks import read_prompts
from ..fingerprint import model_fingerprint
from ..libraries import torch
from ..model import Model, Part
from ..shards import read_shard, write_shard
from ..trajectories import PROMPTS, conditions_of, trajectories
from .processes import Processes

__all__ = ["Batch", "Latents", "Samples", "given_samples", "in_precision", "prepare_samples"]

Array = NDArray[Any]
Tensor = Any

SEEDS = 10_000_000
"""The first seed of what a student learns on, far from those that pictures are judged on."""
SHARD = 256
"""Latents drawn between two looks at the disk: what a kill costs at most."""


@dataclass(frozen=True)
class Latents:
    """How many latents the teacher draws, and of what: a table of a recipe."""

    number: int = 4096
    sampler: str = "dpmpp_2m"
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095): at 16 steps close to the end of the teacher's own way."""
    steps: int = 16
    guidance: float = 0.0
    """0 for the model's own scale."""
    prompts: tuple[str, ...] = ()
    """Latent i shows prompt i modulo their number. Empty for the model's own."""
    prompts_file: str = ""
    """A text file with a prompt a line in their place; a prompt that stands twice is drawn twice as often."""
    batch: int = 32
    precision: str = "bfloat16"
    """Of the teacher while it draws: bfloat16 or float32."""
    pictures: str = ""
    """A folder or a .zip of real pictures to learn on in place of drawn latents: labels by folder, captions beside."""
    mirrored: bool = False
    """Each picture's mirror image, too."""
    skip_unreadable: bool = False
    """Pictures that cannot be read are left out, not refused."""

    def __post_init__(self) -> None:
        for name in ("number", "steps", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} of latents: {getattr(self, name)}", expected="at least 1")
        if self.precision not in ("bfloat16", "float32"):
            raise BadInput(f"precision of latents: {self.precision}", expected="bfloat16 or float32")
        if self.prompts and self.prompts_file:
            raise BadInput("both prompts and prompts_file of latents", expected="one of them")

    def subjects(self, model: Model) -> list[Any]:
        """The distinct prompts or labels in the order of their first latent, with repetitions kept."""
        if model.tokenizer is not None:
            given = tuple(read_prompts(Path(self.prompts_file))) if self.prompts_file else self.prompts
            return list(given or model.prompts or PROMPTS)
        if self.prompts or self.prompts_file:
            raise BadInput(f"prompts for {model.name}, a model without text", expected="no prompts")
        return [None] if model.classes is None else list(range(model.classes))


@dataclass(frozen=True, eq=False)
class Batch:
    """A draw from the samples, on the device of the training."""

    x0: Tensor
    """[batch, channels, height, width]: clean latents in the denoiser's scale."""
    seeds: Array
    """[batch] int64: of the noise each latent was drawn from; -1 for one that comes from a picture."""
    condition: Mapping[str, Tensor]
    """The denoiser's further inputs by name, [batch, ...], in its order."""
    nothing: Mapping[str, Tensor] | None
    """The same for no prompt or no class, where the model knows that."""
    subjects: Array
    """[batch] int64: row of the samples' conditions."""

    def start(self) -> Tensor:
        """[batch, ...]: the noise the teacher began these latents with. Raises BadInput for pictures' latents."""
        if (self.seeds < 0).any():
            raise BadInput(
                "latents of pictures have no noise they came from", expected="the teacher's own latents"
            )
        noise = np.stack([Noise(int(seed)).randn(tuple(self.x0.shape[1:])) for seed in self.seeds])
        return torch().as_tensor(noise.astype(np.float32), device=self.x0.device)


@dataclass(frozen=True, eq=False)
class Samples:
    """All latents with their conditions; in memory, since what fits a training run fits there."""

    latents: Array
    """float32 [n, channels, height, width]."""
    subjects: Array
    """int64 [n]: row of the conditions."""
    seeds: Array
    """int64 [n], -1 where the latent is a picture's."""
    conditions: Mapping[str, Array]
    """Input of the denoiser -> [rows, ...]; empty for an unconditional model."""
    nothing: Mapping[str, Array] | None
    """The same for nothing, [1, ...]."""
    key: str
    """Of all that went into them."""

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, random: Any, count: int, device: Any = "cpu") -> Batch:
        """`count` of them at random, with a torch.Generator of the processor."""
        return self.take(torch().randint(len(self), (count,), generator=random).numpy(), device)

    def take(self, which: Array, device: Any = "cpu") -> Batch:
        rows = self.subjects[which]

        def move(array: Array) -> Tensor:
            return torch().as_tensor(array, device=device)

        condition = {name: move(table[rows]) for name, table in self.conditions.items()}
        nothing = None
        if self.nothing is not None:
            nothing = {
                name: move(row).expand(len(which), *row.shape[1:]) for name, row in self.nothing.items()
            }
        return Batch(move(self.latents[which]), self.seeds[which], condition, nothing, rows)

    def std(self) -> float:
        """Standard deviation of all latents: sigma_data of the papers."""
        return float(self.latents.std(dtype=np.float64))


def prepare_samples(
    model: Model, how: Latents, store: Path, processes: Processes | None = None
) -> Generator[Progress, None, Samples]:
    """Draw the latents with the model, or read them where an earlier run did; several processes share the work.

    Raises BadInput for prompts the model does not take or an unknown sampler.
    """
    processes = Processes() if processes is None else processes
    subjects = how.subjects(model)
    distinct = list(dict.fromkeys(subjects))
    way = plan(how.sampler, how.steps, model.process, prediction=model.prediction, grid=model.grid)
    scale = how.guidance or model.guidance.scale
    scale = scale if model.guidance.kind != "none" else 1.0
    said = (model_fingerprint(model), way.to_json(), how.precision, subjects, scale)
    key = hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()
    folder = store / f"latents-{key}"
    counts = [min(SHARD, how.number - begin) for begin in range(0, how.number, SHARD)]
    files = [folder / f"{k:05d}-{count}.safetensors" for k, count in enumerate(counts)]
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    teacher = in_precision(model, how.precision)
    mine = [
        k for k in range(len(files)) if k % processes.world == processes.rank and read_shard(files[k]) is None
    ]
    todo, done = sum(counts[k] for k in mine), 0
    for k in mine:
        about = [subjects[(k * SHARD + i) % len(subjects)] for i in range(counts[k])]
        seeds = range(SEEDS + k * SHARD, SEEDS + k * SHARD + counts[k])
        drawn: list[Array] = []
        named: Mapping[str, Any] = {}
        if subjects != [None]:
            named = {"prompts" if model.tokenizer is not None else "labels": about}
        for one in trajectories(teacher, way, seeds, guidance=scale, batch=how.batch, calls=False, **named):
            drawn.append(one.latent)
            done += len(one.latent)
            yield Progress("latents", done / todo, f"{done} of {todo}")
        write_shard(files[k], {"latent": np.concatenate(drawn)})
    processes.meet()
    latents = np.concatenate([_read(file)["latent"] for file in files])[: how.number]
    rows = {subject: row for row, subject in enumerate(distinct)}
    numbers = np.array([rows[subjects[i % len(subjects)]] for i in range(how.number)], dtype=np.int64)
    conditions, nothing = conditions_of(model, distinct)
    seeds_of = SEEDS + np.arange(how.number, dtype=np.int64)
    return Samples(latents, numbers, seeds_of, conditions, nothing, f"{key}-{how.number}")


def given_samples(model: Model, latents: Array, subjects: Sequence[Any]) -> Samples:
    """Samples of latents from elsewhere, pictures for instance: latent i shows subjects[i], a prompt or a label.

    Raises BadInput for latents that are not the model's.
    """
    sample = model.sample
    wanted = (sample.channels, sample.height // sample.factor, sample.width // sample.factor)
    if latents.ndim != 4 or latents.shape[1:] != wanted or len(latents) != len(subjects) or not len(latents):
        raise BadInput(
            f"latents of shape {list(latents.shape)} with {len(subjects)} subjects for {model.name}",
            expected=f"[n, {', '.join(map(str, wanted))}], a subject each",
        )
    if not np.isfinite(latents).all():
        raise BadInput("latents with NaN or infinity", expected="finite ones")
    distinct = list(dict.fromkeys(subjects))
    rows = {subject: row for row, subject in enumerate(distinct)}
    numbers = np.array([rows[subject] for subject in subjects], dtype=np.int64)
    conditions, nothing = conditions_of(model, distinct)
    digest = hashlib.blake2b(repr((model_fingerprint(model), list(subjects))).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(latents).data)
    seeds = np.full(len(latents), -1, dtype=np.int64)
    return Samples(latents.astype(np.float32), numbers, seeds, conditions, nothing, digest.hexdigest())


def _read(file: Path) -> dict[str, Array]:
    found = read_shard(file)
    if found is None:
        raise BadInput(
            f"{file} is missing or damaged", expected="latents drawn a moment ago", fix="run again"
        )
    return found


def in_precision(model: Model, precision: str) -> Model:
    """The model with a denoiser that computes in bfloat16 where that was asked for."""
    if precision == "float32":
        return model
    th = torch()
    part = model.parts[model.denoiser]

    class Half(th.nn.Module):  # type: ignore[name-defined,misc]
        def forward(self, *inputs: Any) -> Any:
            with th.autocast("cpu", th.bfloat16):
                output = part.module(*inputs)
            return output.float()

    return replace(model, parts={**model.parts, model.denoiser: _other(part, Half())})


def _other(part: Part, module: Any) -> Part:
    return replace(part, module=module)
