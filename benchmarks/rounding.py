"""How much of the U-Net's output survives, by the grid weights lie on and the way they are rounded to it.

emoji-64's U-Net; inputs of all layers float; the first and last convolution and the time embedding float; SQNR of the
output over the held-out calls of a guided plan of 8 steps. Seconds are of one core.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
from common import save

from fewstep.export.plans import plan_of
from fewstep.model import load
from fewstep.model.model import Part
from fewstep.model.quantized import Layer, Quantized
from fewstep.model.trajectories import run_part
from fewstep.quant.adaround import AdaRound, reconstruct
from fewstep.quant.calibrate import Calibration, calibrate
from fewstep.quant.compensate import Compensation, compensate
from fewstep.quant.recorded import Recorded
from fewstep.quant.rounding import gptq, moments
from fewstep.quant.simulate import quantizable, simulated
from fewstep.quant.weights import nearest

MODEL = Path(__file__).parents[1] / "models" / "emoji-64"
FLOAT = (".conv_in", ".conv_out", ".time_embedding.linear_1", ".time_embedding.linear_2")
FORMS: dict[str, dict[str, Any]] = {
    "w8 rows": {"bits": 8},
    "w4 rows": {"bits": 4},
    "w4 groups of 64": {"bits": 4, "group": 64},
    "w4 groups of 32": {"bits": 4, "group": 32},
    "w4 groups of 64, zeros": {"bits": 4, "group": 64, "symmetric": False},
    "w4 groups of 32, zeros": {"bits": 4, "group": 32, "symmetric": False},
    "w4 groups of 32, multipliers": {"bits": 4, "group": 32, "multiplier": True},
    "w4 groups of 64, multipliers, zeros": {"bits": 4, "group": 64, "multiplier": True, "symmetric": False},
    "w4 groups of 32, multipliers, zeros": {"bits": 4, "group": 32, "multiplier": True, "symmetric": False},
    "w3 groups of 64, zeros": {"bits": 3, "group": 64, "symmetric": False},
    "w3 groups of 32, zeros": {"bits": 3, "group": 32, "symmetric": False},
    "w3 groups of 32, multipliers, zeros": {"bits": 3, "group": 32, "multiplier": True, "symmetric": False},
}
LEARNED = ("w4 rows", "w3 groups of 64, zeros")
"""Forms that AdaRound is tried on, with --learned: it takes far longer than all else together."""

SPARSE = 3
"""AdaRound learns from every third call: a block's inputs are recorded anew for each block, and need not be many."""


def finished(work: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    return make(), round(time.process_time() - begin, 1)


def sqnr_db(part: Part, recorded: Recorded, layers: dict[str, Layer]) -> float:
    noise = signal = 0.0
    for batch in recorded.held_out(part.name):
        right = next(iter(run_part(part, batch).values())).astype(np.float64)
        with simulated(part, Quantized(layers)):
            got = next(iter(run_part(part, batch).values()))
        noise, signal = noise + float(np.sum((got - right) ** 2)), signal + float(np.sum(right**2))
    return round(10 * float(np.log10(signal / noise)), 2)


def main(scratch: Path) -> None:
    model = load(MODEL)
    part = model.parts["unet"]
    plan = plan_of(model, "ddim", 8)
    recorded = finished(calibrate(model, plan, Calibration(), scratch))
    batches = recorded.batches("unet")
    weights = {n: m.weight.detach().numpy() for n, m in quantizable(part).items() if not n.endswith(FLOAT)}
    count = sum(w.size for w in weights.values())
    rows = sum(len(batch["sample"]) for batch in batches)
    sums, seconds = timed(lambda: moments(part, batches, list(weights)))
    results: dict[str, Any] = {
        "weights": count,
        "calls": len(batches),
        "rows_in_calls": rows,
        "seconds_moments": seconds,
        "forms": {},
    }
    starts: dict[str, dict[str, Layer]] = {}
    for name, form in FORMS.items():
        plain, took = timed(lambda form=form: {n: nearest(w, **form) for n, w in weights.items()})
        fed, more = timed(lambda plain=plain: {n: gptq(w, plain[n], sums[n]) for n, w in weights.items()})
        starts[name] = {n: Layer(w) for n, w in plain.items()}
        results["forms"][name] = {
            "bits_per_weight": round(sum(w.stored_bits() for w in plain.values()) / count, 3),
            "nearest": {"sqnr_db": sqnr_db(part, recorded, starts[name]), "seconds": took},
            "gptq": {
                "sqnr_db": sqnr_db(part, recorded, {n: Layer(w) for n, w in fed.items()}),
                "seconds": more,
            },
        }
        print(name, results["forms"][name], flush=True)
        save("rounding", results)
    for name in LEARNED if "--learned" in sys.argv else ():
        results["forms"][name] |= learned(part, recorded, Quantized(starts[name]), scratch)
        print(name, results["forms"][name], flush=True)
        save("rounding", results)


def learned(part: Part, recorded: Recorded, start: Quantized, scratch: Path) -> dict[str, Any]:
    """What more passes and AdaRound add, in the order in which they are used."""
    batches = recorded.batches(part.name)
    found: dict[str, Any] = {}

    def note(name: str, work: Generator[Any, None, Quantized]) -> Quantized:
        done, took = timed(lambda: finished(work))
        found[name] = {"sqnr_db": sqnr_db(part, recorded, dict(done.layers)), "seconds": took}
        print(name, found[name], flush=True)
        return done

    fed = note("gptq, 8 passes", compensate(part, start, batches, Compensation(passes=8), scratch))
    note("adaround beside that", reconstruct(part, fed, batches[::SPARSE], AdaRound(), scratch))
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
