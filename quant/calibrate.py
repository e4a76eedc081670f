"""Calibration from trajectories: what every part is fed while the shipped plan runs, kept on disk.

No dataset is needed: the model draws by the very plan that ships, steps, sampler, guidance and prompts alike, and what
its networks see on the way is what they will see on the device (Shang et al. 2023, PTQ4DM, arXiv:2211.15736; Li et al.
2023, Q-Diffusion, arXiv:2302.04304). Every batch of trajectories is one file, so that a job that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.fingerprint import model_fingerprint
from ..model.model import Model
from ..model.shards import read_shard, write_shard
from ..model.trajectories import PROMPTS, Trajectory, run_part, text_inputs, trajectories
from ..runtime.errors import BadInput, FewstepError
from ..runtime.files import output_errors
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from .calls import STEPS, TIMESTEPS, chosen_calls
from .recorded import BATCH, Recorded, by_part, rows_at_once, unscaled

__all__ = ["TIMESTEPS", "Calibration", "Recorded", "calibrate", "chosen_calls"]

Array = NDArray[Any]
BUDGET = 5.7e13
"""Part.work of all samples that trajectories take through the denoiser, unless told otherwise: 16 forwards of SD-1.5's
U-Net (3.5e12 each, nine core-seconds in float32), so about two and a half minutes of one core at any size."""

MOST = 32
"""Trajectories, and network calls kept, of a model small enough that BUDGET would allow more. On emoji-64 twice as many
change the output's error by 0.01 dB (benchmarks/results/calibration.json)."""

FIRST_SEED, FIRST_HELD_OUT = 1_000_000, 2_000_000
"""Far from the small seeds that pictures are drawn and compared with."""


@dataclass(frozen=True)
class Calibration:
    """How much is recorded, and at which calls of the plan.

    timesteps  "uniform": the same number at every call, or, of a long plan, calls evenly spread (Q-Diffusion).
               "normal": PTQ4DM's clamped normal distribution, mean 0.4 T and deviation 0.4 T where 0 is the clean end
               and T the noise: more points where there is little noise, most at the last call, which gets all that
               falls below 0. (The authors' code counts from the noisy end while it gathers and from the clean end
               when it tells the network the time; this is the paper's orientation.)
               "steps": every call of every trajectory, for plans of few steps and a range for each.
    """

    samples: int | None = None
    """Trajectories. None: what BUDGET allows, 1 to 32: 32 for emoji-64; for SD-1.5 at 4 steps 4, or 2 with guidance."""
    calls: int | None = None
    """Network calls kept, all their samples at one time. None: again by BUDGET, at most 32."""
    timesteps: str = "uniform"
    prompts: tuple[str, ...] = ()
    """Empty for those that came with the model, and for model.trajectories.PROMPTS where none did."""
    labels: tuple[int, ...] = ()
    """Class labels; empty for all classes, evenly spread."""
    guidance: float | None = None
    """None: as shipped."""
    seed: int = 0


