import pytest

from fewstep.export import export_bundle
from fewstep.export.preflight import BASE_BYTES, check_room, estimate, gib, memory_available
from fewstep.runtime.errors import BadInput


def test_an_estimate_grows_with_the_weights_and_covers_them():
    small, large = estimate({"unet": 1 << 20}), estimate({"unet": 4 << 30, "text_encoder": 1 << 29})
    assert small.memory_bytes > BASE_BYTES
    assert large.memory_bytes > small.memory_bytes
    assert large.bundle_bytes > (4 << 30) + (1 << 29)
    assert large.disk_bytes >= large.bundle_bytes + (4 << 30)


def test_this_machine_has_memory_and_room_for_a_small_model(tmp_path):
    assert memory_available() > 0
    check_room(estimate({"unet": 1 << 10}), tmp_path / "not" / "yet" / "there")


def test_sizes_are_readable():
    assert gib(3 << 30) == "3.0 GiB"
    assert gib(5 << 20) == "5 MiB"


@pytest.mark.parametrize("target", ["iphone-15-pro", "mac-m-series", "cpu-aoti"])
def test_integers_for_an_engine_that_takes_none_are_refused_before_the_model_is_read(target, tmp_path):
    events = export_bundle("no such model", target, tmp_path / "b", quantize="w8a8")
    with pytest.raises(BadInput, match=f"integers for {target}.*leave --quantize out"):
        list(events)
