"""The cache of what engines compile on this device: only this user's own, whole, for this very key."""

import json
import os
import shutil
import stat

import pytest

from fewstep.runtime import compiled as cache
from fewstep.runtime.errors import OutputError

KEY = {"graph": "a", "device": "gpu", "driver": "1", "library": "x 1", "what": "engine"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "x"


class Maker:
    def __init__(self, data=b"engine"):
        self.made, self.data = 0, data

    def __call__(self, file):
        self.made += 1
        file.write_bytes(self.data)


def fetch(key=KEY, maker=None):
    """The content, and whether it had to be made."""
    maker = maker or Maker()
    return cache.compiled("x", key, maker).read_bytes(), bool(maker.made)


def test_what_was_compiled_once_is_there_the_next_time(folder):
    assert fetch() == (b"engine", True)
    assert fetch() == (b"engine", False)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("part", sorted(KEY))
def test_another_graph_device_driver_or_library_is_a_miss(folder, part):
    fetch()
    assert fetch({**KEY, part: "other"})[1]


def test_an_older_version_for_the_same_graph_and_device_goes(folder):
    old = cache.compiled("x", KEY, Maker())
    cache.compiled("x", {**KEY, "graph": "b"}, Maker())
    cache.compiled("x", {**KEY, "driver": "2"}, Maker())
    assert not old.exists()
    assert len(list(folder.glob("*.bin"))) == 2
    assert len(list(folder.glob("*.json"))) == 2


def damage_truncated(file, record, folder):
    file.write_bytes(file.read_bytes()[:-1])


def damage_flipped(file, record, folder):
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(bytes(data))


def damage_record_gone(file, record, folder):
    record.unlink()


def damage_record_not_json(file, record, folder):
    record.write_bytes(b"\xff")


def damage_record_a_list(file, record, folder):
    record.write_text("[]")


def damage_record_endless(file, record, folder):
    record.write_text(record.read_text() + " " * (1 << 17))


def damage_unsealed(file, record, folder):
    said = json.loads(record.read_text())
    record.write_text(json.dumps({**said, "hmac_sha256": "0" * 64}))


def damage_link(file, record, folder):
    elsewhere = folder / "elsewhere"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


def damage_hard_link(file, record, folder):
    os.link(file, folder / "second")


def damage_open_to_all(file, record, folder):
    file.chmod(0o666)


def damage_secret_of_another(file, record, folder):
    (folder / "secret").write_bytes(b"x" * 32)


@pytest.mark.parametrize("damage", [value for name, value in globals().items() if name.startswith("damage_")])
def test_a_damaged_or_foreign_entry_is_made_again(folder, damage):
    file = cache.compiled("x", KEY, Maker())
    damage(file, file.with_suffix(".json"), folder)
    assert fetch(maker=Maker(b"new")) == (b"new", True)
    assert fetch() == (b"new", False)


def test_an_entry_copied_from_another_cache_is_a_miss(folder, tmp_path, monkeypatch):
    fetch(maker=Maker(b"theirs"))
    theirs = tmp_path / "theirs"
    shutil.move(folder, theirs)
    fetch({**KEY, "graph": "b"})  # a cache of one's own, with its own secret
    for file in theirs.iterdir():
        if file.name != "secret":
            shutil.copy(file, folder)
    assert fetch(maker=Maker(b"ours")) == (b"ours", True)


def test_a_folder_others_can_write_to_is_refused(folder):
    fetch()
    folder.chmod(0o777)
    with pytest.raises(OutputError, match=r"others can write to .*chmod go-w"):
        fetch()


def test_only_the_user_may_read_the_secret(folder):
    fetch()
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600


def test_nothing_stays_of_a_compilation_that_fails(folder):
    def fail(file):
        file.write_bytes(b"half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.compiled("x", KEY, fail)
    assert os.listdir(folder) == ["secret"]
    assert fetch() == (b"engine", True)


def test_a_cache_that_cannot_be_written_is_said_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="file"):
        fetch()


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/fewstep"),
        ("linux", {"HOME": "/home/a"}, "/home/a/.cache/fewstep"),
        ("darwin", {"HOME": "/Users/a"}, "/Users/a/Library/Caches/fewstep"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/fewstep/cache"),
    ],
)
def test_the_cache_lies_where_the_system_keeps_such_things(monkeypatch, system, variables, expected):
    for name in ("FEWSTEP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.sys, "platform", system)
    assert cache.cache_folder().as_posix() == expected
