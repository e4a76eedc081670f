"""Write the committed feature network as an image graph, which `fewstep compare --features` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar import SIZE
from features import load


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="an .onnx file")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        load(),
        (torch.rand(2, 3, SIZE, SIZE),),
        args.output,
        input_names=["picture"],
        output_names=["vector"],
        dynamic_shapes={"pictures": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
    )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
