"""The TypeScript runtime: its own tests, and what it draws of a bundle that Python made. Needs Node (make web)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.export import export_bundle
from fewstep.runtime import Pipeline

from . import golden_refused, golden_tokens

ROOT = Path(__file__).parents[2]
WEB = ROOT / "runtime/web"
STEPS = 4


def node(*command: str | Path) -> str:
    """What a command prints that was run in runtime/web."""
    assert (WEB / "node_modules").is_dir(), "run make web first: it needs Node 20 or later, and npm"
    done = subprocess.run([*command], cwd=WEB, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """dist/tests, and the library beside it."""
    node("node", "build.mjs", "--tests")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emoji-64 in float32, with plans of 1 and 2 steps beside the default one."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "recipe.toml").write_text(f"steps = {STEPS}\noffered = [1, 2]\n")
    recipe = folder / "recipe.toml"
    source = ROOT / "models/emoji-64"
    *_, done = export_bundle(source, "laptop-cpu", folder / "emoji", recipe=recipe, measure_speed=False)
    return done.path


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a rooster", "seed": 1},
    {"prompt": "a red apple", "negativePrompt": "green", "seed": 2, "guidanceScale": 5},
    {"prompt": "an octopus", "seed": 3, "plan": "steps_2", "guidanceScale": 1},
    {"prompt": "a house", "seed": 4, "plan": "steps_1", "width": 128},
]
ENGINES = ("onnxruntime-node", "onnxruntime-web")


@pytest.fixture(scope="module")
def drawn(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """By engine: the folder of the pictures, and what verify said. The second is WebAssembly, in Node."""
    found = {}
    for engine in ENGINES:
        out = tmp_path_factory.mktemp("drawn")
        said = node("node", "dist/tests/draw.js", engine, bundle, out, *map(json.dumps, REQUESTS))
        found[engine] = (out, json.loads(said)["verification"])
    return found


def test_its_own_tests_pass() -> None:
    tests = sorted((WEB / "dist/tests").glob("*.test.js"))
    assert len(tests) >= 5
    node("node", "--test", *tests)


def test_its_types_hold() -> None:
    node("npm", "run", "-s", "lint")


@pytest.mark.parametrize("index", range(len(REQUESTS)))
def test_every_engine_draws_pythons_picture(bundle: Path, drawn: Any, index: int) -> None:
    names = {"negativePrompt": "negative_prompt", "guidanceScale": "guidance_scale"}
    arguments = {names.get(name, name): value for name, value in REQUESTS[index].items()}
    with Pipeline.from_pretrained(bundle, threads=1, check="size") as pipeline:
        latents = pipeline(**arguments, output_type="latent").images
        expected = np.rint(pipeline.decode(latents)[0] * 255)
    for out, _ in drawn.values():
        found = np.fromfile(out / f"{index}.latents", np.float32).reshape(latents.shape)
        np.testing.assert_allclose(found, latents, atol=1e-4 * np.abs(latents).max())
        picture = np.fromfile(out / f"{index}.rgba", np.uint8).reshape(*expected.shape[:2], 4)
        assert np.abs(picture[:, :, :3] - expected).max() <= 1
        assert (picture[:, :, 3] == 255).all()
        assert picture[:, :, :3].std() > 10


def test_every_engine_draws_the_golden_latent(drawn: Any) -> None:
    for _, verification in drawn.values():
        assert verification["passed"], verification
        assert verification["worst"] < 1e-4


def test_what_must_be_refused_is_what_python_refuses() -> None:
    stored = json.loads(golden_refused.FILE.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(golden_refused.make())) == stored, (
        "run python -m tests.runtime.golden_refused"
    )


def test_the_ids_to_reproduce_are_pythons() -> None:
    stored = json.loads(golden_tokens.FILE.read_text(encoding="utf-8"))
    assert golden_tokens.make() == stored, "run python -m tests.runtime.golden_tokens"


def test_a_changed_byte_is_refused(bundle: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    graph = broken / "unet/model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    command = ["node", "dist/tests/draw.js", ENGINES[0], broken, tmp_path, '{"prompt": "a"}']
    done = subprocess.run(command, cwd=WEB, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unet/model.onnx has been changed or damaged" in done.stderr
