"""The teacher's step of consistency methods: exact where data is one point, with the right noise elsewhere."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.distill.solver import Solver, teacher_step  # noqa: E402
from fewstep.model.training import Denoising  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402

from .analytic import MEAN, PROCESS, WIDTH, Affine, exact_end, model_of, module, samples_of, turn_of  # noqa: E402

T, S = 600.0, 400.0


def times(batch):
    return torch.full((batch,), T), torch.full((batch,), S)


def step(solver, width=WIDTH, batch=4096):
    """x_t of the right distribution, and where the solver leads."""
    model = model_of(Affine(width=width))
    denoising, samples = Denoising.of(model), samples_of(model, batch, width=width)
    turn = turn_of(samples, module(model), batch)
    t, s = times(batch)
    x = denoising.noised(turn.batch.x0, turn.normal(turn.batch.x0), t)
    return x, teacher_step(turn, denoising, module(model), x, t, s, {}, 1.0, solver)


@pytest.mark.parametrize("substeps", [1, 3])
def test_data_that_is_one_point_is_reached_exactly(substeps):
    x, end = step(Solver(substeps=substeps), width=0.0)
    alpha, sigma = (float(of(T)) for of in (PROCESS.alpha, PROCESS.sigma))
    noise = (x - alpha * MEAN) / sigma
    torch.testing.assert_close(
        end, float(PROCESS.alpha(S)) * MEAN + float(PROCESS.sigma(S)) * noise, rtol=0, atol=1e-5
    )


def test_more_substeps_come_nearer_to_the_flow():
    errors = []
    for substeps in (1, 4, 16):
        x, end = step(Solver(substeps=substeps))
        wanted = exact_end(x, T)
        got = exact_end(end, S)  # both brought to clean data along the exact flow
        errors.append((got - wanted).abs().max().item())
    assert errors[1] < 0.35 * errors[0]
    assert errors[2] < 0.35 * errors[1]


def test_noise_on_the_way_keeps_the_spread_and_forgets_where_it_came_from():
    alpha, sigma = (float(of(S)) for of in (PROCESS.alpha, PROCESS.sigma))
    wanted = np.hypot(alpha * WIDTH, sigma)
    tied = []
    for eta in (0.0, 0.5, 1.0):
        x, end = step(Solver(eta=eta, substeps=16))
        assert abs(end.std().item() / wanted - 1) < 0.02
        tied.append(np.corrcoef(x.flatten(), end.flatten())[0, 1])
    assert tied[0] > 0.9999
    assert tied[0] > tied[1] + 0.02 > tied[2] + 0.04


def test_one_ancestral_step_has_the_variance_of_the_posterior():
    x, end = step(Solver(eta=1.0), width=0.0)
    (at, a), (st, s) = ([float(of(time)) for time in (T, S)] for of in (PROCESS.alpha, PROCESS.sigma))
    variance = s**2 / st**2 * (st**2 - (at / a * s) ** 2)  # DDPM, equation 7
    mean = a * MEAN + np.sqrt(s**2 - variance) * (x - at * MEAN) / st
    assert abs((end - mean).var().item() / variance - 1) < 0.02


@pytest.mark.parametrize("fields", [{"eta": 1.5}, {"eta": -0.1}, {"substeps": 0}])
def test_a_solver_that_cannot_be_is_refused(fields):
    with pytest.raises(BadInput, match="of a solver"):
        Solver(**fields)
