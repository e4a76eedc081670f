"""A bundle as a problem: its own denoiser, seeded noises, and where many steps of a good sampler take them.

The long runs are the dear part, so they are kept in a folder, a file a batch, and an interrupted job goes on with the
next batch. The folder's name is the hash of everything the runs depend on.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.denoiser import Denoiser
from ..runtime.errors import BadInput, PlanError
from ..runtime.files import atomic_write, output_errors
from ..runtime.noise import Noise
from ..runtime.pipeline import Pipeline
from ..runtime.plan import Call, Time, plan
from ..runtime.process import Array, RectifiedFlow, process_from_json
from ..runtime.request import guidance_of, shape_of
from .problem import Problem, Trajectory

__all__ = ["PROMPTS", "References", "Setting"]

PROMPTS = (
    *("a red apple", "a cat", "a house by the sea", "a portrait of a woman", "a green tree", "a blue car"),
    *("a mountain at night", "a bowl of fruit"),
)
"""Where none are given: short, since a small tokenizer may spend a token on every letter."""

KNOTS = 33
"""States kept of each long run: interpolation between them is far closer than few-step plans ever come."""


@dataclass(frozen=True)
class Setting:
    """What the references depend on besides the bundle."""

    noises: int = 32
    prompts: tuple[str, ...] = ()
    """Empty for PROMPTS; noise i goes with prompt i modulo their number. Class labels are spread evenly."""
    guidance: float | None = None
    """None for the bundle's own."""
    steps: int = 100
    """Of dpmpp_2m on Karras' grid. On benchmarks/mixture.py 100 leave an error of 0.0015, a sixtieth of what the best
    fixed sampler leaves with six calls; evenly spaced timesteps would leave ten times that."""
    seed: int = 0
    batch: int = 16
    """Samples in one call of the network."""

    def __post_init__(self) -> None:
        for name, low, high in (("noises", 2, 4096), ("steps", 10, 1000), ("batch", 1, 4096)):
            value = getattr(self, name)
            if not low <= value <= high:
                said = "reference steps" if name == "steps" else name
                raise BadInput(f"{value} {said}", expected=f"{low} to {high}")


@dataclass
class Meter:
    """Counts samples through the network, so that whoever waits can be told how long."""

    samples: int = 0


@dataclass
class References:
    """The problem of one bundle in the making: iterate `make` to the end, then read `problem`."""

    pipeline: Pipeline
    setting: Setting
    folder: Path
    """Where references are kept, in a subfolder of their own."""
    meter: Meter = field(default_factory=Meter)

    @property
    def path(self) -> Path:
        """The subfolder of exactly these references."""
        manifest = self.pipeline.manifest
        depends = {
            "files": {name: spec.sha256 for name, spec in manifest.files.items()},
            "process": dict(manifest.process),
            "guidance": self._scale(),
            "setting": {**self.setting.__dict__, "guidance": None},
            "knots": KNOTS,
            "plan": self._plan().to_json(),
        }
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:16]

    def make(self) -> Iterator[float]:
        """Run what is not there yet; yields how much of the whole is done."""
        problem, long = self.empty, self._plan()
        keep = _kept(long.states)
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        for begin in range(0, self.setting.noises, self.setting.batch):
            which = np.arange(begin, min(begin + self.setting.batch, self.setting.noises))
            path = self.path / f"noises-{begin:04d}.npy"
            if not path.exists():
                states = [long.start(problem.starts[which])]
                for step in problem.run(long, which):
                    if step.index + 1 in keep:
                        states.append(step.x)
                    yield (begin + len(which) * step.index / long.states) / self.setting.noises
                buffer = io.BytesIO()
                np.save(buffer, np.stack(states))
                atomic_write(path, buffer.getvalue())
            yield (int(which[-1]) + 1) / self.setting.noises

    def problem(self) -> Problem:
        """Raises FileNotFoundError before `make` came to its end."""
        long, empty = self._plan(), self.empty
        states = np.concatenate(
            [
                np.load(self.path / f"noises-{begin:04d}.npy", allow_pickle=False)
                for begin in range(0, self.setting.noises, self.setting.batch)
            ],
            axis=1,
        )
        times = np.array([call.t for call in long.calls] + [0.0])[sorted({0, *_kept(long.states)})]
        return replace(empty, targets=states[-1], trajectory=Trajectory(empty.process, times, states))

    def _plan(self) -> Any:
        process = process_from_json(self.pipeline.manifest.process)
        grid = "linspace" if isinstance(process, RectifiedFlow) else "karras"
        if float(process.alpha(process.t_max)) == 0 and grid == "karras":
            grid = "trailing"  # zero terminal SNR has no noise level over signal to be even in
        made = plan(
            "dpmpp_2m", self.setting.steps, process, grid, prediction=self.pipeline.manifest.prediction
        )
        return self.empty.shipped(made)

    @cached_property
    def empty(self) -> Problem:
        """The problem before anything is known of its targets."""
        manifest, n = self.pipeline.manifest, self.setting.noises
        shape = shape_of(manifest, None, None)
        starts = np.stack([Noise(self.setting.seed + i).randn(shape) for i in range(n)])
        spec = {tensor.name: tensor for tensor in manifest.parts[manifest.denoiser].inputs}
        fixed = isinstance(spec["sample"].shape[0], int)
        return Problem(
            process_from_json(manifest.process),
            self._predict(),
            starts,
            starts,
            fit=max(1, n * 3 // 4),
            prediction=manifest.prediction,
            whole_timesteps=spec["timestep"].dtype.startswith("int"),
            batch=1 if fixed else self.setting.batch,
        )

    def _scale(self) -> float:
        return guidance_of(self.pipeline.manifest, self.setting.guidance)

    def _predict(self) -> Any:
        pipeline, manifest, n = self.pipeline, self.pipeline.manifest, self.setting.noises
        scale = self._scale()
        prompts = labels = None
        if manifest.tokenizer is not None:
            given = self.setting.prompts or PROMPTS
            prompts = [given[i % len(given)] for i in range(n)]
        elif self.setting.prompts:
            raise BadInput("prompts for a model without text", expected="no --prompt")
        if manifest.classes is not None:
            labels = np.linspace(0, manifest.classes - 1, n).astype(int).tolist()
        condition, nothing = pipeline._condition(prompts, None, labels, n, guided=scale != 1.0)
        graphs = manifest.graphs

        def predict(x: Array, call: Call, which: Array) -> Array:
            if call.graph not in graphs:
                raise PlanError(f"graph {call.graph!r}", expected=" or ".join(graphs))
            session, spec = pipeline._open(graphs[call.graph]), manifest.parts[graphs[call.graph]]
            self.meter.samples += len(x)
            mine = {name: array[which] for name, array in condition.items()}
            none = None if nothing is None else {name: array[which] for name, array in nothing.items()}
            return Denoiser(session, spec, mine, none, scale)(x, Time(call))

        return predict


def _kept(states: int) -> set[int]:
    """Which states after a step are kept; the last one is."""
    return set(np.unique(np.linspace(0, states, KNOTS).astype(int))[1:].tolist())
