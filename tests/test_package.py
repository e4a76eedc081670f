"""The wheel holds exactly the tree: every tracked file of the layers and of src/fewstep, and nothing else."""

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
    packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert packed == {name for name in expected if ".egg-info/" not in name}


def test_the_wheel_is_pure_python_and_brings_the_command(wheel):
    _, archive = wheel
    assert archive.filename.endswith("-py3-none-any.whl")
    [entry] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "fewstep = fewstep.tools.cli:run" in archive.read(entry).decode()
