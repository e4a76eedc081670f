"""The Frechet distance of drawn pictures from real ones, in the features of ../../cifar-dit-features.

It is a distance of our own, of 128 features of a small network: figures of other networks do not compare with it.
Distances of equal numbers of pictures, drawn from the same seeds, do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import features
import numpy as np
import torch
from cifar import FEATURES, MODEL, as_input, pictures
from PIL import Image
from safetensors.numpy import load_file, save_file

from fewstep.export.quality import frechet_distance, frechet_gaussian
from fewstep.model import load
from fewstep.model.training.samples import in_precision
from fewstep.model.trajectories import run_part, trajectories
from fewstep.runtime import Pipeline
from fewstep.runtime.plan import plan

REFERENCE = FEATURES / "reference.safetensors"
SHEET_COLUMNS = 20
DRAWS = 200


def drawn(
    source: Path, count: int, sampler: str, steps: int, guidance: float | None, batch: int
) -> Iterator[np.ndarray]:
    """uint8 pictures [n, height, width, 3], a batch at a time; picture i is of class i modulo their number."""
    if (source / "manifest.json").exists():
        yield from drawn_by_bundle(source, count, sampler, steps, guidance, batch)
        return
    model = in_precision(load(source), "bfloat16")
    labels = list(range(model.classes or 0))
    way = plan(sampler, steps, model.process, prediction=model.prediction, grid=model.grid)
    decoder = model.parts["vae_decoder"]
    for run in trajectories(
        model, way, range(count), labels=labels, guidance=guidance, batch=batch, calls=False
    ):
        latents = run.latent / model.sample.scaling_factor + model.sample.shift_factor
        decoded = run_part(decoder, {decoder.inputs[0].name: latents})[decoder.outputs[0].name]
        yield as_pixels(decoded)


def drawn_by_bundle(
    source: Path, count: int, sampler: str, steps: int, guidance: float | None, batch: int
) -> Iterator[np.ndarray]:
    """The same by the exported graphs, on their engine."""
    with Pipeline.from_pretrained(source, threads=1) as pipe:
        classes = pipe.manifest.classes or 1
        for first in range(0, count, batch):
            labels = [i % classes for i in range(first, min(first + batch, count))]
            images = pipe(
                class_labels=labels,
                seed=first,
                sampler=sampler,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="np",
            ).images
            yield (images * 255).round().astype(np.uint8)


def as_pixels(decoded: np.ndarray) -> np.ndarray:
    """[n, 3, height, width] in -1..1 -> uint8 [n, height, width, 3], rounded as a picture file would be."""
    return ((decoded.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)


def features_of(net: features.FeatureNet, pixels: np.ndarray) -> np.ndarray:
    """uint8 [n, height, width, 3] -> float64 [n, features]."""
    return features.features_of(net, torch.from_numpy(pixels.transpose(0, 3, 1, 2))).double().numpy()


def gaussian(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance."""
    return vectors.mean(0), np.cov(vectors, rowvar=False)


def distance(vectors: np.ndarray, split: str, rng: np.random.Generator) -> dict[str, Any]:
    """Distance from all real pictures of `train` or `test`, with a 95 % interval over the draw of our own pictures.

    The reverse percentile bootstrap of `fewstep.export.quality.frechet_interval`, the real side held fast.
    """
    reference = load_file(REFERENCE)
    mean, cov = reference[f"{split}_mean"], reference[f"{split}_cov"]
    found = frechet_gaussian(*gaussian(vectors), mean, cov)
    picks = (rng.integers(0, len(vectors), len(vectors)) for _ in range(DRAWS))
    low, high = np.quantile(
        [frechet_gaussian(*gaussian(vectors[i]), mean, cov) for i in picks], (0.025, 0.975)
    )
    return {"distance": round(found, 4), "interval": [round(2 * found - high, 4), round(2 * found - low, 4)]}


