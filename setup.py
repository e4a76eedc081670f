"""Map the top-level folders onto the package: runtime/ is fewstep.runtime, and so on.

The folders and their order are `[tool.fewstep] layers` in pyproject.toml. The packages found under each are listed
one by one, because setuptools forgets subpackages of a mapped folder without saying so.

runtime/web is an npm package; the web app that `make web` builds of it comes along where it was built.
"""

import tomllib
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fewstep"]["layers"]

packages = {"fewstep": "src/fewstep"}
for layer in LAYERS:
    packages[f"fewstep.{layer}"] = layer
    for name in find_namespace_packages(layer, exclude=["__pycache__", "*.__pycache__", "web", "web.*"]):
        packages[f"fewstep.{layer}.{name}"] = f"{layer}/{name.replace('.', '/')}"

site = [
    p.relative_to("runtime").as_posix()
    for p in sorted(Path("runtime/web/dist/site").rglob("*"))
    if p.is_file()
]

setup(
    packages=list(packages),
    package_dir=packages,
    package_data={"": ["*.toml", "*.json", "*.md", "*.html", "*.css", "py.typed"], "fewstep.runtime": site},
)
