"""LCM-LoRA: adapters alone learn, merge exactly, and load in diffusers; and a full-size step fits in memory."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("peft", reason="needs the train extra")

from fewstep.distill.adapters import ADAPTER_FILE, adapted, merged  # noqa: E402
from fewstep.distill.lcm_lora import LCMLora  # noqa: E402
from fewstep.model import load  # noqa: E402
from fewstep.model.training import Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput, OutputError  # noqa: E402

from .analytic import Affine, context, finish, model_of, module  # noqa: E402

SHORT = LCMLora(
    rank=4,
    latents=Latents(number=4, steps=2, precision="float32", prompts=("a", "b")),
    training=Training(steps=4, batch=2, rate=1e-2, warm=0, decay="constant", average=0, precision="float32"),
)


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load(tiny_sd)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    store = folder / "store"
    before = {name: tensor.clone() for name, tensor in module(model).state_dict().items()}
    job = LCMLora(rank=4, adapter=str(folder / "adapter"), latents=SHORT.latents, training=SHORT.training)
    made = finish(job(model, context(model, store)))
    for name, tensor in module(model).state_dict().items():
        assert torch.equal(tensor, before[name]), name
    return made, folder, job


def inputs(network):
    config = network.network.config
    torch.manual_seed(0)
    text = torch.randn(2, 5, config.cross_attention_dim)
    return torch.randn(2, config.in_channels, 8, 8), torch.tensor([900.0, 20.0]), text


def test_adapters_begin_as_nothing_share_the_weights_and_alone_learn(model):
    own = module(model)
    network = adapted(copy.deepcopy(own), own, 4, seed=0)
    with torch.no_grad():
        assert torch.equal(network(*inputs(own)), own(*inputs(own)))
    learned = [name for name, tensor in network.named_parameters() if tensor.requires_grad]
    assert learned
    assert all(".lora_" in name for name in learned)
    mine = {tensor.data_ptr() for name, tensor in network.named_parameters() if ".lora_" not in name}
    assert mine == {tensor.data_ptr() for tensor in own.parameters()}


def test_merged_weights_answer_as_the_adapter_did_and_are_plain(model):
    own = module(model)
    network = adapted(copy.deepcopy(own), own, 4, seed=0)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        plain = merged(network)
        torch.testing.assert_close(plain(*inputs(own)), network(*inputs(own)), rtol=1e-4, atol=1e-5)
        assert (plain(*inputs(own)) - own(*inputs(own))).abs().max() > 1e-3
    assert [(name, type(part)) for name, part in plain.named_modules()] == [
        (name, type(part)) for name, part in own.named_modules()
    ]
    assert plain.state_dict().keys() == own.state_dict().keys()


def test_the_pass_leaves_a_plain_network_drawn_as_lcm(model, trained):
    made, _, _ = trained
    assert module(made).state_dict().keys() == module(model).state_dict().keys()
    assert (made.steps, made.guidance.scale, made.scheduler["_class_name"]) == (4, 1.0, "LCMScheduler")
    record = made.history[-1]
    assert (record["pass"], record["adapter"]) == ("LCMLora", "adapter")


def test_the_checkpoint_holds_the_adapter_alone(model, trained):
    _, folder, _ = trained
    (file,) = (folder / "store").glob("lcm-lora-*.checkpoint")
    kept = torch.load(file, weights_only=True)
    assert kept["networks"]["student"]
    assert all(".lora_" in name for name in kept["networks"]["student"])


def test_diffusers_loads_the_adapter_onto_the_pipeline_it_came_from(model, trained, tiny_sd):
    made, folder, _ = trained
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    sample, time, text = inputs(module(model))
    with torch.no_grad():
        before = pipe.unet(sample, time, text).sample
        pipe.load_lora_weights(str(folder / "adapter"))
        after = pipe.unet(sample, time, text).sample
        wanted = module(made)(sample, time, text)
    assert (before - wanted).abs().max() > 1e-2
    torch.testing.assert_close(after, wanted, rtol=0, atol=2e-3)  # the file is in half precision


def test_another_adapter_is_not_written_over(model, trained, tmp_path):
    _, folder, job = trained
    again = finish(job(model, context(model, folder / "store")))  # its own it may write again
    assert again.steps == 4
    other = LCMLora(rank=2, adapter=str(folder / "adapter"), latents=SHORT.latents, training=SHORT.training)
    with pytest.raises(OutputError, match="exists already"):
        next(other(model, context(model, tmp_path)))
    (tmp_path / ADAPTER_FILE).write_bytes(b"no adapter")
    foreign = LCMLora(adapter=str(tmp_path))
    with pytest.raises(OutputError, match="exists already"):
        next(foreign(model, context(model, tmp_path)))


def test_a_network_without_such_layers_is_refused(tmp_path):
    model = model_of(Affine())
    job = LCMLora(latents=Latents(number=4, sampler="ddim", steps=2, precision="float32"))
    with pytest.raises(BadInput, match="without layers for adapters"):
        finish(job(model, context(model, tmp_path)))


@pytest.mark.parametrize("fields", [{"rank": 0}, {"steps": 0}, {"intervals": 1}, {"huber_c": 0.0}])
def test_fields_that_make_no_sense_are_refused(fields):
    with pytest.raises(BadInput):
        LCMLora(**fields)


STEP = Path(__file__).parents[2] / "benchmarks" / "lora_step.py"


@pytest.mark.slow
def test_a_step_at_full_size_fits_in_24_gib():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, STEP], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["peak_rss_bytes"] < 24 << 30
    assert 0 < measured["losses"]["student.huber"] < 1
