"""A sampler compiled to a table of numbers, and the loop that runs it.

Almost every diffusion sampler is linear: each new state is a fixed combination of earlier states, earlier
predictions and fresh noise, with coefficients that depend only on the process and the grid of times. A Plan is that
table. spec/plan.md describes its JSON; a port to another language is this file's `run` and nothing else.

Four kinds of value take part: states x, data predictions d (one a network call), fresh noises n, and given arrays y
that the caller brings: the observation of a conditional process, an image to start from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import FewstepError, PlanError
from .linear import Terms
from .manifest import GridSpec
from .policy import Policy, predict
from .process import Array, Process
from .step import Denoise, Step
from .times import Grid, check_steps

if TYPE_CHECKING:
    from .samplers import Sampler

__all__ = ["Call", "Plan", "Time", "plan"]

MAX_CALLS = 4000
"""A thousand steps of the costliest published sampler; more in a file is damage, not a plan."""


@dataclass(frozen=True, slots=True)
class Call:
    """One row: one network call, and what follows from it."""

    t: float
    """The process's time of this call."""
    timestep: float
    """What the network is fed as its time."""
    input: Terms
    """The combination of states and predictions handed to `denoise`."""
    scale: float
    """The network itself sees scale * input."""
    x0: tuple[float, float, float]
    """x0 = x0[0] * input + x0[1] * network output + x0[2] * y 0, the observation (0 where there is none)."""
    next: Terms | None
    """The next state as a combination; None when another call comes first (Heun's inner call)."""
    graph: str = "denoiser"
    """Which graph to call: "denoiser", unless the bundle has several."""
    guided: bool = True
    """Whether guidance applies at this call."""
    policies: tuple[Policy, ...] = ()
    """What is done to this call's prediction that no table can express, in order; see policy.py."""


class Time(float):
    """The process's time, with the row it comes from: `t.timestep` is what a discrete network wants."""

    __slots__ = ("call", "variance")
    call: Call
    variance: Array | None
    """Set by a denoiser whose network learned its variance: the second half of the output's channels."""

    def __new__(cls, call: Call) -> Time:
        time = super().__new__(cls, call.t)
        time.call, time.variance = call, None
        return time

    @property
    def timestep(self) -> float:
        return self.call.timestep


