"""`fewstep tune plan`: the bundle gets its plan, whole or not at all, and an interrupted job goes on."""

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.runtime import Pipeline, Plan
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput, OutputError, PlanError
from fewstep.tools import cli
from fewstep.tune.job import Tuned, tune_bundle
from fewstep.tune.reference import References, Setting

from ..tools.conftest import start, write_bundle  # noqa: F401

FEW = Setting(noises=6, steps=20, prompts=("a cat", "a red apple"))


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "tiny")


def tuned(path, **options):
    *_, done = tune_bundle(path, **{"calls": 3, "setting": FEW, **options})
    assert isinstance(done, Tuned)
    return done


def test_a_bundle_gets_a_plan_that_a_run_uses_by_name(bundle):
    before = Bundle.open(bundle).manifest
    done = tuned(bundle, name="three")
    after = Bundle.open(bundle).manifest
    assert (set(after.plans), after.plans["default"]) == ({"default", "three"}, before.plans["default"])
    assert after.history[:-1] == before.history
    assert after.history[-1]["score"]["rmse"] <= after.history[-1]["best_fixed"]["rmse"]
    with Pipeline.from_pretrained(bundle) as pipeline:
        drawn = pipeline("a cat", plan="three", output_type="latent")
    assert drawn.plan == done.found.plan == Plan.from_json(after.plans["three"])


def test_a_plan_goes_into_a_new_bundle_and_the_old_one_stays(bundle, tmp_path):
    before = (bundle / "manifest.json").read_bytes()
    done = tuned(bundle, out=tmp_path / "new", default=True)
    assert (bundle / "manifest.json").read_bytes() == before
    plans = Bundle.open(done.path).manifest.plans
    assert plans["default"] == plans["learned-3"]
    assert cli.main(["verify", str(done.path)]) == 0


def test_the_reference_is_the_bundles_own_long_run_at_the_shipped_guidance(bundle, tmp_path):
    with Pipeline.from_pretrained(bundle) as pipeline:
        references = References(pipeline, FEW, tmp_path / "work")
        shares = list(references.make())
        assert shares == sorted(shares)
        assert shares[-1] == 1
        problem = references.problem()
        long = references._plan()
        for i in (0, 1, 5):
            drawn = pipeline(FEW.prompts[i % 2], plan=long, seed=i, output_type="latent")
            assert problem.targets[i] == pytest.approx(drawn.images[0], abs=1e-5)


def test_references_are_made_once_and_only_the_missing_ones_again(bundle, tmp_path):
    setting = Setting(noises=6, steps=20, prompts=("a cat",), batch=2)
    with Pipeline.from_pretrained(bundle) as pipeline:
        references = References(pipeline, setting, tmp_path / "work")
        making = references.make()
        while next(making) < 1 / 3:
            pass
        making.close()
        first = references.meter.samples
        for _ in references.make():
            pass
        assert (first, references.meter.samples) == (2 * 20, 6 * 20)
        other = References(pipeline, Setting(noises=6, steps=20, guidance=1.5), tmp_path / "work")
        assert other.path != references.path


def test_a_job_that_was_interrupted_ends_where_it_would_have(bundle, tmp_path):
    whole = tuned(bundle, out=tmp_path / "whole", workdir=tmp_path / "a")
    for events in (12, 30, 60):
        job = tune_bundle(bundle, calls=3, setting=FEW, out=tmp_path / "again", workdir=tmp_path / "b")
        for _ in range(events):
            next(job)
        job.close()
        assert not (tmp_path / "again").exists()
    assert tuned(bundle, out=tmp_path / "again", workdir=tmp_path / "b").found == whole.found


