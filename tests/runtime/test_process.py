"""Forward processes against their closed forms."""

import numpy as np
import pytest

from fewstep.runtime import EDM, DiscreteVP, RectifiedFlow
from fewstep.runtime.errors import BadInput
from fewstep.runtime.process import lam, process_from_json

SD15 = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
PROCESSES = [SD15, DiscreteVP.from_betas(np.linspace(1e-4, 0.02, 1000)), EDM(), RectifiedFlow()]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_clean_at_zero(process):
    assert process.alpha(0.0) == 1
    assert process.sigma(0.0) == 0


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_t_of_lam_inverts_lam(process):
    t = np.linspace(process.t_max * 1e-3, process.t_max * 0.999, 301)
    np.testing.assert_allclose(process.t_of_lam(lam(process, t)), t, rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_lam_falls_with_t(process):
    assert np.all(np.diff(lam(process, np.linspace(process.t_max * 1e-4, process.t_max, 500))) < 0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_json_round_trip_keeps_every_digit(process):
    again = process_from_json(process.to_json())
    t = np.linspace(0, process.t_max, 77)
    np.testing.assert_array_equal(again.alpha(t), process.alpha(t))
    np.testing.assert_array_equal(again.timestep(t[1:]), process.timestep(t[1:]))


def test_discrete_vp_preserves_variance():
    t = np.linspace(0, 1000, 1001)
    np.testing.assert_allclose(SD15.alpha(t) ** 2 + SD15.sigma(t) ** 2, 1, rtol=1e-12)


def test_discrete_levels_sit_one_after_their_index():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(SD15.alpha(np.arange(1, 1001)) ** 2, np.cumprod(1 - betas), rtol=1e-12)
    assert SD15.timestep(1000) == 999


def test_cosine_schedule_ends_with_the_capped_beta():
    cosine = DiscreteVP.from_schedule("squaredcos_cap_v2", 0, 0, 1000)
    ratio = cosine.alphas_cumprod[-1] / cosine.alphas_cumprod[-2]
    assert ratio == pytest.approx(1 - 0.999)


def test_zero_terminal_snr_has_no_negative_infinity_in_alpha():
    betas = np.append(np.linspace(1e-4, 0.02, 999), 1.0)
    assert DiscreteVP.from_betas(betas).alpha(1000.0) < 1e-100


@pytest.mark.parametrize("betas", [[0.1], [0.0, 0.1], [0.1, 1.5], [[0.1, 0.2]], [0.1, np.nan]])
def test_betas_outside_zero_and_one_are_refused(betas):
    with pytest.raises(BadInput, match="betas"):
        DiscreteVP.from_betas(betas)


def test_an_unknown_process_names_the_known_ones():
    with pytest.raises(BadInput, match="discrete_vp, edm or rectified_flow"):
        process_from_json({"kind": "brownian"})


def test_an_unknown_beta_schedule_names_the_known_ones():
    with pytest.raises(BadInput, match="scaled_linear"):
        DiscreteVP.from_schedule("sigmoid", 0.1, 0.2, 10)
