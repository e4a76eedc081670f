"""A profile's arithmetic, and what its tables in TOML may say."""

import re

import pytest

from fewstep.runtime.errors import BadInput
from fewstep.targets import FOLDER, Profile, Rates, known_targets, load_target, read_target
from fewstep.targets.profile import CLASSES, Demand

RATES = Rates(
    convolution_gops=100, moved_gb_s=10, weights_gb_s=20, operator_us=2, call_us=50, held=1.5, alive=2
)
DEMAND = Demand(convolution=1e9, moved=1e8, weights=4e7, operators=100, alive=1e6, held=4e7)


def test_a_call_takes_the_sum_of_its_shares():
    profile = Profile(rates={"float32": RATES})
    assert profile.seconds(DEMAND, "float32") == pytest.approx(0.01 + 0.01 + 0.002 + 200e-6 + 50e-6)
    shares = profile.shares(DEMAND, "float32")
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) in ("convolution", "moved")
    assert "linear" not in shares


def test_two_samples_ask_for_twice_the_products_and_the_same_weights():
    both = DEMAND.at(2)
    assert (both.convolution, both.moved, both.alive) == (2e9, 2e8, 2e6)
    assert (both.weights, both.operators, both.calls, both.held) == (4e7, 100, 1, 4e7)


def test_further_cores_add_their_share():
    profile = Profile(cores=4, parallel=0.5, rates={"float32": RATES})
    assert profile.seconds(DEMAND, "float32", 1) == pytest.approx(2.5 * profile.seconds(DEMAND, "float32"))


def test_memory_is_weights_activations_kernels_and_the_part():
    profile = Profile(rates={"float32": Rates(held=1.5, alive=2, operator_kib=4, part_mib=3)})
    assert profile.memory(DEMAND, "float32") == 1.5 * 4e7 + 2e6 + 4096 * 100 + 3 * 2**20


def test_rates_are_those_of_the_seconds_they_take():
    assert Rates.of_seconds(RATES.seconds(), RATES) == RATES
    assert len(RATES.seconds()) == len(CLASSES) == len(DEMAND.amounts())


def test_a_demand_survives_json():
    assert Demand.from_json(DEMAND.to_json()) == DEMAND
    assert Demand.from_json({**DEMAND.to_json(), "later": 3}) == DEMAND


def test_a_precision_without_rates_goes_by_the_nearest():
    profile = Profile(rates={"float16": RATES})
    assert profile.of("int8") == profile.of("float32") == RATES


@pytest.mark.parametrize("name", known_targets())
def test_every_target_has_rates_and_every_number_a_source(name):
    target = load_target(name)
    assert target.recipe.precision in target.profile.rates
    assert target.profile.base_mib > 0
    text = (FOLDER / f"{name}.toml").read_text()
    for line in text[text.index("[profile]") :].splitlines():
        assert "=" not in line or line.startswith("#") or re.search(r"# \S", line), (
            f"{line}: where does it come from?"
        )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("[profile]\ncores = 0\n", "cores 0"),
        ("[profile]\nparallel = 1.5\n", "parallel 1.5"),
        ("[profile]\nspeed = 3\n", r"\[profile\] has unknown keys: speed"),
        ("[profile.float8]\nheld = 1.0\n", r"\[profile\] has unknown keys: float8"),
        (
            "[profile.float32]\nheld = -1.0\n",
            r"\[profile.float32\] held is -1.0; expected a number, not below 0",
        ),
        ("[profile.float32]\nmoved_gb_s = nan\n", "moved_gb_s is nan"),
        ("[profile.float32]\nmoved_gb_s = 'fast'\n", r"moved_gb_s is 'fast'; expected float"),
        ("profile = 3\n", "expected a table"),
    ],
)
def test_a_wrong_profile_is_refused_by_table_and_key(lines, said, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(lines)
    with pytest.raises(BadInput, match=said):
        load_target("laptop-cpu").with_profile(file)


def test_a_profile_replaces_what_it_names_and_nothing_else(tmp_path):
    file = tmp_path / "host.toml"
    file.write_text("[profile]\ncores = 16\n[profile.float32]\nconvolution_gops = 7\n")
    target = load_target("laptop-cpu")
    changed = target.with_profile(file).profile
    assert (changed.cores, changed.of("float32").convolution_gops) == (16, 7.0)
    assert changed.of("float32").held == target.profile.of("float32").held
    assert changed.of("int8") == target.profile.of("int8")
    file.write_text("[limits]\npart_mib = 3\n")
    with pytest.raises(BadInput, match="top level has unknown keys: limits"):
        target.with_profile(file)


def test_a_target_without_a_profile_is_complete(tmp_path):
    file = tmp_path / "mine.toml"
    text = (FOLDER / "laptop-cpu.toml").read_text()
    file.write_text(text[: text.index("[profile]")])
    assert read_target(file).profile == Profile()
