"""Find the table of numbers inside a diffusers scheduler, by feeding it symbols it takes for a sample.

A linear scheduler treats every element of the sample alike, so a sample whose k-th element stands for "one unit of
value k" comes out of `step` as the row of coefficients. Each step is given a fresh unit for its state, which keeps
rows short: what a scheduler remembers shows up as coefficients on earlier states and outputs.

The scheduler brings torch with it; nothing here imports it. Its own float32 rounding of scalars is kept, so that the
plan repeats what diffusers computes rather than what it meant.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from .errors import NotLinear, PlanError
from .linear import Terms
from .plan import Call, Plan
from .policy import Clip, Policy, Threshold, with_policies
from .process import Array
from .tracing import x0_conversion

NEGLIGIBLE = 1e-10
"""Coefficients this small against the largest of their row are rounding of what cancels exactly."""

TOLERANCE = 1e-4
"""A nonlinear scheduler misses its own table by far more; float32 arithmetic inside diffusers by far less."""


def probe(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Plan:
    """The plan of a scheduler; see Plan.from_diffusers."""
    name = type(scheduler).__name__
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step") and "torch" in sys.modules):
        raise NotLinear(f"{name}", expected="a diffusers scheduler with set_timesteps and step")
    if "Brownian" in str(vars(sys.modules[type(scheduler).__module__]).keys()):
        raise NotLinear(
            f"{name} draws correlated noise (a Brownian tree)", expected="independent noise at each step"
        )
    try:
        # as it stands first: some schedulers have the option and do not act on it (CogVideoXDDIM)
        plan, error = _checked(scheduler, scheduler, [], steps, options)
        linear, policies = _without_policies(scheduler)
        if policies and not error < TOLERANCE:
            plan, error = _checked(scheduler, linear, policies, steps, options)
    except PlanError:
        raise
    except Exception as problem:  # whatever third-party code does on input it was not written for
        raise NotLinear(
            f"{name} with {steps} steps cannot be probed ({type(problem).__name__}: {problem})",
            expected="step(model_output, timestep, sample) on tensors",
            fix="choose one of fewstep's samplers with --sampler",
        ) from None
    if not error < TOLERANCE:
        raise NotLinear(
            f"{name} is not linear: {_why(scheduler)}",
            expected="updates that only add and scale",
            fix="switch that option off in the scheduler's config, or pass --sampler",
        )
    return plan


def _checked(
    scheduler: Any, linear: Any, policies: list[Policy], steps: int, options: Mapping[str, Any]
) -> tuple[Plan, float]:
    """The plan of `linear` under the policies, and how far it is from `scheduler`."""
    plan, timesteps = _read(_fresh(linear, steps, options), steps)
    plan = with_policies(plan, *policies)
    # the larger size is beyond what clipping schedulers leave alone
    errors = (_disagreement(plan, _fresh(scheduler, steps, options), timesteps, size) for size in (1.0, 30.0))
    return plan, max(errors)


def _without_policies(scheduler: Any) -> tuple[Any, list[Policy]]:
    """A copy that is linear, and what it no longer does to x0. Whether that is all it did, `_disagreement` tells."""
    config, policies = scheduler.config, list[Policy]()
    if config.get("clip_sample") or config.get("clip_denoised"):
        policies.append(Clip(float(config.get("clip_sample_range", 1.0))))
    if config.get("thresholding"):
        ratio, limit = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        policies = [
            Threshold(float(ratio), float(limit))
        ]  # diffusers thresholds first and then does not clip
    if not policies:
        return scheduler, []
    # diffusers remembers which options were left alone, and would put those back
    plain = {key: value for key, value in config.items() if key != "_use_default_values"}
    off = {key: False for key in ("clip_sample", "clip_denoised", "thresholding") if key in plain}
    return type(scheduler).from_config({**plain, **off}), policies


def _fresh(scheduler: Any, steps: int, options: Mapping[str, Any]) -> Any:
    """A copy at step 0; the caller's object is left alone."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, **options)
    return scheduler


