"""How well sensitivity predicts: emoji-64's U-Net, 8 guided steps; results/sensitivity.json.

    python benchmarks/sensitivity.py [--model models/emoji-64] [--work DIR] [--samples 4] [--page FILE]

Measured: the table itself; the local mode against the exact one; predicted against measured noise of final latents;
sums of single errors against joint ones; W3.5 mixed by the integer programme, by greed, at random and uniform; K-means
codebooks a row against uniform grids. Joint figures are of calls that were held out and of trajectories with other
seeds. The table takes a few minutes of a quiet core and is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save
from scipy.stats import kurtosis, spearmanr

from fewstep.export.plans import plan_of
from fewstep.model import load
from fewstep.model.quantized import Layer, Quantized
from fewstep.model.trajectories import trajectories
from fewstep.quant.budget import _greedy, _solve, average_bits, choose, propose
from fewstep.quant.calibrate import Calibration, calibrate
from fewstep.quant.local import Local
from fewstep.quant.observe import input_codes, observe
from fewstep.quant.probe import Probe
from fewstep.quant.sensitivity import Sensitivity, _measured, sensitivity
from fewstep.quant.simulate import quantizable, simulated
from fewstep.quant.table import FLOAT, Table, bits_of, decibels, kind_of
from fewstep.tools.sensitivity_page import render

STEPS, GUIDANCE = 8, 3.0
SEEDS = range(8)
OPTIONS = ("w8", "w4", "w3")


def finished(work: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            return stop.value
        print(f"\r{event.stage} {100 * (event.fraction or 0):.0f} % {event.note:110.110}", end="", flush=True)


class Bench:
    """The model, what it was fed, and joint measurements."""

    def __init__(self, folder: Path, work: Path, samples: int) -> None:
        self.model = load(folder)
        self.part = self.model.parts[self.model.denoiser]
        self.plan = plan_of(self.model, "auto", STEPS)
        how = Calibration(samples=32, guidance=GUIDANCE)
        recorded = finished(calibrate(self.model, self.plan, how, work))
        self.batches, self.steps = recorded.batches(self.part.name), recorded.steps(self.part.name)
        names = list(quantizable(self.part))
        seen = finished(observe(self.part, self.batches, names, self.steps))
        self.codes = {n: {bits: input_codes(s, bits) for bits in (8, 4)} for n, s in seen.items()}
        self.work, self.samples = work, samples
        held = recorded.held_out(self.part.name), recorded.steps_held_out(self.part.name)
        self.held = Probe.of(
            self.part, *held, self.codes, Sensitivity(samples=samples), plan=self.plan, guidance=GUIDANCE
        )
        _ = self.held.reference
        self.latents = self.draw()

    def draw(self) -> Any:
        runs = trajectories(self.model, self.plan, SEEDS, guidance=GUIDANCE)
        return np.concatenate([run.latent for run in runs]).astype(np.float64)

    def table(self, mode: str) -> Table:
        how = Sensitivity(mode=mode, samples=self.samples)
        run = sensitivity(
            *(self.part, self.batches, self.steps, self.codes, how, self.work),
            plan=self.plan,
            guidance=GUIDANCE,
        )
        return finished(run)

    def seconds(self) -> dict[str, int]:
        """Of one core: local as a whole, exact from three layers, since what is kept in --work is not done again."""
        probe = self.probe("exact")
        _ = probe.reference
        begun = time.process_time()
        names = list(probe.modules)
        for i in (10, 60, 110):
            _measured(probe, None, names[i])
        exact = (time.process_time() - begun) / 3 * len(names)
        begun = time.process_time()
        local = finished(Local.measured(probe))
        for name in names:
            _measured(probe, local, name)
        return {"exact": round(exact), "local": round(time.process_time() - begun)}

    def probe(self, mode: str) -> Probe:
        how = Sensitivity(mode=mode, samples=self.samples)
        fed = (self.part, self.batches, self.steps, self.codes, how)
        return Probe.of(*fed, plan=self.plan, guidance=GUIDANCE)

    def quantized(self, chosen: Mapping[str, str]) -> Quantized:
        layers = {}
        for name, option in chosen.items():
            weights, inputs = bits_of(option)
            if weights is not None:
                codes = None if inputs is None else self.codes[name][inputs]
                layers[name] = Layer(self.held.weights(name, weights), codes)
        return Quantized(layers)

    def joint(self, chosen: Mapping[str, str]) -> tuple[Any, float]:
        """(noise-to-signal ratio of the held-out outputs by step, that of final latents)."""
        with simulated(self.part, self.quantized(chosen)):
            return self.held.noise(), float(
                np.sum((self.draw() - self.latents) ** 2) / np.sum(self.latents**2)
            )

    def row(self, table: Table, label: str, chosen: Mapping[str, str]) -> dict[str, Any]:
        outputs, final = self.joint(chosen)
        predicted = table.predicted_steps(chosen)
        row = {
            "what": label,
            "bits_per_weight": round(table.average_bits(chosen), 3),
            "output_db": round(decibels(float(np.mean(outputs))), 2),
            "output_predicted_db": round(decibels(float(np.mean(predicted))), 2),
            "joint_over_sum": round(float(np.mean(outputs) / np.mean(predicted)), 3),
            "final_db": round(decibels(final), 2),
            "final_predicted_db": round(decibels(table.predicted(chosen)), 2),
        }
        print(f"\r{row}", flush=True)
        return row


def agreement(right: Any, got: Any) -> dict[str, float]:
    """Of two sets of noise-to-signal ratios."""
    off = 10 * np.log10(got / right)
    return {
        "spearman": round(float(spearmanr(right, got)[0]), 4),
        "mean_db": round(float(off.mean()), 2),
        "sd_db": round(float(off.std()), 2),
        "worst_db": round(float(np.abs(off - off.mean()).max()), 2),
    }


def local_against_exact(bench: Bench, exact: Table, local: Table) -> dict[str, Any]:
    found: dict[str, Any] = {
        option: agreement(exact.final[:, j], local.final[:, j]) for j, option in enumerate(exact.options)
    }
    probe = bench.probe("local")
    measured = finished(Local.measured(probe))
    j = exact.options.index("w4")
    plain = [
        measured.noise(n, "w4", probe.weights(n, 4, probe.some_channels(n)), gain=False) @ exact.gains
        for n in exact.layers
    ]
    found["w4 with gain 1"] = agreement(exact.final[:, j], np.array(plain))
    return found


def final_against_measured(bench: Bench, table: Table, count: int = 20) -> dict[str, Any]:
    """Single layers, spread over the network."""
    names = [table.layers[i] for i in np.linspace(0, len(table.layers) - 1, count).astype(int)]
    measured, predicted, plain = [], [], []
    for option in ("w4", "w3"):
        for name in names:
            measured.append(bench.joint({name: option})[1])
            predicted.append(table.error(name, option))
            plain.append(float(np.mean(table.nsr[table.layers.index(name), table.options.index(option)])))
    return {
        "pairs": len(measured),
        "by the plan": agreement(np.array(measured), np.array(predicted)),
        "mean over steps": agreement(np.array(measured), np.array(plain)),
    }


def mixed(bench: Bench, table: Table, bits: float) -> list[dict[str, Any]]:
    """One size, several ways to spend it; then uniform ones."""
    best = choose(table, average_bits(table, bits), OPTIONS)
    rows = [bench.row(table, f"W{bits:g} integer programme", best)]
    # the same layers free, the same options, by greed
    pinned = {name: option for name, option in best.items() if option == "w8" and small(name)}
    free = [name for name in table.layers if name not in pinned]
    errors = [[table.error(name, o) for o in OPTIONS] for name in free]
    costs = [[table.stored_bits(name, o) / sum(table.weights) for o in OPTIONS] for name in free]
    left = bits - sum(table.stored_bits(name, o) for name, o in pinned.items()) / sum(table.weights)
    for label, solve in (("greedy", _greedy), ("integer programme, the same", _solve)):
        picked = {name: OPTIONS[i] for name, i in zip(free, solve(errors, costs, left), strict=True)}
        rows.append(bench.row(table, f"W{bits:g} {label}", {**picked, **pinned}))
    rng = np.random.default_rng(0)
    for draw in range(5):
        picked = dict.fromkeys(free, "w3")
        for name in rng.permutation(free):
            tried = {**picked, name: "w4"}
            if table.average_bits({**tried, **pinned}) <= bits:
                picked = tried
        rows.append(bench.row(table, f"W{bits:g} random {draw + 1}", {**picked, **pinned}))
    for option in ("w8", "w4", "w3"):
        uniform = {**dict.fromkeys(free, option), **pinned}
        rows.append(bench.row(table, f"uniform {option}, ends and time embedding at 8 bits", uniform))
    for option in ("w8a8", "w4a8", "w4a4"):
        every = {
            name: (option.replace("w4", "w8") if name in pinned else option)
            for name in table.layers
            if table.takes(name, option)
        }
        rows.append(bench.row(table, f"{option}, all layers", every))
    return rows


def small(name: str) -> bool:
    return kind_of(name) in ("conv_in", "conv_out", "time embedding")


def relaxed(bench: Bench, table: Table) -> dict[str, Any]:
    """Layers proposed for a floor 3 dB above what uniform 4 bits reach, and what they give."""
    chosen = {name: "w8" if small(name) else "w4" for name in table.layers}
    outputs, final = bench.joint(chosen)
    found = {}
    for what, of, before in (
        ("final latents", table, decibels(final)),
        ("outputs", table.of_outputs(), decibels(float(np.mean(outputs)))),
    ):
        steps = propose(of, chosen, before + 3, measured_db=before, options=OPTIONS)
        noise = bench.joint({**chosen, **{step.layer: step.after for step in steps}})
        after = decibels(float(np.mean(noise[0])) if what == "outputs" else noise[1])
        found[what] = {
            "before_db": round(before, 2),
            "floor_db": round(before + 3, 2),
            "predicted_db": steps[-1].final_db,
            "measured_db": round(after, 2),
            "more_bytes": sum(step.bytes for step in steps),
            "layers": [f"{step.layer}: {step.before} to {step.after}" for step in steps],
        }
    return found


def codebooks(bench: Bench, bits: int) -> dict[str, Any]:
    """SQNR of weights: K-means a row (2^bits values of 16 bits each) over the searched uniform grid of a row."""
    gains, tails, kinds, extra, total = [], [], [], 0, 0
    for name, module in quantizable(bench.part).items():
        rows = module.weight.detach().numpy().reshape(len(module.weight), -1)
        uniform = float(np.sum((bench.held.weights(name, bits).floats().reshape(rows.shape) - rows) ** 2))
        gains.append(10 * np.log10(uniform / kmeans_error(rows, 2**bits)))
        tails.append(float(kurtosis(rows / rows.std(axis=1, keepdims=True), axis=None)))
        kinds.append(kind_of(name))
        extra, total = extra + len(rows) * (16 * 2**bits - 32), total + rows.size
    by_kind = {
        kind: [g for g, k in zip(gains, kinds, strict=True) if k == kind] for kind in dict.fromkeys(kinds)
    }
    return {
        "bits": bits,
        "gain_db": {"median": median(gains), "least": round(min(gains), 2), "most": round(max(gains), 2)},
        "gain_db_by_kind": {kind: median(values) for kind, values in by_kind.items()},
        "spearman_with_kurtosis": round(float(spearmanr(tails, gains)[0]), 3),
        "more_bits_per_weight": round(extra / total, 3),
    }


def median(values: Any) -> float:
    return round(float(np.median(values)), 2)


def kmeans_error(rows: Any, count: int, rounds: int = 25) -> float:
    """Squared error of Lloyd's algorithm on each row, from its quantiles."""
    ordered = np.sort(rows, axis=1).astype(np.float64)
    inner = ordered.shape[1]
    if inner <= count:
        return 1e-30
    sums = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(ordered, axis=1)], axis=1)
    edges = np.tile(np.linspace(0, inner, count + 1).round().astype(int), (len(rows), 1))
    centres = np.zeros((len(rows), count))
    for _ in range(rounds):
        sizes = np.diff(edges, axis=1)
        means = np.diff(np.take_along_axis(sums, edges, axis=1), axis=1) / np.maximum(sizes, 1)
        centres = np.sort(np.where(sizes > 0, means, centres), axis=1)
        middles = (centres[:, 1:] + centres[:, :-1]) / 2
        for j in range(count - 1):
            edges[:, j + 1] = np.sum(ordered < middles[:, j : j + 1], axis=1)
    index = np.zeros(ordered.shape, int)
    for j in range(count - 1):
        index += ordered >= middles[:, j : j + 1]
    return float(np.sum((ordered - np.take_along_axis(centres, index, axis=1)) ** 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models/emoji-64")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fewstep-sensitivity")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--page", type=Path)
    parser.add_argument(
        "--only", nargs="+", metavar="SECTION", help="measure these anew, keep the rest of the results"
    )
    args = parser.parse_args()
    bench = Bench(args.model, args.work, args.samples)
    exact = bench.table("exact")
    sections: dict[str, Callable[[], Any]] = {
        "core_seconds": bench.seconds,
        "local_against_exact": lambda: local_against_exact(bench, exact, bench.table("local")),
        "final_latents": lambda: final_against_measured(bench, exact),
        "joint": lambda: mixed(bench, exact, args.bits),
        "relaxed": lambda: relaxed(bench, exact),
        "kinds": lambda: {option: exact.by_kind(option) for option in exact.options},
        "kmeans_over_uniform": lambda: [codebooks(bench, bits) for bits in (3, 4)],
        "table": exact.to_json,
    }
    results: dict[str, Any] = {
        "model": args.model.name,
        "plan": f"{bench.plan.sampler}, {STEPS} steps, guidance {GUIDANCE:g}",
    }
    if args.only:
        results |= json.loads((RESULTS / "sensitivity.json").read_text(encoding="utf-8"))
    for name in args.only or sections:
        results[name] = sections[name]()
    save("sensitivity", {name: value for name, value in results.items() if name != "host"})
    if args.page:
        best = choose(exact, average_bits(exact, args.bits), OPTIONS)
        args.page.write_text(render(exact, {n: o for n, o in best.items() if o != FLOAT}), encoding="utf-8")


if __name__ == "__main__":
    main()
