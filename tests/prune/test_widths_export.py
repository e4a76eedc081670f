"""What is left after a cut is a plain network: it exports like any other."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.export import gate  # noqa: E402
from fewstep.export import onnx as lowering  # noqa: E402
from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model import Context, load  # noqa: E402
from fewstep.model.trajectories import run_part, trajectories  # noqa: E402
from fewstep.prune.widths import CutWidths  # noqa: E402
from fewstep.targets import load_target  # noqa: E402


def result(work):
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def context(model, tmp_path):
    return Context(load_target("laptop-cpu"), plan_of(model, "auto", 2), tmp_path, tmp_path / "store")


def exported_error(part, folder):
    spec = lowering.write(lowering.trace(part), folder, opset=23)
    tried = gate.cases(part, few=True)
    got = gate.run_graph(folder / "model.onnx", spec, list(tried.values()))
    right = [run_part(part, case) for case in tried.values()]
    return gate.compare(part.name, list(tried), right, got).relative_error


def test_a_cut_unet_exports_to_what_torch_computes(tiny_sd, tmp_path):
    model = load(tiny_sd)
    job = CutWidths(ratio=0.4, criterion="magnitude", refit=False)
    part = result(job(model, context(model, tmp_path))).parts["unet"]
    assert exported_error(part, tmp_path) < 1e-4


def dit_model():
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    from fewstep.model.families import from_pipeline

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(0, 0.2 if tensor.ndim < 2 else tensor[0].numel() ** -0.5)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, latent_channels=4)
    return from_pipeline(DiTPipeline(network, vae, DDIMScheduler()), "dit", None)


def test_a_dit_is_cut_and_exports(tmp_path):
    model = dit_model()
    ctx = context(model, tmp_path)
    smaller = result(CutWidths(ratio=0.25, samples=2)(model, ctx))
    part = smaller.parts[model.denoiser]
    assert part.parameters() <= 0.75 * model.parts[model.denoiser].parameters()
    assert all(np.isfinite(run.latent).all() for run in trajectories(smaller, ctx.plan, [5]))
    assert exported_error(part, tmp_path) < 1e-4
