"""Write the committed scorer as the folder that `fewstep compare --scorer` takes (tools/features.py has the format)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import scorer
import tokenizer
import torch
from common import SCORER
from torch import Tensor, nn


class Eye(nn.Module):
    """Pictures in 0..1 -> unit vectors; the network itself was trained on -1..1."""

    def __init__(self, model: scorer.Scorer) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: Tensor) -> Tensor:
        return self.model.embed_images(2 * picture - 1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="a folder; made if it is not there")
    args = parser.parse_args()
    model, captions = scorer.load()
    args.output.mkdir(parents=True, exist_ok=True)
    example = torch.rand(2, 3, 64, 64)
    batch = {"picture": {0: torch.export.Dim("batch")}}
    torch.onnx.export(
        Eye(model).eval(),
        (example,),
        args.output / "image.onnx",
        input_names=["picture"],
        output_names=["vector"],
        dynamic_shapes=batch,
        dynamo=True,
        external_data=False,
    )
    vectors = model.embed_tokens(torch.from_numpy(tokenizer.encode(captions).astype(np.int64)))
    np.save(args.output / "captions.npy", vectors.numpy())
    rows = json.loads((SCORER / "captions.json").read_text())
    data = {"fewstep_scorer": 1, "captions": captions, "prompts": [r["caption"] for r in rows if r["core"]]}
    (args.output / "scorer.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(captions)} captions, {vectors.shape[1]} features -> {args.output}")


if __name__ == "__main__":
    main()