def test_ctrl_c_exits_130_leaves_no_bundle_and_keeps_what_is_done(bundle, tmp_path, start):  # noqa: F811
    line = ["tune", "plan", bundle, "--calls", "8", "--noises", "24", "--reference-steps", "300"]
    line += ["--batch", "1", "--out", tmp_path / "new", "--prompt", "a cat"]
    process = start(*line)
    kept = Path(f"{bundle}.tune")
    while not list(kept.glob("*/noises-0001.npy")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (tmp_path / "new").exists()
    assert list(kept.glob("*/noises-*.npy"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--calls", "0"], "0 calls"),
        (["--calls", "99"], "99 calls"),
        (["--calls", "3", "--method", "lerned"], "did you mean learned"),
        (["--calls", "3", "--noises", "1"], "1 noises"),
        (["--calls", "3", "--reference-steps", "5"], "5 reference steps"),
        (["--calls", "3", "--name", "default"], "not 'default'"),
        (["--calls", "3", "--name", "a/b"], "plan name 'a/b'"),
        (["--calls", "3", "--prompts", "missing.txt"], "missing.txt cannot be read"),
        (["--calls", "3", "--guidance", "nan"], "guidance nan"),
        (["--calls", "3", "--out", "."], "is not a fewstep bundle"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(bundle, words, says, capsys):
    before = (bundle / "manifest.json").read_bytes()
    assert cli.main(["tune", "plan", str(bundle), "--reference-steps", "10", *words]) == 2
    assert says in capsys.readouterr().err
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_plan_is_replaced_only_on_request(bundle):
    tuned(bundle, calls=1, name="mine")
    with pytest.raises(BadInput, match="has a plan 'mine'"):
        tuned(bundle, calls=2, name="mine")
    tuned(bundle, calls=2, name="mine", overwrite=True)
    assert len(Plan.from_json(Bundle.open(bundle).manifest.plans["mine"]).calls) == 2


def test_an_existing_place_is_refused_before_the_work_begins(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "new")
    job = tune_bundle(bundle, calls=3, setting=FEW, out=tmp_path / "new")
    next(job)
    with pytest.raises(OutputError, match="exists"):
        next(job)


def test_prompts_for_a_model_without_text_are_refused(tmp_path):
    free = write_bundle(tmp_path / "free", text=False)
    with pytest.raises(BadInput, match="without text"):
        tuned(free, setting=Setting(noises=4, steps=10, prompts=("a cat",)))
    assert tuned(free, setting=Setting(noises=4, steps=10)).record["prompts"] == []


def test_damaged_state_says_what_to_delete(bundle, tmp_path):
    job = tune_bundle(bundle, calls=3, setting=FEW, workdir=tmp_path)
    while not list(tmp_path.glob("*/learned-3.json")):
        next(job)
    job.close()
    [state] = tmp_path.glob("*/learned-3.json")
    state.write_text("{")
    with pytest.raises(BadInput, match="delete it"):
        tuned(bundle, workdir=tmp_path)


def test_json_answers_with_scores(bundle, capsys):
    line = ["tune", "plan", str(bundle), "--calls", "2", "--noises", "4", "--reference-steps", "10", "--json"]
    assert cli.main(line) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plan"] == "learned-2"
    assert answer["score"]["psnr_db"] >= answer["best_fixed"]["psnr_db"]


def test_another_graph_than_the_bundles_is_refused(bundle, tmp_path):
    with Pipeline.from_pretrained(bundle) as pipeline:
        problem = References(pipeline, FEW, tmp_path).empty
        [call] = problem.rows([500.0, 0.0])
        with pytest.raises(PlanError, match="graph 'small'"):
            problem.x0(problem.starts[:1], replace(call, graph="small"), np.arange(1))


def test_a_network_that_takes_whole_timesteps_gets_no_others(bundle, tmp_path):
    opened = Bundle.open(bundle)
    unet = opened.manifest.parts["unet"]
    inputs = tuple(replace(t, dtype="int64") if t.name == "timestep" else t for t in unet.inputs)
    parts = {**opened.manifest.parts, "unet": replace(unet, inputs=inputs)}
    with Pipeline(Bundle(opened.path, replace(opened.manifest, parts=parts))) as pipeline:
        problem = References(pipeline, FEW, tmp_path).empty
        [call] = problem.rows([500.4, 0.0])
        assert (call.timestep, call.t) == (499.0, 500.4)
    with Pipeline(opened) as pipeline:
        [call] = References(pipeline, FEW, tmp_path).empty.rows([500.4, 0.0])
        assert call.timestep == pytest.approx(499.4)


def test_the_command_run_takes_the_plan_by_name(bundle, tmp_path, capsys):
    tuned(bundle, calls=2)
    line = ["run", str(bundle), "-p", "a cat", "-o", str(tmp_path / "x.png"), "--json", "--plan"]
    assert cli.main([*line, "learned-2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["plan"], answer["sampler"], answer["steps"]) == ("learned-2", "learned", 2)
    assert cli.main([*line, "learnd-2"]) == 2
    assert "did you mean learned-2" in capsys.readouterr().err
