"""What the scripts of this folder share: settings, paths and the pictures of CIFAR-10, decoded once."""

from __future__ import annotations

import io
import os
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for common.py; at the end, since names of files here and there are alike
MODEL = HERE.parents[1] / "cifar-dit"
FEATURES = HERE.parents[1] / "cifar-dit-features"
SIZE = 32


def config() -> dict[str, Any]:
    """The settings of config.toml."""
    return tomllib.loads((HERE / "config.toml").read_text())


def work_dir() -> Path:
    """Checkpoints and caches live here, never in the repository."""
    path = Path(os.environ.get("CIFAR_TRAIN_DIR", "/tmp/cifar-train"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def classes() -> list[str]:
    """The ten names, sorted; a label is the place in this list."""
    return list(_load("test")["classes"])


def pictures(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`train` or `test`: uint8 [n, 3, 32, 32] and int64 labels [n], as decode() left them."""
    data = _load(split)
    return torch.from_numpy(data["pictures"]), torch.from_numpy(data["labels"])


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> -1..1, as the autoencoder takes pictures."""
    return pixels.float().div_(127.5).sub_(1)


def decode(folder: Path) -> None:
    """Read cifar10-train.zip and cifar10-test.zip, JPEG pictures in one folder a class, into the work folder."""
    for split in ("train", "test"):
        target = work_dir() / f"{split}.npz"
        if target.exists():
            continue
        with zipfile.ZipFile(folder / f"cifar10-{split}.zip") as archive:
            names = sorted(n for n in archive.namelist() if n.endswith((".jpg", ".png")))
            folders = [PurePosixPath(n).parent.name for n in names]
            found = sorted(set(folders))
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in names])
        if pixels.shape[1:] != (SIZE, SIZE, 3):
            raise SystemExit(f"pictures of {pixels.shape[1:]}, expected {(SIZE, SIZE, 3)}")
        labels = np.array([found.index(f) for f in folders], np.int64)
        partial = target.with_suffix(".partial.npz")
        np.savez(
            partial,
            pictures=np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)),
            labels=labels,
            classes=np.array(found),
        )
        os.replace(partial, target)


def _load(split: str) -> Any:
    path = work_dir() / f"{split}.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing; run `python cifar.py --data FOLDER` first")
    return np.load(path)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=decode.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two zip files")
    decode(parser.parse_args().data)
    for split in ("train", "test"):
        print(split, tuple(pictures(split)[0].shape), ", ".join(classes()))


if __name__ == "__main__":
    main()
