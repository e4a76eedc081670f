import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from fewstep.export import child
from fewstep.runtime.errors import BadInput, FewstepError, GateFailed

# what children run has to be importable there: they live in the package's own modules and in the standard library


def test_a_child_returns_the_value_and_its_peak_memory(tmp_path):
    done = child.call(os.path.join, "a", "b", work=tmp_path)
    assert done.value == os.path.join("a", "b")
    assert done.peak_rss_bytes == 0 or 5e6 < done.peak_rss_bytes < 1e9
    assert not list(tmp_path.glob("*.pickle"))


def test_an_error_of_ours_crosses_with_its_words(tmp_path):
    from fewstep.targets import load_target

    with pytest.raises(BadInput, match=r"unknown target 'x'; expected .*; fix: fewstep targets"):
        child.call(load_target, "x", work=tmp_path)


def test_any_other_error_is_reported_in_one_line(tmp_path):
    with pytest.raises(FewstepError, match="path.join") as caught:
        child.call(os.path.join, None, work=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_killed_child_says_it_was_memory(tmp_path):
    with pytest.raises(
        FewstepError, match=r"signal.raise_signal, most likely for want of memory; fix: close other"
    ):
        child.call(signal.raise_signal, signal.SIGKILL, work=tmp_path)


def test_children_die_with_their_parent(tmp_path):
    """A parent killed with SIGKILL leaves no child behind."""
    code = (
        "import sys, time; from pathlib import Path; from fewstep.export import child; "
        f"child.call(time.sleep, 60, work=Path({str(tmp_path)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    pids = []
    for _ in range(300):
        time.sleep(0.1)
        pids = _children(parent.pid)
        if pids:
            break
    assert pids
    time.sleep(1.0)  # let it come as far as watching its standard input
    parent.kill()
    parent.wait()
    for _ in range(300):
        if not any(_alive(pid) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail(f"{pids} outlived their parent")


def _children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_our_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(GateFailed("found", expected="e", fix="f")))
    assert str(error) == "found; expected e; fix: f"
