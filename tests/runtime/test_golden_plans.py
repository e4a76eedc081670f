"""The golden plans are what the samplers give today, and what any port must reproduce."""

import json

import numpy as np
import pytest

from fewstep.runtime import SAMPLERS, Plan
from fewstep.runtime.conditional import CONDITIONAL
from fewstep.runtime.policy import POLICIES

from . import golden_plans

GOLDEN = json.loads(golden_plans.FILE.read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
TRACED = dict(golden_plans.plans())


def inputs(case):
    return {
        "start": GOLDEN["start"],
        "given": GOLDEN["given"][: case["given"]],
        "noises": GOLDEN["noises"][: case["noises"]],
    }


def test_every_sampler_process_and_policy_has_a_case():
    samplers, others = zip(*(name.split(" / ") for name in CASES), strict=True)
    assert set(samplers) == set(SAMPLERS)
    assert {*CONDITIONAL, *POLICIES, *golden_plans.UNCONDITIONAL, "two_graphs"} == set(others)
    assert list(CASES) == list(TRACED), "run python tests/runtime/golden_plans.py"


@pytest.mark.parametrize("name", CASES)
def test_plans_are_traced_as_they_were(name):
    """A sampler that changed its numbers has to say so by making the file anew."""
    old, new = Plan.from_json(CASES[name]["plan"]), TRACED[name]
    assert [c.timestep for c in new.calls] == pytest.approx([c.timestep for c in old.calls], rel=1e-12)
    for one, other in zip(old.calls, new.calls, strict=True):
        assert [t[:2] for t in other.next or ()] == [t[:2] for t in one.next or ()]
        a, b = (np.array([t[2] for t in c.next or ()]) for c in (one, other))
        np.testing.assert_allclose(
            b, a, rtol=1e-9, atol=1e-12
        )  # exp and log differ by machine in the last digits


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", CASES)
def test_running_a_golden_plan_gives_its_states(name, dtype):
    case = CASES[name]
    found = golden_plans.states(Plan.from_json(case["plan"]), inputs(case), dtype)
    expected = np.array(case["states"])
    peak = max(np.abs(expected).max(), np.abs(GOLDEN["start"]).max() * case["plan"]["init"][0][2])
    difference = np.abs(np.array([x.ravel() for x in found]) - expected).max() / peak
    assert difference < (case["tolerance"] if dtype is np.float32 else 1e-6)
