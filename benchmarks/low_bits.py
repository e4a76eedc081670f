"""emoji-64 at 8 and 4 bits, as its quantized graph computes: plain rounding, ours, and ours finetuned.

    python benchmarks/low_bits.py [--store DIR] [--schemes w8a8 w4a8 w4a4] [--train 1000] [--samples 256]

Only the U-Net changes. SQNR is of its output, on calls of the shipped plan (8 steps, guidance 3) nothing was fitted
to: the mean of the eight calls and the worst. PSNR is of final latents against float32 with equal seeds, by the largest
latent. Retrieval is the share of the 255 core captions whose picture the scorer (models/emoji-64-scorer, never used in
training) ranks first among all 1,355. What is calibrated and trained on was drawn from the other 1,100 captions.

plain      nearest codes over the whole range, weights symmetric a row, inputs from their least to their largest value;
           every layer alike
ours       the pass `quantize` as it stands
finetuned  ours, all weights and scales trained for --train steps (quant/finetune.py), then the drift measured anew
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save

from fewstep.export.plans import plan_of
from fewstep.export.quality import psnr_db, sqnr_db
from fewstep.model import Context, Model, Part, load
from fewstep.model.quantized import Activations, Layer, Quantized, Weights
from fewstep.model.trajectories import run_part, trajectories
from fewstep.quant.calibrate import Calibration, Recorded, calibrate
from fewstep.quant.drift import measure_drift, with_drift
from fewstep.quant.finetune import Finetune, finetune
from fewstep.quant.observe import observe
from fewstep.quant.quantize import Quantize
from fewstep.quant.scheme import parse_scheme
from fewstep.quant.simulate import quantizable, simulated
from fewstep.runtime.plan import Plan
from fewstep.targets import load_target
from fewstep.tools.features import Scorer, open_scorer

ROOT = Path(__file__).parents[1]
CAPTIONS = ROOT / "models/emoji-64-scorer/captions.json"
STEPS = 8
SEED = 10_000
"""Of the first picture; calibration draws from a million on."""
BATCH = 32


def finished(work: Generator[Any, None, Any], every: float = 20.0) -> Any:
    """The result of a generator, whose progress is shown every so many seconds."""
    shown = 0.0
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return end.value
        if time.monotonic() - shown > every:
            shown = time.monotonic()
            print(f"  {event.stage}: {event.note}", flush=True)


def plain(part: Part, recorded: Recorded, weights: int, inputs: int) -> Quantized:
    """What a quantizer does that knows nothing of the network."""
    modules = quantizable(part)
    seen = finished(observe(part, recorded.batches(part.name), list(modules), recorded.steps(part.name)))
    layers = {}
    for name, module in modules.items():
        w = module.weight.detach().numpy()
        rows = w.reshape(len(w), -1)
        top = 2 ** (weights - 1) - 1
        scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / top, 1e-12).astype(np.float32)
        codes = np.clip(np.rint(rows / scale), -top, top).astype(np.int8)
        low, high = min(seen[name].low, 0.0), max(seen[name].high, 0.0)
        step = (high - low) / (2**inputs - 1)
        layers[name] = Layer(
            Weights(weights, codes, scale, w.shape), Activations(step, round(-low / step), inputs)
        )
    return Quantized(layers)


def latents(model: Model, plan: Plan, captions: Sequence[str], quantized: Quantized | None) -> Any:
    with simulated(model.parts[model.denoiser], quantized):
        seeds = range(SEED, SEED + len(captions))
        runs = trajectories(model, plan, seeds, prompts=captions, batch=BATCH)
        return np.concatenate([run.latent for run in runs])


def retrieved(model: Model, scorer: Scorer, captions: Sequence[str], drawn: Any) -> dict[str, float]:
    """Shares of pictures that the scorer ranks first, and among the first five."""
    part = model.parts["vae_decoder"]
    ranks = []
    for begin in range(0, len(captions), BATCH):
        fed = (drawn[begin : begin + BATCH] / model.sample.scaling_factor).astype(np.float32)
        pictures = np.clip(run_part(part, {part.inputs[0].name: fed})[part.outputs[0].name] / 2 + 0.5, 0, 1)
        pairs = zip(pictures.transpose(0, 2, 3, 1), captions[begin : begin + BATCH], strict=True)
        ranks += [scorer.rank(picture, caption) for picture, caption in pairs]
    return {"first": float(np.mean(np.array(ranks) == 0)), "first_five": float(np.mean(np.array(ranks) < 5))}


def output_db(part: Part, quantized: Quantized, calls: Sequence[Mapping[str, Any]]) -> list[float]:
    """SQNR of the part's output, call by call."""
    found = []
    for call in calls:
        right = run_part(part, call)
        with simulated(part, quantized):
            got = run_part(part, call)
        found.append(sqnr_db(right[part.outputs[0].name], got[part.outputs[0].name]))
    return found


