"""`fewstep prune` from the command line, on a checkpoint of a million weights."""

import json

import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")

from fewstep.tools import cli


@pytest.fixture
def main(capsys):
    def run(*words):
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def test_a_model_becomes_a_smaller_folder_that_can_be_cut_again(main, tiny_sd, tmp_path):
    out = tmp_path / "small"
    code, text, err = main(
        "prune", tiny_sd, "-o", out, "--ratio", 0.3, "--samples", 2, "--steps", 2, "--json"
    )
    assert code == 0, err
    data = json.loads(text)
    before, after = data["history"]["parameters"]
    assert after <= 0.7 * before
    assert data["speed"]["after"]["wall_ms"][1] > 0
    assert data["speed"]["after"]["bytes"] == 4 * after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    code, text, err = main("prune", out, "-o", tmp_path / "tiny", "--criterion", "magnitude", "--no-speed")
    assert code == 0, err
    assert "parameters" in text


def test_a_curve_is_a_row_for_every_criterion_and_ratio_that_can_be_had(main, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fewstep.tools.prune.CURVE_RATIOS", (0.2, 0.4, 0.99)
    )  # the last is more than there is
    out = tmp_path / "curve"
    code, _, err = main("prune", tiny_sd, "-o", out, "--curve", "--samples", 1, "--steps", 1)
    assert code == 0, err
    rows = json.loads((out / "curve.json").read_text())
    assert {row["criterion"] for row in rows} >= {"laptop", "ld_pruner", "magnitude", "random"}
    assert {row["asked"] for row in rows} == {0.2, 0.4}
    for row in rows:
        assert row["parameters_left"] <= 1 - row["asked"] + 1e-4
    assert len((out / "curve.csv").read_text().splitlines()) == len(rows) + 1
    assert "<svg" in (out / "curve.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ratio", "1.5"), "ratio"),
        (("--ratio", "0.99"), "at most"),
        (("--criterion", "best"), "laptop"),
        (("--target", "toaster"), "toaster"),
        (("--steps", "0"), "steps"),
        (("--criterion", "bk_sdm_base"), "layer a block"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(main, tiny_sd, tmp_path, words, said):
    code, _, err = main("prune", tiny_sd, "-o", tmp_path / "out", *words)
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("fewstep: error: ")
    assert said in last
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_unless_overwritten(main, tiny_sd, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for words in ((), ("--overwrite",)):
        code, _, err = main(
            "prune", tiny_sd, "-o", tmp_path / "out", "--criterion", "random", "--no-speed", *words
        )
        assert code == 2, err
        assert "exists already" in err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
