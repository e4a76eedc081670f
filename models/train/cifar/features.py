"""Train the feature network of the Frechet distance: a small residual classifier of CIFAR-10."""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from cifar import FEATURES, SIZE, classes, config, pictures, work_dir
from common import Average, Budget, count, load_state, save_state, set_rate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions around which the input passes by."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(channels, channels, 1), *_convolution(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class FeatureNet(nn.Module):
    """RGB pictures in 0..1, [n, 3, 32, 32] -> features [n, channels[-1]]; normalisation happens inside."""

    def __init__(self, channels: list[int], labels: int = 10, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        stages: list[nn.Module] = [*_convolution(3, channels[0], 1)]
        for before, after in pairwise(channels):
            stages += [*_convolution(before, after, 2), Residual(after)]
        self.body = nn.Sequential(*stages)
        self.head = nn.Linear(channels[-1], labels)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.pooled(pictures) * self.scale

    def pooled(self, pictures: Tensor) -> Tensor:
        """The features before they are scaled to a mean variance of 1 over the training pictures."""
        # the mean and the deviation of CIFAR-10's pixels are near 0.47 and 0.25 in every channel
        return self.body((pictures - 0.47) * 4).mean(dim=(2, 3))

    def classify(self, pictures: Tensor) -> Tensor:
        """Logits [n, labels]."""
        return self.head(self.pooled(pictures))

    def classified(self, features: Tensor) -> Tensor:
        """Features -> the label of each."""
        return self.head(features / self.scale).argmax(1)


def _convolution(before: int, after: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)


def load() -> FeatureNet:
    """The committed network, in float32."""
    settings = json.loads((FEATURES / "config.json").read_text())
    net = FeatureNet(settings["channels"], len(settings["classes"]), settings["scale"])
    weights = {name: tensor.float() for name, tensor in load_file(FEATURES / "model.safetensors").items()}
    net.load_state_dict(weights, strict=False)  # the counts of batches are not stored
    return net.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def features_of(net: FeatureNet, pixels: Tensor, batch: int = 100) -> Tensor:
    """uint8 or 0..1 pictures -> float32 [n, features]."""
    scale = 255 if pixels.dtype == torch.uint8 else 1
    parts = (part.contiguous(memory_format=torch.channels_last) for part in pixels.split(batch))
    return torch.cat([net(part.float() / scale) for part in parts])


@torch.no_grad()
def accuracy(net: FeatureNet) -> float:
    """Share of the test pictures classified rightly."""
    pixels, labels = pictures("test")
    return float((net.classified(features_of(net, pixels)) == labels).float().mean())


def draw(pixels: Tensor, labels: Tensor, picks: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Pictures in 0..1, each moved by up to `shift` pixels (the edge is reflected), half of them mirrored."""
    batch = pixels[picks]
    n = len(batch)
    place = torch.arange(SIZE)[None] + torch.randint(-shift, shift + 1, (2, n, 1))
    place = (SIZE - 1) - ((SIZE - 1) - place.abs()).abs()
    rows, columns = place
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    images = batch.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images.permute(0, 3, 1, 2).float() / 255, labels[picks]  # channels last in memory


def train(args: argparse.Namespace) -> None:
    """Until the time is up, then write the folder of the network."""
    cfg = config()["features"]
    path = work_dir() / "features.pt"
    state = load_state(path) or {"step": 0, "elapsed": 0.0}
    torch.manual_seed(state["step"])
    net = FeatureNet(cfg["channels"]).to(memory_format=torch.channels_last)
    weights = list(net.parameters())
    optimizer = torch.optim.SGD(
        weights, cfg["rate"], cfg["momentum"], weight_decay=cfg["decay"], nesterov=True, fused=True
    )
    average = Average([*weights, *_floats(net)], 0.998)
    if "model" in state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.shadow, average.step = state["average"], state["step"]
    budget, step = Budget(args.until, args.minutes, state["elapsed"]), state["step"]
    pixels, labels = pictures("train")
    print(f"{count(net):,} parameters, {budget.left()}", flush=True)
    order, last, running = torch.empty(0, dtype=torch.long), time.time(), 0.0
    while budget.share < 1:
        if len(order) < cfg["batch"]:
            order = torch.randperm(len(pixels))
        picks, order = order[: cfg["batch"]], order[cfg["batch"] :]
        set_rate(optimizer, budget.rate(cfg["rate"], cfg["floor"], step, cfg["warmup"]))
        images, target = draw(pixels, labels, picks, cfg["shift"])
        with torch.autocast("cpu", torch.bfloat16):
            logits = net.classify(images)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=cfg["smoothing"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        average.update([*weights, *_floats(net)])
        running += (loss.item() - running) / min(step, 200)
        if time.time() - last > args.every or budget.share >= 1:
            last = time.time()
            state = {"step": step, "elapsed": budget.elapsed, "model": net.state_dict()}
            save_state(path, {**state, "optimizer": optimizer.state_dict(), "average": average.shadow})
            right = accuracy(net.eval())
            net.train()
            speed = step * cfg["batch"] / budget.elapsed
            print(
                f"step {step} loss {running:.4f} test accuracy {100 * right:.2f} % {speed:.0f} images/s, "
                f"{budget.left()}",
                flush=True,
            )
    average.copy_to([*weights, *_floats(net)])
    export(net.eval(), cfg, step, budget.elapsed)


def _floats(net: nn.Module) -> list[Any]:
    return [b for b in net.buffers() if b.is_floating_point()]


def export(net: FeatureNet, cfg: dict[str, Any], step: int, seconds: float) -> None:
    """Write weights in half precision, config.json and accuracy.json."""
    FEATURES.mkdir(exist_ok=True)
    net.to(memory_format=torch.contiguous_format)
    tensors = {k: v.half().contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}
    save_file(tensors, FEATURES / "model.safetensors")
    variance = features_of(net, pictures("train")[0]).var(0).mean().item() / net.scale**2
    settings = {
        "channels": cfg["channels"],
        "size": SIZE,
        "classes": classes(),
        "input": "RGB in 0..1",
        "scale": round(variance**-0.5, 6),
    }
    (FEATURES / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    report = {
        "test_accuracy": accuracy(load()),
        "pictures": 10_000,
        "steps": step,
        "minutes": round(seconds / 60, 1),
    }
    (FEATURES / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {FEATURES}: {report}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", help="stop at this time of day, HH:MM")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
