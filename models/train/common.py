"""What the three trainers share: clock, paths, checkpoints, averaged weights."""

from __future__ import annotations

import math
import os
import time
import tomllib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "emoji-64"
SCORER = HERE.parent / "emoji-64-scorer"


def config() -> dict[str, Any]:
    """The settings of config.toml."""
    return tomllib.loads((HERE / "config.toml").read_text())


def work_dir() -> Path:
    """Checkpoints and caches live here, never in the repository."""
    path = Path(os.environ.get("EMOJI_TRAIN_DIR", "/tmp/emoji-train"))
    path.mkdir(parents=True, exist_ok=True)
    return path


class Budget:
    """Training time, either until a time of day or for some minutes; it survives interruptions.

    The learning rate follows the share of time used, not a step count, so that it reaches its floor when
    time is up whatever else the machine is doing.
    """

    def __init__(self, until: str | None, minutes: float | None, used: float = 0.0) -> None:
        self.start, self.used = time.time(), used
        if until:
            hour, minute = map(int, until.split(":"))
            end = datetime.now().replace(hour=hour, minute=minute, second=0, microsecond=0)
            if end < datetime.now():
                end += timedelta(days=1)
            self.total = used + end.timestamp() - self.start
        else:
            self.total = (minutes or 1.0) * 60

    def take_up(self, share: float) -> None:
        """Stretch the past so that the time left is the rest after this share."""
        left = self.total - self.used
        self.used = left * share / (1 - share)
        self.total = self.used + left

    @property
    def elapsed(self) -> float:
        return self.used + time.time() - self.start

    @property
    def share(self) -> float:
        return min(1.0, self.elapsed / self.total)

    def rate(self, peak: float, floor: float, step: int, warmup: int) -> float:
        return self.rate_at(self.share, peak, floor, step, warmup)

    @staticmethod
    def rate_at(share: float, peak: float, floor: float, step: int, warmup: int) -> float:
        """Cosine decay over the time share, after a short warm-up in steps."""
        decay = floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share))
        return decay * min(1.0, (step + 1) / max(1, warmup))

    def left(self) -> str:
        return f"{max(0.0, self.total - self.elapsed) / 60:.1f} min left"


class Average:
    """Exponential moving average of trainable weights, with a short memory while training is young."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.decay, self.step = decay, 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[torch.nn.Parameter], steps: int = 1) -> None:
        """Move towards the current weights as far as `steps` single updates would."""
        self.step += steps
        decay = min(self.decay, (1 + self.step) / (10 + self.step)) ** steps
        torch._foreach_lerp_(self.shadow, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: list[torch.nn.Parameter]) -> None:
        for shadow, parameter in zip(self.shadow, parameters, strict=True):
            parameter.copy_(shadow)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that an interruption leaves the old one or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any] | None:
    return torch.load(path, map_location="cpu", weights_only=False) if path.exists() else None


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
