"""`fewstep serve`: what is answered, with which headers, and what never is."""

import json
import shutil
import threading
from http.client import HTTPConnection

import pytest

from fewstep.export import site as sites
from fewstep.runtime.errors import BadInput, BundleError, OutputError
from fewstep.tools import cli
from fewstep.tools import serve as serving


@pytest.fixture
def app(tmp_path, monkeypatch):
    """A built app of four files."""
    folder = tmp_path / "app"
    (folder / "ort").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>")
    (folder / "app.js").write_text("1")
    (folder / "ort/ort.mjs").write_text("2")
    (folder / "ort/ort.wasm").write_bytes(b"\0asm")
    monkeypatch.setattr(sites, "app_folder", lambda: folder)
    return folder


@pytest.fixture
def ask(app, text_bundle):
    """`ask("GET", "/")` -> (status, headers, body) of a server with one bundle."""
    server = serving.serve(serving.site([text_bundle]))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def one(method, path, **headers):
        connection = HTTPConnection(*server.server_address, timeout=30)
        connection.putrequest(method, path, skip_host=False)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), body

    yield one
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_listed_file_is_served_as_it_is(ask, text_bundle):
    name = text_bundle.name
    manifest = (text_bundle / "manifest.json").read_bytes()
    assert ask("GET", f"/bundles/{name}/manifest.json")[2] == manifest
    for path in json.loads(manifest)["files"]:
        assert ask("GET", f"/bundles/{name}/{path}")[2] == (text_bundle / path).read_bytes()


def test_the_catalog_names_every_bundle(ask, text_bundle):
    listed = json.loads(ask("GET", "/bundles.json")[2])
    assert listed["fewstep_site"] == 1
    (entry,) = listed["bundles"]
    assert (entry["path"], entry["name"]) == (f"bundles/{text_bundle.name}/", "tiny")
    assert entry["device"] == "cpu"
    assert entry["bytes"] > 1000


def test_the_page_is_isolated_and_may_only_ask_here(ask):
    status, headers, body = ask("GET", "/")
    assert (status, body) == (200, b"<!doctype html>")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert headers["Content-Type"] == "text/html"


@pytest.mark.parametrize(
    ("path", "kind"), [("/ort/ort.mjs", "text/javascript"), ("/ort/ort.wasm", "application/wasm")]
)
def test_code_has_the_types_browsers_insist_on(ask, path, kind):
    assert ask("GET", path)[1]["Content-Type"] == kind


@pytest.mark.parametrize(
    "path",
    [
        "/../app/app.js",
        "/bundles/../app.js",
        "/%2e%2e/app.js",
        "/ort/",
        "/app.js/",
        "/bundles/bundle/extra.txt",
        "/\\app.js",
    ],
)
def test_nothing_but_listed_files_is_there(ask, text_bundle, path):
    assert ask("GET", path)[0] == 404


def test_a_file_the_browser_has_is_not_sent_again(ask, text_bundle):
    path = f"/bundles/{text_bundle.name}/unet/model.onnx"
    tag = ask("GET", path)[1]["ETag"]
    status, _, body = ask("GET", path, If_None_Match=tag)
    assert (status, body) == (304, b"")
    assert ask("GET", path, If_None_Match='"other"')[0] == 200


def test_only_reading_is_answered(ask):
    assert ask("HEAD", "/app.js")[1]["Content-Length"] == "1"
    assert ask("HEAD", "/app.js")[2] == b""
    assert ask("POST", "/app.js")[0] == 501


def test_a_file_deleted_since_is_not_found(app, ask):
    (app / "app.js").unlink()
    assert ask("GET", "/app.js")[0] == 404


def test_two_bundles_of_one_folder_name_have_two_addresses(app, text_bundle, tmp_path):
    twin = tmp_path / "elsewhere" / text_bundle.name
    shutil.copytree(text_bundle, twin)
    found = serving.site([text_bundle, twin])
    assert f"/bundles/{text_bundle.name}-2/manifest.json" in found


def test_a_bundle_of_another_engine_is_refused_before_anything_is_served(app, own_bundle):
    path = own_bundle / "manifest.json"
    path.write_text(path.read_text().replace('"onnxruntime"', '"openvino"', 1))
    with pytest.raises(BadInput, match=r"is for openvino, which no browser has; .*--target web-wasm"):
        serving.site([own_bundle])


def test_a_folder_that_is_no_bundle_is_refused(app, tmp_path):
    with pytest.raises(BundleError, match="has no manifest.json"):
        serving.site([tmp_path])


def test_an_app_that_is_not_built_names_the_command(own_bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(sites.runtime, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BadInput, match="the web app is not built: .*; fix: run make web"):
        serving.site([own_bundle])


def test_a_port_that_is_taken_is_said_so(app):
    with (
        serving.serve({}) as server,
        pytest.raises(OutputError, match=r"cannot listen on port \d+: .*; fix: pick another --port"),
    ):
        serving.serve({}, server.server_address[1])


def test_a_port_is_a_number_of_16_bits(app, own_bundle, capsys):
    assert cli.main(["serve", str(own_bundle), "--port", "65536"]) == 2
    assert "--port 65536; expected 0 to 65535" in capsys.readouterr().err
