"""Run by this machine's Python and by the emulated one: noise and a picture of a bundle, into a .npz file.

python arm64_draw.py BUNDLE OUT
"""

import json
import platform
import sys

import numpy as np

from fewstep.runtime import Bundle, Pipeline
from fewstep.runtime.noise import randn

bundle, out = sys.argv[1:]
with Pipeline(Bundle.open(bundle)) as pipeline:
    drawn = pipeline("a red apple", num_inference_steps=4, seed=20, output_type="np")
np.savez(
    out,
    image=drawn.images,
    noise=np.stack([randn((4, 16, 16), seed) for seed in (0, 1, 42, 2**63)]),
)
print(json.dumps({"machine": platform.machine(), "numpy": np.__version__}))
