"""The pass: from a model and the plan it ships with to integers for every part."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..model.model import Context, Model, Part
from ..model.quantized import Quantized
from ..runtime.errors import BadInput
from ..runtime.progress import Progress, within
from . import compose, drift
from .adaround import AdaRound, reconstruct
from .calibrate import Calibration, Recorded, calibrate
from .compensate import Compensation, compensate
from .finetune import Finetune, finetune
from .scheme import Scheme, parse_scheme
from .simulate import quantizable

__all__ = ["Quantize"]

CASES = 4
"""Held-out batches the gate compares on."""

SMALL_BYTES = 1 << 26
"""Of float weights, up to which codes of 8 bits are compensated as well: seconds for emoji-64's U-Net, 44 dB become 50
(benchmarks/results/rounding.json); for SD-1.5's some ten minutes, where inputs of 8 bits leave 32 dB anyhow."""

ROUNDINGS = ("nearest", "gptq", "adaround")


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
    """Weights of a row that share a scale, at less than 8 bits; 0: a whole row."""
    rounding: str = "gptq"
    """nearest; gptq: later weights of a row make up for the earlier, but for 8 bits of large parts; adaround: the
    denoiser's blocks then learn theirs, in many times the time."""
    smooth: bool = True
    """Even out channels of inputs where that earns its multiplication."""
    correct: bool = False
    """Take off the mean error of layers and, by timestep, of the denoiser's output: 0.1 dB of emoji-64's final latents
    at w8a8, nothing at w4a8, for twice the time, and no more than chance could give."""
    finetune: int = 0
    """Steps of training the denoiser's integers on its own float outputs: some thousands for w4a4."""
    keep: tuple[str, ...] = ()
    """Layers left in floating point, as PART.LAYER with * and ? for any letters: "unet.*.conv_shortcut"."""
    samples: int = 0
    """Trajectories to calibrate on; 0: what the size of the model allows."""
    timesteps: str = "uniform"
    """At which calls of the plan: uniform, normal or steps (calibrate.Calibration)."""
    prompts: tuple[str, ...] = ()
    """To calibrate on; empty: those that came with the model."""

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for schemes and patterns that fit nothing, a budget of bits that cannot be met, and what
        calibrate raises.
        """
        schemes = self._schemes(model)
        _check_patterns(self.keep, model)
        if self.rounding not in ROUNDINGS:
            raise BadInput(f"rounding {self.rounding!r}", expected=" or ".join(ROUNDINGS))
        how = Calibration(
            samples=self.samples or None, timesteps=self.timesteps, prompts=self.prompts, seed=ctx.seed
        )
        share = 0.5 / max(len(schemes), 1)  # recording takes about as long as all the rest together
        recorded = yield from within(calibrate(model, ctx.plan, how, ctx.store), 0.0, 0.5)
        parts = {}
        for number, (name, scheme) in enumerate(schemes.items()):
            begin = 0.5 + share * number
            names = self._layers(model.parts[name])
            if not names:
                continue
            job = self._part(model, model.parts[name], names, scheme, recorded, ctx)
            quantized = yield from within(job, begin, begin + share)
            parts[name] = replace(model.parts[name], quantized=quantized)
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

    def _layers(self, part: Part) -> list[str]:
        """Those that are not kept."""
        return [
            name
            for name in quantizable(part)
            if not any(fnmatchcase(f"{part.name}.{name}", pattern) for pattern in self.keep)
        ]

    def _part(
        self,
        model: Model,
        part: Part,
        names: list[str],
        scheme: Scheme,
        recorded: Recorded,
        ctx: Context,
    ) -> Generator[Progress, None, Quantized]:
        batches, steps = recorded.batches(part.name), recorded.steps(part.name)
        high = compose.protected(part, batches[0])
        denoiser = part.name == model.denoiser
        guidance = model.guidance.scale if denoiser and model.guidance.kind != "none" else 1.0
        inputs = compose.Inputs()
        if scheme.inputs is not None:
            inputs = yield from compose.round_inputs(
                part, names, batches, steps, scheme, high, smooth=self.smooth
            )
        bits, weakest = compose.even_bits(names, scheme, high), inputs.weakest
        if scheme.mixed:
            bits, weakest = yield from compose.mixed_bits(
                part, names, scheme, recorded, inputs, ctx, group=self.group, guidance=guidance
            )
        quantized = yield from compose.round_weights(part, bits, inputs, group=self.group)
        if self.rounding != "nearest" and (min(bits.values()) < 8 or part.weight_bytes() <= SMALL_BYTES):
            quantized = yield from compensate(part, quantized, batches, Compensation(), ctx.store)
        if self.rounding == "adaround" and denoiser:
            quantized = yield from reconstruct(part, quantized, batches, AdaRound(), ctx.store)
        if self.correct and scheme.inputs is not None:
            quantized = yield from drift.correct_biases(part, quantized, batches)
        if self.finetune and denoiser:
            train = Finetune(
                steps=self.finetune, guidance=guidance if guidance != 1.0 else None, seed=ctx.seed
            )
            quantized = yield from finetune(
                part, quantized, batches, train, ctx.store, recorded.held_out(part.name)
            )
        if self.correct and denoiser:
            means = yield from drift.measure_drift(part, quantized, batches)
            quantized = drift.with_drift(quantized, means)
        return replace(quantized, cases=_cases(part, recorded), weakest=weakest)


def _cases(part: Part, recorded: Recorded) -> dict[str, dict[str, Any]]:
    """For the gate, evenly spread over the plan."""
    held, steps = recorded.held_out(part.name), recorded.steps_held_out(part.name)
    picked = range(0, len(held), max(1, len(held) // CASES))
    return {f"held out, call {steps[i] + 1}": dict(held[i]) for i in picked}


def _check_patterns(patterns: tuple[str, ...], model: Model) -> None:
    every = [f"{part.name}.{name}" for part in model for name in quantizable(part)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise BadInput(
                f"keep = {pattern!r} fits no layer",
                expected=f"PART.LAYER with * and ?, such as {every[0]} or {every[-1]}",
            )
