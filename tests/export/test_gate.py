import math

import numpy as np
import pytest

from fewstep.export import gate
from fewstep.runtime.errors import GateFailed
from fewstep.targets import load_target

TARGET = load_target("laptop-cpu")
RIGHT = {"out": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}


def compared(got):
    return gate.compare("unet", ["batch 3"], [RIGHT], [got])


def test_equal_outputs_are_as_good_as_can_be():
    quality = compared(RIGHT)
    assert (quality.relative_error, quality.snr_db, quality.max_abs_error) == (0, gate.MAX_DB, 0)
    gate.judge_part("unet", quality, TARGET)


def test_the_relative_error_is_the_ratio_of_rms_and_its_decibels():
    quality = compared({"out": RIGHT["out"] * np.float32(1.01)})
    assert quality.relative_error == pytest.approx(0.01, rel=1e-4)
    assert quality.snr_db == pytest.approx(40, abs=0.01)
    assert quality.max_abs_error == pytest.approx(0.01, rel=1e-3)
    assert quality.worst == "out at batch 3"


def test_below_the_floor_the_part_the_output_the_figure_and_the_remedy_are_named():
    quality = compared({"out": RIGHT["out"] * np.float32(1.01)})
    with pytest.raises(
        GateFailed,
        match=r"unet: out at batch 3 .*1\.00e-02 .*40\.0 dB.*expected at most 0\.0001.*fix: .*fuse_attention",
    ) as caught:
        gate.judge_part("unet", quality, TARGET)
    assert caught.value.exit_code == 5


def test_nan_in_the_export_is_counted_and_named():
    got = RIGHT["out"].copy()
    got[1, 1:3] = np.nan, np.inf
    with pytest.raises(
        GateFailed, match=r"unet: out of shape \(3, 4\) with 2 NaN or infinite values at batch 3"
    ):
        compared({"out": got})


def test_nan_in_the_original_is_the_models_fault():
    with pytest.raises(GateFailed, match="the original's out holds NaN"):
        gate.compare("unet", ["batch 3"], [{"out": np.full(3, np.nan)}], [{"out": np.zeros(3)}])


def test_another_shape_is_refused():
    with pytest.raises(GateFailed, match=r"out of shape \(4, 3\).*expected finite values of shape \(3, 4\)"):
        compared({"out": RIGHT["out"].T})


def test_the_worst_of_several_cases_is_the_one_that_counts():
    wrong = {"out": RIGHT["out"] + np.float32(0.1)}
    quality = gate.compare("unet", ["a", "b", "c"], [RIGHT] * 3, [RIGHT, wrong, RIGHT])
    assert quality.worst == "out at b"
    assert quality.cases == ("a", "b", "c")


def test_psnr_of_a_known_error():
    image = np.zeros((1, 4, 4, 3))
    assert gate.psnr_db(image, image + 0.1) == pytest.approx(20)
    assert gate.psnr_db(image, image) == gate.MAX_DB
    assert gate.psnr_db(image, np.full_like(image, math.nan)) == -gate.MAX_DB


def test_images_below_the_floor_are_refused():
    with pytest.raises(
        GateFailed, match=r"49\.0 dB \(ddim, 4 steps\); expected at least 50 dB; fix: .*--sampler"
    ):
        gate.judge_pipeline(49.0, TARGET, "ddim, 4 steps")
    gate.judge_pipeline(50.0, TARGET, "ddim, 4 steps")


@pytest.mark.parametrize("few", [True, False])
def test_cases_cover_two_shapes_two_batches_and_times_at_both_ends(few, pixels):
    tried = gate.cases(pixels.parts["unet"], few=few)
    shapes = {feeds["sample"].shape for feeds in tried.values()}
    assert len({shape[0] for shape in shapes}) >= 2
    assert len({shape[2:] for shape in shapes}) >= 2
    times = {float(t) for feeds in tried.values() for t in feeds["timestep"]}
    assert {0.0, 999.0} <= times
    assert len(times) >= 3
    for name, feeds in tried.items():
        assert f"batch {feeds['sample'].shape[0]}" in name
