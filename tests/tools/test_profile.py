"""Rates found again from calls that were made up by them, and from bundles."""

import pytest

from fewstep.runtime.errors import BadInput
from fewstep.targets import Profile, Rates, load_target
from fewstep.targets.profile import Demand
from fewstep.tools.profile import Measured, fit, fit_memory, host_profile, stages_of, write_profile

TRUE = Rates(
    convolution_gops=200,
    linear_gops=100,
    attention_gops=50,
    moved_gb_s=10,
    weights_gb_s=20,
    operator_us=3,
    call_us=30,
)
GUESS = Rates(
    convolution_gops=90,
    linear_gops=90,
    attention_gops=90,
    moved_gb_s=9,
    weights_gb_s=9,
    operator_us=9,
    call_us=9,
)
DEMANDS = [
    Demand(convolution=4e9, moved=1e7, weights=4e7, operators=300, alive=1e7, held=4e7),
    Demand(convolution=1e8, linear=3e9, weights=9e7, operators=80, alive=2e6, held=9e7),
    Demand(linear=1e9, attention=2e9, moved=3e7, operators=500, alive=3e7, held=1e7),
    Demand(convolution=1e7, moved=2e8, operators=40, alive=2e8, held=1e6),
    Demand(convolution=3e8, linear=3e8, weights=2e8, operators=900, alive=5e6, held=2e8),
    Demand(linear=1e7, moved=1e6, operators=2000, alive=1e6, held=1e6),
    Demand(convolution=1e6, operators=1),
    Demand(convolution=2e9, attention=5e8, moved=5e7, weights=1e7, operators=100, alive=6e7, held=1e7),
]


def taken(rates, demand):
    return Profile(rates={"float32": rates}).seconds(demand, "float32")


def test_rates_are_found_again_from_the_times_they_gave():
    found = fit([(demand, taken(TRUE, demand)) for demand in DEMANDS], GUESS, trust=1e-9)
    for name in (
        "convolution_gops",
        "linear_gops",
        "attention_gops",
        "moved_gb_s",
        "weights_gb_s",
        "operator_us",
    ):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name


def test_what_nothing_was_measured_of_keeps_what_was_known():
    found = fit([(Demand(convolution=1e9, calls=0), 0.01)], GUESS)
    assert found.linear_gops == GUESS.linear_gops
    assert found.convolution_gops == pytest.approx(100, rel=0.05)


def test_no_class_gets_a_negative_time():
    demands = [Demand(convolution=1e9, linear=1e9), Demand(convolution=2e9, linear=1e9)]
    found = fit([(demands[0], 0.02), (demands[1], 0.01)], GUESS, trust=1e-6)
    assert all(each >= 0 for each in found.seconds())


def test_memory_is_found_again_beside_the_process():
    known = Rates(held=1.5, alive=2.5, operator_kib=20, part_mib=7)
    rows = [(d, 6e7 + Profile(rates={"float32": known}).memory(d, "float32")) for d in DEMANDS]
    found = fit_memory(rows, Rates(held=1, alive=1, operator_kib=5, part_mib=3), 6e7, trust=1e-9)
    for name in ("held", "alive", "operator_kib", "part_mib"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), rel=0.02), name


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    from fewstep.runtime.bundle import Bundle

    return Bundle.open(tiny_bundle, check="size").manifest


def test_a_bundle_says_what_its_stages_ask_for(manifest):
    stages = stages_of(manifest)
    assert {stage: (name, table, count) for stage, (name, table, _, count) in stages.items()} == {
        "text": ("text_encoder", "float32", 2),
        "denoise": ("unet", "float32", 4),
        "decode": ("vae_decoder", "float32", 1),
    }
    demand = stages["denoise"][2]
    alone = Demand.from_json(manifest.speed["unet"]["demand"])
    assert demand.convolution == 2 * alone.convolution  # with guidance two samples go in one call
    assert demand.weights == alone.weights


def test_a_host_ten_times_as_slow_is_foreseen_ten_times_as_slow(manifest, tmp_path):
    known = load_target("laptop-cpu").profile
    stages = {
        stage: count * (10 * known.seconds(demand, table, 2) + known.between_us * 1e-6)
        for stage, (_, table, demand, count) in stages_of(manifest).items()
    }
    found = host_profile([Measured(manifest, stages, None)], threads=2)
    other = Demand(convolution=5e9, linear=1e9, attention=3e8, moved=1e8, weights=3e8, operators=500)
    assert found.seconds(other, "float32") == pytest.approx(10 * known.seconds(other, "float32", 2), rel=0.05)
    file = tmp_path / "host.toml"
    write_profile(found, file, ["by a test"])
    again = load_target("laptop-cpu").with_profile(file).profile
    assert again == found


def test_more_memory_than_foreseen_is_foreseen_next_time(manifest):
    stages = stages_of(manifest)
    seconds = dict.fromkeys(stages, 0.01)
    for peak in (200 << 20, 400 << 20):
        found = host_profile([Measured(manifest, seconds, peak)], threads=1)
        spent = sum(found.memory(demand, table) for _, table, demand, _ in stages.values())
        loading = max(demand.parsed for _, _, demand, _ in stages.values())
        assert found.base_mib * 2**20 + loading + spent == pytest.approx(peak, rel=0.01)


def test_bundles_of_before_cannot_be_fitted(manifest):
    from dataclasses import replace

    with pytest.raises(BadInput, match="do not say what their networks do.*export them again"):
        host_profile([Measured(replace(manifest, speed={}), {"denoise": 1.0}, None)], threads=1)


def test_bundles_of_two_engines_make_no_profile(manifest):
    from dataclasses import replace

    parts = {name: replace(spec, engine="openvino") for name, spec in manifest.parts.items()}
    with pytest.raises(BadInput, match="one engine"):
        host_profile(
            [Measured(manifest, {}, None), Measured(replace(manifest, parts=parts), {}, None)], threads=1
        )


def test_a_profile_is_of_the_bundles_own_plans(tmp_path):
    from fewstep.tools.bench import bench

    with pytest.raises(BadInput, match=r"--profile with --steps"):
        bench([tmp_path], output=None, steps=3, profile=tmp_path / "p.toml")
