"""Zeros in a denoiser's weights, learned while they come: gradual magnitude pruning, regrowth, patterns.

The graph keeps its size. An engine of dense kernels, ONNX Runtime and OpenVINO among them, multiplies by the zeros: it
is no faster (measured: docs/how-to-prune-widths.md). What zeros save is a bundle's transfer, zipped; and N:M patterns
are what Sparse Tensor Cores skip.
"""

from __future__ import annotations

import copy
import hashlib
import re
import zlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..model.fingerprint import model_fingerprint
from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Denoising, Latents, Lesson, Processes, Training, Turn, prepare_samples, train
from ..runtime.errors import BadInput
from ..runtime.progress import Progress, within
from .masks import (
    block_mask,
    cubic_sparsity,
    drop_and_regrow,
    global_masks,
    magnitude_mask,
    n_of_m_mask,
    regrown_fraction,
)

__all__ = ["Pattern", "Sparsify", "sparse_layers", "zipped_bytes"]

Tensor = Any
Module = Any

DRAWN_SHARE = 0.25
"""Of the pass's progress bar: the time the latents take. A guess, for the bar alone."""
ENDS = ("conv_in", "conv_out", "pos_embed.proj", "proj_out_1", "proj_out_2")
"""Layers at the ends of diffusers' denoisers: few weights that everything passes through."""


@dataclass(frozen=True)
class Pattern:
    """What goes together: blocks of rows x columns, or all but n of every m inputs."""

    rows: int = 1
    columns: int = 1
    n: int = 0
    m: int = 0

    @classmethod
    def of(cls, text: str) -> Pattern:
        """From "4x1" or "2:4". Raises BadInput."""
        found = re.fullmatch(r"(\d+)([x:])(\d+)", text)
        if found is not None and min(pair := (int(found[1]), int(found[3]))) > 0:
            if found[2] == "x":
                return cls(*pair)
            if pair[0] < pair[1]:
                return cls(n=pair[0], m=pair[1])
        raise BadInput(f"pattern {text!r}", expected="rows x columns like 4x1, or n of m like 2:4")

    def fits(self, weight: Tensor) -> bool:
        if self.m:
            return int(weight.shape[1]) % self.m == 0
        outputs, inputs = (int(size) for size in weight.shape[:2])
        return outputs % self.rows == 0 and inputs % self.columns == 0

    def mask(self, weight: Tensor, sparsity: float) -> Tensor:
        if self.m:
            return n_of_m_mask(weight, max(self.n, round((1 - sparsity) * self.m)), self.m)
        return block_mask(weight, sparsity, self.rows, self.columns)


