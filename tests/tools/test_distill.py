"""The command: a recipe of prune, recover and distill, its folder, its errors, and what it leaves to export."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("accelerate", reason="needs the export extra")

from diffusers import LCMScheduler  # noqa: E402
from PIL import Image  # noqa: E402

from fewstep.export.passes import configured  # noqa: E402
from fewstep.model import load  # noqa: E402
from fewstep.model.builders import tiny_sd  # noqa: E402
from fewstep.runtime.bundle import Bundle  # noqa: E402
from fewstep.targets import load_target  # noqa: E402
from fewstep.tools import cli  # noqa: E402

STUDENTS = Path(__file__).parents[2] / "models" / "train" / "students"
RECIPE = """
[recipe]
passes = ["cut_blocks", "recover", "lcm", "split_upsampling"]
[cut_blocks]
criterion = "random"
ratio = 0.2
samples = 1
calls = 1
[recover]
latents = { number = 4, steps = 2 }
training = { steps = 2, batch = 2, warm = 0 }
[lcm]
steps = 2
latents = { number = 4, steps = 2 }
training = { steps = 2, batch = 2, warm = 0 }
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("distill") / "sd")


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)
    return file


def test_a_recipe_makes_a_student_that_export_takes_as_it_is(model, recipe, tmp_path, capsys):
    out = tmp_path / "student"
    assert cli.main(["distill", str(model), "--recipe", str(recipe), "-o", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passes"] == ["cut_blocks", "recover", "lcm"]
    assert answer["left"] == ["split_upsampling"]
    assert answer["steps"] == 2
    assert not out.with_name("student.work").exists()
    logs = {file.name.split("-")[0] for file in (out / "training").iterdir()}
    assert logs == {"recover", "lcm"}

    assert type(LCMScheduler.from_pretrained(out / "scheduler")).__name__ == "LCMScheduler"
    student, teacher = load(out), load(model)
    assert (student.steps, student.guidance.scale) == (2, 1.0)
    assert student.parts["unet"].parameters() < teacher.parts["unet"].parameters()
    assert [record["pass"] for record in student.history] == ["CutBlocks", "Recover", "LCM"]

    bundle = tmp_path / "bundle"
    words = ["export", str(out), "--target", "laptop-cpu", "-o", str(bundle), "--no-speed"]
    assert cli.main(words) == 0
    manifest = Bundle.open(bundle).manifest
    assert manifest.sampler == "lcm"
    assert len(manifest.plans["default"]["calls"]) == 2
    assert manifest.guidance.scale == 1.0
    assert [record["pass"] for record in manifest.history] == ["CutBlocks", "Recover", "LCM"]


@pytest.mark.parametrize("file", sorted(STUDENTS.glob("*.toml")), ids=lambda file: file.stem)
def test_the_recipes_of_the_built_in_students_are_ones(file):
    target = load_target("laptop-cpu").with_recipe(file)
    assert [name for name, _ in configured(target)] == list(target.recipe.passes)
    files = [table.get("latents", {}).get("prompts_file", "") for table in target.recipe.options.values()]
    assert all((STUDENTS.parents[2] / name).exists() for name in files)


def test_what_was_kept_in_a_store_is_not_made_again(model, recipe, tmp_path, monkeypatch):
    store = tmp_path / "store"
    words = ["distill", str(model), "--recipe", str(recipe), "--store", str(store)]
    assert cli.main([*words, "-o", str(tmp_path / "one")]) == 0
    assert list(store.glob("latents-*/*.safetensors"))

    def never(*args, **options):
        raise AssertionError("drawn again")

    monkeypatch.setattr("fewstep.model.training.samples.trajectories", never)
    assert cli.main([*words, "-o", str(tmp_path / "two")]) == 0
    one, two = (load(tmp_path / name).parts["unet"].module.state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"lcm", "split', '"lcd", "split'), "lcd"),
        (("steps = 2\nlatents", "stepz = 2\nlatents"), "stepz"),
        (("batch = 2", "batch = 0"), "batch of training"),
        (("number = 4", "numbers = 4"), "numbers"),
    ],
)  # fmt: skip
def test_a_recipe_with_a_mistake_is_refused_before_anything_is_done(
    model, recipe, tmp_path, capsys, change, said
):
    recipe.write_text(RECIPE.replace(*change))
    assert cli.main(["distill", str(model), "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.toml"}


def test_a_recipe_of_exports_passes_alone_is_refused(model, recipe, tmp_path, capsys):
    recipe.write_text('[recipe]\npasses = ["split_upsampling"]\n')
    assert cli.main(["distill", str(model), "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 2
    assert "nothing to prune or distill" in capsys.readouterr().err


def test_a_teacher_of_other_latents_is_refused(model, recipe, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_sd(other)
    config = other / "scheduler" / "scheduler_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"beta_end": 0.02}))
    words = [
        "distill",
        str(model),
        "--teacher",
        str(other),
        "--recipe",
        str(recipe),
        "-o",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 2
    assert "differ in process" in capsys.readouterr().err


def test_a_loss_that_breaks_names_the_step_and_keeps_the_folder_away(model, recipe, tmp_path, capsys):
    recipe.write_text(
        RECIPE.replace(
            "training = { steps = 2, batch", "training = { rate = 0.999, clip = 1e30, steps = 40, batch"
        )
    )
    assert cli.main(["distill", str(model), "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "turned" in error
    assert "at step" in error
    assert not (tmp_path / "out").exists()


def test_real_pictures_are_learned_from_and_a_folder_of_none_is_refused(model, recipe, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    recipe.write_text(
        '[recipe]\npasses = ["recover"]\n[recover]\ntraining = { steps = 1, batch = 2, warm = 0 }\n'
        f'latents = {{ pictures = "{folder}" }}\n'
    )
    words = ["distill", str(model), "--recipe", str(recipe), "-o", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert str(folder) in capsys.readouterr().err
    for number, text in enumerate(("a cat", "a dog")):
        Image.new("RGB", (80, 64), (40 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text)
    (folder / "2.png").write_bytes(b"no picture")
    (folder / "2.txt").write_text("nothing")
    assert cli.main(words) == 2
    assert "2.png" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("pictures =", "skip_unreadable = true, pictures ="))
    assert cli.main(words) == 0
