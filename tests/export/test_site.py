"""`fewstep export --target web`: a folder with the app and two bundles, or nothing."""

import json

import pytest

from fewstep.export import site as sites
from fewstep.export.site import Site, app_files, export_site
from fewstep.model import Model
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput, GateFailed, OutputError
from fewstep.tools import cli

from .conftest import LINEAR, Pixels


@pytest.fixture
def app(tmp_path, monkeypatch):
    folder = tmp_path / "app"
    (folder / "ort").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>")
    (folder / "ort/ort.mjs").write_text("1")
    monkeypatch.setattr(sites, "app_folder", lambda: folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return Model.from_module(Pixels(), sample_shape=(3, 16, 16), process=LINEAR, dynamic=("height", "width"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Integers by rounding alone, in few steps: what is tested here is the folder."""
    file = tmp_path_factory.mktemp("recipe") / "quick.toml"
    file.write_text('steps = 2\noffered = [1]\n[quantize]\nrounding = "nearest"\nsamples = 2\n')
    return file


def test_a_site_is_the_app_with_a_bundle_for_each_kind_of_browser(app, model, quick, tmp_path):
    *events, done = export_site(model, tmp_path / "site", recipe=quick, steps=2)
    assert isinstance(done, Site)
    assert all(not isinstance(event, Site) for event in events)
    assert (tmp_path / "site/index.html").read_text() == "<!doctype html>"
    assert (tmp_path / "site/ort/ort.mjs").read_text() == "1"
    listed = json.loads((tmp_path / "site/bundles.json").read_text())
    assert listed["fewstep_site"] == 1
    wasm, webgpu = listed["bundles"]
    assert (wasm["path"], wasm["device"], wasm["quantized"]) == ("bundles/wasm/", "cpu", True)
    assert (webgpu["path"], webgpu["device"], webgpu["precision"]) == ("bundles/webgpu/", "gpu", "float16")
    for entry in listed["bundles"]:
        manifest = Bundle.open(tmp_path / "site" / entry["path"]).manifest
        assert {part.executed for part in manifest.parts.values()} == {"converted"}
        assert entry["bytes"] == sum(file.bytes for file in manifest.files.values())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "app") == ["site"]


def test_a_gate_that_fails_leaves_nothing(app, model, quick, tmp_path):
    hard = tmp_path / "hard.toml"
    hard.write_text(quick.read_text() + "[quality.int8]\npart_relative_error = 1e-9\npart_snr_db = 180\n")
    with pytest.raises(GateFailed):
        list(export_site(model, tmp_path / "site", recipe=hard, steps=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app", "hard.toml"]


def test_without_a_built_app_nothing_is_begun(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sites.runtime, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BadInput, match="the web app is not built: .*; fix: run make web"):
        next(export_site(model, tmp_path / "site"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_site_is_never_replaced(app, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    with pytest.raises(OutputError, match="exists and is not a fewstep site"):
        next(export_site(model, tmp_path / "mine", overwrite=True))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/bundles.json").write_text('{"fewstep_site": 1, "bundles": []}')
    with pytest.raises(OutputError, match="ask for overwriting"):
        next(export_site(model, tmp_path / "old"))


@pytest.mark.parametrize("name", ["bundles.json", "bundles"])
def test_an_app_with_a_file_of_the_site_s_own_is_refused(app, name):
    (app / name).mkdir()
    (app / name / "x").write_text("")
    with pytest.raises(BadInput, match=f"has a {name} of its own"):
        app_files(app)


def test_a_link_in_the_app_is_left_out(app, tmp_path):
    (tmp_path / "secret").write_text("x")
    (app / "link").symlink_to(tmp_path / "secret")
    assert list(app_files(app)) == ["index.html", "ort/ort.mjs"]


def test_two_exports_that_go_on_are_counted_as_one(app, model, tmp_path):
    events = list(export_site(model, tmp_path / "site", dry_run=True))
    assert {event.stage.split(":")[0] for event in events} == {"web-wasm", "web-webgpu"}
    assert not (tmp_path / "site").exists()


def test_options_that_a_site_cannot_have_are_refused(app, tmp_path, capsys):
    line = ["export", "models/emoji-64", "--target", "web", "-o", str(tmp_path / "s"), "--quantize", "w4a8"]
    assert cli.main(line) == 2
    assert "--quantize with --target web; expected the recipes of the targets" in capsys.readouterr().err
