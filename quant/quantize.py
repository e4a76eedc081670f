"""The pass: from a model and the plan it ships with to integers for every part."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from numpy.typing import NDArray

from ..model.model import Context, Model, Part
from ..model.quantized import Layer, Quantized
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .calibrate import Calibration, Recorded, calibrate
from .observe import Seen, input_codes, observe
from .scheme import Scheme, parse_scheme
from .simulate import quantizable
from .weights import nearest

__all__ = ["Quantize"]

Array = NDArray[Any]

CASES = 4
"""Held-out batches the gate compares on."""


@dataclass(frozen=True)
class Quantize:
    """Every part's weights as integers, and the inputs of its layers where the scheme says so."""

    scheme: str = "w8a8"
    """Of the denoiser: bits of weights, and of inputs behind an a. See parse_scheme."""
    decoder: str = "w8a8"
    """Of the VAE's decoder and encoder; "" leaves them in floating point."""
    text: str = "w8"
    """Of the text encoder: weights alone, for its share of the time is small and its outliers are not."""
    group: int = 64
    """Weights of a row that share a scale, at less than 8 bits: [derived] a float scale for 64 adds half a bit."""
    keep: tuple[str, ...] = ()
    """Layers left in floating point, as PART.LAYER with * and ? for any letters: "unet.*.conv_shortcut"."""
    samples: int = 0
    """Trajectories to calibrate on; 0: what the size of the model allows."""
    timesteps: str = "uniform"
    """At which calls of the plan: uniform, normal or steps (calibrate.Calibration)."""
    prompts: tuple[str, ...] = ()
    """To calibrate on; empty: those that came with the model."""

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for schemes and patterns that fit nothing, and what calibrate raises."""
        schemes = self._schemes(model)
        _check_patterns(self.keep, model)
        how = Calibration(
            samples=self.samples or None, timesteps=self.timesteps, prompts=self.prompts, seed=ctx.seed
        )
        recorded = yield from calibrate(model, ctx.plan, how, ctx.store)
        parts = {}
        for name, scheme in schemes.items():
            part = model.parts[name]
            quantized = yield from self._part(part, scheme, recorded)
            parts[name] = replace(part, quantized=quantized)
        return model.after(self, parts)

    def _schemes(self, model: Model) -> dict[str, Scheme]:
        """Part -> its scheme, for those that get one."""
        written = {
            name: self.scheme
            if name == model.denoiser
            else self.decoder
            if name.startswith("vae_")
            else self.text
            for name in model.parts
        }
        return {name: parse_scheme(text) for name, text in written.items() if text}

    def _part(self, part: Part, scheme: Scheme, recorded: Recorded) -> Generator[Progress, None, Quantized]:
        layers = {
            name: module
            for name, module in quantizable(part).items()
            if not any(fnmatchcase(f"{part.name}.{name}", pattern) for pattern in self.keep)
        }
        batches = recorded.batches(part.name)
        seen: Mapping[str, Seen] = {}
        if scheme.inputs is not None:
            fed = [name for name, module in layers.items() if type(module).__name__ != "Embedding"]
            seen = yield from observe(part, batches, fed, recorded.steps(part.name))
        found = {}
        for number, (name, module) in enumerate(layers.items()):
            yield Progress("round", number / len(layers), f"{part.name}, layer {number + 1} of {len(layers)}")
            bits = 8 if _protected(part, name) else int(scheme.weights)
            weights = nearest(
                module.weight.detach().numpy(),
                bits,
                group=0 if bits == 8 else self.group,
                multiplier=scheme.inputs is not None,
                name=f"{part.name}.{name}",
            )
            codes = None
            if scheme.inputs is not None and name in seen and not _of_time(name):
                codes = input_codes(seen[name], 8 if _protected(part, name) else scheme.inputs)
            found[name] = Layer(weights, codes)
        cases = {
            f"held out {number + 1}": dict(batch)
            for number, batch in enumerate(recorded.held_out(part.name)[:CASES])
        }
        return Quantized(found, cases=cases)


def _protected(part: Part, name: str) -> bool:
    """The first and the last layer keep 8 bits (Q-Diffusion, section 4.1), and so do tables of tokens."""
    every = list(quantizable(part))
    return name in (every[0], every[-1]) or _of_time(name) or "embedding" in name


def _of_time(name: str) -> bool:
    """Layers that see nothing but the time: few numbers, all of them decisive (QuEST, section 4.2)."""
    return "time_emb" in name


def _check_patterns(patterns: tuple[str, ...], model: Model) -> None:
    every = [f"{part.name}.{name}" for part in model for name in quantizable(part)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise BadInput(
                f"keep = {pattern!r} fits no layer",
                expected=f"PART.LAYER with * and ?, such as {every[0]} or {every[-1]}",
            )