@dataclass(frozen=True)
class Sparsify:
    """A pass: most weights of the denoiser are zero, and the others learned to do without them.

    It imitates the outputs of the model the recipe began with, on that model's own latents; after a pass that changed
    how it is drawn (fewer steps, guidance taken in), those of the model it is given. The record in history holds
    `nonzeros` of `weights` in the layers thinned, `dense` layers the pattern does not fit, and `zipped_bytes` of the
    whole denoiser as float16, before and after.
    """

    method: str = "gmp"
    """gmp: weights go by magnitude on a cubic schedule (arXiv:1710.01878); granet: the same, and a share of the others
    is dropped and regrown where the gradient is large (arXiv:2106.10404)."""
    sparsity: float = 0.8
    """Of the layers thinned. With a pattern n:m it follows from that."""
    pattern: str = "1x1"
    """Single weights, blocks like 4x1, 1x4 or 8x8, or n:m like 2:4 along the inputs."""
    scope: str = "layer"
    """Equal sparsity in every layer, or global: one threshold for all, for single weights alone."""
    initial: float = 0.0
    """Sparsity the schedule begins with."""
    every: int = 50
    """Updates between two looks at the masks."""
    until: float = 0.8
    """Share of the training after which masks stay: GraNet's."""
    regrown: float = 0.5
    """Share of the weights exchanged at the first look, for granet; it falls along a cosine."""
    drop: float = 0.1
    """Share of samples without their prompt or label: guidance needs an answer to nothing, too."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=2000, rate=2e-4, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.method not in ("gmp", "granet"):
            raise BadInput(f"method of sparsify: {self.method!r}", expected="gmp or granet")
        if self.scope not in ("layer", "global"):
            raise BadInput(f"scope of sparsify: {self.scope!r}", expected="layer or global")
        pattern = Pattern.of(self.pattern)
        if pattern != Pattern() and (self.method == "granet" or self.scope == "global"):
            raise BadInput(
                f"pattern {self.pattern} with {self.method}, scope {self.scope}",
                expected="gmp, scope layer",
                fix="single weights (pattern 1x1) for regrowth or one threshold for all layers",
            )
        for name in ("sparsity", "initial", "drop", "regrown"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"{name} of sparsify: {getattr(self, name)}", expected="from 0 to below 1")
        if not 0 < self.until <= 1:
            raise BadInput(f"until of sparsify: {self.until}", expected="above 0 to 1")
        if self.every < 1 or self.looks < 1:
            raise BadInput(
                f"every {self.every} of {self.training.steps} steps, until {self.until:g} of them",
                expected="at least one look at the masks",
                fix="more steps, or a smaller `every`",
            )

    @property
    def looks(self) -> int:
        """How often the masks change."""
        return int(self.until * self.training.steps) // self.every

    @property
    def final(self) -> float:
        pattern = Pattern.of(self.pattern)
        return 1 - pattern.n / pattern.m if pattern.m else self.sparsity

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Interrupted, it goes on from its last checkpoint. Raises BadInput for a denoiser with no layer that the
        pattern fits, a teacher of other inputs, or a loss turned NaN."""
        part, drawer = model.parts[model.denoiser], ctx.teacher or model
        teacher = imitated(model, ctx)
        if [(i.name, i.shape) for i in part.inputs] != [
            (i.name, i.shape) for i in drawer.parts[drawer.denoiser].inputs
        ] or model.prediction != drawer.prediction:
            raise BadInput(
                f"{model.name} and its teacher {drawer.name} differ in inputs or prediction",
                expected="a student that is fed and read like its teacher",
            )
        layers, dense = sparse_layers(part.module, Pattern.of(self.pattern))
        if not layers:
            raise BadInput(
                f"no layer of {part.name} of {model.name} fits the pattern {self.pattern}",
                expected="convolutions and linear layers whose sizes it divides",
                fix="another pattern",
            )
        samples = yield from within(
            prepare_samples(drawer, self.latents, ctx.store, Processes.found()), 0, DRAWN_SHARE
        )
        student = copy.deepcopy(part.module).requires_grad_(True)
        thin = _Thinning(self, student, layers, Denoising.of(model), teacher.parts[teacher.denoiser].module)
        lesson = Lesson(
            {"student": student},
            {"student": thin.losses},
            self._key(model, teacher, samples.key, ctx.seed),
            frozen=(thin.teacher,),
            after=thin.after,
        )
        how = replace(self.training, seed=self.training.seed + ctx.seed)
        trained = yield from within(train(lesson, samples, how, ctx.store, "sparsify"), DRAWN_SHARE, 1)
        network = trained.student
        thin.put_on(network)
        weights = {name: network.get_parameter(name) for name in layers}
        total = sum(weight.numel() for weight in weights.values())
        nonzeros = sum(int(weight.count_nonzero()) for weight in weights.values())
        yield Progress("sparsify", 1.0, f"{1 - nonzeros / total:.1%} of {total:,} weights are zero")
        return model.after(
            self,
            {part.name: replace(part, module=network, quantized=None)},
            weights=total,
            nonzeros=nonzeros,
            dense=dense,
            zipped_bytes=[zipped_bytes(part.module), zipped_bytes(network)],
            losses={name: float(f"{value:.4g}") for name, value in trained.losses.items()},
            log=trained.metrics.name,
        )

    def _key(self, model: Model, teacher: Model, samples: str, seed: int) -> str:
        """Of all that the training comes from."""
        both = [model_fingerprint(one, [one.denoiser]) for one in (model, teacher)]
        return hashlib.blake2b(repr((self, both, samples, seed)).encode(), digest_size=12).hexdigest()


def imitated(model: Model, ctx: Context) -> Model:
    """Whose outputs are learned: those of another number of steps or another guidance mean something else."""
    teacher = ctx.teacher or model
    alike = (teacher.steps, teacher.guidance) == (model.steps, model.guidance)
    return teacher if alike else model


