"""`fewstep export --stitch` and `--student` from the command line, without loading anything."""

import json

import pytest

from fewstep.tools import cli
from fewstep.tools.export import _second

TARGET = ("--target", "laptop-cpu", "--dry-run")


@pytest.mark.parametrize(
    ("stitch", "student", "meant"),
    [
        ("half", None, ("half", 0.4)),
        ("half:0.25", None, ("half", 0.25)),
        ("arch:bk-sdm-small", None, ("arch:bk-sdm-small", 0.4)),
        ("arch:bk-sdm-small:1", None, ("arch:bk-sdm-small", 1.0)),
        (None, "arch:bk-sdm-tiny", ("arch:bk-sdm-tiny", None)),
        (None, None, (None, None)),
    ],
)
def test_a_share_follows_the_last_colon(stitch, student, meant):
    assert _second(stitch, student) == meant


@pytest.fixture
def export(tiny_sd, tmp_path, capsys):
    def run(*words):
        code = cli.main(["export", str(tiny_sd), *TARGET, "-o", str(tmp_path / "bundle"), *words])
        return code, *capsys.readouterr()

    return run


def test_a_dry_run_counts_the_small_denoiser(export, tiny_sd):
    code, text, err = export("--stitch", f"{tiny_sd}:0.5", "--json")
    assert code == 0, err
    stages = {stage["stage"]: stage["note"] for stage in json.loads(text)["stages"]}
    assert stages["lower small"] == stages["lower unet"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--stitch", "{sd}:1.5"), "a share of 1.5 for the small model; expected 0 to 1"),
        (("--stitch", "{sd}:-1"), "a share of -1.0"),
        (("--stitch", "{sd}", "--student", "{sd}"), "--stitch and --student; expected one of them"),
        (("--stitch", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_stitched_is_one_line(export, tiny_sd, words, said):
    code, out, err = export(*(word.format(sd=tiny_sd) for word in words))
    assert code == 2
    assert said in err.strip().splitlines()[-1]
    assert "Traceback" not in out + err
