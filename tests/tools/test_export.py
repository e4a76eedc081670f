"""`fewstep export` and `fewstep show MODEL` from the command line, on a checkpoint of a few thousand weights."""

import json
import os
import signal

import pytest

from fewstep.tools import cli

TARGET = ("--target", "laptop-cpu", "--no-speed")


@pytest.fixture
def main(capsys):
    def run(*words):
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def refused(result, *said):
    code, out, err = result
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("fewstep: error: ")
    assert "Traceback" not in err + out
    for text in said:
        assert text in last


def test_a_checkpoint_becomes_a_bundle_that_verifies_and_draws(main, tiny_sd, tmp_path):
    out = tmp_path / "bundle"
    code, text, err = main("export", tiny_sd, *TARGET, "-o", out, "--steps", 3, "--sampler", "ddim", "--json")
    assert code == 0, err
    assert json.loads(text)["bundle"] == str(out)
    code, text, err = main("verify", out, "--json")
    assert code == 0, err
    golden = json.loads(text)["golden"]
    assert golden is not None
    assert golden["error"] <= golden["tolerance"]
    assert main("run", out, "--prompt", "a cat", "-o", tmp_path / "x.png")[0] == 0
    code, text, _ = main("show", out, "--json")
    assert json.loads(text)["plans"][0]["steps"] == 3
    refused(main("export", tiny_sd, *TARGET, "-o", out), "--overwrite")


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(main, tiny_sd, tmp_path):
    code, text, err = main("export", tiny_sd, *TARGET, "-o", tmp_path / "bundle", "--dry-run")
    assert code == 0, err
    assert text.startswith("would do:")
    assert not list(tmp_path.iterdir())


def test_show_a_model_lists_its_parts(main, tiny_sd):
    code, text, err = main("show", tiny_sd, "--json")
    assert code == 0, err
    data = json.loads(text)
    assert data["kind"] == "model"
    assert data["parameters"] == sum(part["parameters"] for part in data["parts"])
    code, text, _ = main("show", tiny_sd)
    assert "unet" in text
    assert "total" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "toaster"], "toaster"),
        ([*TARGET, "--steps", "0"], "0"),
        ([*TARGET, "--steps", "1000000"], "1000000"),
        ([*TARGET, "--sampler", "magic"], "magic"),
        ([*TARGET, "--times", "karas"], "did you mean karras"),
        ([*TARGET, "--recipe", "/nowhere.toml"], "nowhere"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(words, said, main, tiny_sd, tmp_path):
    refused(main("export", tiny_sd, *words, "-o", tmp_path / "bundle"), said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["/nowhere", "some/hub-id"])
def test_a_missing_model_is_one_line(model, main, tmp_path):
    refused(main("export", model, *TARGET, "-o", tmp_path / "bundle"), model)
    refused(main("show", model), model)
    assert not list(tmp_path.iterdir())


def test_an_unknown_recipe_key_is_named(main, tiny_sd, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[recipe]\nstepz = 3\n")
    refused(main("export", tiny_sd, *TARGET, "--recipe", recipe, "-o", tmp_path / "bundle"), "stepz")


def test_a_folder_that_is_not_ours_is_left_alone(main, tiny_sd, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/thesis.tex").write_text("x")
    refused(main("export", tiny_sd, *TARGET, "-o", tmp_path / "bundle", "--overwrite"), "bundle")
    assert (tmp_path / "bundle/thesis.tex").read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_an_export_and_leaves_nothing(number, tiny_sd, tmp_path, start, appears):
    process = start("export", tiny_sd, *TARGET, "-o", "bundle", cwd=tmp_path)
    appears(tmp_path, "*", process)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_nothing_under_the_final_name_and_the_next_one_cleans_up(
    tiny_sd, tmp_path, start, appears, fewstep
):
    words = ("export", tiny_sd, *TARGET, "-o", "bundle")
    process = start(*words, cwd=tmp_path)
    appears(tmp_path, "*", process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "bundle").exists()
    assert fewstep(*words, cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_dry_run_foresees_the_bundle_as_data(main, tiny_sd, tmp_path):
    code, text, err = main(
        "export", tiny_sd, *TARGET, "-o", tmp_path / "b", "--steps", "4", "--dry-run", "--json"
    )
    assert code == 0, err
    data = json.loads(text)
    assert data["fits"] is True
    assert data["forecast"]["steps"] == 4
    assert data["forecast"]["parts"]["unet"]["calls"] == 4
    assert data["forecast"]["picture_s"] > 0
    assert data["others"]["w8a8"]["size_bytes"] < data["forecast"]["size_bytes"]


def test_a_dry_run_takes_the_rates_of_a_host(main, tiny_sd, tmp_path):
    file = tmp_path / "host.toml"
    file.write_text("[profile]\ncores = 1\n[profile.float32]\noperator_us = 1000000\n")
    code, text, err = main(
        "export", tiny_sd, *TARGET, "-o", tmp_path / "b", "--dry-run", "--json", "--profile", file
    )
    assert code == 0, err
    assert json.loads(text)["forecast"]["parts"]["unet"]["call_s"] > 100
    file.write_text("[profile]\ncores = 'many'\n")
    refused(
        main("export", tiny_sd, *TARGET, "-o", tmp_path / "b", "--dry-run", "--profile", file),
        "cores is 'many'",
    )


def test_a_dry_run_of_what_cannot_fit_fails_and_says_what_would(main, tmp_path):
    words = ("export", "arch:sd15", "--target", "android-cpu", "-o", tmp_path / "b")
    code, text, _ = main(*words, "--dry-run", "--json")
    data = json.loads(text)
    assert (code, data["fits"]) == (2, False)
    assert data["wrong"][0].startswith("unet does not fit: 3.2 GiB of 2.0 GiB a part")
    assert "--quantize w8a8" in data["remedy"]
    refused(main(*words), "unet does not fit: 3.2 GiB of 2.0 GiB a part")
    assert not list(tmp_path.iterdir())
