"""`fewstep samplers`: the list is whole, the gallery holds what it says."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from fewstep.runtime import SAMPLERS, DiscreteVP, plan
from fewstep.runtime.times import GRIDS
from fewstep.tools import cli
from fewstep.tools.samplers import within

SD15 = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)


def test_the_list_names_every_sampler_and_grid_with_its_cost(capsys):
    assert cli.main(["samplers", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in said["samplers"]}
    assert list(rows) == list(SAMPLERS)
    assert [row["name"] for row in said["grids"]] == list(GRIDS)
    assert all(row["what"] for row in [*rows.values(), *said["grids"]])
    assert (rows["ddim"]["calls"], rows["heun"]["calls"], rows["ddim"]["noise"]) == (10, 19, False)
    assert rows["euler_ancestral"]["noise"]


@pytest.mark.parametrize(
    ("name", "calls", "steps"), [("ddim", 7, 7), ("heun", 7, 4), ("heun", 6, 3), ("ddim", 0, None)]
)
def test_a_budget_of_calls_is_kept(name, calls, steps):
    table = within(calls, name, lambda sampler, n: plan(sampler, n, SD15))
    assert (table.steps if table else None) == steps
    assert table is None or len(table.calls) <= calls


def test_a_gallery_has_a_picture_for_each_sampler_and_budget(text_bundle, tmp_path, capsys):
    out = tmp_path / "gallery.png"
    words = [
        "--prompt",
        "a red apple",
        "--sampler",
        "ddim",
        "--sampler",
        "heun",
        "--calls",
        "3",
        "5",
        "-o",
        str(out),
    ]
    assert cli.main(["samplers", str(text_bundle), *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["pictures"]
    assert [(r["sampler"], r["calls"], r["steps"]) for r in rows] == [
        ("ddim", 3, 3), ("ddim", 5, 5), ("heun", 3, 2), ("heun", 5, 3),
    ]  # fmt: skip
    assert all(r["psnr_db"] is None or math.isfinite(r["psnr_db"]) for r in rows)
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[2] == 3
    assert pixels.shape[0] > 2 * 16
    assert pixels.std() > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "x"], "-o gallery.png"),
        (["-p", "x", "-o", "x.jpg"], "PNG"),
        (["-p", "x", "--sampler", "ddjm", "-o", "x.png"], "did you mean"),
        (["-p", "x", "--times", "karas", "-o", "x.png"], "karras"),
        (["-p", "x", "--calls", "0", "-o", "x.png"], "--calls"),
        (["-o", "x.png"], "prompt"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(words, said, text_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["samplers", str(text_bundle), *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
