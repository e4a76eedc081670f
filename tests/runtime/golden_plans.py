"""Make runtime/spec/golden/plans.json: python tests/runtime/golden_plans.py

For every sampler and process, and for two networks: a plan, what it is run on, and the states that any port must
reproduce to 1e-5 in float32. The network is arithmetic every language has: out = 0.6 z / (1 + |z|) + 0.1 timestep /
(1 + |timestep|), half of it for the small one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.runtime import EDM, SAMPLERS, DiscreteVP, Noise, Plan, RectifiedFlow, plan
from fewstep.runtime.conditional import (
    OUVE,
    DataPrior,
    MeanReverting,
    Resfusion,
    ResidualDenoising,
    ResidualShift,
    SchroedingerBridge,
)
from fewstep.runtime.errors import PlanError
from fewstep.runtime.policy import Clip, Threshold, with_learned_variance, with_policies, with_time_shift
from fewstep.runtime.two_graphs import stitched

FILE = Path(__file__).parents[2] / "runtime/spec/golden/plans.json"
STEPS = 5
SHAPE = (2, 8)
"""A batch of two, so that what is done per sample shows; 16 values are the fewest the noise contract defines."""
NETWORK = (
    "out = 0.6 * z / (1 + abs(z)) + 0.1 * timestep / (1 + abs(timestep)), with z = scale * input; "
    "a learned variance's output is out too; the graph named small gives half of that"
)

SD15 = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
UNCONDITIONAL = {
    "scaled_linear": (SD15, "epsilon"),
    "zero_snr": (DiscreteVP.from_betas(np.append(np.linspace(1e-4, 0.02, 49), 1.0)), "v_prediction"),
    "edm": (EDM(), "edm"),
    "rectified_flow": (RectifiedFlow(), "flow"),
}
CONDITIONAL = {
    process.kind: process
    for process in (
        ResidualShift(),
        ResidualDenoising(),
        Resfusion(),
        MeanReverting(),
        OUVE(),
        SchroedingerBridge(),
        DataPrior(SD15),
    )
}


def network(z: Any, timestep: float, graph: str = "denoiser") -> Any:
    out = 0.6 * z / (1 + np.abs(z)) + 0.1 * timestep / (1 + abs(timestep))
    return out / 2 if graph == "small" else out


def states(table: Plan, case: dict[str, Any], dtype: Any) -> list[Any]:
    """Every state of the run, as arrays of `dtype`."""

    def denoise(x: Any, t: Any) -> Any:
        a, b, y = t.call.x0
        out = network(t.call.scale * x, t.timestep, t.call.graph)
        t.variance = out
        return (a * x + b * out + (y * given[0] if y else 0)).astype(dtype)

    given = [np.array(values, dtype=dtype) for values in case["given"]]
    noises = iter(np.array(values, dtype=dtype) for values in case["noises"])
    start = table.start(np.array(case["start"], dtype=dtype), given)
    return [step.x for step in table.run(denoise, start, lambda: next(noises), given)]


def plans() -> Iterator[tuple[str, Plan]]:
    """Every sampler on every process it serves, then every conditional process, then every policy."""
    for name in SAMPLERS:
        for kind, (process, prediction) in UNCONDITIONAL.items():
            try:
                yield f"{name} / {kind}", plan(name, STEPS, process, prediction=prediction)
            except PlanError:
                continue  # distilled models' samplers serve their own process alone; test_samplers lists them
    for kind, process in CONDITIONAL.items():
        for name in ("ddim", "dpmpp_2m"):
            times = np.linspace(0.98 * process.t_max, 0, STEPS + 1)
            yield f"{name} / {kind}", plan(name, STEPS, process, times, prediction="sample")
    ddim = plan("ddim", STEPS, SD15)
    yield "ddim / clip", with_policies(ddim, Clip(0.5))
    yield "ddim / threshold", with_policies(ddim, Threshold(0.9, 1.5))
    yield "ddim / time_shift", with_time_shift(ddim, SD15)
    yield "ddpm / learned_variance", with_learned_variance(plan("ddpm", STEPS, SD15), SD15)
    yield "dpmpp_2m / two_graphs", stitched(plan("dpmpp_2m", STEPS, SD15), 0.4)


def make() -> dict[str, Any]:
    stream = Noise(0)
    draw = lambda: np.round(stream.randn(SHAPE).astype(float), 4).tolist()  # noqa: E731 short decimals, exact in JSON
    start, given, noises = draw(), [draw()], [draw() for _ in range(24)]
    cases = []
    for name, table in plans():
        # a leapfrog amplifies rounding: its float32 states are that much further from float64's
        tolerance = 5e-5 if name.startswith("bdia") else 1e-5
        case: dict[str, Any] = {
            "name": name,
            "plan": table.to_json(),
            "given": table.givens,
            "noises": table.noises,
            "tolerance": tolerance,
        }
        inputs = {"start": start, "given": given[: table.givens], "noises": noises[: table.noises]}
        assert len(inputs["noises"]) == table.noises, name
        case["states"] = [[float(f"{v:.7g}") for v in x.ravel()] for x in states(table, inputs, np.float64)]
        cases.append(case)
    return {
        "network": NETWORK,
        "shape": SHAPE,
        "start": start,
        "given": given,
        "noises": noises,
        "cases": cases,
    }


def main() -> None:
    data = make()
    cases = data.pop("cases")
    # a case a line: a change of one sampler is a change of its lines
    head = json.dumps(data)[:-1]
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    FILE.write_text(f'{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(cases)} cases, {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