def add_row(row: dict[str, Any]) -> None:
    """Into the results, in place of what was measured before under the same name: a run may be of some rows alone."""
    path = RESULTS / "low_bits.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [old for old in rows if (old["scheme"], old["how"]) != (row["scheme"], row["how"])]
    print(json.dumps(row), flush=True)
    save("low_bits", {"steps": STEPS, "rows": [*kept, row]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()) / "fewstep-low-bits")
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a8", "w4a4"])
    parser.add_argument("--finetuned", nargs="*", default=["w4a4"])
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=256, help="trajectories to train on")
    parser.add_argument("--captions", type=int, default=255)
    args = parser.parse_args()

    args.store.mkdir(parents=True, exist_ok=True)
    model = load(ROOT / "models/emoji-64")
    plan, part = plan_of(model, "model", STEPS), model.parts[model.denoiser]
    known = json.loads(CAPTIONS.read_text(encoding="utf-8"))
    core = [row["caption"] for row in known if row["core"]]
    core = [core[i] for i in np.unique(np.linspace(0, len(core) - 1, args.captions).astype(int))]
    others = tuple(row["caption"] for row in known if not row["core"])
    folder = args.store / "scorer"
    if not (folder / "image.onnx").exists():
        script = ROOT / "models/train/export_scorer.py"
        subprocess.run([sys.executable, script, folder], check=True, cwd=script.parent)
    scorer = open_scorer(folder)

    context = Context(load_target("laptop-cpu"), plan, args.store / "work", args.store)
    some = others[:: max(1, len(others) // 32)]
    recorded = finished(calibrate(model, plan, Calibration(prompts=some), args.store))
    exam = recorded.held_out(part.name)
    right = latents(model, plan, core, None)
    add_row({"scheme": "float32", "how": "", "captions": len(core), **retrieved(model, scorer, core, right)})

    def add(scheme: str, how: str, quantized: Quantized, seconds: float) -> None:
        drawn, decibels = latents(model, plan, core, quantized), output_db(part, quantized, exam)
        shapes = {name: tuple(module.weight.shape) for name, module in quantizable(part).items()}
        row = {
            "scheme": scheme,
            "how": how,
            "captions": len(core),
            "bits_per_weight": quantized.summary(shapes)["bits_per_weight"],
            "output_sqnr_db": {"mean": float(np.mean(decibels)), "worst": min(decibels)},
            "latent_psnr_db": psnr_db(right, drawn),
            "core_seconds": round(seconds, 1),
            **retrieved(model, scorer, core, drawn),
        }
        if how == "finetuned":
            row["train"] = {"steps": args.train, "samples": args.samples}
        add_row(row)

    for scheme in args.schemes:
        bits = parse_scheme(scheme)
        assert bits.inputs is not None, "the table is of integer inputs"
        begun = time.process_time()
        made = plain(part, recorded, int(bits.weights), bits.inputs)
        add(scheme, "plain", made, time.process_time() - begun)
        begun = time.process_time()
        quantize = Quantize(scheme=scheme, decoder="", text="", prompts=some)
        ours = finished(quantize(model, context)).parts[part.name].quantized
        add(scheme, "ours", ours, time.process_time() - begun)
        if scheme in args.finetuned:
            begun = time.process_time()
            asked = Calibration(args.samples, args.samples, "steps", others, seed=1)
            lessons = finished(calibrate(model, plan, asked, args.store)).batches(part.name)
            how = Finetune(steps=args.train, guidance=model.guidance.scale)
            trained = finished(finetune(part, ours, lessons, how, args.store, exam))
            means = finished(measure_drift(part, trained, lessons[:64], model.guidance.scale))
            trained = replace(with_drift(trained, means), cases=ours.cases)
            add(scheme, "finetuned", trained, time.process_time() - begun)


if __name__ == "__main__":
    main()