def measure(
    source: Path, count: int, sampler: str, steps: int, guidance: float | None, batch: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Distances of `count` pictures, and the first of them."""
    net, rng, began = features.load(), np.random.default_rng(0), time.process_time()
    vectors, shown = [], []
    for pixels in drawn(source, count, sampler, steps, guidance, batch):
        vectors.append(features_of(net, pixels))
        if sum(map(len, shown)) < SHEET_COLUMNS * 10:
            shown.append(pixels)
    spent = time.process_time() - began
    every = np.concatenate(vectors)
    scale = own_guidance(source) if guidance is None else guidance
    row = {"samples": count, "sampler": sampler, "steps": steps, "guidance": scale}
    row |= {split: distance(every, split, rng) for split in ("test", "train")}
    labels = torch.arange(count) % net.head.out_features
    with torch.no_grad():
        right = net.classified(torch.from_numpy(every).float()) == labels
    row |= {"recognised": round(float(right.float().mean()), 4), "core_seconds": round(spent, 1)}
    return row, np.concatenate(shown)[: SHEET_COLUMNS * 10]


def own_guidance(source: Path) -> float:
    """The scale a folder or a bundle is drawn with unless told otherwise."""
    if (source / "manifest.json").exists():
        with Pipeline.from_pretrained(source) as pipe:
            return pipe.manifest.guidance.scale
    return load(source).guidance.scale


def floors() -> dict[str, Any]:
    """What no model of ours goes below: real pictures against real ones, and the autoencoder's reconstructions."""
    net, rng = features.load(), np.random.default_rng(0)
    train = features.features_of(net, pictures("train")[0]).double().numpy()
    test_pixels = pictures("test")[0]
    test = features.features_of(net, test_pixels).double().numpy()
    save_file(
        {f"{name}_{what}": part for name, vectors in (("train", train), ("test", test))
         for what, part in zip(("mean", "cov"), gaussian(vectors))},
        REFERENCE,
    )  # fmt: skip
    order = rng.permutation(len(train))
    half, ten = len(train) // 2, len(test)
    vae = load(MODEL).original.vae
    with torch.no_grad():
        again = [
            vae.decode(vae.encode(as_input(part)).latent_dist.mode()).sample
            for part in test_pixels.split(250)
        ]
    rebuilt = features_of(net, as_pixels(torch.cat(again).numpy()))
    return {
        "variance": round(float(np.trace(gaussian(train)[1])), 4),
        "train_halves": round(frechet_distance(train[order[:half]], train[order[half:]]), 4),
        "train_10k_twice": round(frechet_distance(train[order[:ten]], train[order[ten : 2 * ten]]), 4),
        "test": {"train": distance(test, "train", rng)},
        "test_reconstructed": {split: distance(rebuilt, split, rng) for split in ("test", "train")},
    }


def sheet(images: np.ndarray) -> Image.Image:
    """A row a class, twenty pictures each."""
    classes = 10
    size = images.shape[1]
    canvas = np.full((classes * (size + 1) - 1, SHEET_COLUMNS * (size + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images):
        column, row = divmod(i, classes)
        canvas[row * (size + 1) :, column * (size + 1) :][:size, :size] = image
    return Image.fromarray(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="?", default=MODEL, help="a diffusers folder or a bundle")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--guidance", type=float, nargs="+", help="the model's own unless said")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument(
        "--floors", action="store_true", help="only real pictures; writes reference.safetensors"
    )
    parser.add_argument("--record", help="the name under which the result goes into evaluation.json")
    parser.add_argument("--sheet", type=Path, help="a .png file for the first 200 pictures of the last run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Any] = []
    if args.floors:
        rows.append(floors())
        print(json.dumps(rows[-1]), flush=True)
    else:
        for steps in args.steps:
            for guidance in args.guidance or [None]:
                row, images = measure(args.source, args.samples, args.sampler, steps, guidance, args.batch)
                rows.append(row)
                print(json.dumps(row), flush=True)
        if args.sheet:
            sheet(images).save(args.sheet, optimize=True)
    if args.record:
        file = MODEL / "evaluation.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {args.record: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
