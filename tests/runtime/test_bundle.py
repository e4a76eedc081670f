"""A bundle on disk: whole or absent when written, exactly what its manifest lists when read."""

# ruff: noqa: PT012 -- what a writer raises, it raises inside its own with block

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.runtime import files, plainfiles
from fewstep.runtime.bundle import Bundle, BundleWriter
from fewstep.runtime.errors import BundleError, OutputError
from fewstep.runtime.manifest import Manifest, PartSpec, SampleSpec

MANIFEST = Manifest(
    name="tiny",
    task="unconditional",
    process={"kind": "edm"},
    prediction="sample",
    denoiser="unet",
    # neither .onnx nor .xml: what the gate makes of graphs is test_graphfile.py's business
    parts={"unet": PartSpec("openvino", "unet/model.graph", (), ())},
    sample=SampleSpec(height=8, width=8, channels=3),
    plans={},
    sampler="ddim",
)


def fill(folder: Path, size: int = 1000) -> None:
    (folder / "unet").mkdir()
    (folder / "unet/model.graph").write_bytes(b"x" * size)
    (folder / "model_index.json").write_text("{}")


def write(dest: Path, size: int = 1000, **options: Any) -> Path:
    with BundleWriter(dest, **options) as writer:
        fill(writer.folder, size)
        return writer.commit(MANIFEST)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "out")


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


# ---- reading


@pytest.mark.parametrize("check", ["hash", "size"])
def test_what_was_written_opens(path: Path, check: Any) -> None:
    opened = Bundle.open(path, check)
    assert opened.path == path
    assert opened.manifest.files["unet/model.graph"].bytes == 1000
    assert set(opened.manifest.files) == {"unet/model.graph", "model_index.json"}


def test_a_listed_file_has_a_path(path: Path) -> None:
    assert Bundle.open(path).file("unet/model.graph").read_bytes() == b"x" * 1000


@pytest.mark.parametrize("name", ["../secret", "manifest.json", "unet", "/etc/passwd", ""])
def test_a_file_that_is_not_listed_has_no_path(path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"not listed in manifest\.json"):
        Bundle.open(path).file(name)


def test_a_bundle_opens_through_a_link_to_its_folder(path: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(path)
    assert Bundle.open(tmp_path / "current").manifest.name == "tiny"


def test_a_changed_byte_is_noticed(path: Path) -> None:
    (path / "unet/model.graph").write_bytes(b"x" * 999 + b"y")
    with pytest.raises(BundleError, match=r"unet/model\.graph has been changed or damaged"):
        Bundle.open(path)


def test_size_alone_does_not_notice_a_changed_byte(path: Path) -> None:
    (path / "unet/model.graph").write_bytes(b"x" * 999 + b"y")
    assert Bundle.open(path, check="size").manifest.name == "tiny"


def corruptions() -> dict[str, tuple[Callable[[Path], Any], str]]:
    def longer(p: Path) -> None:
        (p / "unet/model.graph").write_bytes(b"x" * 1001)

    def symlink(p: Path) -> None:
        (p / "model_index.json").rename(p.parent / "elsewhere")
        (p / "model_index.json").symlink_to("../elsewhere")

    def folder_link(p: Path) -> None:
        (p / "unet").rename(p.parent / "unet")
        (p / "unet").symlink_to("../unet")

    def hard_link(p: Path) -> None:
        (p.parent / "secret").hardlink_to(p / "unet/model.graph")

    def fifo(p: Path) -> None:
        (p / "model_index.json").unlink()
        os.mkfifo(p / "model_index.json")

    def manifest_link(p: Path) -> None:
        (p / "manifest.json").rename(p.parent / "m.json")
        (p / "manifest.json").symlink_to("../m.json")

    def folder(p: Path) -> None:
        (p / "model_index.json").unlink()
        (p / "model_index.json").mkdir()

    return {
        "longer": (longer, r"unet/model\.graph has 1,001 bytes; expected 1,000"),
        "missing": (lambda p: (p / "model_index.json").unlink(), r"model_index\.json is missing"),
        "last of its folder missing": (
            lambda p: (p / "unet/model.graph").unlink(),
            r"unet/model\.graph is missing",
        ),
        "extra": (lambda p: (p / "unet/run.py").touch(), r"'unet/run\.py' is not listed.*delete it"),
        "hidden extra": (lambda p: (p / ".DS_Store").touch(), r"'\.DS_Store' is not listed"),
        "name that is no UTF-8": (
            lambda p: Path(os.fsdecode(bytes(p) + b"/\xff")).touch(),
            r"'\\udcff' is not",
        ),
        "empty folder": (lambda p: (p / "cache").mkdir(), "cache is an empty folder"),
        "symlink": (symlink, r"model_index\.json is a symbolic link"),
        "link to a folder": (folder_link, "unet is a symbolic link"),
        "hard link": (hard_link, r"unet/model\.graph is a hard link: 2 names"),
        "fifo": (fifo, r"model_index\.json is a folder or a device"),
        "link for the manifest": (manifest_link, r"manifest\.json is a symbolic link"),
        "folder for a file": (folder, "empty folder"),
        "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "the file is empty"),
        "binary manifest": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "not JSON"),
        "cut manifest": (lambda p: os.truncate(p / "manifest.json", 300), "not JSON"),
        "large manifest": (lambda p: os.truncate(p / "manifest.json", 1 << 25), "at most 16,777,216"),
    }


