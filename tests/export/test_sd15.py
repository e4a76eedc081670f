"""The full Stable Diffusion 1.5 architecture. Minutes and gigabytes: pytest -m slow tests/export/test_sd15.py"""

import pytest

from fewstep.export import export_bundle
from fewstep.runtime import Pipeline
from fewstep.runtime.bundle import Bundle

UNET_BYTES = 4 * 859_520_964
LIMIT = 2.5
"""Times the U-Net's float32 weights, for every process of the export."""


@pytest.mark.slow
def test_sd15_exports_within_memory_passes_the_gate_and_draws(tmp_path):
    *_, done = export_bundle("arch:sd15", "laptop-cpu", tmp_path / "sd15", measure_speed=False)
    for process, peak in done.peak_rss_bytes.items():
        assert peak <= LIMIT * UNET_BYTES, process
    assert (done.path / "unet/model.onnx_data").stat().st_size > 2**31
    manifest = Bundle.open(done.path).manifest
    assert manifest.quality["parts"].keys() == manifest.parts.keys()
    assert manifest.quality["pipeline"]["psnr_db"] >= 50
    with Pipeline.from_pretrained(done.path, low_memory=True, check="size") as pipeline:
        images = pipeline("a cat", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 512, 512, 3)