def sparse_layers(module: Module, pattern: Pattern) -> tuple[list[str], list[str]]:
    """Names of the weights that are thinned, and of those that the pattern does not fit. The ends are in neither."""
    nn = torch().nn
    layers: list[str] = []
    dense: list[str] = []
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear) or any(
            path == end or path.endswith("." + end) for end in ENDS
        ):
            continue
        (layers if pattern.fits(layer.weight) else dense).append(f"{path}.weight")
    return layers, dense


def zipped_bytes(module: Module) -> int:
    """Of all its weights as float16, each deflated by itself as in a zip file: what a download takes."""
    half = torch().float16
    return sum(
        len(zlib.compress(t.detach().to(half).cpu().numpy().tobytes(), 6)) for t in module.parameters()
    )


class _Thinning:
    """The masks of one training. They lie in the weights: what is zero when it begins, or goes on, is off."""

    def __init__(
        self, how: Sparsify, student: Module, layers: list[str], denoising: Denoising, teacher: Module
    ) -> None:
        self.how, self.student, self.layers = how, student, layers
        self.denoising, self.teacher = denoising, teacher
        self.pattern = Pattern.of(how.pattern)
        self.masks: dict[str, Tensor] = {}

    def weights(self) -> dict[str, Tensor]:
        return {name: self.student.get_parameter(name) for name in self.layers}

    def losses(self, turn: Turn) -> Mapping[str, Tensor]:
        """The squared difference of the outputs at a time drawn evenly."""
        if not self.masks:  # a checkpoint has been read by now
            self.masks = {name: weight.detach() != 0 for name, weight in self.weights().items()}
        th, batch, denoising = torch(), turn.batch, self.denoising
        last = denoising.process.t_max
        # a discrete process has its trained levels at 1, 2, ...; a continuous one no noise at 0
        t = 1 + turn.uniform(0, last - 1) if last > 1 else turn.uniform(1e-3, 1)
        x = denoising.noised(batch.x0, turn.normal(batch.x0), t)
        condition = batch.condition
        if batch.nothing is not None and self.how.drop:
            dropped = turn.uniform(0, 1) < self.how.drop
            condition = {
                name: th.where(dropped.view(-1, *[1] * (value.ndim - 1)), batch.nothing[name], value)
                for name, value in condition.items()
            }
        with th.no_grad():
            right = denoising.output(self.teacher, x, t, condition)
        got = denoising.output(turn.student, x, t, condition)
        return {"output": (got - right).square().mean()}

    def after(self, name: str, turn: Turn) -> None:
        """Look at the masks where it is time, and put them on."""
        how, step = self.how, turn.step + 1
        if step % how.every == 0 and step <= how.looks * how.every:
            sparsity = cubic_sparsity(
                step, initial=how.initial, final=how.final, begin=0, pulses=how.looks, every=how.every
            )
            self.put_on(self.student)
            self.masks = self._by_size(sparsity)
            fraction = regrown_fraction(step, first=how.regrown, end=how.looks * how.every)
            if how.method == "granet" and fraction > 0:
                self._regrow(turn, fraction)
        self.put_on(self.student)

    def put_on(self, network: Module) -> None:
        if not self.masks:  # the training was over when it began
            self.masks = {name: weight.detach() != 0 for name, weight in self.weights().items()}
        with torch().no_grad():
            for name, mask in self.masks.items():
                weight = network.get_parameter(name)
                weight.mul_(mask.to(weight.device))

    def _by_size(self, sparsity: float) -> dict[str, Tensor]:
        weights = self.weights()
        if self.how.scope == "global":
            return global_masks(weights, sparsity)
        if self.pattern == Pattern():
            return {name: magnitude_mask(weight, sparsity) for name, weight in weights.items()}
        return {name: self.pattern.mask(weight, sparsity) for name, weight in weights.items()}

    def _regrow(self, turn: Turn, fraction: float) -> None:
        """One dense gradient, of this turn's batch; of all processes' where there are several."""
        th = torch()
        weights = self.weights()
        gradients = th.autograd.grad(self.losses(turn)["output"], list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if th.distributed.is_available() and th.distributed.is_initialized():
                th.distributed.all_reduce(gradient)
            self.masks[name] = drop_and_regrow(weight, self.masks[name], gradient, fraction)
