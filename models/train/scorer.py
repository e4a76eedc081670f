"""The scorer: a small image-text retrieval model that judges generated pictures.

It never takes part in training the generator, so agreeing with it is evidence, not a training target.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import render
import tokenizer
import torch
import torch.nn.functional as F
from common import SCORER, Budget, config, count, load_state, save_state, set_rate, work_dir
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TEXT_LENGTH = 16  # the longest single-emoji caption has fewer tokens


class Block(nn.Module):
    """A residual pair of convolutions that halves the resolution."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride=2, padding=1)
        self.norm_first = nn.GroupNorm(8, outer)
        self.second = nn.Conv2d(outer, outer, 3, padding=1)
        self.norm_second = nn.GroupNorm(8, outer)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm_first(self.first(x)))
        return x + F.silu(self.norm_second(self.second(x)))


class Scorer(nn.Module):
    """Two towers that put a picture and its caption at the same place on a sphere."""

    def __init__(self, vocabulary: int, padding: int, width: int) -> None:
        super().__init__()
        self.padding = padding
        self.image = nn.Sequential(Block(3, 24), Block(24, 64), Block(64, 128), Block(128, 224))
        self.image_head = nn.Linear(224 * 16, width)
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(TEXT_LENGTH, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.text = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text_head = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def embed_images(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], Nx3x64x64 -> unit vectors."""
        return F.normalize(self.image_head(self.image(images).flatten(1)), dim=-1)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids, NxL -> unit vectors; only the first 16 tokens count."""
        ids = ids[:, :TEXT_LENGTH]
        hidden = self.tokens(ids) + self.places[: ids.shape[1]]
        silent = ids == self.padding  # also hides the end token, which carries nothing here
        hidden = self.text(hidden, src_key_padding_mask=silent)
        weight = (~silent).unsqueeze(-1).float()
        return F.normalize(self.text_head((hidden * weight).sum(1) / weight.sum(1).clamp_min(1)), dim=-1)


def load(folder: Path = SCORER) -> tuple[Scorer, list[str]]:
    """The committed scorer in single precision, and its ordered captions."""
    cfg = json.loads((folder / "config.json").read_text())
    model = Scorer(cfg["vocabulary"], cfg["padding"], cfg["width"])
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "scorer.safetensors").items()})
    captions = [row["caption"] for row in json.loads((folder / "captions.json").read_text())]
    return model.eval(), captions


@torch.no_grad()
def ranks(model: Scorer, captions: list[str], images: Tensor, wanted: Tensor) -> Tensor:
    """For each picture, how many captions fit it better than its own (0 = retrieved first)."""
    ids = torch.from_numpy(tokenizer.encode(captions).astype(np.int64))
    texts = model.embed_tokens(ids)
    found = []
    for batch, target in zip(images.split(64), wanted.split(64), strict=True):
        likeness = model.embed_images(batch) @ texts.T
        found.append((likeness > likeness.gather(1, target[:, None])).sum(1))
    return torch.cat(found)


def single(rng: np.random.Generator, index: int) -> np.ndarray:
    """One emoji near the canonical place, on any background: what retrieval must recognise."""
    colour = (255, 255, 255)
    if rng.random() < 0.4:
        colour = render.COLOURS[list(render.COLOURS)[int(rng.integers(len(render.COLOURS)))]]
    cx, cy = 0.5 + rng.uniform(-0.035, 0.035, 2)
    return render.draw(render.Plan((index,), colour, int(rng.integers(53, 60)), ((cx, cy),)))


def disturb(images: Tensor) -> Tensor:
    """Blur, noise and colour drift like those of a small autoencoder and a sampler."""
    n = len(images)
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = torch.lerp(images, blurred, torch.rand(n, 1, 1, 1) * 0.9)
    gain = 1 + 0.12 * torch.randn(n, 3, 1, 1)
    images = images * gain + 0.06 * torch.randn(n, 3, 1, 1)
    coarse = F.interpolate(torch.randn(n, 3, 16, 16), scale_factor=4, mode="bilinear")
    strength = torch.rand(n, 1, 1, 1) * 0.15
    return (images + strength * coarse + 0.5 * strength * torch.randn_like(images)).clamp(-1.2, 1.2)


