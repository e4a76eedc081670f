import numpy as np
import pytest
import torch

from fewstep.model import Model, load
from fewstep.model.trajectories import PROMPTS, trajectories
from fewstep.runtime import Pipeline
from fewstep.runtime.errors import BadInput
from fewstep.runtime.plan import Plan, plan
from fewstep.runtime.process import DiscreteVP


class Constant(torch.nn.Module):
    """Predicts the clean sample it was told, whatever it sees; a label is told by its number."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, sample, timestep, class_labels=None):
        told = self.value if class_labels is None else self.value + class_labels[:, None, None, None]
        return told * torch.ones_like(sample)


def constant(classes=None, guidance=1.0):
    process = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)
    return Model.from_module(
        Constant(0.25),
        sample_shape=(3, 4, 8),
        process=process,
        prediction="sample",
        classes=classes,
        guidance=guidance,
    )


def shipped(model, steps=4, sampler="ddim"):
    return plan(sampler, steps, model.process, prediction=model.prediction, grid=model.grid)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_a_latent_is_that_of_the_bundle_with_the_same_seed_and_prompt(tiny_sd, tiny_bundle, sampler):
    model = load(tiny_sd)
    prompts = ["a cat", "a dog"]
    with Pipeline.from_pretrained(tiny_bundle) as pipeline:
        table = pipeline.plan(4, sampler)
        wanted = pipeline(prompts, seed=5, plan=table, output_type="latent").images
    (run,) = trajectories(model, table, [5, 6], prompts=prompts)
    np.testing.assert_allclose(run.latent, wanted, atol=2e-4 * np.abs(wanted).max())


def test_what_the_network_was_fed_gives_the_latent_again(tiny_sd):
    model = load(tiny_sd)
    table = plan("ddim", 3, model.process, prediction=model.prediction, grid=model.grid)
    (run,) = trajectories(model, table, [1, 2], prompts=["a cat"], guidance=1.0)
    assert [float(call["timestep"][0]) for call in run.calls] == [call.timestep for call in table.calls]
    assert run.calls[0]["sample"].shape == (2, 4, 8, 8)
    x = torch.from_numpy(run.calls[-1]["sample"] / table.calls[-1].scale)
    inputs = [torch.from_numpy(run.calls[-1][spec.name]) for spec in model.parts["unet"].inputs]
    with torch.no_grad():
        a, b, _ = table.calls[-1].x0
        x0 = a * x + b * model.parts["unet"].module(*inputs)
    (last,) = [c for kind, _, c in table.calls[-1].next if kind == "d"]
    rest = sum(c for kind, _, c in table.calls[-1].next if kind == "x")
    np.testing.assert_allclose(run.latent, (last * x0 + rest * x).numpy(), atol=1e-4)


def test_guidance_doubles_the_batch_and_texts_name_every_distinct_prompt(tiny_sd):
    model = load(tiny_sd)
    table = Plan.from_json(plan("ddim", 2, model.process, prediction=model.prediction).to_json())
    (run,) = trajectories(model, table, [0, 1, 2], prompts=["a cat", "a dog"])
    assert run.subjects == ("a cat", "a dog", "a cat")
    assert len(run.texts) == 3  # the two and nothing
    states = run.calls[0]["encoder_hidden_states"]
    assert states.shape[0] == 6
    assert np.array_equal(states[0], states[1])  # the unconditional half comes first
    assert np.array_equal(states[3], states[5])
    assert not np.array_equal(states[3], states[4])


def test_every_batch_size_gives_the_same_latents(tiny_sd):
    model = load(tiny_sd)
    table = plan("ddim", 2, model.process, prediction=model.prediction)
    alone, together = (
        np.concatenate([run.latent for run in trajectories(model, table, range(5), batch=batch)])
        for batch in (1, 3)
    )
    np.testing.assert_allclose(alone, together, atol=1e-4 * np.abs(alone).max())


def test_text_is_given_neutral_prompts_where_none_are_named(tiny_sd):
    model = load(tiny_sd)
    table = plan("ddim", 1, model.process, prediction=model.prediction)
    runs = list(trajectories(model, table, range(3), batch=2))
    assert [subject for run in runs for subject in run.subjects] == list(PROMPTS[:3])


def test_a_network_that_knows_the_answer_ends_there():
    model = constant()
    (run,) = trajectories(model, shipped(model), [0, 1])
    np.testing.assert_allclose(run.latent, 0.25, atol=1e-5)
    assert run.subjects == (None, None)
    assert run.texts == ()


def test_labels_are_guided_by_the_class_after_the_last():
    model = constant(classes=3, guidance=2.0)
    (run,) = trajectories(model, shipped(model), [0, 1, 2])
    assert run.subjects == (0, 1, 2)
    # out = uncond + 2 (cond - uncond) with uncond = 0.25 + 3 and cond = 0.25 + label
    np.testing.assert_allclose(
        run.latent[:, 0, 0, 0], [0.25 + 2 * label - 3 for label in range(3)], atol=1e-4
    )
    assert run.calls[0]["class_labels"].tolist() == [3, 3, 3, 0, 1, 2]


def test_what_a_model_does_not_take_is_refused(tiny_sd):
    model = constant()
    with pytest.raises(BadInput, match="without text"):
        next(trajectories(model, shipped(model), [0], prompts=["a cat"]))
    with pytest.raises(BadInput, match="without classes"):
        next(trajectories(model, shipped(model), [0], labels=[1]))
    labelled = constant(classes=3)
    with pytest.raises(BadInput, match="class label 3"):
        next(trajectories(labelled, shipped(labelled), [0], labels=[3]))
    text = load(tiny_sd)
    table = plan("ddim", 1, text.process, prediction=text.prediction)
    with pytest.raises(BadInput, match="shorten it by"):
        next(trajectories(text, table, [0], prompts=["word " * 80]))
