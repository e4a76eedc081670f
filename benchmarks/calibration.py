"""How inputs of layers are best rounded: ranges, smoothing, which calls of the plan to calibrate on, how many.

    python benchmarks/calibration.py [MODEL] [--steps 8]

Inputs of all convolutions and linear layers of the denoiser but those of the time embedding are rounded, weights stay
as they are. What is measured is the signal to noise ratio of the network's output on trajectories that nothing was
calibrated on, over all calls of the plan and by call. Writes results/calibration.json.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save

from fewstep.model import Model, Part, load
from fewstep.model.quantized import Activations
from fewstep.model.trajectories import run_part, trajectories
from fewstep.quant.calibrate import Calibration, Recorded, calibrate
from fewstep.quant.grid import codes_of_range
from fewstep.quant.observe import Seen, input_codes, observe, predicted_db, step_codes, step_gain_db
from fewstep.quant.simulate import fake_quantize, quantizable
from fewstep.quant.smooth import shared_inputs, splits, trials
from fewstep.runtime.plan import Plan, plan

ROOT = Path(__file__).parents[1]
Codes = Mapping[str, Activations | Mapping[int, Activations]]
Divisors = Mapping[str, np.ndarray]
ROWS = 64
"""Inputs a layer's smoothing is chosen by."""
SEEDS = range(8)
"""Of the pictures whose final latents are compared."""


def result(generator: Generator[Any, None, Any]) -> Any:
    try:
        while True:
            next(generator)
    except StopIteration as stop:
        return stop.value


