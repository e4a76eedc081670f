"""cifar-dit by every method at few calls: the Frechet distance of our own against the calls a picture costs.

    python benchmarks/cifar_students.py train [NAME ...] [--work DIR] [--share 1.0]
    python benchmarks/cifar_students.py measure [NAME ...] [--work DIR] [--samples 2500]
    python benchmarks/cifar_students.py plot

`train` gives each method about the same processor time (--share of it), from the same teacher and the same 4,096
latents of its own; learning rates were not searched. `measure` draws with each student and, as "teacher", with the
teacher by the samplers that could be best at few calls: guided, two calls a step, and not. Distances are those of
models/train/cifar/evaluate.py, to the test pictures, 128 features of models/cifar-dit-features; equal seeds, so that
equal numbers of pictures compare. Writes results/cifar_students.json, `plot` results/cifar_students.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, from_models, save

from fewstep.export.students import make_student
from fewstep.model import load

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "models" / "cifar-dit"
WORK = Path(tempfile.gettempdir()) / "fewstep-cifar-students"
NAME = "cifar_students"
BATCH = 64

METHODS: Mapping[str, tuple[str, Mapping[str, Any], int, tuple[int, ...], str]] = {
    "tdm": ("tdm", {"steps": 4, "also": [2]}, 400, (1, 2, 4), "ddim"),
    "tdm-4": ("tdm", {"steps": 4}, 600, (4,), "ddim"),
    "tdm-4, more": ("tdm", {"steps": 4}, 500, (4,), "ddim"),
    "tdm-1": ("tdm", {"steps": 1}, 400, (1,), "ddim"),
    "dmd2": ("dmd2", {"steps": 4, "fake_turns": 2}, 200, (1, 2, 4), "model"),
    "lcm": ("lcm", {"steps": 4}, 900, (1, 2, 4, 8), "lcm"),
    "pcm-4": ("pcm", {"steps": 4}, 900, (4,), "ddim"),
    "progressive-4": ("progressive", {"steps": 4, "start": 32}, 350, (4,), "ddim"),
    "sid-1": ("sid", {}, 350, (1,), "ddim"),
    "mmd-4": ("mmd", {"steps": 4}, 150, (4,), "ddim"),
    "guidance": ("guidance", {}, 900, (8, 16, 50), "ddim"),
    "reflow": ("reflow", {}, 900, (1, 2, 4, 8), "euler"),
}
"""Name -> pass, its fields, updates of about 150 core seconds, the steps it is drawn with, and the sampler.