@pytest.mark.parametrize("check", ["hash", "size"])
@pytest.mark.parametrize("name", corruptions())
def test_anything_else_than_the_listed_plain_files_is_refused(path: Path, name: str, check: Any) -> None:
    corrupt, message = corruptions()[name]
    corrupt(path)
    with pytest.raises(BundleError, match=message):
        Bundle.open(path, check)


def test_a_path_that_leaves_the_folder_is_refused_before_it_is_read(path: Path) -> None:
    data = json.loads((path / "manifest.json").read_text())
    data["files"]["../secret.bin"] = {"sha256": "0" * 64, "bytes": 1}
    (path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"'\.\./secret\.bin': the step '\.\.'"):
        Bundle.open(path)


def test_a_file_that_grows_while_it_is_read_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat

    def fstat_then_grow(descriptor: int) -> os.stat_result:
        info = real(descriptor)
        with open(path / "unet/model.graph", "ab") as file:
            file.write(b"!")
        return info

    opened = json.loads((path / "manifest.json").read_text())
    assert opened["files"]["unet/model.graph"]["bytes"] == 1000
    monkeypatch.setattr(plainfiles.os, "fstat", fstat_then_grow)
    with pytest.raises(BundleError, match=r"model\.graph"):
        Bundle.open(path)


def test_a_diffusers_checkpoint_is_told_to_be_exported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BundleError, match="diffusers checkpoint.*fix: run fewstep export"):
        Bundle.open(tmp_path)


def test_another_folder_is_described(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(BundleError, match=r"no manifest\.json, only: holiday\.jpg"):
        Bundle.open(tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "none")


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle.zip").touch()
    with pytest.raises(BundleError, match="is a file"):
        Bundle.open(tmp_path / "bundle.zip")


def test_graphs_go_through_the_gate(tmp_path: Path) -> None:
    manifest = dataclasses.replace(
        MANIFEST, parts={"unet": PartSpec("onnxruntime", "unet/model.onnx", (), ())}
    )
    with BundleWriter(tmp_path / "out") as writer:
        (writer.folder / "unet").mkdir()
        (writer.folder / "unet/model.onnx").write_bytes(b"\x08")
        writer.commit(manifest)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Bundle.open(tmp_path / "out")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Bundle.open(tmp_path / "out", check="size").check_graphs()


# ---- writing


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


def test_only_the_bundle_remains(path: Path, tmp_path: Path) -> None:
    assert os.listdir(tmp_path) == ["out"]
    assert names(path) == {"manifest.json", "model_index.json", "unet", "unet/model.graph"}


def test_missing_parent_folders_are_made(tmp_path: Path) -> None:
    assert Bundle.open(write(tmp_path / "a/b/c")).manifest.name == "tiny"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "out") as writer:
        fill(writer.folder)
        raise error
    assert os.listdir(tmp_path) == []


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        fill(writer.folder)
    assert os.listdir(tmp_path) == []


def test_an_existing_bundle_is_not_replaced_unasked(path: Path) -> None:
    with pytest.raises(OutputError, match="exists; fix: .*--overwrite"):
        write(path)


