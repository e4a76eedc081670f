"""A restoration network becomes a bundle that takes what is to be restored."""

import numpy as np
import pytest
import torch

from fewstep.runtime import Pipeline
from fewstep.runtime.conditional import ResidualShift
from fewstep.runtime.errors import BadInput, CheckpointError
from fewstep.runtime.golden import compare_golden


class Restorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.outward = torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.Conv2d(8, 1, 3, padding=1)
        self.times = torch.nn.Linear(1, 8)

    def forward(self, sample, timestep, observation):
        hidden = (
            self.inward(torch.cat([sample, observation], dim=1))
            + self.times(timestep[:, None])[..., None, None]
        )
        return observation + 0.1 * self.outward(torch.nn.functional.silu(hidden))


def model():
    from fewstep.model import Model

    return Model.from_module(
        Restorer(), name="restorer", sample_shape=(1, 8, 8), process=ResidualShift(), prediction="sample"
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from fewstep.export import export_bundle

    out = tmp_path_factory.mktemp("restorer") / "bundle"
    *_, done = export_bundle(model(), "laptop-cpu", out, steps=4, measure_speed=False)
    return done


def test_the_bundle_runs_resshifts_four_steps_on_what_it_is_given(bundle):
    y = np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32)
    assert bundle.manifest.plans["default"]["sampler"] == "reverse_chain"
    with Pipeline.from_pretrained(bundle.path) as pipeline:
        assert compare_golden(pipeline, pipeline.manifest.quality["golden"]) < 1e-3
        seen = []
        out = pipeline(
            observation=y, seed=4, output_type="latent", callback_on_step_end=lambda *a: seen.append(a[2])
        )
        with pytest.raises(BadInput, match="observation first"):
            pipeline(seed=4)
    assert seen == [3, 2, 1, 0]
    # the same by hand: torch's network in the published loop
    from fewstep.runtime import Noise

    network, process, stream = Restorer().eval(), ResidualShift(), Noise(4)
    eta = process.gamma(np.arange(5.0))
    x = y + process.sigma(4.0) * stream.randn((1, 8, 8))
    for t in (4, 3, 2, 1):
        scaled = torch.from_numpy((x / np.sqrt(4 * eta[t] + 1)).astype(np.float32))
        with torch.no_grad():
            x0 = network(scaled, torch.tensor([t - 1.0]), torch.from_numpy(y)).numpy()
        x = eta[t - 1] / eta[t] * x + (1 - eta[t - 1] / eta[t]) * x0
        if t > 1:
            x = x + np.sqrt(4 * eta[t - 1] / eta[t] * (eta[t] - eta[t - 1])) * stream.randn((1, 8, 8))
    np.testing.assert_allclose(out.images, x, atol=1e-4)


def test_a_network_that_takes_no_observation_is_told_how_it_is_called():
    from fewstep.model import Model

    with pytest.raises(CheckpointError, match="observation"):
        Model.from_module(
            torch.nn.Conv2d(1, 1, 1),
            name="x",
            sample_shape=(1, 8, 8),
            process=ResidualShift(),
            prediction="sample",
        )
