"""From what a network outputs to an estimate of clean data: conditioning, guidance and conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .backends import Session
from .manifest import PartSpec
from .plan import Time
from .process import Array
from .step import Denoise


@dataclass(frozen=True)
class Denoiser:
    """(x_t, t) -> estimate of x_0, for `Plan.run`: one graph with everything it is conditioned on.

    The graph is fed `sample` [batch, ...], `timestep` and the arrays of `condition`. With guidance, `unconditional`
    goes in the same call as the first half of a doubled batch, which is diffusers' order.
    """

    session: Session
    spec: PartSpec
    condition: Mapping[str, Array]
    """Inputs besides sample and timestep, [batch, ...] each."""
    unconditional: Mapping[str, Array] | None = None
    guidance_scale: float = 1.0
    """Classifier-free guidance: out = uncond + scale (cond - uncond). Ho and Salimans 2022 <arXiv:2207.12598>."""
    observation: Array | None = None
    """What a conditional process is given (a degraded image, say), of the sample's shape."""

    def __call__(self, x: Array, t: float) -> Array:
        assert isinstance(t, Time), "a Denoiser needs the row of the plan, which Plan.run hands to it"
        call = t.call
        guided = call.guided and self.unconditional is not None and self.guidance_scale != 1.0
        sample = x * call.scale if call.scale != 1.0 else x
        if guided:
            out = self._network(np.concatenate([sample, sample]), call.timestep, self._both)
            uncond, cond = out[: len(x)], out[len(x) :]
            out = uncond + self.guidance_scale * (cond - uncond)
            if out.shape[1] == 2 * x.shape[1]:
                out[:, x.shape[1] :] = cond[:, x.shape[1] :]  # guidance is for the mean alone
        else:
            out = self._network(sample, call.timestep, self.condition)
        if out.shape[1] == 2 * x.shape[1]:  # a network that learned its variance
            out, t.variance = out[:, : x.shape[1]], out[:, x.shape[1] :]
        a, b, c = call.x0
        x0 = out * b
        if a != 0.0:
            x0 += x * a
        if c != 0.0:
            assert self.observation is not None, "Plan.run checked that the observation was given"
            x0 += self.observation * c
        return np.asarray(x0, dtype=x.dtype)

    @cached_property
    def _both(self) -> dict[str, Array]:
        """The doubled batch's condition: the same at every step, so joined once."""
        assert self.unconditional is not None, "only guided calls ask for it"
        return {
            name: np.concatenate([self.unconditional[name], value]) for name, value in self.condition.items()
        }

    def _network(self, sample: Array, timestep: float, condition: Mapping[str, Array]) -> Array:
        if (
            self.spec.inputs[0].shape[0] == 1 and len(sample) > 1
        ):  # a graph of fixed sizes: one after the other
            each = range(len(sample))
            alone = [{name: value[i : i + 1] for name, value in condition.items()} for i in each]
            return np.concatenate([self._network(sample[i : i + 1], timestep, alone[i]) for i in each])
        feeds: dict[str, Array] = {}
        for spec in self.spec.inputs:
            if spec.name == "sample":
                feeds["sample"] = np.ascontiguousarray(sample, dtype=spec.dtype)
            elif spec.name == "timestep":
                shape = tuple(len(sample) if isinstance(size, str) else size for size in spec.shape)
                feeds["timestep"] = np.full(shape, timestep, dtype=spec.dtype)
            else:
                feeds[spec.name] = np.asarray(condition[spec.name], dtype=spec.dtype)
        name = self.spec.outputs[0].name
        return self.session.run(feeds, [name])[name]


def by_graph(denoiser_of: Callable[[str], Denoiser]) -> Denoise:
    """For plans that call several graphs: each row by the denoiser of its graph, asked for whenever that changes."""
    graph, current = "", None

    def denoise(x: Array, t: float) -> Array:
        nonlocal graph, current
        assert isinstance(t, Time), "a Denoiser needs the row of the plan, which Plan.run hands to it"
        if current is None or t.call.graph != graph:
            graph, current = t.call.graph, denoiser_of(t.call.graph)
        return current(x, t)

    return denoise


def network_inputs(spec: PartSpec) -> dict[str, Any]:
    """The inputs that condition the network, by name."""
    return {tensor.name: tensor for tensor in spec.inputs if tensor.name not in ("sample", "timestep")}
