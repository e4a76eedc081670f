"""What a training method is made of: networks, a loss for each, and the order in which they take their turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.errors import BadInput
from ..libraries import torch
from .samples import Batch

__all__ = ["Lesson", "Training", "Turn", "Wrong"]

Tensor = Any
Module = Any


@dataclass(frozen=True)
class Training:
    """How long and how fast: a table of a recipe, [lcm.training] for instance."""

    steps: int = 2000
    """Turns of the student."""
    batch: int = 16
    """Samples behind one backward pass, on each process."""
    accumulation: int = 1
    """Backward passes behind one update: the batch of an update is batch x accumulation x processes."""
    rate: float = 1e-4
    """Largest learning rate of AdamW."""
    warm: int = 100
    """Updates over which the rate rises: AdamW's second moments are noise before."""
    decay: str = "cosine"
    """How the rate falls after it: cosine, to nothing, or constant."""
    weight_decay: float = 0.0
    average: float = 0.99
    """Decay of the student's moving average, which is what comes out; 0 for the student itself."""
    clip: float = 1.0
    """Norm that longer gradients are cut to."""
    precision: str = "bfloat16"
    """Of the arithmetic, weights stay in float32: bfloat16, or float32 where the processor is no faster in bfloat16."""
    checkpointing: bool = False
    """Activations computed again in the backward pass: a third more time, a fraction of the memory."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("accumulation", 1),
            ("warm", 0),
            ("weight_decay", 0),
        ):
            if getattr(self, name) < least:
                raise BadInput(f"{name} of training: {getattr(self, name)}", expected=f"at least {least}")
        if not 0 < self.rate < 1:
            raise BadInput(f"rate of training: {self.rate}", expected="between 0 and 1")
        if not 0 <= self.average < 1:
            raise BadInput(f"average of training: {self.average}", expected="from 0 to below 1")
        if not self.clip > 0:
            raise BadInput(f"clip of training: {self.clip}", expected="more than 0")
        if self.precision not in ("bfloat16", "float32"):
            raise BadInput(f"precision of training: {self.precision}", expected="bfloat16 or float32")
        if self.decay not in ("cosine", "constant"):
            raise BadInput(f"decay of training: {self.decay}", expected="cosine or constant")


@dataclass(frozen=True, eq=False)
class Turn:
    """What a loss may look at. All that is random comes from here, so that a resumed run repeats nothing."""

    step: int
    share: float
    """Of all steps: 0 at the first, below 1 at the last."""
    batch: Batch
    random: Any
    """torch.Generator on the processor, this turn's own."""
    networks: Mapping[str, Module]
    """Those of the lesson by name; only the one whose turn it is learns."""
    average: Module
    """The student's moving average, without gradients; the student itself where there is none."""

    @property
    def student(self) -> Module:
        return self.networks["student"]

    def normal(self, like: Tensor) -> Tensor:
        """Fresh noise of the shape of `like`."""
        return torch().randn(like.shape, generator=self.random).to(like.device)

    def uniform(self, low: float, high: float) -> Tensor:
        """[batch] on the batch's device."""
        x0 = self.batch.x0
        return (low + (high - low) * torch().rand(len(x0), generator=self.random)).to(x0.device)

    def integers(self, low: int, high: int) -> Tensor:
        """[batch] int64 of low <= i < high."""
        x0 = self.batch.x0
        return torch().randint(low, high, (len(x0),), generator=self.random).to(x0.device)


Loss = Callable[[Turn], Mapping[str, Tensor]]
"""Named terms; what is minimized is their sum. A term that has no gradient is only written down."""


def _student_alone(step: int) -> Sequence[str]:
    return ("student",)


@dataclass(frozen=True, eq=False)
class Lesson:
    """A method, prepared for one model."""

    networks: Mapping[str, Module]
    """What is trained, the "student" among them: every parameter that requires a gradient."""
    losses: Mapping[str, Loss]
    """Of each network."""
    key: str
    """Of all configuration and weights the lesson came from: a run goes on only from a checkpoint of the same key."""
    turns: Callable[[int], Sequence[str]] = _student_alone
    """Step -> whose update comes, in order; a name may stand several times."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Network -> its learning rate over that of the training; 1 where absent."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    frozen: tuple[Module, ...] = ()
    """Teachers and whatever else has to lie on the device."""
    after: Callable[[str, Turn], None] | None = None
    """Called after every update with the network's name: masks put on again, for instance."""


class Wrong(BadInput):
    """A loss that turned NaN or infinite."""