def test_an_existing_bundle_is_replaced_when_asked(path: Path, tmp_path: Path) -> None:
    write(path, size=5, overwrite=True)
    assert Bundle.open(path).manifest.files["unet/model.graph"].bytes == 5
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_bundle_is_replaced_where_names_cannot_be_exchanged(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    write(path, size=5, overwrite=True)
    assert Bundle.open(path).manifest.files["unet/model.graph"].bytes == 5
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_replacement_keeps_the_old_bundle(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export"), BundleWriter(path, overwrite=True) as writer:
        fill(writer.folder, 5)
        raise ValueError("export failed")
    assert Bundle.open(path).manifest.files["unet/model.graph"].bytes == 1000
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_becomes_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert Bundle.open(write(tmp_path / "out")).manifest.name == "tiny"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").touch()
    with pytest.raises(OutputError, match="not a fewstep bundle"):
        write(tmp_path / "photos", overwrite=overwrite)
    assert os.listdir(tmp_path) == ["photos"]


def test_another_tools_manifest_does_not_make_a_folder_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an Android app"}')
    with pytest.raises(OutputError, match="not a fewstep bundle"):
        write(tmp_path, overwrite=True)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_link_is_never_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").touch() if kind == "file" else (tmp_path / "out").symlink_to("real")
    with pytest.raises(OutputError, match="exists and is no folder"):
        write(tmp_path / "out", overwrite=True)


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"), BundleWriter(tmp_path / "out") as writer:
        fill(writer.folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/precious").touch()
        writer.commit(MANIFEST)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out/precious").exists()


def test_a_file_as_parent_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*/file/out: .*; fix: "):
        write(tmp_path / "file/out")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_parent_that_is_not_writable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    # tests run as root, whom permissions do not stop
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*/out: .*; fix: (pick|write to) a folder"):
        write(tmp_path / "out")


def test_too_little_space_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"1,000,000,000,000,000 bytes needed, [\d,]+ free\); fix: free some"
    ):
        BundleWriter(tmp_path / "out", size=10**15).__enter__()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("inside", ["symlink", "hardlink", "manifest.json", "device name", "empty folder"])
def test_a_bundle_that_could_not_be_opened_is_not_written(tmp_path: Path, inside: str) -> None:
    with pytest.raises(BundleError), BundleWriter(tmp_path / "out") as writer:
        fill(writer.folder)
        match inside:
            case "symlink":
                (writer.folder / "x").symlink_to("model_index.json")
            case "hardlink":
                (writer.folder / "x").hardlink_to(writer.folder / "model_index.json")
            case "manifest.json":
                (writer.folder / "manifest.json").touch()
            case "device name":
                (writer.folder / "con.txt").touch()
            case "empty folder":
                (writer.folder / "x").mkdir()
        writer.commit(MANIFEST)
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="task"), BundleWriter(tmp_path / "out") as writer:
        fill(writer.folder)
        writer.commit(dataclasses.replace(MANIFEST, task="poetry"))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_in_the_middle_of_an_export_is_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"no space left.*at least 1,002 bytes needed.*free some space"),
        BundleWriter(tmp_path / "out") as writer,
    ):
        fill(writer.folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_another_os_error_in_the_middle_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), BundleWriter(tmp_path / "out"):
        (tmp_path / "checkpoint that is not there").read_bytes()


@pytest.mark.parametrize("failing", range(6))
def test_a_disk_that_fails_at_any_flush_leaves_the_old_bundle(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OutputError, match="input/output error"):
        write(path, size=5, overwrite=True)
    monkeypatch.undo()
    # the last flush, of the parent, comes after the rename: then the new one is whole
    assert Bundle.open(path).manifest.files["unet/model.graph"].bytes == (5 if failing == 5 else 1000)
    assert os.listdir(tmp_path) == ["out"]


WRITE = """
import resource, signal
from fewstep.runtime.bundle import BundleWriter
from fewstep.runtime.manifest import Manifest
files = {{"unet/model.graph": {{"sha256": "0" * 64, "bytes": 0}}}}
manifest = Manifest.from_json({{**{manifest!r}, "files": files}})
{before}
print("ready", flush=True)
with BundleWriter({dest!r}, overwrite=True) as writer:
    (writer.folder / "unet").mkdir()
    for name in ("unet/model.graph", "a", "b", "c"):
        with open(writer.folder / name, "wb") as file:
            for _ in range(40):
                file.write(b"x" * 50_000)
    writer.commit(manifest)
"""


def script(dest: Path, before: str = "") -> str:
    return WRITE.format(manifest=json.loads(MANIFEST.to_json()), dest=str(dest), before=before)


def test_a_file_size_limit_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)"
    run = subprocess.run(
        [sys.executable, "-c", script(tmp_path / "out", before)], capture_output=True, text=True
    )
    assert "OutputError: cannot write" in run.stderr
    assert "file too large" in run.stderr
    assert "ulimit -f" in run.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
def test_kill_9_at_any_moment_leaves_the_old_bundle_or_the_new_one(tmp_path: Path, existing: bool) -> None:
    dest = tmp_path / "out"
    outcomes = set()
    for i in range(5):
        shutil.rmtree(dest, ignore_errors=True)
        if existing:
            write(dest)
        process = subprocess.Popen([sys.executable, "-c", script(dest)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(i * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if dest.exists():
            outcomes.add(Bundle.open(dest).manifest.files["unet/model.graph"].bytes)
        else:
            assert not existing
            outcomes.add(0)
    assert outcomes <= ({1000, 2_000_000} if existing else {0, 2_000_000})

    write(dest, overwrite=True)  # the next writer clears away what the dead ones left
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_living_writer_has_so_far_is_left_alone(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as slow:
        fill(slow.folder)
        write(tmp_path / "out")
        assert slow.folder.exists()


def test_a_bundle_moved_aside_by_a_process_that_died_comes_back(path: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.rename(tmp_path / f".out.old-{dead.pid}-0123abcd")
    files.remove_stale(path)
    assert Bundle.open(path).manifest.name == "tiny"


# ---- single files


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    files.atomic_write(tmp_path / "report.json", b"new")
    assert (tmp_path / "report.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"report\.json: no space left.*at least 3 bytes needed"):
        files.atomic_write(tmp_path / "report.json", b"new")
    assert (tmp_path / "report.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        files.atomic_write(tmp_path, b"")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="create the folder first"):
        files.atomic_write(tmp_path / "none/report.json", b"")
