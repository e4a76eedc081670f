"""`fewstep run`: pictures that say how they were made, and what it refuses."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from fewstep.runtime import Pipeline
from fewstep.tools import cli


def opened(path):
    """(pixels, text) of a PNG as Pillow reads it."""
    with Image.open(path) as image:
        image.load()
        return np.asarray(image), image.text


@pytest.fixture
def draw(text_bundle, tmp_path, capsys):
    """`draw("--steps", 2)` -> (exit code, stdout, stderr); the picture is tmp_path/x.png."""

    def run(*words, prompt="a red apple", bundle=text_bundle):
        subject = ["--prompt", prompt] if prompt is not None else []
        line = ["run", bundle, *subject, "-o", tmp_path / "x.png", *words]
        code = cli.main([str(word) for word in line])
        return code, *capsys.readouterr()

    return run


def test_the_picture_is_the_pipeline_s(draw, text_bundle, tmp_path):
    assert draw("--seed", 3, "--steps", 2)[0] == 0
    expected = Pipeline.from_pretrained(text_bundle)("a red apple", seed=3, num_inference_steps=2).images[0]
    assert np.array_equal(opened(tmp_path / "x.png")[0], np.asarray(expected))


def test_the_picture_says_how_it_was_made(draw, text_bundle, tmp_path):
    import hashlib

    digest = hashlib.sha256((text_bundle / "manifest.json").read_bytes()).hexdigest()
    code, _, err = draw(
        "--seed", 5, "--steps", 3, "--sampler", "euler", "--guidance", 2, "--negative-prompt", "blue"
    )
    assert code == 0, err
    text = opened(tmp_path / "x.png")[1]
    assert text["parameters"].splitlines() == [
        "a red apple",
        "Negative prompt: blue",
        f"Steps: 3, Sampler: euler, CFG scale: 2, Seed: 5, Size: 16x16, Model hash: {digest[:10]}, Model: tiny, "
        "Version: fewstep 0.1.0",
    ]
    record = json.loads(text["fewstep"])
    assert record["bundle"] == {"name": "tiny", "sha256": digest}
    assert (record["prompt"], record["negative_prompt"], record["seed"]) == ("a red apple", "blue", 5)
    assert (record["steps"], record["sampler"], record["plan"]) == (3, "euler", "traced")


def test_the_default_plan_is_named(draw, tmp_path):
    assert draw()[0] == 0
    record = json.loads(opened(tmp_path / "x.png")[1]["fewstep"])
    assert (record["plan"], record["steps"], record["guidance"]) == ("default", 4, 3.0)


def test_a_prompt_outside_latin_1_survives(draw, tmp_path):
    assert draw(prompt="a 红 apple – 🍎")[0] == 0
    text = opened(tmp_path / "x.png")[1]
    assert json.loads(text["fewstep"])["prompt"] == "a 红 apple – 🍎"
    assert text["parameters"].startswith("a 红 apple – 🍎\n")


def test_count_draws_numbered_files_and_a_grid(draw, text_bundle, tmp_path):
    code, out, _ = draw("--count", 3, "--grid", "--seed", 7, "--json")
    assert code == 0
    data = json.loads(out)
    assert [image["seed"] for image in data["images"]] == [7, 8, 9]
    names = ["x-001.png", "x-002.png", "x-003.png", "x-grid.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    alone = Pipeline.from_pretrained(text_bundle)("a red apple", seed=8).images[0]
    assert np.array_equal(opened(tmp_path / "x-002.png")[0], np.asarray(alone))
    assert opened(tmp_path / "x-grid.png")[0].shape == (36, 36, 3)  # 2 x 2 pictures of 16, 4 pixels between


def test_another_size_and_low_memory(draw, tmp_path):
    assert draw("--height", 24, "--width", 32, "--low-memory", "--threads", 1)[0] == 0
    assert opened(tmp_path / "x.png")[0].shape == (24, 32, 3)


def test_a_model_without_text_needs_no_prompt(draw, pixel_bundle, tmp_path):
    assert draw(prompt=None, bundle=pixel_bundle)[0] == 0
    assert opened(tmp_path / "x.png")[0].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "0"),
        (["--steps", "1000000"], "1000000"),
        (["--height", "17"], "17"),
        (["--width", "-16"], "-16"),
        (["--width", "1000000000"], "1000000000"),
        (["--count", "0"], "--count 0"),
        (["--sampler", "magic"], "magic"),
        (["--guidance", "nan"], "nan"),
        (["--class-label", "1"], "class label"),
        (["--threads", "0"], "0"),
        (["--seed", "-1"], "-1"),
        (["-o", "/nowhere/x.png"], "/nowhere"),
        (["-o", "x.jpg"], ".png"),
    ],
)
def test_bad_input_is_one_line_and_no_file(words, said, draw, tmp_path):
    code, out, err = draw(*words)
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("fewstep: error: ")
    assert said in last
    assert "Traceback" not in err + out
    assert not list(tmp_path.iterdir())


def test_a_prompt_beyond_the_tokenizer_s_limit_is_bad_input(draw, tmp_path):
    code, _, err = draw(prompt="a cat " * 40)
    assert code == 2
    assert "tokens" in err
    assert not list(tmp_path.iterdir())


def test_a_missing_prompt_is_bad_input_as_json(draw):
    code, out, _ = draw("--json", prompt=None)
    assert code == 2
    assert json.loads(out)["error"]["type"] == "BadInput"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_and_leaves_no_half_file(number, text_bundle, tmp_path, start, appears):
    words = [
        "run",
        text_bundle,
        "--prompt",
        "a cat",
        "--count",
        1000,
        "--steps",
        500,
        "-o",
        tmp_path / "x.png",
    ]
    process = start(*words)
    appears(tmp_path, "x-*.png", process)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == "fewstep: error: interrupted"
    left = list(tmp_path.iterdir())
    assert left
    for path in left:
        opened(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--times", "karas"), ("time grid 'karas'", "did you mean karras")),
        (("--times", "ays_svd"), ("time grid ays from noise level 700", "expected levels of at most")),
        (("--times", "lightning", "--steps", 3), ("3 steps on the lightning grid", "1, 2, 4 or 8")),
        (("--times", "trailing", "--steps", 2000), ("2000 steps", "1 to 1000")),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_one_line(draw, words, said):
    code, out, err = draw(*words)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert last.startswith("fewstep: error: ")
    assert all(text in last for text in said), last


def test_a_grid_by_name_is_the_pipeline_s_and_is_written_down(draw, text_bundle, tmp_path):
    assert draw("--steps", 3, "--times", "karras")[0] == 0
    pixels, text = opened(tmp_path / "x.png")
    with Pipeline.from_pretrained(text_bundle) as pipeline:
        expected = pipeline("a red apple", num_inference_steps=3, times="karras").images[0]
        assert pipeline.plan(3, times="karras").calls[1].t not in (334.0, 667.0)  # not the bundle's own grid
    assert np.array_equal(pixels, np.asarray(expected))
    assert json.loads(text["fewstep"])["times"] == "karras"
    assert ", Schedule type: karras, " in text["parameters"]


def test_a_pipeline_takes_a_grid_as_a_function_and_as_times(text_bundle):
    from functools import partial

    from fewstep.runtime.grids import karras

    with Pipeline.from_pretrained(text_bundle) as pipeline:
        named = pipeline.plan(3, times="karras")
        assert pipeline.plan(3, times=partial(karras, rho=7.0)) == named
        assert pipeline.plan(times=[*(call.t for call in named.calls), 0.0]) == named
        with pytest.raises(ValueError, match="3 times for 3 steps"):
            pipeline.plan(3, times=[900.0, 400.0, 0.0])


def test_a_shift_that_depends_on_the_size_is_that_of_the_size_drawn(text_bundle):
    import math
    from dataclasses import replace

    from fewstep.runtime.manifest import DynamicShift, GridSpec
    from fewstep.runtime.process import RectifiedFlow

    with Pipeline.from_pretrained(text_bundle) as pipeline:
        grid = GridSpec(
            "trailing", dynamic=DynamicShift(base_tokens=1, max_tokens=2, base_shift=0, max_shift=0.1)
        )
        flow = {"process": RectifiedFlow().to_json(), "prediction": "flow", "sampler": "euler", "grid": grid}
        pipeline.bundle = replace(pipeline.bundle, manifest=replace(pipeline.manifest, **flow, plans={}))
        sample = pipeline.manifest.sample
        for width in (sample.width, 2 * sample.width):
            tokens = sample.height * width // sample.multiple**2
            s = math.exp(0.1 * (tokens - 1))
            middle = pipeline.plan(2, height=sample.height, width=width).calls[1].t
            assert middle == pytest.approx(s / (1 + s))  # of t = 1/2


def test_starting_from_an_image_within_a_mask_is_the_pipeline_s(draw, pixel_bundle, tmp_path):
    with Pipeline.from_pretrained(pixel_bundle) as pipeline:
        sample = pipeline.manifest.sample
        cells = (sample.channels, sample.height // sample.factor, sample.width // sample.factor)
        image = np.random.default_rng(0).standard_normal(cells).astype(np.float32)
        mask = np.zeros((sample.height, sample.width), np.uint8)
        mask[:8] = 255
        how = {"num_inference_steps": 10, "strength": 0.4, "mask_image": mask, "seed": 0, "output_type": "np"}
        expected = np.rint(pipeline(image=image, **how).images[0] * 255)
    np.save(tmp_path / "start.npy", image)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = (
        "--steps",
        10,
        "--image",
        tmp_path / "start.npy",
        "--mask",
        tmp_path / "mask.png",
        "--strength",
        0.4,
    )
    code, _, err = draw(*words, prompt=None, bundle=pixel_bundle)
    assert code == 0, err
    np.testing.assert_array_equal(opened(tmp_path / "x.png")[0], expected)

    (tmp_path / "broken.png").write_bytes(b"no picture")
    code, _, err = draw("--image", tmp_path / "broken.png", prompt=None, bundle=pixel_bundle)
    assert code == 2
    assert "--image" in err
