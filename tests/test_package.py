"""The wheel holds exactly the tree: every tracked file of the layers and of src/fewstep, and nothing else; but for the
npm package in runtime/web, of which it takes the built web app alone."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fewstep"]["layers"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git tracks, as a fresh clone would be: no links, no caches."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    tracked = listed.stdout.split("\0")
    clone = tmp_path_factory.mktemp("clone")
    keep = (*LAYERS, "src", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    for name in filter(None, tracked):
        if name.split("/")[0] in keep and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    out = clone / "wheel"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        clone,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=clone)
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = out.glob("*.whl")
    return clone, zipfile.ZipFile(path)


def test_the_wheel_holds_exactly_the_tracked_files(wheel):
    clone, archive = wheel
    expected = set()
    for layer in LAYERS:
        expected |= {f"fewstep/{p.relative_to(clone)}" for p in (clone / layer).rglob("*") if p.is_file()}
    expected |= {str(p.relative_to(clone / "src")) for p in (clone / "src").rglob("*") if p.is_file()}
    expected = {name for name in expected if not name.startswith("fewstep/runtime/web/")}
    packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert packed == {name for name in expected if ".egg-info/" not in name}


def test_the_wheel_is_pure_python_and_brings_the_command(wheel):
    _, archive = wheel
    assert archive.filename.endswith("-py3-none-any.whl")
    [entry] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "fewstep = fewstep.tools.cli:run" in archive.read(entry).decode()


def test_a_built_web_app_comes_along(wheel):
    clone, _ = wheel
    site = clone / "runtime/web/dist/site"
    (site / "ort").mkdir(parents=True)
    for name in ("index.html", "app.js", "ort/ort.wasm"):
        (site / name).touch()
    (site.parent / "index.js").touch()
    listed = "import setuptools; setuptools.setup = lambda **o: print(*o['package_data']['fewstep.runtime'])"
    code = f"{listed}; import runpy; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=clone, check=True)
    shutil.rmtree(site.parent)
    assert done.stdout.split() == [
        f"web/dist/site/{name}" for name in ("app.js", "index.html", "ort/ort.wasm")
    ]
