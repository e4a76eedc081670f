"""What the runtime costs before and between network calls.

Import: fresh processes, interleaved with a bare interpreter and numpy alone; wall seconds and resident memory.
Executor: `Plan.run` with a denoiser that returns a ready array, minus the same multiply-adds written by hand.
Samplers: the same for each of them, and the time to trace a plan of 50 steps.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
from common import save, spread

from fewstep.runtime import EDM, SAMPLERS, DiscreteVP, Plan, plan

IMPORTS = {
    "interpreter": "pass",
    "numpy": "import numpy",
    "fewstep.runtime": "import fewstep.runtime",
    "fewstep.runtime.pipeline": "import fewstep.runtime.pipeline",
    "pipeline + onnxruntime + tokenizers": "import fewstep.runtime.pipeline, onnxruntime, tokenizers",
}
MEASURE = """
import time; start = time.perf_counter()
{code}
spent = time.perf_counter() - start
import sys, re
rss = int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024
third = sorted({{m.split(".")[0] for m in sys.modules}} - set(sys.stdlib_module_names))
third = [m for m in third if not m.startswith(("_", "fewstep")) and m not in ("sitecustomize", "sphinxcontrib")]
print(spent, rss, ",".join(third))
"""


def imports(runs: int = 11) -> dict[str, dict[str, object]]:
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    memory: dict[str, float] = {}
    packages: dict[str, str] = {}
    for _ in range(runs):
        for name, code in IMPORTS.items():
            command = [sys.executable, "-c", MEASURE.format(code=code)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            seconds[name].append(float(out[0]))
            memory[name] = float(out[1])
            packages[name] = out[2] if len(out) > 2 else ""
    return {
        n: {"seconds": spread(seconds[n]), "rss_mib": memory[n], "third_party": packages[n]} for n in IMPORTS
    }


def executor(table: Plan, runs: int) -> dict[str, dict[str, float]]:
    """Microseconds a step at [1, 4, 64, 64], float32: the plan, the same products and sums by hand, the difference."""
    x = np.random.default_rng(0).standard_normal((1, 4, 64, 64)).astype(np.float32)
    ready, steps = 0.5 * x, len(table.calls)
    # a lone term of coefficient 1 is passed on, as the executor does
    rows = [
        row
        for call in table.calls
        for row in (call.input, call.next or ())
        if len(row) > 1 or (row and row[0][2] != 1)
    ]
    through_plan, by_hand = [], []
    for _ in range(runs):
        start = time.perf_counter()
        for _step in table.run(lambda x, t: ready, x, lambda: ready):
            pass
        through_plan.append((time.perf_counter() - start) / steps * 1e6)
        start = time.perf_counter()
        for row in rows:
            total = x * row[0][2]
            scratch = None
            for _, _, c in row[1:]:
                scratch = np.multiply(ready, c, out=scratch)
                total += scratch
        by_hand.append((time.perf_counter() - start) / steps * 1e6)
    over = [a - b for a, b in zip(through_plan, by_hand, strict=True)]
    return {"plan_us": spread(through_plan), "arithmetic_us": spread(by_hand), "overhead_us": spread(over)}


def samplers(runs: int = 15) -> dict[str, dict[str, object]]:
    """Every sampler: milliseconds to trace 50 steps, and what its plan of 20 steps costs beyond the arithmetic."""
    vp, found = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000), {}
    for name in SAMPLERS:
        process = EDM() if name == "consistency" else vp
        plan(name, 20, process)
        traced = []
        for _ in range(runs):
            start = time.perf_counter()
            plan(name, 50, process)
            traced.append((time.perf_counter() - start) * 1e3)
        found[name] = {"trace_50_ms": spread(traced), **executor(plan(name, 20, process), runs)}
    return found


if __name__ == "__main__":
    process = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
    results = {
        "import": imports(),
        "executor": executor(plan("dpmpp_2m", 20, process), 300),
        "samplers": samplers(),
    }
    for name, row in results["import"].items():
        print(f"{name:36} {row['seconds']['median']:.3f} s  {row['rss_mib']:5.0f} MiB  {row['third_party']}")
    for name, row in results["executor"].items():
        print(f"{name:36} {row['median']:.1f} us a step ({row['min']:.1f} to {row['max']:.1f})")
    for name, row in results["samplers"].items():
        traced, over = row["trace_50_ms"]["median"], row["overhead_us"]["median"]
        print(f"{name:36} traced in {traced:5.1f} ms, {over:5.1f} us a step over the arithmetic")
    save("runtime-overhead", results)
