"""Networks that learn to be the score of any Gaussian, for methods that teach a second network beside the student."""

import numpy as np
import torch

from fewstep.distill.student import Setting
from fewstep.model.training import Denoising, Turn, given_samples
from fewstep.runtime.plan import plan

from .analytic import PROCESS, SHAPE, model_of


class Gaussian(torch.nn.Module):
    """The exact clean estimate of data N(mean, width^2); a fake's mean and width may differ from time to time."""

    def __init__(self, mean, width, knots=17):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor([[mean, width]] * knots, dtype=torch.float32))

    def forward(self, sample, timestep):
        t = timestep.double().numpy() + 1
        alpha, sigma = (
            torch.tensor(of(t)).float().view(-1, 1, 1, 1) for of in (PROCESS.alpha, PROCESS.sigma)
        )
        mean, width = between_knots(self.table, timestep)
        gain = alpha * width**2 / ((alpha * width) ** 2 + sigma**2)
        return mean + gain * (sample - alpha * mean)


def between_knots(table, timestep):
    """The table's columns at the timesteps, straight between its rows, [batch, 1, 1, 1] each."""
    at = timestep.clamp(min=0) / 999 * (len(table) - 1)
    low = at.floor().long().clamp(max=len(table) - 2)
    values = torch.lerp(table[low], table[low + 1], (at - low).unsqueeze(1))
    return (column.view(-1, 1, 1, 1) for column in values.unbind(1))


class Knots(torch.nn.Module):
    """x0 = a(t) x + b(t), a and b straight between knots: what leads any Gaussian to any other."""

    def __init__(self, gain=0.2, offset=0.0, knots=9):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor([[gain, offset]] * knots, dtype=torch.float32))

    def forward(self, sample, timestep):
        gain, offset = between_knots(self.table, timestep)
        return gain * sample + offset


class Constant(torch.nn.Module):
    """A clean estimate N(mean, width^2) out of the sample itself, which is standard noise."""

    def __init__(self, mean, width):
        super().__init__()
        self.mean, self.width = (torch.nn.Parameter(torch.tensor(float(value))) for value in (mean, width))

    def forward(self, sample, timestep):
        return self.mean + self.width * sample


class Exact(torch.nn.Module):
    """A student whose DDIM steps lead standard noise through the very distributions of N(mean, width^2), noised."""

    def __init__(self, times, mean, width):
        super().__init__()
        self.times, self.mean, self.width = times, mean, width

    def spread(self, t):
        return np.hypot(PROCESS.alpha(t) * self.width, PROCESS.sigma(t))

    def forward(self, sample, timestep):
        out = torch.zeros_like(sample)
        for t, s in zip(self.times[:-1], self.times[1:], strict=True):
            here = timestep + 1 == t
            (alpha, sigma), (alpha_s, sigma_s) = ((PROCESS.alpha(u), PROCESS.sigma(u)) for u in (t, s))
            centre, spread = (0.0, 1.0) if t == self.times[0] else (alpha * self.mean, self.spread(t))
            end = alpha_s * self.mean + self.spread(s) / spread * (sample[here] - centre)
            out[here] = (end - sigma_s / sigma * sample[here]) / (alpha_s - alpha * sigma_s / sigma)
        return out


def setting_of(student, teacher, number=512):
    """What a loss works with: no data, zeros for latents."""
    model = model_of(student)
    samples = given_samples(model, np.zeros((number, *SHAPE), np.float32), [None] * number)
    return Setting(model, Denoising.of(model), student, teacher, 1.0, samples, "toy")


def turn_of(setting, batch=4096, seed=0, **networks):
    random = torch.Generator().manual_seed(seed)
    networks = {"student": setting.student, **networks}
    return Turn(0, 0.0, setting.samples.batch(random, batch), random, networks, setting.student)


def drawn(model, sampler="ddim", steps=None, count=20000):
    """float32 [count, ...]: what the model draws by the runtime's own loop, with the times of its grid."""
    way = plan(sampler, steps or model.steps, model.process, prediction=model.prediction, grid=model.grid)
    network, rng = model.parts[model.denoiser].module, np.random.default_rng(0)

    def denoise(x, t):
        with torch.no_grad():
            return network(torch.from_numpy(x).float(), torch.full((len(x),), float(t.timestep))).numpy()

    def noise():
        return rng.standard_normal((count, *SHAPE)).astype(np.float32)

    *_, last = way.run(denoise, way.start(noise()), noise)
    return last.x