@dataclass(frozen=True)
class Plan:
    """A table of network calls and linear updates, in float64.

    The state may live in the sampler's own scaling (diffusers' Euler keeps x / alpha); `init` makes the first one,
    and the last is the clean sample.
    """

    sampler: str
    steps: int
    """Steps as the user counts them: what was asked for, whatever the number of network calls."""
    prediction: str
    """The meaning of the network's output that `Call.x0` was built for; see tracing.x0_conversion."""
    init: Terms
    """The first state: a combination of start noise ("z", 0, ...) and given arrays ("y", i, ...)."""
    calls: tuple[Call, ...]

    @property
    def states(self) -> int:
        """How many states `run` yields; more than `steps` for diffusers' two-call schedulers."""
        return sum(call.next is not None for call in self.calls)

    @property
    def noises(self) -> int:
        """How many fresh noises a run draws."""
        return 1 + max(
            (i for call in self.calls for kind, i, _ in (*call.input, *(call.next or ())) if kind == "n"),
            default=-1,
        )

    @property
    def givens(self) -> int:
        """How many arrays the caller brings besides noise."""
        reads = [self.init, *(call.input for call in self.calls), *(call.next or () for call in self.calls)]
        used = [i for terms in reads for kind, i, _ in terms if kind == "y"]
        return 1 + max(used, default=-1 if all(call.x0[2] == 0 for call in self.calls) else 0)

    @classmethod
    def trace(
        cls, sampler: Sampler, process: Process, times: ArrayLike, *, prediction: str = "", name: str = ""
    ) -> Plan:
        """Run a sampler once on symbols and write down what it does.

        times       [steps + 1], strictly decreasing within the process's [0, t_max]; rising for an inversion
        prediction  what the network outputs; empty for the usual one of the process
        Raises PlanError for times out of order, NotLinear when the sampler does something no table can express.

        A process with an observation y has x_t = alpha x0 + gamma y + sigma noise. Samplers then work on
        u = x_t - gamma y, an ordinary process, so every one of them serves it; the network is handed u + gamma y.
        """
        from .tracing import trace  # those who only run plans need no samplers

        return trace(sampler, process, times, prediction=prediction, name=name)

    @classmethod
    def from_diffusers(cls, scheduler: Any, steps: int, **timestep_options: Any) -> Plan:
        """The plan of any linear diffusers scheduler, found by probing it.

        timestep_options go to the scheduler's `set_timesteps` (`mu` or `sigmas` for flow matching, say).
        Raises NotLinear, naming the scheduler and the reason, for what no table can express.
        """
        from .probe import probe

        check_steps(steps)
        return probe(scheduler, steps, timestep_options)

    def start(self, noise: Array, given: Sequence[Array] = ()) -> Array:
        """The first state, from standard normal noise of the sample's shape and the arrays the plan is given."""
        self._check_given(given)
        values = {("z", 0): noise, **{("y", i): array for i, array in enumerate(given)}}
        x = _combine(self.init, values, _no_noise)
        return x.copy() if x is noise else x

    def run(
        self,
        denoise: Denoise,
        x: Array,
        noise: Callable[[], Array] | None = None,
        given: Sequence[Array] = (),
    ) -> Iterator[Step]:
        """Sample.

        denoise  (x, t) -> estimate of the clean sample, same shape; t is a float with `.timestep` and `.call` (Time)
        x        the state at the first call, as `start` makes it; [batch, ...], float32 or float64
        noise    () -> fresh standard normal of x's shape, called `noises` times in order; PlanError if it is missing
        given    `givens` arrays of x's shape: the observation, for processes that have one

        Raises FewstepError, naming the step, when a prediction holds NaN or infinity.
        """
        if self.noises and noise is None:
            raise PlanError(f"no noise for {self.sampler}", expected=f"a source of {self.noises} noises")
        self._check_given(given)
        values: dict[tuple[str, int], Array] = {("x", 0): x}
        values.update({("y", i): array for i, array in enumerate(given)})
        drawn = 0

        def draw(i: int) -> Array:
            """Noise i. A stream of noises is used in order, also past one that no row reads."""
            nonlocal drawn
            assert noise is not None
            while drawn <= i:
                fresh, drawn = noise(), drawn + 1
            return fresh

        index = 0
        for k, (call, dead) in enumerate(zip(self.calls, self._dead, strict=True)):
            z = _combine(call.input, values, draw)
            x0, scale = predict(call, z, denoise) if call.policies else (denoise(z, Time(call)), 1.0)
            values["d", k] = x0
            if not math.isfinite(float(np.sum(x0))) and not np.isfinite(x0).all():
                where = f"call {k + 1} of {len(self.calls)}, {call.graph} at timestep {call.timestep:g}"
                raise FewstepError(
                    f"{where}: the network's output holds NaN or infinity",
                    fix="a layer overflows in this precision; export that part in float32",
                )
            if call.next is not None:
                if not isinstance(scale, float):
                    values.update({(n, i): draw(i) * scale for n, i, _ in call.next if n == "n"})
                index += 1
                x = values["x", index] = _combine(call.next, values, draw)
            for key in dead:
                values.pop(key, None)
            if call.next is not None:
                yield Step(index - 1, x, x0)

    def _check_given(self, given: Sequence[Array]) -> None:
        if len(given) != self.givens:
            raise PlanError(
                f"{len(given)} given arrays for {self.sampler}",
                expected=f"{self.givens}" + (", the observation first" if self.givens else ""),
            )

    @cached_property
    def _dead(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """After each call, the values no later row reads."""
        last: dict[tuple[str, int], int] = {}
        index = 0
        for k, call in enumerate(self.calls):
            last["d", k] = k
            for kind, i, _ in (*call.input, *(call.next or ())):
                last[kind, i] = k
            if call.next is not None:
                index += 1
                last["x", index] = k
        dead: list[list[tuple[str, int]]] = [[] for _ in self.calls]
        for key, k in last.items():
            dead[k].append(key)
        return tuple(tuple(keys) for keys in dead)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able table; float64 survives a round trip exactly."""
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            "prediction": self.prediction,
            "init": [list(term) for term in self.init],
            "calls": [
                {
                    "t": call.t,
                    "timestep": call.timestep,
                    "input": [list(term) for term in call.input],
                    "scale": call.scale,
                    "x0": list(call.x0),
                    "next": None if call.next is None else [list(term) for term in call.next],
                    "graph": call.graph,
                    "guided": call.guided,
                    "policies": [policy.to_json() for policy in call.policies],
                }
                for call in self.calls
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Plan:
        """Read a plan and check that it can run. Raises PlanError naming the row at fault."""
        from .planfile import read

        return read(data)


def plan(
    sampler: str | Sampler,
    steps: int,
    process: Process,
    times: str | Grid | ArrayLike = "auto",
    *,
    prediction: str = "",
    grid: GridSpec = GridSpec(),  # noqa: B008
) -> Plan:
    """Compile a sampler to a table.

    sampler  a name from SAMPLERS, or a function of their signature (functools.partial sets options such as eta)
    times    "auto", the name of a grid (times.GRIDS), a function like those there (functools.partial sets options such
             as rho), or [steps + 1] decreasing process times
    prediction  what the network outputs, as in Plan.trace
    grid     how the model's own scheduler spaces its times
    Raises PlanError for an unknown name, steps outside 1 to 1000, or times out of order.
    """
    from .tracing import choose, trace

    chosen, name, times = choose(sampler, steps, process, times, grid)
    return trace(chosen, process, times, prediction=prediction, name=name)


def _no_noise(i: int) -> Array:
    raise AssertionError("planfile.read lets a start read no noise but its own")


def _combine(terms: Terms, values: dict[tuple[str, int], Array], draw: Callable[[int], Array]) -> Array:
    """sum of coefficient * value, with one temporary; a lone term of coefficient 1 is passed on untouched."""
    total = scratch = None
    for kind, i, c in terms:
        if kind == "n" and (kind, i) not in values:
            values[kind, i] = draw(i)
        value = values[kind, i]
        if total is None:
            total = value if len(terms) == 1 and c == 1.0 else value * c
        else:
            scratch = np.multiply(value, c, out=scratch)
            total += scratch
    assert total is not None, "from_json and trace refuse empty combinations"
    return total
