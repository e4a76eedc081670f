"""A cut model is an ordinary one to the exporters."""

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.export import export_bundle
from fewstep.model import load
from fewstep.model.structure import without

REMOVED = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "mid_block.attentions.0",
    "mid_block.resnets.0",
    "up_blocks.0.resnets.0",  # its skip path is a convolution
)


@pytest.mark.parametrize(("target", "least_db"), [("laptop-cpu", 60), ("intel-cpu", 30)])
def test_a_cut_model_exports_through_the_gate(target, least_db, tiny_sd, tmp_path):
    model = load(tiny_sd)
    smaller = replace(model, parts={**model.parts, "unet": without(model.parts["unet"], REMOVED)})
    *_, done = export_bundle(smaller, target, tmp_path / "bundle", steps=2, measure_speed=False)
    assert done.manifest.quality["parts"]["unet"]["snr_db"] > least_db  # float32, and bfloat16
