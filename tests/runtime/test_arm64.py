"""The ONNX Runtime bundle on ARM64 Linux under emulation: fewstep.runtime itself draws the picture there.

It proves results, and says nothing of speed. `make test-arm64` fetches what it needs and runs it.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")

from fewstep.export import export_bundle

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models" / "emoji-64"
spec = importlib.util.spec_from_file_location("arm64", HERE / "arm64.py")
arm64 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(arm64)

pytestmark = pytest.mark.arm64


@pytest.fixture(scope="module", autouse=True)
def prepared():
    assert arm64.ready(), f"no ARM64 Linux in {arm64.folder()}: run python tests/runtime/arm64.py first"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for name, scheme in (("float32", None), ("int8", "w8a8")):
        for _ in export_bundle(MODEL, "laptop-cpu", folder / name, quantize=scheme, measure_speed=False):
            pass
    return folder


def both(bundle, folder):
    """What this machine and the emulated one draw."""
    script, found = HERE / "arm64_draw.py", {}
    done = subprocess.run(
        [sys.executable, script, bundle, folder / "here.npz"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = arm64.python(script, bundle, folder / "there.npz")
    assert said.returncode == 0, said.stderr[-2000:]
    assert json.loads(said.stdout)["machine"] == "aarch64"
    for name in ("here", "there"):
        with np.load(folder / f"{name}.npz") as arrays:
            found[name] = dict(arrays)
    return found["here"], found["there"]


def levels(image):
    return np.round(255 * image).astype(int)


def test_noise_is_bit_identical_and_no_pixel_of_a_float32_picture_differs_by_more_than_a_level(
    bundles, tmp_path
):
    here, there = both(bundles / "float32", tmp_path)
    assert here["noise"].dtype == there["noise"].dtype == np.float32
    assert here["noise"].tobytes() == there["noise"].tobytes()
    assert np.abs(levels(here["image"]) - levels(there["image"])).max() <= 1
    assert np.abs(here["image"] - there["image"]).max() < 1e-4  # measured: 2e-6


def test_an_int8_picture_differs_by_no_more_than_its_rounding_does(bundles, tmp_path):
    """Its kernels round sums in another order: codes that flip are errors like those of the rounding itself."""
    here, there = both(bundles / "int8", tmp_path)
    assert here["noise"].tobytes() == there["noise"].tobytes()
    error = float(np.mean((here["image"] - there["image"]) ** 2))
    assert -10 * np.log10(error) > 34  # measured: 40.3 dB; the int8 picture is 44 dB from float32's