"tdm-4, more" goes on from the student "tdm-4"."""
RATES = {"mmd": 2e-5}
"""Where not 1e-4."""
BASELINES = (
    *(("ddim", steps, guided) for steps in (1, 2, 4, 8) for guided in (False, True)),
    *(("dpmpp_2m", steps, True) for steps in (2, 4, 8)),
    ("unipc", 4, True),
    ("ddim", 50, True),
)


def train(args: argparse.Namespace) -> None:
    for name in args.names or METHODS:
        method, fields, updates, _, _ = METHODS[name]
        folder = args.work / name
        if folder.exists():
            continue
        steps = max(1, round(updates * args.share))
        recipe = args.work / f"{name}.toml"
        args.work.mkdir(parents=True, exist_ok=True)
        said = "".join(f"{key} = {value}\n" for key, value in fields.items())
        rate = RATES.get(method, 1e-4)
        recipe.write_text(
            f'[recipe]\npasses = ["{method}"]\n[{method}]\n{said}'
            f"[{method}.latents]\nnumber = {args.latents}\nbatch = 256\n"
            f"[{method}.training]\nsteps = {steps}\nbatch = {BATCH}\nwarm = 30\nrate = {rate}\naverage = 0.98\n"
        )
        began, note = time.process_time(), ""
        try:
            begin = args.work / "tdm-4" if name.endswith("more") else TEACHER
            for event in make_student(begin, folder, recipe, teacher=TEACHER, store=args.work / "store"):
                note = event.note or note
        except Exception as error:  # one method's failure must not take the others' hour
            print(json.dumps({"name": name, "failed": str(error)[:300]}), flush=True)
            continue
        spent = round(time.process_time() - began, 1)
        (folder / "spent.json").write_text(json.dumps({"core_s": spent, "updates": steps}))
        print(json.dumps({"name": name, "core_s": spent, "updates": steps, "end": note}), flush=True)


def measure(args: argparse.Namespace) -> None:
    evaluate = from_models("evaluate", "train/cifar", "train")
    file = RESULTS / f"{NAME}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for name in args.names or ["teacher", *METHODS]:
        if name == "teacher":
            scale = load(TEACHER).guidance.scale
            runs = [(TEACHER, s, k, scale if guided else 1.0) for s, k, guided in BASELINES]
            spent: dict[str, Any] = {}
        else:
            folder = args.work / name
            if not folder.exists():
                continue
            sampler = METHODS[name][4]
            runs = [(folder, sampler, k, 1.0) for k in METHODS[name][3]]
            spent = json.loads((folder / "spent.json").read_text())
        for folder, sampler, steps, scale in runs:
            row, _ = evaluate.measure(folder, args.samples, sampler, steps, scale, 250)
            calls = steps * (1 if scale == 1.0 else 2)
            row = {"name": name, "calls": calls, **row, "training": spent}
            rows = [r for r in rows if key_of(r) != key_of(row)] + [row]
            save(
                NAME,
                {"command": "python benchmarks/cifar_students.py train; … measure; … plot", "rows": rows},
            )
            print(json.dumps(row), flush=True)


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("name", "sampler", "steps", "guidance", "samples"))


WIDTH, HEIGHT, LEFT, TOP = 760, 420, 60, 20
COLOURS = ("#888", "#0a6", "#2a7", "#d62", "#27c", "#83c", "#b80", "#c25", "#0aa", "#555", "#a4a")


def plot(args: argparse.Namespace) -> None:
    """One line a method, calls a picture on a logarithmic axis; the teacher is the best sampler at each number."""
    rows = json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        line = lines.setdefault("best sampler, no training" if row["name"] == "teacher" else row["name"], {})
        line[row["calls"]] = min(line.get(row["calls"], math.inf), row["test"]["distance"])
    top = 1.05 * max(value for line in lines.values() for value in line.values())
    most = max(calls for line in lines.values() for calls in line)

    def x(calls: int) -> float:
        return LEFT + (WIDTH - LEFT - 180) * math.log(calls) / math.log(most)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - 40) * (1 - value / top)

    marks = [
        f'<text x="{x(c):.0f}" y="{HEIGHT - 22}" text-anchor="middle">{c}</text>'
        for c in (1, 2, 4, 8, 16, 32, 100)
    ]
    for tick in range(0, int(top) + 1, max(1, int(top) // 6)):
        rule = f'<line x1="{LEFT}" x2="{WIDTH - 180}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>'
        marks.append(rule + f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(x(calls), y(value)) for calls, value in sorted(line.items())]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        marks += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
        label = f'<text x="{WIDTH - 170}" y="{TOP + 12 + 18 * number}" fill="{colour}">{escape(name)}</text>'
        marks.append(label)
    marks.append(
        f'<text x="{LEFT}" y="{HEIGHT - 4}">network calls a picture; distance to the test pictures</text>'
    )
    style = "<style>text{font:12px sans-serif}</style>"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">{style}{"".join(marks)}</svg>\n'
    (RESULTS / f"{NAME}.svg").write_text(svg)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "measure", "plot"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--share", type=float, default=1.0, help="of the updates")
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2500)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    {"train": train, "measure": measure, "plot": plot}[args.what](args)


if __name__ == "__main__":
    main()