@contextmanager
def rounded(part: Part, table: Plan, codes: Codes, divisors: Divisors) -> Iterator[None]:
    """Inside, layers see what is left of their inputs; weights stay as they are."""
    modules, now = dict(part.module.named_modules()), [0]
    times = np.array([call.timestep for call in table.calls])
    place = [spec.name for spec in part.inputs].index("timestep")

    def tell(_: Any, arguments: tuple[Any, ...]) -> None:
        now[0] = int(np.abs(times - float(arguments[place].reshape(-1)[0])).argmin())

    def hook(name: str) -> Callable[..., Any]:
        how, module = codes[name], modules[name]
        divisor = None
        if name in divisors:
            last = isinstance(module, torch.nn.Linear)
            divisor = torch.from_numpy(divisors[name])[(..., *[None] * (0 if last else 2))]

        def look(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            grid = how if isinstance(how, Activations) else how[now[0]]
            x = arguments[0] if divisor is None else arguments[0] / divisor
            x = fake_quantize(x, grid)
            return (x if divisor is None else x * divisor, *arguments[1:])

        return look

    with ExitStack() as stack:
        stack.callback(part.module.register_forward_pre_hook(tell).remove)
        for name in codes:
            stack.callback(modules[name].register_forward_pre_hook(hook(name)).remove)
        yield


def decibels(signal: float, noise: float) -> float:
    return round(10 * math.log10(signal / noise), 2)


class Judge:
    """The network's output on held-out inputs, and the latents at the end, before and after rounding."""

    def __init__(self, model: Model, table: Plan, recorded: Recorded) -> None:
        self.model, self.table = model, table
        self.part = model.parts[model.denoiser]
        self.feeds = recorded.held_out(self.part.name)
        self.steps = recorded.steps_held_out(self.part.name)
        self.right = [self._output(feeds) for feeds in self.feeds]
        self.latent = self._latent()

    def _output(self, feeds: Mapping[str, Any]) -> Any:
        return run_part(self.part, feeds)[self.part.outputs[0].name].astype(np.float64)

    def _latent(self) -> Any:
        prompts = self.model.prompts[: len(SEEDS)]
        (run,) = trajectories(self.model, self.table, SEEDS, prompts=prompts, batch=len(SEEDS))
        return run.latent.astype(np.float64)

    def __call__(
        self, codes: Codes, divisors: Divisors | None = None, *, latent: bool = False
    ) -> dict[str, Any]:
        signal, noise = np.zeros(len(self.table.calls)), np.zeros(len(self.table.calls))
        found: dict[str, Any] = {}
        with rounded(self.part, self.table, codes, divisors or {}):
            for feeds, step, right in zip(self.feeds, self.steps, self.right, strict=True):
                signal[step] += np.square(right).sum()
                noise[step] += np.square(self._output(feeds) - right).sum()
            if latent:
                got = self._latent()
                error = np.square(got - self.latent).mean()
                found["latent_sqnr_db"] = decibels(np.square(self.latent).mean(), error)
                found["latent_psnr_db"] = decibels((self.latent.max() - self.latent.min()) ** 2, error)
        return {
            "sqnr_db": decibels(signal.sum(), noise.sum()),
            "by_call_db": [decibels(s, n) for s, n in zip(signal, noise, strict=True) if s],
            **found,
        }


def observed(
    part: Part, recorded: Recorded, names: list[str], divisors: Divisors | None = None
) -> dict[str, Seen]:
    batches, steps = recorded.batches(part.name), recorded.steps(part.name)
    return result(observe(part, batches, names, steps, rows=ROWS, smooth=divisors))


def smoothed(
    part: Part, seen: Mapping[str, Seen], batch: Mapping[str, Any], bits: int, kind: str, least_gain_db: float
) -> dict[str, np.ndarray]:
    """Divisors of the layers where they gain so much; layers that share an input share theirs."""
    modules, halves = quantizable(part), splits(part, batch)
    groups = [names for names in shared_inputs(part, batch) if names[0] in seen]
    alone = [(name,) for name in seen if not any(name in group for group in groups)]
    found = {}
    for names in (*groups, *alone):
        names = tuple(name for name in names if name in seen)
        weight = np.concatenate([modules[name].weight.detach().numpy() for name in names])
        tried = trials(seen[names[0]], weight, bits=8, input_bits=bits, halves=halves.get(names[0], ()))
        best = max((t for t in tried if t.kind in ("none", kind)), key=lambda t: t.db)
        if best.divisor is not None and best.db - tried[0].db >= least_gain_db:
            found |= dict.fromkeys(names, best.divisor)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(ROOT / "models/emoji-64"))
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    model = load(args.model)
    part = model.parts[model.denoiser]
    every = [name for name, module in quantizable(part).items() if type(module).__name__ != "Embedding"]
    names = [name for name in every if "time_emb" not in name]
    table = plan("ddim", args.steps, model.process, prediction=model.prediction, grid=model.grid)
    results: dict[str, Any] = {"model": model.name, "plan": f"ddim, {args.steps} steps", "rows": {}}

    with tempfile.TemporaryDirectory() as folder:

        def recorded(**how: Any) -> Recorded:
            return result(calibrate(model, table, Calibration(**how), Path(folder)))

        uniform = recorded()
        judge = Judge(model, table, uniform)

        def row(label: str, codes: Codes, divisors: Divisors | None = None, *, latent: bool = False) -> None:
            begin = time.process_time()
            results["rows"][label] = judge(codes, divisors, latent=latent)
            shown = {key: value for key, value in results["rows"][label].items() if key != "by_call_db"}
            print(f"{label:58s} {shown} ({time.process_time() - begin:.1f} s)", flush=True)

        seen = observed(part, uniform, every)
        feeds = uniform.batches(part.name)[0]
        of_names = {name: seen[name] for name in names}
        for bits in (8, 4):
            plain = {n: codes_of_range(s.low, s.high, bits) for n, s in of_names.items()}
            row(f"A{bits}, whole range", plain, latent=True)
            searched = {n: input_codes(s, bits) for n, s in of_names.items()}
            row(f"A{bits}, searched range", searched, latent=True)
            all_layers = {n: input_codes(s, bits) for n, s in seen.items()}
            row(f"A{bits}, searched, time embedding too", all_layers)
            edges = {n: c for n, c in searched.items() if "conv_in" not in n and "conv_out" not in n}
            row(f"A{bits}, searched, first and last layer float", edges)
            shared = {n: c for n, c in edges.items() if not n.endswith("ff.net.2")}
            row(f"A{bits}, searched, those and ff.net.2 float", shared)
            own = {n: step_codes(s, bits) for n, s in of_names.items()}
            row(f"A{bits}, searched for every step", own, latent=True)
            convolutions = {n: s for n, s in of_names.items() if "conv" in n}
            for of, kind, least in (
                ("all layers", "halves", 0.0),
                ("all layers", "channels", 3.0),
                ("all layers", "channels", 1.0),
                ("convolutions", "channels", 1.0),
            ):
                tried = convolutions if of == "convolutions" else of_names
                divisors = smoothed(part, tried, feeds, bits, kind, least)
                again = observed(part, uniform, names, divisors)
                codes = {n: input_codes(s, bits) for n, s in again.items()}
                label = f"A{bits}, searched, {kind} of {of} smoothed where {least:g} dB are gained"
                row(label, codes, divisors, latent=kind == "channels")
                results["rows"][label]["layers_smoothed"] = len(divisors)
            gains = {n: max(step_gain_db(s, bits).values()) for n, s in of_names.items()}
            ordered = sorted(gains, key=lambda n: -gains[n])
            results[f"A{bits}, predicted gain of own ranges at the best step, db"] = {
                "layers_above_1_db": sum(gain > 1 for gain in gains.values()),
                "layers_above_3_db": sum(gain > 3 for gain in gains.values()),
                "layers": len(gains),
                "largest": {n: round(gains[n], 2) for n in ordered[:10]},
            }
        worst = sorted(names, key=lambda n: predicted_db(seen[n], input_codes(seen[n], 8)))[:12]
        results["A8, predicted input sqnr of the worst layers, db"] = {
            n: {
                "searched": round(predicted_db(seen[n], input_codes(seen[n], 8)), 1),
                "whole range": round(predicted_db(seen[n], codes_of_range(seen[n].low, seen[n].high, 8)), 1),
                "low": round(seen[n].low, 2),
                "high": round(seen[n].high, 2),
            }
            for n in worst
        }
        for label, how in (
            ("normal", {"timesteps": "normal"}),
            ("uniform, as few calls as normal", {"calls": 19}),
            ("1 trajectory", {"samples": 1}),
            ("4 trajectories", {"samples": 4}),
            ("64 trajectories", {"samples": 64, "calls": 64}),
            ("other seed", {"seed": 1000}),
        ):
            recording = recorded(**how)
            found = observed(part, recording, names)
            for bits in (8, 4):
                codes = {n: input_codes(s, bits) for n, s in found.items()}
                row(f"A{bits}, calibrated on: {label}", codes)
            results["rows"][f"A8, calibrated on: {label}"]["calls"] = len(recording.batches(part.name))
        for label, kept in (("first call alone", {0}), ("last call alone", {args.steps - 1})):
            some = [i for i, step in enumerate(uniform.steps(part.name)) if step in kept]
            batches = [uniform.batches(part.name)[i] for i in some]
            found = result(observe(part, batches, names, [uniform.steps(part.name)[i] for i in some]))
            for bits in (8, 4):
                row(f"A{bits}, calibrated on: {label}", {n: input_codes(s, bits) for n, s in found.items()})
    save("calibration", results)


if __name__ == "__main__":
    main()
