"""Systematic errors of rounding, measured and taken off again: of every layer's output, and of the part's by timestep.

Rounding errors have a mean. A layer's own goes into its bias (Nagel et al. 2019, arXiv:1906.04721, section 4.2,
measured there on data too). What is left of it at the output differs from call to call of the plan, and a sampler adds
it up: it is subtracted by timestep, as calibrated diffusion models do with the mean error of a trained network (Pang et
al. 2023, arXiv:2302.10688), here against the float network, which asks for no data.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Array, Quantized
from ..model.trajectories import run_part
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .simulate import quantizable, simulated

__all__ = ["correct_biases", "measure_drift", "shrunk", "with_drift"]


def correct_biases(
    part: Part, quantized: Quantized, batches: Sequence[Mapping[str, Array]], *, in_order: bool = True
) -> Generator[Progress, None, Quantized]:
    """Every layer's bias plus the mean over `batches` of (float output - quantized output), a value a channel.

    in_order  a layer's mean is measured behind layers that are corrected already; False: all behind uncorrected ones
    Layers without a bias get none: it would cost an addition. Means that the batches do not agree on are shrunk. Of 4
    batches and more the last quarter is not measured on but judges: where the part's output is no nearer to its float
    output there, `quantized` comes back as it was. That happens: means differ from call to call of the plan, and one
    bias serves them all.
    Raises BadInput for no batches, or where an output is not finite.
    """
    if not batches:
        raise BadInput("no batches to correct biases on", expected="at least 1", fix="record more calls")
    judges = batches[len(batches) - len(batches) // 4 :]
    batches = batches[: len(batches) - len(judges)]
    modules = quantizable(part)
    names = [name for name in quantized.layers if getattr(modules[name], "bias", None) is not None]
    found: dict[str, list[Array]] = {name: [] for name in names}
    for number, batch in enumerate(batches):
        yield Progress(f"bias {part.name}", number / len(batches), f"call {number + 1} of {len(batches)}")
        right: dict[str, Any] = {}
        with _means(part, names, right, None, in_order=False):
            run_part(part, batch)
        missing: dict[str, Any] = {}
        with simulated(part, quantized), _means(part, names, missing, right, in_order=in_order):
            run_part(part, batch)
        for name, value in missing.items():
            if not np.isfinite(value).all():
                raise BadInput(f"the output of {name} is not finite in call {number}", expected="numbers")
            found[name].append(value)
    layers = dict(quantized.layers)
    for name, values in found.items():
        if values:
            given = layers[name].bias
            bias = modules[name].bias.detach().numpy() if given is None else given
            layers[name] = replace(layers[name], bias=(bias + shrunk(np.stack(values))).astype(np.float32))
    fixed = replace(quantized, layers=layers)
    return fixed if not judges or _error(part, fixed, judges) < _error(part, quantized, judges) else quantized


def _error(part: Part, quantized: Quantized, batches: Sequence[Mapping[str, Array]]) -> float:
    """Of the outputs, squared, over their own squares: the mean over batches."""
    found = []
    for batch in batches:
        right = run_part(part, batch)
        with simulated(part, quantized):
            got = run_part(part, batch)
        found += [
            float(np.square(got[n] - r).sum() / max(np.square(r).sum(), 1e-30)) for n, r in right.items()
        ]
    return float(np.mean(found))


def measure_drift(
    part: Part, quantized: Quantized, batches: Sequence[Mapping[str, Array]], guidance: float | None = None
) -> Generator[Progress, None, tuple[Array, Array]]:
    """(timesteps [k] ascending, means [k, channels]) of quantized output - float output, over samples and pixels.

    batches   calls of the part, each at one `timestep`: all batches of a timestep count together
    guidance  the scale s of calls with the unconditional half first: the mean is then that of the guided output's
              error, s conditional + (1 - s) unconditional, which is what the sampler sees and d, subtracted from both
              halves, takes off
    Means too small for the sample to know are shrunk, and all are 0 where those of one half of the samples make the
    other half's no smaller. What drift `quantized` has is not looked at.
    Raises BadInput for no batches, or a part without `timestep`.
    """
    if not batches or "timestep" not in batches[0]:
        raise BadInput(f"no calls of {part.name} with a timestep", expected="recorded calls of the denoiser")
    plain = replace(quantized, drift=None)
    errors: dict[float, list[Array]] = {}
    for number, batch in enumerate(batches):
        yield Progress(f"drift {part.name}", number / len(batches), f"call {number + 1} of {len(batches)}")
        name = part.outputs[0].name
        right = run_part(part, batch)[name]
        with simulated(part, plain):
            error = run_part(part, batch)[name] - right
        error = error.reshape(*error.shape[:2], -1).mean(axis=2, dtype=np.float64)
        if guidance is not None:
            half = len(error) // 2
            error = (1 - guidance) * error[:half] + guidance * error[half:]
        errors.setdefault(float(batch["timestep"].reshape(-1)[0]), []).append(error)
    times = sorted(errors)
    samples = [np.concatenate(errors[t]) for t in times]
    means = np.stack([shrunk(s) for s in samples])
    return np.array(times, np.float32), (means * _holds_up(samples)).astype(np.float32)


def with_drift(quantized: Quantized, drift: tuple[Array, Array]) -> Quantized:
    """With the drift subtracted; without any where all of it is 0, which saves a lowering the nodes."""
    return replace(quantized, drift=drift if np.any(drift[1]) else None)


def shrunk(samples: Array) -> Array:
    """[n, channels] -> [channels]: the mean, brought towards 0 by as much as its own uncertainty makes up of it.

    The positive part James-Stein estimator with the variance of the mean estimated from the samples (James and Stein
    1961; Efron and Morris 1973), for 3 channels and more; 0 from fewer than 2 samples, of which nothing is known.
    """
    count, channels = samples.shape
    if count < 2:
        return np.zeros(channels)
    mean = samples.mean(axis=0)
    noise = float((samples.var(axis=0, ddof=1) / count).sum())
    # with 1 or 2 channels nothing beats the mean everywhere; shrinking by all the noise still halves its worst harm
    share = (channels - 2) / channels if channels > 2 else 1.0
    size = max(float((mean**2).sum()), float(np.finfo(float).tiny))
    return np.asarray(mean * max(0.0, 1 - share * noise / size))


def _holds_up(samples: Sequence[Array]) -> float:
    """1 where the means of every other sample bring those of the rest nearer to 0, and the other way round; else 0."""
    halves = [[s[side::2] for s in samples] for side in (0, 1)]
    for fitted, other in (halves, halves[::-1]):
        before = sum(float((o.mean(axis=0) ** 2).sum()) for o in other if len(o))
        after = sum(
            float(((o.mean(axis=0) - shrunk(f)) ** 2).sum())
            for f, o in zip(fitted, other, strict=True)
            if len(o)
        )
        if not after < before:
            return 0.0
    return 1.0


@contextmanager
def _means(
    part: Part, names: Sequence[str], into: dict[str, Any], right: Mapping[str, Any] | None, *, in_order: bool
) -> Iterator[None]:
    """Inside, `into` gets the mean output a channel of every layer; or, given the right ones, what is missing to them,
    which `in_order` adds to the output at once.
    """
    modules = quantizable(part)

    def look(name: str, module: Any, _: Any, output: Any) -> Any:
        axis = output.ndim - 1 if isinstance(module, torch().nn.Linear) else 1
        mean = output.double().mean(dim=[i for i in range(output.ndim) if i != axis])
        if right is None:
            into[name] = mean.numpy()
            return output
        into[name] = right[name] - mean.numpy()
        if not in_order:
            return output
        shape = [-1 if i == axis else 1 for i in range(output.ndim)]
        return output + torch().from_numpy(into[name].astype(np.float32)).reshape(shape)

    hooks = [modules[name].register_forward_hook(partial(look, name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
