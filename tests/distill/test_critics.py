"""Critics: what they see of U-Nets and transformers alike, what of them learns, and what they refuse."""

import math

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.distill.critics import Discriminator, Head, Opinion, middle, opinion, seen_at, verdict  # noqa: E402
from fewstep.distill.dmd2 import DMD2  # noqa: E402
from fewstep.model import Model  # noqa: E402
from fewstep.model.training import Denoising, Latents, Training  # noqa: E402
from fewstep.runtime.errors import BadInput  # noqa: E402

from .analytic import PROCESS, context, finish  # noqa: E402


def unet():
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )


def transformer():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,
    )


def model_of(name):
    network, size = (unet(), 16) if name == "unet" else (transformer(), 8)
    call = None
    classes = None
    if name == "transformer":
        classes = 10

        def call(module, sample, timestep, labels):
            return module(sample, timestep=timestep.long(), class_labels=labels)

    return Model.from_module(
        network, sample_shape=(4, size, size), process=PROCESS, name=name, call=call, classes=classes
    )


@pytest.fixture(params=["unet", "transformer"])
def model(request):
    torch.manual_seed(0)
    return model_of(request.param)


def looks(model, batch=2):
    """A sample, a time, a condition."""
    size = model.sample.height
    condition = {} if model.classes is None else {"class_labels": torch.arange(batch)}
    return torch.randn(batch, 4, size, size), torch.full((batch,), 500.0), condition


def network(model):
    return model.parts[model.denoiser].module


def test_the_middle_is_a_map_for_both_kinds(model):
    x, t, condition = looks(model)
    where = middle(network(model))
    output, feature = seen_at(network(model), where, (x, t, *condition.values()), stop=False)
    assert output.shape == x.shape
    assert feature.shape == ((2, 16, 4, 4))  # 16 in two halvings; 8 in patches of 2
    nothing, early = seen_at(network(model), where, (x, t, *condition.values()), stop=True)
    assert nothing is None
    assert torch.equal(early, feature)


def test_a_denoiser_with_an_opinion_denoises_as_before(model):
    x, t, condition = looks(model)
    denoising = Denoising.of(model)
    critic = Opinion.of(network(model), model)
    assert torch.equal(
        denoising.output(critic, x, t, condition), denoising.output(network(model), x, t, condition)
    )
    assert opinion(denoising, critic, x, t, condition).shape == (2,)


@pytest.mark.parametrize("number", [1, 2])
def test_a_discriminator_judges_one_sample_or_a_pair(model, number):
    x, t, condition = looks(model)
    critic = Discriminator.of(network(model), model, number)
    logits = verdict(Denoising.of(model), critic, [(x, t)] * number, condition)
    assert logits.shape == (2,)
    logits.sum().backward()
    learned = [p for p in critic.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learned)  # what is behind the middle does not learn
    assert any(p.requires_grad for p in critic.network.parameters())
    assert all(p.grad is None for p in network(model).parameters())  # it is a copy


def test_a_frozen_encoder_leaves_the_head_to_learn(model):
    critic = Discriminator.of(network(model), model, 1, frozen=True)
    assert {name.split(".")[0] for name, p in critic.named_parameters() if p.requires_grad} == {"head"}


def test_it_learns_to_tell_two_distributions_apart():
    torch.manual_seed(0)
    model = model_of("unet")
    critic, denoising = Discriminator.of(network(model), model, 1), Denoising.of(model)
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], 2e-3)
    t = torch.full((8,), 100.0)
    for _ in range(12):
        rough, smooth = torch.randn(8, 4, 16, 16), torch.randn(8, 4, 1, 1).expand(8, 4, 16, 16)
        both = [verdict(denoising, critic, [(x, t)], {}) for x in (rough, smooth)]
        loss = torch.nn.functional.softplus(torch.cat([both[0], -both[1]])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.35  # ln 2 is guessing


def test_dmd2_puts_one_into_the_fake_and_not_into_the_student(tmp_path):
    model = model_of("unet")
    latents = Latents(number=8, sampler="ddim", steps=1, precision="float32", batch=128)
    training = Training(steps=1, batch=4, warm=0, average=0, precision="float32")
    job = DMD2(steps=2, fake_turns=1, critic=1e-2, latents=latents, training=training)
    done = finish(job(model, context(model, tmp_path)))
    told = done.history[-1]["losses"]["fake.critic"]
    assert told == pytest.approx(job.critic_fake * 2 * math.log(2), rel=0.3)  # a head that knows nothing yet
    assert set(network(done).state_dict()) == set(network(model).state_dict())


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_a_head_takes_maps_of_any_size(size):
    assert Head(6, 8, size)(torch.randn(3, 6, size, size)).shape == (3,)


def test_a_network_without_stages_is_refused():
    with pytest.raises(BadInput, match="without stages"):
        middle(torch.nn.Linear(2, 2))