def batch_of(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Disturbed pictures of distinct emoji and their numbers."""
    rng = np.random.default_rng(config()["seeds"]["scorer"] + seed)
    numbers = rng.choice(len(render.catalogue()), size, replace=False)
    pictures = np.stack([single(rng, int(i)) for i in numbers])
    return torch.from_numpy(render.as_model_input(pictures)), torch.from_numpy(numbers)


def accuracy(model: Scorer, captions: list[str], kind: str = "held_out") -> dict[str, float]:
    """Top-1 and top-5 retrieval on real renderings, one per emoji.

    "held_out" ones are moved, resized and coloured by seeds that were not trained on; "disturbed" ones are
    blurred and noisy as well; "canonical" ones are what a plain caption asks for.
    """
    rng = np.random.default_rng(config()["seeds"]["held_out"])
    drawn = [render.canonical(i) if kind == "canonical" else single(rng, i) for i in range(len(captions))]
    images = torch.from_numpy(render.as_model_input(np.stack(drawn)))
    if kind == "disturbed":
        torch.manual_seed(1)
        images = disturb(images)
    place = ranks(model, captions, images, torch.arange(len(captions)))
    return {"top1": (place < 1).float().mean().item(), "top5": (place < 5).float().mean().item()}


def train(until: str | None, minutes: float, every: float) -> None:
    cfg, cat = config()["scorer"], render.catalogue()
    tok = tokenizer.load()
    ids = torch.from_numpy(tokenizer.encode(cat.captions).astype(np.int64))
    torch.manual_seed(0)
    model = Scorer(len(tok), tok.pad_token_id, cfg["width"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg["rate"], betas=(0.9, 0.98), weight_decay=0.02)
    path, step, elapsed = work_dir() / "scorer.pt", 0, 0.0
    if (state := load_state(path)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, elapsed = state["step"], state["elapsed"]
    budget, last = Budget(until, minutes, elapsed), time.time()
    print(f"{count(model):,} parameters, {len(cat)} captions, {budget.left()}", flush=True)
    while budget.share < 1:
        set_rate(optimizer, budget.rate(cfg["rate"], cfg["floor"], step, cfg["warmup"]))
        images, numbers = batch_of(step, cfg["batch"])
        # The batch's own captions and as many others: the full list each step would cost more than it gives.
        others = torch.randperm(len(cat))[: 2 * len(numbers)]
        others = others[~torch.isin(others, numbers)]
        with torch.autocast("cpu", torch.bfloat16):
            pictures = model.embed_images(disturb(images))
            texts = model.embed_tokens(ids[torch.cat([numbers, others])])
        logits = pictures.float() @ texts.float().T * model.scale.exp().clamp(max=60)
        loss = F.cross_entropy(logits, torch.arange(len(numbers)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if time.time() - last > every or budget.share >= 1:
            last = time.time()
            saved: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(path, saved | {"step": step, "elapsed": budget.elapsed, "rng": torch.get_rng_state()})
            good = accuracy(model, cat.captions)
            speed = step * cfg["batch"] / budget.elapsed
            print(
                f"step {step} loss {loss.item():.3f} top-1 {good['top1']:.3f} top-5 {good['top5']:.3f} "
                f"{speed:.0f} images/s, {budget.left()}",
                flush=True,
            )
    write(model)


def write(model: Scorer) -> None:
    """Save weights (half precision), settings and the ordered captions with their code points."""
    SCORER.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()}, SCORER / "scorer.safetensors"
    )
    settings = {
        "width": model.tokens.embedding_dim,
        "vocabulary": model.tokens.num_embeddings,
        "padding": model.padding,
        "text_length": TEXT_LENGTH,
        "image_size": render.SIZE,
        "parameters": count(model),
    }
    (SCORER / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    core = set(render.catalogue().core)
    rows = [
        {"caption": e.caption, "code_point": f"U+{ord(e.char):04X}", "core": i in core}
        for i, e in enumerate(render.catalogue().emoji)
    ]
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    (SCORER / "captions.json").write_text(f"[\n{lines}\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", help="stop at this time of day, HH:MM")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="only measure the committed scorer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.check:
        train(args.until, args.minutes, args.every)
    model, captions = load()
    measured = {kind: accuracy(model, captions, kind) for kind in ("canonical", "held_out", "disturbed")}
    (SCORER / "accuracy.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
