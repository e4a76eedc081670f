"""What every test of the toolchain works on: a Stable-Diffusion-1.x checkpoint of a million random weights."""

import pytest


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A diffusers folder. Copy it before changing anything in it."""
    pytest.importorskip("diffusers", reason="needs the export extra")
    from fewstep.model.builders import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("checkpoint") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_sd, tmp_path_factory):
    """The bundle that checkpoint exports to, with a default plan of 4 steps. Copy it before changing it."""
    from fewstep.export import export_bundle

    out = tmp_path_factory.mktemp("bundle") / "tiny-sd"
    *_, done = export_bundle(tiny_sd, "laptop-cpu", out, steps=4, measure_speed=False)
    return done.path