def _read(scheduler: Any, steps: int) -> tuple[Plan, list[Any]]:
    timesteps = list(scheduler.timesteps)
    n = len(timesteps)
    unit, rows = _Units(n), _Rows()
    calls: list[Call] = []
    with _noise(scheduler, unit.noise):
        for k, timestep in enumerate(timesteps):
            x, output = unit("x", k), unit("o", k)
            scaled = (
                scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            )
            scale = float(scaled.flatten()[unit.place("x", k)])
            if getattr(scheduler, "step_index", 0) is None and hasattr(scheduler, "_init_step_index"):
                scheduler._init_step_index(timestep)  # converting an output needs to know which step this is
            converted = _converted(scheduler, output, x)
            sigma = _sigma(scheduler, timestep)
            result = scheduler.step(output, timestep, x)
            guess = getattr(result, "pred_original_sample", None)
            a, b = _conversion(scheduler, unit, k, guess, converted, scale, sigma, float(timestep))
            calls.append(
                Call(
                    t=_process_time(scheduler, sigma, float(timestep)),
                    timestep=float(timestep),
                    input=(("x", k, 1.0),),
                    scale=scale,
                    x0=(a, b, 0.0),
                    next=rows.shorten(
                        unit.terms(result.prev_sample, [*(call.x0[:2] for call in calls), (a, b)])
                    ),
                )
            )
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return Plan(
        type(scheduler).__name__, steps, _prediction(scheduler), (("z", 0, start),), tuple(calls)
    ), timesteps


class _Units:
    """Places of the symbols in a sample of shape [1, 3n, 1, 1]: n states, n outputs, n noises."""

    def __init__(self, n: int) -> None:
        self.n, self.drawn = n, 0
        self.torch = sys.modules["torch"]

    def place(self, kind: str, k: int) -> int:
        return "xon".index(kind) * self.n + k

    def __call__(self, kind: str, k: int) -> Any:
        vector = self.torch.zeros(3 * self.n, dtype=self.torch.float64)
        vector[self.place(kind, k)] = 1.0
        return vector.reshape(1, -1, 1, 1)

    def noise(self) -> Any:
        self.drawn += 1
        return self("n", self.drawn - 1)

    def terms(self, vector: Any, conversions: list[tuple[float, float]]) -> Terms:
        """A row of coefficients, with outputs o_j rewritten as data predictions d_j = a_j x_j + b_j o_j."""
        row = vector.double().flatten().numpy().copy()
        x, o, noise = row[: self.n], row[self.n : 2 * self.n], row[2 * self.n :]
        d = np.zeros(self.n)
        for j, (a, b) in enumerate(conversions):
            d[j] = o[j] / b
            x[j] -= d[j] * a
        small = NEGLIGIBLE * max(np.abs(x).max(), np.abs(d).max(), np.abs(noise).max())
        found = [
            (kind, j, float(c)) for kind, cs in (("x", x), ("d", d), ("n", noise)) for j, c in enumerate(cs)
        ]
        kept = tuple(term for term in found if abs(term[2]) > small)
        return kept or (("x", 0, 0.0),)


class _Rows:
    """Keeps rows short where a scheduler carries a hidden state along.

    UniPC steps from a corrected state that it never shows, so its rows reach back to the first call. The corrected
    and the shown state have that far past in common: subtracting the shown state's own row cancels it.
    """

    def __init__(self) -> None:
        self.last: Terms = ()
        self.states = 0

    def shorten(self, row: Terms) -> Terms:
        best = row
        if self.last and row[0][0] == "x" and row[0][:2] == self.last[0][:2]:
            factor = row[0][2] / self.last[0][2]
            total = {(kind, i): c for kind, i, c in row}
            for kind, i, c in self.last:
                total[kind, i] = total.get((kind, i), 0.0) - factor * c
            total["x", self.states] = total.get(("x", self.states), 0.0) + factor
            small = NEGLIGIBLE * max(abs(c) for c in total.values())
            other = tuple((kind, i, c) for (kind, i), c in total.items() if abs(c) > small)
            best = min(row, tuple(sorted(other, key=lambda term: ("xdn".index(term[0]), term[1]))), key=len)
        self.last, self.states = row, self.states + 1
        return best


def _converted(scheduler: Any, output: Any, x: Any) -> Any:
    """What a multistep solver keeps as its data prediction, where it works on data predictions."""
    data = getattr(scheduler, "predict_x0", False) or "++" in str(scheduler.config.get("algorithm_type", ""))
    if not data or not hasattr(scheduler, "convert_model_output"):
        return None
    return scheduler.convert_model_output(output, sample=x)


