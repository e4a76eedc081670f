"""What is foreseen of a bundle, against the bundle, and what is said where it would not fit."""

from dataclasses import replace

import pytest

from fewstep.export.foresee import check_fits, foresee, misfits, planned, sketched
from fewstep.export.predict import scheme_of
from fewstep.model.load import sketch
from fewstep.runtime.errors import BadInput
from fewstep.targets import load_target


def limited(target="laptop-cpu", **limits):
    found = load_target(target)
    return replace(found, limits=replace(found.limits, **limits))


def seen(source, target, **asked):
    return foresee(*planned(sketched(source), target, **asked), target)


@pytest.fixture(scope="module")
def sd15():
    return sketch("arch:sd15")


def test_the_size_foreseen_is_that_of_the_bundle(tiny_sd, tiny_bundle):
    found = seen(tiny_sd, load_target("laptop-cpu"), steps=4).forecast
    for name, part in found.parts.items():
        size = sum(file.stat().st_size for file in (tiny_bundle / name).iterdir())
        assert part.size_bytes == pytest.approx(size, rel=0.15), name
    assert found.steps == 4
    assert {name: part.calls for name, part in found.parts.items()} == {
        "unet": 4,
        "vae_decoder": 1,
        "text_encoder": 2,
    }


def test_a_bundle_carries_what_its_parts_ask_for(tiny_sd, tiny_bundle):
    from fewstep.runtime.bundle import Bundle

    found = seen(tiny_sd, load_target("laptop-cpu"), steps=4).forecast
    speed = Bundle.open(tiny_bundle, check="size").manifest.speed
    assert speed["unet"]["demand"] == found.parts["unet"].demand.to_json()


def test_a_full_size_model_is_foreseen_without_its_weights(sd15):
    found = foresee(*planned(sd15, load_target("laptop-cpu"), steps=20), load_target("laptop-cpu"))
    float32, w8a8 = found.forecast, found.others["w8a8"]
    assert float32.size_bytes == pytest.approx(
        4 * 1_032_071_643, rel=0.01
    )  # every parameter of its three parts
    assert w8a8.size_bytes == pytest.approx(0.26 * float32.size_bytes, rel=0.04)  # docs/how-to-quantize.md
    assert w8a8.picture_s < float32.picture_s
    assert float32.low_memory_bytes < float32.memory_bytes
    assert found.wrong == []


def test_what_does_not_fit_is_said_with_the_recipe_that_does(sd15):
    target = limited(peak_memory_mib=3072)
    found = foresee(*planned(sd15, target), target)
    [wrong] = found.wrong
    assert "the memory does not fit" in wrong
    assert "of 3.0 GiB" in wrong
    assert "--quantize w8a8 fits" in found.remedy
    with pytest.raises(
        BadInput, match=r"does not fit: .* of 3\.0 GiB.*the limits of laptop-cpu.*--quantize w8a8 fits"
    ):
        check_fits(found)
    quantized = target.with_pass("quantize", scheme="w8a8")
    check_fits(foresee(*planned(sd15, quantized), quantized))  # float32 weights are not what is judged


def test_where_nothing_fits_the_distance_is_said(sd15):
    target = limited(peak_memory_mib=200, part_mib=100)
    found = foresee(*planned(sd15, target), target)
    assert any(wrong.startswith("unet does not fit: 3.2 GiB of 100 MiB a part") for wrong in found.wrong)
    assert found.remedy.startswith("take a smaller model: --quantize")
    assert "does not fit either" in found.remedy


def test_a_part_that_fits_quantized_is_no_misfit(tiny_sd):
    target = limited(part_mib=2)
    assert any("unet does not fit" in wrong for wrong in misfits(seen(tiny_sd, target).forecast, target))
    assert misfits(seen(tiny_sd, target).others["w8a8"], target) == []


def test_fixed_sizes_take_one_sample_a_call(tiny_sd):
    guided = seen(tiny_sd, load_target("laptop-cpu"), steps=4).forecast.parts["unet"]
    fixed = seen(tiny_sd, limited(dynamic_shapes=False), steps=4).forecast.parts["unet"]
    assert (guided.calls, fixed.calls) == (4, 8)
    assert fixed.call_s < guided.call_s


def test_split_doublings_are_less_work_on_a_sketch(tiny_sd):
    target = load_target("laptop-cpu")
    split = replace(target, recipe=replace(target.recipe, passes=("split_upsampling",)))
    before, after = (seen(tiny_sd, each).forecast.parts["vae_decoder"].demand for each in (target, split))
    assert after.convolution < before.convolution
    assert after.held > before.held  # 16 weights in place of 9


def test_each_part_has_the_scheme_the_pass_gives_it(sd15):
    target = load_target("laptop-cpu").with_pass("quantize", scheme="w4a8", keep=["unet.*"])
    schemes = {part.name: scheme_of(part.name, sd15, target) for part in sd15}
    assert schemes["unet"][0].weights == 4
    assert schemes["unet"][1] == ("unet.*",)
    assert (schemes["vae_decoder"][0].weights, schemes["vae_decoder"][0].inputs) == (8, 8)
    assert schemes["text_encoder"][0].inputs is None
    assert scheme_of("unet", sd15, load_target("laptop-cpu")) == (None, ())


def test_passes_that_change_networks_are_named_as_not_counted(tiny_sd):
    target = load_target("laptop-cpu").with_pass("cut_blocks")
    assert seen(tiny_sd, target).forecast.not_counted == ("cut_blocks",)


def test_a_network_that_looks_at_values_is_not_foreseen(pixels):
    class Looks(type(pixels.parts[pixels.denoiser].module)):
        def forward(self, sample, timestep):
            return sample if float(sample.sum()) > 0 else -sample

    part = pixels.parts[pixels.denoiser]
    part.module.__class__ = Looks
    assert foresee(*planned(pixels, load_target("laptop-cpu")), load_target("laptop-cpu")) is None
