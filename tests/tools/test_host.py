"""The host says what it is, and "unknown" where it cannot say."""

import json

import pytest

from fewstep.tools import host
from fewstep.tools.console import human_bytes, human_rate, human_seconds, table


@pytest.fixture
def machine(monkeypatch):
    """A host whose files are the given dict; every other file is missing."""

    def be(files):
        monkeypatch.setattr(host, "_read", lambda path: files.get(str(path), ""))
        monkeypatch.setattr(host.sys, "platform", "linux")

    return be


def test_this_host_is_json_with_every_key():
    found = host.fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"]["usable"] >= 1
    assert found["libraries"]["numpy"]


def test_a_host_that_tells_nothing_is_unknown_not_wrong(machine):
    machine({})
    assert host.cpu_flags() == {}
    assert host.cpu_quota() is None
    assert host.memory("MemTotal") is None
    assert host.peak_rss_bytes() is None
    assert host.power()["governor"] is None


def test_flags_memory_and_quota_are_read_as_linux_writes_them(machine, monkeypatch):
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    machine(
        {
            "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Imaginary 9000\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1",
            "/proc/meminfo": "MemTotal:       16000 kB\nMemAvailable:    8000 kB",
            "/sys/fs/cgroup/cpu.max": "150000 100000",
            "/proc/self/status": "Name:\tpython\nVmHWM:\t    1234 kB",
        }
    )
    assert host.cpu_model() == "Imaginary 9000"
    assert [flag for flag, have in host.cpu_flags().items() if have] == ["avx2", "fma"]
    assert host.memory("MemTotal") == 16000 * 1024
    assert host.cpu_quota() == 1.5
    assert host.peak_rss_bytes() == 1234 * 1024


def test_an_unlimited_control_group_has_no_quota(machine):
    machine({"/sys/fs/cgroup/cpu.max": "max 100000"})
    assert host.cpu_quota() is None


def test_numbers_are_written_for_people():
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 * 2**30, None)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "unknown",
    ]
    assert [human_seconds(s) for s in (0.01234, 1.5, 250, None)] == ["12.3 ms", "1.5 s", "250 s", "unknown"]
    assert [human_rate(r) for r in (41.25, 16680.3)] == ["41.2", "16,680"]
    assert table([("a", 1), ("long", 22)], ("x", "y")).splitlines() == [
        "x     y",
        "----  --",
        "a     1",
        "long  22",
    ]
