"""The golden latent notices what a hash cannot: an engine that computes something else."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from fewstep.runtime import EDM
from fewstep.runtime.errors import BundleError
from fewstep.runtime.golden import TOLERANCES, compare_golden, golden_latent


@dataclass
class Fake:
    """A pipeline whose latent is a fixed function of its seed, off by `error`."""

    error: float = 0.0
    shape: tuple[int, ...] = (1, 4, 8, 8)

    precision: str = "float32"
    plans: tuple[str, ...] = ()

    @property
    def manifest(self):
        parts = {"unet": SimpleNamespace(precision=self.precision), "x": SimpleNamespace(precision="float32")}
        return SimpleNamespace(
            tokenizer=object(),
            classes=None,
            sampler="ddim",
            process=EDM().to_json(),
            parts=parts,
            plans=self.plans,
        )

    def __call__(
        self, prompt, *, class_labels, num_inference_steps, seed, sampler, plan, output_type, observation
    ):
        assert observation is None
        assert output_type == "latent"
        assert plan is None or (num_inference_steps is None and sampler is None)
        num_inference_steps = int(plan.removeprefix("steps_")) if plan else num_inference_steps
        x = np.random.default_rng([seed, num_inference_steps, len(prompt)]).standard_normal(self.shape)
        return SimpleNamespace(images=(x + self.error).astype(np.float32))


def test_a_replay_on_the_same_engine_differs_by_the_stored_digits_only():
    assert compare_golden(Fake(), golden_latent(Fake())) < 1e-6


def test_a_plan_of_the_bundle_is_drawn_where_there_is_one_so_that_any_runtime_can():
    golden = golden_latent(Fake(plans=("default", "steps_2")))
    assert (golden["plan"], golden["steps"], golden["sampler"]) == ("steps_2", None, None)
    assert compare_golden(Fake(), golden) < 1e-6


def test_a_record_from_before_there_were_such_plans_is_replayed():
    golden = golden_latent(Fake())
    del golden["plan"]
    assert compare_golden(Fake(), golden) < 1e-6


@pytest.mark.parametrize("error", [0.1, np.nan, np.inf])
def test_a_wrong_engine_is_beyond_the_tolerance(error):
    with np.errstate(invalid="ignore"):
        assert compare_golden(Fake(error), golden_latent(Fake())) > TOLERANCES["float32"]


def test_a_bundle_in_half_precision_leaves_room_for_a_host_without():
    assert golden_latent(Fake())["tolerance"] == TOLERANCES["float32"]
    assert golden_latent(Fake(precision="bfloat16"))["tolerance"] == TOLERANCES["bfloat16"]


def test_another_shape_is_named():
    with pytest.raises(BundleError, match=r"\[1, 4, 4, 4\].*\[1, 4, 8, 8\]"):
        compare_golden(replace(Fake(), shape=(1, 4, 4, 4)), golden_latent(Fake()))


@pytest.mark.parametrize("damage", [{}, {"values": "x"}, {"values": [1.0]}, {"steps": None}])
def test_a_damaged_record_is_a_bundle_error(damage):
    golden = {**golden_latent(Fake()), **damage} if damage else {}
    with pytest.raises(BundleError, match=r"quality\.golden"):
        compare_golden(Fake(), golden)


def test_it_is_small_enough_for_a_manifest():
    import json

    assert len(json.dumps(golden_latent(Fake(shape=(1, 4, 64, 64))))) < 2500
