"""The training loop on a network of one matrix: what it minimizes, resumes, averages and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="needs the export extra")

import torch

from fewstep.model import Model
from fewstep.model.training import Lesson, Training, Wrong, given_samples, train
from fewstep.runtime.errors import BadInput
from fewstep.runtime.process import DiscreteVP

from . import together

PROCESS = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)
HOW = Training(steps=12, batch=4, rate=0.1, warm=0, average=0.9, precision="float32")


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep):
        return self.weight * sample


def samples_of(n=32):
    model = Model.from_module(Line(), sample_shape=(2, 2, 2), process=PROCESS, prediction="sample")
    latents = np.random.default_rng(0).standard_normal((n, 2, 2, 2)).astype(np.float32)
    return given_samples(model, latents, [None] * n)


def three_times(turn):
    """A loss that is 0 where the network triples its input, with noise of the turn's own in it."""
    x = turn.batch.x0 + 0.1 * turn.normal(turn.batch.x0)
    return {"squared": (turn.student(x, torch.zeros(len(x))) - 3 * x).square().mean()}


def lesson_of(loss=three_times, **options):
    return Lesson({"student": Line()}, {"student": loss}, "key", **options)


def run(lesson, how, store, stop=None):
    """What comes out, or None for a run that is stopped after so many steps."""
    work = train(lesson, samples_of(), how, store, "toy")
    for number in range(10**6):
        try:
            next(work)
        except StopIteration as end:
            return end.value
        if number + 1 == stop:
            work.close()
    return None


def test_what_is_minimized_is_reached(tmp_path):
    trained = run(
        lesson_of(), Training(steps=200, batch=8, rate=0.1, warm=0, average=0, precision="float32"), tmp_path
    )
    assert float(trained.student.weight) == pytest.approx(3, abs=0.05)
    assert not trained.student.weight.requires_grad
    lines = [json.loads(line) for line in trained.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 201, 10))
    assert lines[-1]["student.squared"] < 0.1 * lines[0]["student.squared"]


def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(tmp_path, monkeypatch):
    whole = run(lesson_of(), HOW, tmp_path / "whole")
    monkeypatch.setattr("fewstep.model.training.loop.CHECKPOINT_S", 0.0)
    monkeypatch.setattr("fewstep.model.training.loop.CHECKPOINT_SHARE", 1e9)
    assert run(lesson_of(), HOW, tmp_path / "cut", stop=5) is None
    resumed = run(lesson_of(), HOW, tmp_path / "cut")
    assert torch.equal(whole.student.weight, resumed.student.weight)
    assert torch.equal(whole.networks["student"].weight, resumed.networks["student"].weight)
    assert not torch.equal(
        resumed.student.weight, resumed.networks["student"].weight
    )  # the average is another
    logs = [
        [json.loads(line)["step"] for line in trained.metrics.read_text().splitlines()]
        for trained in (whole, resumed)
    ]
    assert logs[0] == logs[1] == [10, 12]


def test_a_finished_run_is_read_and_not_trained_again(tmp_path):
    first = run(lesson_of(), HOW, tmp_path)

    def never(turn):
        raise AssertionError("trained again")

    again = run(lesson_of(never), HOW, tmp_path)
    assert torch.equal(first.student.weight, again.student.weight)
    assert again.losses == pytest.approx(first.losses)


def test_gradients_of_parts_add_up_to_that_of_the_whole(tmp_path):
    """Two backward passes behind an update give the mean of two gradients: with equal batches, the same update."""

    def fixed(turn):
        x = torch.ones(4, 2, 2, 2)
        return {"squared": (turn.student(x, torch.zeros(4)) - 3 * x).square().mean()}

    once = run(lesson_of(fixed), HOW, tmp_path / "once")
    twice = run(lesson_of(fixed), Training(**{**HOW.__dict__, "accumulation": 2}), tmp_path / "twice")
    assert float(once.student.weight) == pytest.approx(float(twice.student.weight), rel=1e-6)


