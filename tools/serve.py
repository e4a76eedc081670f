"""`fewstep serve`: the web app and some bundles on this machine alone."""

from __future__ import annotations

import argparse
import hashlib
import json
import mimetypes
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..runtime.bundle import Bundle
from ..runtime.errors import BadInput, OutputError
from ..runtime.manifest import NAME
from .console import Answer, needs, note

__all__ = ["add", "call", "serve", "site"]

HOST = "127.0.0.1"
"""Nobody else: browsers treat it as safe, which caches, WebGPU and workers ask for, and it is no public server."""

PORT = 8000
"""Python's own http.server takes this one, too."""

TYPES = {
    ".mjs": "text/javascript",
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
    ".webmanifest": "application/manifest+json",
}
"""What browsers insist on; the system's table may lack or misname them."""

HEADERS = {
    # both: SharedArrayBuffer, and with it threads (html.spec.whatwg.org, cross-origin isolation)
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # the browser keeps files, and asks whether they have changed: what it gets then is one line
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
}


@dataclass(frozen=True)
class Source:
    """What one address answers: a file, or bytes."""

    content: Path | bytes
    kind: str
    tag: str
    """Changes with the content: If-None-Match."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundles", metavar="BUNDLE", type=Path, nargs="+", help="folders that fewstep export made"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0 picks a free one")


def call(args: argparse.Namespace) -> Answer:
    if not 0 <= args.port <= 65535:  # RFC 9293: 16 bits
        raise BadInput(f"--port {args.port}", expected="0 to 65535")
    sources = site(args.bundles)
    with serve(sources, args.port) as server:
        address = f"http://{HOST}:{server.server_address[1]}/"
        note(f"serving {len(args.bundles)} bundle(s) at {address} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            note("")
    return Answer({"served": address}, f"no longer serving {address}")


def site(bundles: Iterable[Path]) -> dict[str, Source]:
    """Address -> what it answers: the built app, the catalog, and the files every bundle lists; nothing else is there.

    Raises BundleError for what is no bundle, BadInput where the app is not built.
    """
    with needs("export"):
        from ..export.site import CATALOG, app_files, app_folder, catalog, names_of

    opened = names_of(Bundle.open(path, check="size") for path in bundles)
    for name, bundle in opened.items():
        for part, spec in bundle.manifest.parts.items():
            if spec.engine != "onnxruntime":
                raise BadInput(
                    f"{bundle.path}: {part} is for {spec.engine}, which no browser has",
                    expected="parts for onnxruntime",
                    fix=f"fewstep export MODEL --target web-wasm -o {name}-web",
                )
    found = {f"/{path}": _file(file) for path, file in app_files(app_folder()).items()}
    found["/"] = found["/index.html"]
    listed = json.dumps(catalog({name: bundle.manifest for name, bundle in opened.items()})).encode()
    found[f"/{CATALOG}"] = Source(listed, TYPES.get(".json", "application/json"), _tag(listed))
    for name, bundle in opened.items():
        found[f"/bundles/{name}/{NAME}"] = _file(bundle.path / NAME)
        for path, file in bundle.manifest.files.items():
            found[f"/bundles/{name}/{path}"] = Source(bundle.file(path), _kind(path), f'"{file.sha256}"')
    return found


def serve(sources: Mapping[str, Source], port: int = 0) -> ThreadingHTTPServer:
    """A server that listens on this machine alone; port 0 picks a free one. Raises OutputError where it is taken."""
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, sources))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise OutputError(
            f"cannot listen on port {port}: {why}", fix="pick another --port, or 0 for any"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    """One request. Addresses are looked up, never joined to a folder: there is nothing to escape from."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte, after which a connection is given up

    def __init__(self, sources: Mapping[str, Source], *args: object) -> None:
        self.sources = sources
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        source = self.sources.get(self.path.split("?")[0].split("#")[0])
        if source is None:
            self._start(HTTPStatus.NOT_FOUND, 0)
        elif self.headers.get("If-None-Match") == source.tag:
            self._start(HTTPStatus.NOT_MODIFIED, 0, {"ETag": source.tag})
        elif isinstance(source.content, bytes):
            self._start(HTTPStatus.OK, len(source.content), {"ETag": source.tag, "Content-Type": source.kind})
            if body:
                self.wfile.write(source.content)
        else:
            self._file(source.content, source, body)

    def _file(self, path: Path, source: Source, body: bool) -> None:
        try:
            with open(path, "rb") as file:
                self._start(
                    HTTPStatus.OK,
                    os.fstat(file.fileno()).st_size,
                    {"ETag": source.tag, "Content-Type": source.kind},
                )
                if body:
                    shutil.copyfileobj(file, self.wfile, 1 << 20)
        except FileNotFoundError:  # deleted since
            self._start(HTTPStatus.NOT_FOUND, 0)

    def _start(self, status: HTTPStatus, size: int, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Length": str(size), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody asked for a line a request."""

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # whoever asked has gone
            super().handle()


def _file(path: Path) -> Source:
    info = path.stat()
    return Source(path, _kind(path.name), f'"{info.st_mtime_ns:x}-{info.st_size:x}"')


def _kind(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()}"'
