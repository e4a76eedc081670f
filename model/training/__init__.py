"""Training for passes that prune, distill or quantize: what is learned on, how outputs are read, and the loop."""

from .estimates import Denoising, Estimate
from .lesson import Lesson, Training, Turn, Wrong
from .loop import Trained, train
from .processes import Processes
from .samples import Batch, Latents, Samples, given_samples, prepare_samples

__all__ = [
    "Batch",
    "Denoising",
    "Estimate",
    "Latents",
    "Lesson",
    "Processes",
    "Samples",
    "Trained",
    "Training",
    "Turn",
    "Wrong",
    "given_samples",
    "prepare_samples",
    "train",
]