def test_only_the_network_whose_turn_it_is_learns_and_gradients_flow_through_the_other(tmp_path):
    critic, student = Line(), Line()
    torch.nn.init.constant_(critic.weight, 2.0)
    seen = []

    def through(turn):
        seen.append("student")
        assert turn.networks["student"].weight.requires_grad
        assert not turn.networks["critic"].weight.requires_grad
        x = turn.batch.x0
        return {"loss": (turn.networks["critic"](turn.student(x, x), x) - 4 * x).square().mean()}

    def still(turn):
        seen.append("critic")
        assert turn.networks["critic"].weight.requires_grad
        assert not turn.networks["student"].weight.requires_grad
        return {"loss": (turn.networks["critic"].weight - 2).square().mean()}

    lesson = Lesson(
        {"student": student, "critic": critic},
        {"student": through, "critic": still},
        "key",
        turns=lambda step: ["critic", "critic", "student"] if step % 2 else ["student"],
        rates={"critic": 0.5},
    )
    trained = run(
        lesson, Training(steps=150, batch=8, rate=0.1, warm=0, average=0, precision="float32"), tmp_path
    )
    assert seen[:5] == ["student", "critic", "critic", "student", "student"]
    assert float(trained.networks["critic"].weight) == pytest.approx(2)
    assert float(trained.student.weight) == pytest.approx(2, abs=0.05)


def test_a_loss_that_turns_nan_stops_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.model.training.loop.CHECKPOINT_S", 0.0)
    monkeypatch.setattr("fewstep.model.training.loop.CHECKPOINT_SHARE", 1e9)

    def breaks(turn):
        losses = three_times(turn)
        return {"squared": losses["squared"] * float("nan")} if turn.step == 7 else losses

    with pytest.raises(Wrong, match=r"student's loss squared turned nan at step 8 of 12") as caught:
        run(lesson_of(breaks), HOW, tmp_path)
    file = tmp_path / "toy-key.checkpoint"
    assert str(file) in str(caught.value)
    kept = torch.load(file, weights_only=True)
    assert kept["step"] == 7
    assert all(torch.isfinite(tensor).all() for tensor in kept["networks"]["student"].values())


def test_a_gradient_that_is_infinite_never_reaches_the_weights(tmp_path):
    student = Line()

    def steep(turn):
        return {"root": turn.student(turn.batch.x0, turn.batch.x0).abs().sum().sqrt()}

    with pytest.raises(Wrong, match="gradient turned nan at step 1"):
        run(Lesson({"student": student}, {"student": steep}, "key"), HOW, tmp_path)
    assert not student.weight.detach().any()


def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "toy-key.checkpoint").write_bytes(b"PK\x03\x04 not one")
    with pytest.raises(BadInput, match=r"toy-key\.checkpoint is no checkpoint"):
        run(lesson_of(), HOW, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"rate": 0.0},
        {"average": 1.0},
        {"precision": "half"},
        {"decay": "slow"},
        {"clip": 0.0},
    ],
)
def test_training_that_cannot_be_is_refused(wrong):
    with pytest.raises(BadInput, match=f"{next(iter(wrong))} of training"):
        Training(**wrong)


def test_two_processes_train_as_one_of_twice_the_batch(tmp_path):
    """Each sees its own half; the weights they agree on are those of one process that sees both."""
    port = 20_000 + os.getpid() % 20_000
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, str(Path(together.__file__)), str(tmp_path / "two")]
    ranks = [
        subprocess.Popen(
            command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    two = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert two[0] == two[1]
    alone = together.learn(tmp_path / "one", halves=(0, 1))
    assert two[0]["weight"] == pytest.approx(alone["weight"], rel=1e-6)
    assert two[0]["average"] == pytest.approx(alone["average"], rel=1e-6)
    assert len((tmp_path / "two" / "toy-key.jsonl").read_text().splitlines()) == 1