@dataclass(frozen=True)
class _Run:
    """Everything that decides what is recorded: hashed, it is the name of the folder."""

    network: str
    plan: Mapping[str, Any]
    process: Mapping[str, Any]
    samples: int
    held_out: int
    batch: int
    calls: int
    timesteps: str
    prompts: tuple[str, ...]
    labels: tuple[int, ...]
    guidance: float
    seed: int
    pictures: bool
    """Whether decoded pictures are kept as well, for an image encoder."""
    version: int = 1
    """Of the files."""

    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def subjects(self, kind: str) -> tuple[Sequence[Any], Sequence[Any]]:
        """(prompts or labels to calibrate on, held out): apart where there are at least two."""
        every: Sequence[Any] = getattr(self, kind)
        if len(every) < 2:
            return every, every
        count = max(1, min(self.held_out, len(every) // 4))
        apart = set((np.linspace(0, len(every) - 1, count + 2)[1:-1] + 0.5).astype(int).tolist())
        return [s for i, s in enumerate(every) if i not in apart], [every[i] for i in sorted(apart)]


def calibrate(model: Model, plan: Plan, how: Calibration, store: Path) -> Generator[Progress, None, Recorded]:
    """Run the plan on the torch modules and keep what every part is fed.

    store  a folder; what is there already, by a key of weights, plan and configuration, is read and not run again, so
           that a job that was cut off at any point goes on with the next batch
    Raises BadInput for a model that is quantized already, a setting or prompt that makes no sense, and NaN or infinity
    in what a network puts out (naming part, call and prompt); OutputError where the store cannot be written, which
    leaves the batches before in place and nothing half-written.
    """
    run = _settle(model, plan, how)
    folder = Path(store) / f"calibration-{run.key()}"
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    begins = range(0, run.samples, run.batch)
    kept = chosen_calls(run.timesteps, len(plan.calls), len(begins), run.calls)
    spread = np.unique(np.linspace(0, len(plan.calls) - 1, min(BATCH, len(plan.calls))).round().astype(int))
    shards: list[dict[str, Array]] = []
    held: list[dict[str, Array]] = []
    total = run.samples + run.held_out
    for number, begin in enumerate(begins):
        yield Progress("calibrate", begin / total, f"trajectory {begin + 1} of {total}")
        count = min(run.batch, run.samples - begin)
        file = folder / f"trajectories-{number:04d}.safetensors"
        shards.append(_shard(file, model, plan, run, begin, count, kept[number], held_out=False))
    for number, begin in enumerate(range(0, run.held_out, run.batch)):
        yield Progress(
            "calibrate", (run.samples + begin) / total, f"trajectory {run.samples + begin + 1} of {total}"
        )
        count = min(run.batch, run.held_out - begin)
        file = folder / f"held-out-{number:04d}.safetensors"
        held.append(_shard(file, model, plan, run, begin, count, spread.tolist(), held_out=True))
    yield Progress("calibrate", 1.0, f"{sum(map(len, kept))} network calls of {run.samples} trajectories")
    prompts, others = run.subjects("prompts")
    prompts = prompts if run.guidance == 1.0 else ["", *prompts]
    return Recorded(run.key(), *by_part(model, shards, prompts), *by_part(model, held, others))


def _settle(model: Model, plan: Plan, how: Calibration) -> _Run:
    """Every choice made. Raises BadInput for those that make no sense."""
    if done := [part.name for part in model if part.quantized is not None]:
        raise BadInput(
            f"{done[0]} of {model.name} is quantized already",
            expected="a model in floating point",
            fix="quantize once: leave one of the passes out",
        )
    if how.timesteps not in TIMESTEPS:
        raise BadInput(f"timesteps {how.timesteps!r}", expected=" or ".join(TIMESTEPS))
    if how.timesteps == "steps" and len(plan.calls) > STEPS:
        raise BadInput(
            f'timesteps "steps" for a plan of {len(plan.calls)} calls',
            expected=f"at most {STEPS}",
            fix='take "uniform"',
        )
    for name, value in (("samples", how.samples), ("calls", how.calls)):
        if value is not None and value < 1:
            raise BadInput(f"{value} {name} to calibrate on", expected="1 or more")
    prompts, labels = _subjects(model, how)
    scale = model.guidance.scale if how.guidance is None else how.guidance
    scale = 1.0 if model.guidance.kind == "none" else scale
    part = model.parts[model.denoiser]
    rows = [2 if scale != 1.0 and call.guided else 1 for call in plan.calls]
    samples = how.samples or max(1, min(MOST, int(BUDGET / (part.work() * sum(rows)))))
    batch = rows_at_once(part)
    calls = how.calls or max(1, min(MOST, int(BUDGET / (part.work() * max(rows) * min(batch, samples)))))
    if model.classes is not None and not labels:
        every = min(samples + batch, model.classes)
        labels = tuple(np.linspace(0, model.classes - 1, every).astype(int).tolist())
    pictures = "vae_encoder" in model.parts
    matter = [name for name in model.parts if pictures or not name.startswith("vae_")]
    return _Run(
        network=model_fingerprint(model, matter),
        plan=plan.to_json(),
        process=model.process.to_json(),
        samples=samples,
        held_out=min(batch, samples),
        batch=batch,
        calls=calls,
        timesteps=how.timesteps,
        prompts=prompts,
        labels=labels,
        guidance=scale,
        seed=how.seed,
        pictures=pictures,
    )


def _subjects(model: Model, how: Calibration) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Prompts and labels; () where the model takes none."""
    if model.tokenizer is None and how.prompts:
        raise BadInput(f"prompts for {model.name}, a model without text", expected="no prompts")
    if blank := [number for number, prompt in enumerate(how.prompts, 1) if not prompt.strip()]:
        raise BadInput(f"prompt {blank[0]} to calibrate on is empty", expected="words", fix="leave it out")
    if model.tokenizer is None:
        return (), how.labels
    # without repetitions, since those held out must be others
    return tuple(dict.fromkeys(how.prompts or model.prompts or PROMPTS)), how.labels


def _shard(
    file: Path,
    model: Model,
    plan: Plan,
    run: _Run,
    begin: int,
    count: int,
    keep: Sequence[int],
    *,
    held_out: bool,
) -> dict[str, Array]:
    """One batch of trajectories: read where it is whole, run and written otherwise."""
    found = read_shard(file)
    if found is not None:
        return found
    first = (FIRST_HELD_OUT if held_out else FIRST_SEED) + run.seed + begin
    seeds = range(first, first + count)
    prompts, labels = (_turned(run.subjects(kind)[held_out], begin) for kind in ("prompts", "labels"))
    try:
        (done,) = trajectories(
            model, plan, seeds, prompts=prompts, labels=labels, guidance=run.guidance, batch=count
        )
    except BadInput:
        raise
    except FewstepError as error:
        raise _broken(model, plan, run, seeds, prompts, labels, error) from error
    arrays = {
        f"call.{k}.{name}": array for k in keep for name, array in done.calls[_index(done, plan, k)].items()
    }
    arrays["latent"] = done.latent
    if run.pictures:
        arrays["picture"] = np.concatenate([_decoded(model, latent[None]) for latent in done.latent])
    write_shard(file, arrays)
    return arrays


def _turned(subjects: Sequence[Any], begin: int) -> list[Any]:
    """Sample `begin` gets its own subject as its batch counts from 0."""
    begin %= max(len(subjects), 1)
    return [*subjects[begin:], *subjects[:begin]]


def _index(done: Trajectory, plan: Plan, call: int) -> int:
    """Where a trajectory keeps the call of a row: a policy may leave calls out."""
    if len(done.calls) == len(plan.calls):
        return call
    times = [float(feeds["timestep"].reshape(-1)[0]) for feeds in done.calls]
    return int(np.abs(np.subtract(times, plan.calls[call].timestep)).argmin())


def _broken(
    model: Model,
    plan: Plan,
    run: _Run,
    seeds: Sequence[int],
    prompts: Sequence[str],
    labels: Sequence[int],
    error: FewstepError,
) -> BadInput:
    """Which part, call and prompt put out NaN or infinity: sample by sample this time."""
    if model.tokenizer is not None:
        used = list(dict.fromkeys([*prompts[: len(seeds)], ""]))
        part = model.parts["text_encoder"]
        for text, feeds in zip(used, text_inputs(model, used), strict=True):
            if not all(np.isfinite(array).all() for array in run_part(part, feeds).values()):
                return BadInput(
                    f"text_encoder puts out NaN or infinity for the prompt {text!r}",
                    expected="numbers",
                    fix="leave the prompt out, or take weights that are not damaged",
                )
    found, about = error.found, ""
    for i, seed in enumerate(seeds):
        prompt = [prompts[i % len(prompts)]] if prompts else []
        label = [labels[i % len(labels)]] if labels else []
        try:
            list(
                trajectories(
                    model, plan, [seed], prompts=prompt, labels=label, guidance=run.guidance, batch=1
                )
            )
        except FewstepError as alone:
            found, about = alone.found, f", seed {seed}"
            about += f", prompt {prompt[0]!r}" if prompt else f", label {label[0]}" if label else ""
            break
    return BadInput(
        f"calibration of {model.denoiser}: {found}{about}",
        expected="numbers",
        fix="leave that prompt out, lower the guidance, or take weights that are not damaged",
    )


def _decoded(model: Model, latent: Array) -> Array:
    part = model.parts["vae_decoder"]
    return run_part(part, {part.inputs[0].name: unscaled(model, latent)})[part.outputs[0].name]
