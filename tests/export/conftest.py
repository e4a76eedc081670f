"""Networks small enough to export in a second or two."""

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model import Model  # noqa: E402
from fewstep.runtime import DiscreteVP  # noqa: E402

LINEAR = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)


class Pixels(torch.nn.Module):
    """Everything the clean-up touches, once: a group norm, and attention over the pixels."""

    def __init__(self, channels=3, width=16, heads=2):
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.inward = torch.nn.Conv2d(channels, width, 3, padding=1)
        self.time = torch.nn.Linear(1, width)
        self.norm = torch.nn.GroupNorm(4, width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.outward = torch.nn.Conv2d(width, channels, 3, padding=1)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.uniform_(-0.5, 0.5)

    def forward(self, sample, timestep):
        x = self.inward(sample) + self.time(timestep[:, None] / 1000)[:, :, None, None]
        batch, width, height, length = x.shape
        flat = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            part.reshape(batch, height * length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(flat).chunk(3, dim=-1)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = mixed.reshape(batch, height * length, width)
        x = x + mixed.transpose(1, 2).reshape(batch, width, height, length)
        return self.outward(torch.nn.functional.silu(x))


class Labelled(torch.nn.Module):
    """Class-conditional, in a signature of its own; label 10 means "no class"."""

    def __init__(self):
        super().__init__()
        self.pixels = Pixels()
        self.classes = torch.nn.Embedding(11, 3)

    def forward(self, timestep, label, picture):
        return {"noise": self.pixels(picture, timestep) + self.classes(label)[:, :, None, None]}


class Actions(torch.nn.Module):
    """A policy: 16 actions of 7 numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inward, self.outward = torch.nn.Conv1d(7, 16, 3, padding=1), torch.nn.Conv1d(16, 7, 3, padding=1)
        self.time = torch.nn.Linear(1, 16)

    def forward(self, sample, timestep):
        return self.outward(
            torch.nn.functional.silu(self.inward(sample) + self.time(timestep[:, None])[:, :, None])
        )


@pytest.fixture
def pixels():
    return Model.from_module(
        Pixels(), sample_shape=(3, 8, 8), process=LINEAR, name="pixels", dynamic=("height", "width")
    )


@pytest.fixture
def labelled():
    return Model.from_module(
        Labelled(),
        sample_shape=(3, 8, 8),
        process=LINEAR,
        prediction="v_prediction",
        name="labelled",
        classes=10,
        guidance=2.0,
        call=lambda module, sample, timestep, labels: module(timestep, labels, sample)["noise"],
    )