def _conversion(
    scheduler: Any,
    unit: _Units,
    k: int,
    guess: Any,
    converted: Any,
    scale: float,
    sigma: float | None,
    timestep: float,
) -> tuple[float, float]:
    """(a, b) of x0 = a x + b output, exactly as the scheduler has it if it says so."""
    for candidate in (guess, converted):
        if candidate is not None:
            row = candidate.double().flatten()
            a, b = float(row[unit.place("x", k)]), float(row[unit.place("o", k)])
            if b != 0 and np.isfinite(a) and np.isfinite(b):
                return a, b
    prediction = _prediction(scheduler)
    if sigma is not None and prediction == "flow":
        return x0_conversion("flow", 1 - sigma, sigma)
    if sigma is not None and scale != 1.0:  # the state is x / alpha; the network sees x
        a, b = x0_conversion(prediction, scale, scale * sigma)
        return a * scale, b
    if not hasattr(scheduler, "alphas_cumprod"):
        # A process of its own (IPNDM's, say). The table is exact with any conversion that can be undone; only the
        # preview then shows the raw output.
        return 0.0, 1.0
    alphas = scheduler.alphas_cumprod.double().numpy()
    alpha = float(np.sqrt(np.interp(timestep, np.arange(len(alphas)), alphas)))
    return x0_conversion(prediction, alpha, float(np.sqrt(1 - alpha**2)))


def _sigma(scheduler: Any, timestep: Any) -> float | None:
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return None
    index = getattr(scheduler, "step_index", None)
    if index is None and hasattr(scheduler, "index_for_timestep"):
        index = scheduler.index_for_timestep(timestep)
    return None if index is None else float(sigmas[index])


def _prediction(scheduler: Any) -> str:
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith(("EDM", "Cosine")):
        return "edm"
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    return str(config.get("prediction_type", "epsilon"))


def _process_time(scheduler: Any, sigma: float | None, timestep: float) -> float:
    if sigma is not None and _prediction(scheduler) in ("edm", "flow"):
        return sigma
    return timestep + 1


@contextmanager
def _noise(scheduler: Any, draw: Callable[[], Any]) -> Iterator[None]:
    """Let the scheduler's module draw its noise from us. Every diffusers module imports the same one function."""
    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is not None:
        module.randn_tensor = lambda *args, **kwargs: draw()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if original is not None:
            module.randn_tensor = original  # type: ignore[attr-defined]


def _disagreement(plan: Plan, scheduler: Any, timesteps: list[Any], size: float) -> float:
    """Largest relative difference between the table and the scheduler itself, over all states, on random numbers."""
    torch = sys.modules["torch"]
    rng = np.random.default_rng(0)
    shape = (1, 8, 2, 2)
    outputs = size * rng.standard_normal((len(timesteps), *shape))
    noises = rng.standard_normal((len(timesteps), *shape))
    start = plan.start(rng.standard_normal(shape))

    remaining = iter(noises)
    states, sample = [], torch.from_numpy(start)
    with _noise(scheduler, lambda: torch.from_numpy(next(remaining))):
        for timestep, output in zip(timesteps, outputs, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(torch.from_numpy(output), timestep, sample).prev_sample
            states.append(sample.double().numpy())

    given, drawn = iter(outputs), iter(noises)

    def denoise(x: Array, t: float) -> Array:
        a, b, _ = t.call.x0  # type: ignore[attr-defined]
        return np.asarray(a * x + b * next(given))

    worst = 0.0
    for step, state in zip(plan.run(denoise, start, lambda: next(drawn)), states, strict=True):
        error = np.abs(step.x - state).max() / (np.abs(state).max() + 1e-12)
        worst = max(worst, float(error)) if np.isfinite(error) else np.inf
    return worst


def _why(scheduler: Any) -> str:
    reasons = {
        "thresholding": "besides x0, it uses the output before thresholding (thresholding=True)",
        "clip_sample": "besides x0, it uses the output before clipping (clip_sample=True)",
        "clip_denoised": "besides x0, it uses the output before clipping (clip_denoised=True)",
    }
    found = [why for key, why in reasons.items() if scheduler.config.get(key)]
    return " and ".join(found) or "its step does not repeat as a table of coefficients"
