"""Teachers whose answers are known exactly, for methods that distill: data N(mean, width^2) in every value."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from fewstep.model import Context, Model
from fewstep.model.training import Denoising, Turn, given_samples
from fewstep.runtime.plan import plan
from fewstep.runtime.process import DiscreteVP
from fewstep.targets import load_target

PROCESS = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
SHAPE = (16, 1, 1)  # seeded noise comes in no smaller pieces
MEAN, WIDTH = 0.7, 0.4


class Affine(torch.nn.Module):
    """x0 = (a x + b) at every noise level: exact for a Gaussian, and a table that can learn.

    means  of the data for each class label; the last is what no class in particular means
    """

    def __init__(self, process=PROCESS, means=(MEAN,), width=WIDTH, labelled=False):
        super().__init__()
        t = np.arange(1, process.t_max + 1)
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * width**2 / ((alpha * width) ** 2 + sigma**2)
        offset = np.outer(means, 1 - gain * alpha)
        self.a = torch.nn.Parameter(torch.tensor(gain, dtype=torch.float32))
        self.b = torch.nn.Parameter(torch.tensor(offset, dtype=torch.float32))
        self.labelled = labelled

    def forward(self, sample, timestep, labels=None):
        at = timestep.round().long()
        label = torch.zeros_like(at) if labels is None else labels
        return self.a[at].view(-1, 1, 1, 1) * sample + self.b[label, at].view(-1, 1, 1, 1)


def model_of(network, **more):
    settings = {"sample_shape": SHAPE, "process": PROCESS, "prediction": "sample", "name": "toy"}
    return Model.from_module(network, **{**settings, **more})


def data(number=512, mean=MEAN, width=WIDTH, seed=0):
    return np.random.default_rng(seed).normal(mean, width, (number, *SHAPE)).astype(np.float32)


def samples_of(model, number=512, subjects=None, **more):
    return given_samples(model, data(number, **more), [None] * number if subjects is None else subjects)


def turn_of(samples, student, batch=64, seed=0, step=0, share=0.0):
    random = torch.Generator().manual_seed(seed)
    return Turn(step, share, samples.batch(random, batch), random, {"student": student}, student)


def module(model):
    return model.parts[model.denoiser].module


def context(model, folder, teacher=None):
    way = plan("ddim", 1, model.process, prediction=model.prediction)
    return Context(load_target("laptop-cpu"), way, folder, folder, teacher=teacher)


def finish(work):
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def walk(model, network, x, times, labels=None, scale=1.0, nothing=None):
    """DDIM through the times, [steps + 1], with guidance."""
    denoising = Denoising.of(model)
    condition = {} if labels is None else {"class_labels": labels}
    empty = None if nothing is None else {"class_labels": torch.full_like(labels, nothing)}
    for t, s in pairwise(times):
        t, s = (torch.full((len(x),), float(time)) for time in (t, s))
        with torch.no_grad():
            x = denoising.ddim(denoising.guided(network, x, t, condition, empty, scale), s)
    return x


def exact_end(x, t, mean=MEAN, width=WIDTH, process=PROCESS):
    """Where the probability flow leads from x at time t: a Gaussian stays one, only its mean and width move."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    return mean + width / np.hypot(alpha * width, sigma) * (x - alpha * mean)
