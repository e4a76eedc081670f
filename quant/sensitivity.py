"""Which layers suffer from how few bits: each quantized alone, every way, and what the part's output makes of it.

SQNR as in Yang et al. 2023 (arXiv:2312.05431), one layer at a time, at every step of the plan that ships.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.model import Part
from ..runtime.errors import BadInput
from ..runtime.files import atomic_write, output_errors
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from .local import Local
from .probe import Inputs, Probe, Sensitivity, final_gains
from .table import Table, bits_of

__all__ = ["Sensitivity", "sensitivity"]

Array = NDArray[Any]

EXACT_WORK = 3.4e14
"""Part.work of all forwards up to which "auto" is exact: 15 minutes of a core that takes 6.5 ms for the 2.4e9 of one
image of emoji-64's U-Net, and 9 s for the 3.5e12 of SD-1.5's."""

EVERY = 2.0
"""Seconds of work that may be lost when the process is killed."""


def sensitivity(
    part: Part,
    batches: Sequence[Mapping[str, Array]],
    steps: Sequence[int],
    inputs: Inputs,
    how: Sensitivity,
    store: Path,
    *,
    plan: Plan | None = None,
    guidance: float = 1.0,
    smooth: Mapping[str, Array] | None = None,
) -> Generator[Progress, None, Table]:
    """Measure every quantizable layer of a part with every option of `how`.

    batches   named inputs of the part, each of one network call
    steps     of each batch, the plan's call
    inputs    layer -> bits -> how its input is rounded there, for the options of inputs
    store     a folder; layers that are done are kept there, every few seconds, so that a job that was cut off goes on
    plan      for the denoiser: what makes final latents of its outputs; None: the mean over steps counts
    guidance  the scale; other than 1, batches of guided calls are doubled, the unconditional half first
    smooth    layer -> [in channels] that its input is divided and its weights are multiplied by
    Raises BadInput for no batches, unknown options, or a part whose output is not finite.
    """
    probe = Probe.of(part, batches, steps, inputs, how, plan=plan, guidance=guidance, smooth=smooth)
    if how.mode not in ("auto", "exact", "local"):
        raise BadInput(f"sensitivity mode {how.mode!r}", expected="auto, exact or local")
    first = part.inputs[0].name
    forwards = len(probe.modules) * len(how.options) * sum(len(feeds[first]) for feeds in probe.feeds)
    exact = how.mode == "exact" or (how.mode == "auto" and part.work() * forwards <= EXACT_WORK)
    mode = "exact" if exact else "local"
    yield Progress("sensitivity", 0.0, f"{len(probe.modules)} layers of {part.name}, {mode}")
    if not np.isfinite(probe.power).all():
        raise BadInput(f"{part.name} puts out NaN or infinity", expected="numbers", fix="check its weights")
    macs = _macs(probe)
    path = Path(store) / f"sensitivity-{part.name}-{mode}-{probe.key(mode)}.json"
    done = _read(path)
    local = None
    if not exact and len(done) < len(probe.modules):
        local = yield from Local.measured(probe)
    kept = _Kept(path, done)
    begun, fresh = time.monotonic(), 0
    try:
        for number, name in enumerate(probe.modules):
            if name in done:
                continue
            left = len(probe.modules) - number
            yield Progress("sensitivity", number / len(probe.modules), _note(name, begun, fresh, left))
            done[name] = _measured(probe, local, name)
            fresh += 1
            kept.save(at_once=False)
    finally:
        if fresh:
            kept.save(at_once=True)
    yield Progress("sensitivity", 1.0, part.name)
    return _table(probe, mode, done, macs, plan)


def _measured(probe: Probe, local: Local | None, name: str) -> dict[str, Any]:
    """What the table has of one layer, by option."""
    noise, stored = [], []
    count = int(probe.modules[name].weight.numel())
    some = None if local is None else probe.some_channels(name)
    for option in probe.how.options:
        bits = bits_of(option)[0]
        weights = None if bits is None else probe.weights(name, bits, some)
        if not probe.takes(name, option):
            noise.append([float("nan")] * len(probe.calls))
        elif local is not None:
            noise.append(local.noise(name, option, weights).tolist())
        else:
            with probe.rounded(name, option, weights):
                noise.append(probe.noise().tolist())
        if weights is None:
            stored.append(count * probe.how.float_bits)
        else:  # every row takes as much as every other
            stored.append(weights.stored_bits() * count // weights.codes.size)
    return {"nsr": noise, "bits": stored}


@dataclass
class _Kept:
    """Layers that are done, on disk: not written more often than every few seconds."""

    path: Path
    done: Mapping[str, Any]
    written: float = field(default_factory=time.monotonic)

    def save(self, *, at_once: bool) -> None:
        if at_once or time.monotonic() - self.written > EVERY:
            with output_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, json.dumps(self.done).encode())
            self.written = time.monotonic()


def _note(name: str, begun: float, fresh: int, left: int) -> str:
    if fresh == 0:
        return name
    seconds = (time.monotonic() - begun) / fresh * left
    return (
        f"{name}; about {seconds / 60:.0f} min left"
        if seconds > 90
        else f"{name}; about {seconds:.0f} s left"
    )


def _read(path: Path) -> dict[str, Any]:
    """What an earlier run finished; a file that cannot be read counts as none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _table(
    probe: Probe, mode: str, done: Mapping[str, Any], macs: Mapping[str, int], plan: Plan | None
) -> Table:
    names = tuple(probe.modules)
    gains = np.full(len(probe.calls), 1 / len(probe.calls))
    if plan is not None:
        sizes = probe.by_step([float(out.size) for out in probe.reference])
        gains = final_gains(plan, probe.calls, probe.power / sizes, _final_power(probe, plan))
    return Table(
        part=probe.part.name,
        mode=mode,
        layers=names,
        options=probe.how.options,
        steps=probe.calls,
        nsr=np.array([done[name]["nsr"] for name in names], np.float64),
        bits=np.array([done[name]["bits"] for name in names], np.int64),
        weights=tuple(int(probe.modules[name].weight.numel()) for name in names),
        macs=tuple(macs[name] for name in names),
        gains=gains,
        float_bits=probe.how.float_bits,
    )


def _final_power(probe: Probe, plan: Plan) -> float:
    """Mean square of the clean sample, as the last recorded call estimates it."""
    last = probe.steps.index(probe.calls[-1])
    call, out = plan.calls[probe.calls[-1]], probe.reference[last]
    x = probe.feeds[last]["sample"][-len(out) :].astype(np.float64) / call.scale
    a, b, _ = call.x0
    return max(float(np.mean((a * x + b * out[:, : x.shape[1]]) ** 2)), float(np.finfo(np.float32).tiny))


def _macs(probe: Probe) -> dict[str, int]:
    """Layer -> multiply-accumulates for one sample; of an Embedding none."""
    macs = dict.fromkeys(probe.modules, 0)
    hooks = []
    for name, module in probe.modules.items():
        if type(module).__name__ == "Embedding":
            continue

        def hook(module: Any, _: Any, out: Any, name: str = name) -> None:
            positions = out.numel() // module.weight.shape[0]
            macs[name] += int(module.weight.numel()) * positions // rows

        hooks.append(module.register_forward_hook(hook))
    rows = len(probe.feeds[0][probe.part.inputs[0].name])
    try:
        probe.output(0)
    finally:
        for handle in hooks:
            handle.remove()
    return macs
