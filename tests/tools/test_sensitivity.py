"""The command: a page, two tables, the best mix for a size; and what it refuses."""

import json

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.model.builders import tiny_sd  # noqa: E402
from fewstep.tools import cli  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sensitivity") / "sd")


def line(model, out, *more):
    return ["sensitivity", str(model), "-o", str(out), "--steps", "2", "--samples", "1", *more]


def test_a_page_and_tables_say_what_every_layer_suffers(model, tmp_path, capsys):
    out = tmp_path / "report"
    words = ["--options", "w8", "w4", "a8", "--bits", "7", "--group", "16", "--json"]
    assert cli.main(line(model, out, *words)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bits_per_weight"] <= 7
    assert set(answer["chosen"].values()) == {"w8", "w4"}
    assert {file.name for file in out.iterdir() if file.is_file()} == {
        "sensitivity.html", "sensitivity.json", "sensitivity.csv"
    }  # fmt: skip
    page = (out / "sensitivity.html").read_text()
    assert all(layer in page for layer in list(answer["chosen"])[:5])
    header, first, *_ = (out / "sensitivity.csv").read_text().splitlines()
    assert header.startswith("layer,kind,option,step,sqnr_db")
    assert first.count(",") == header.count(",")


def test_a_budget_below_what_is_possible_names_the_nearest(model, tmp_path, capsys):
    assert cli.main(line(model, tmp_path / "report", "--options", "w8", "w4", "--bits", "3")) == 2
    said = capsys.readouterr().err
    assert "a budget of 3 bits a weight" in said
    assert "at least" in said


def test_inputs_alone_are_nothing_to_choose_weights_from(model, tmp_path, capsys):
    assert cli.main(line(model, tmp_path / "report", "--options", "a8")) == 2
    assert "bits of weights" in capsys.readouterr().err
