"""Run one function in a process of its own: its memory goes back to the system, and its death is not ours.

A child is a fresh interpreter, not a fork (torch's threads do not survive one) and not multiprocessing's spawn (which
runs the caller's script again). It ends when its parent does, however the parent ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..runtime.errors import FewstepError

__all__ = ["Done", "call", "peak_rss_bytes"]


@dataclass(frozen=True)
class Done:
    value: Any
    peak_rss_bytes: int
    """The most memory the child had resident at once, file-backed pages included."""


def call(function: Callable[..., Any], *args: Any, work: Path) -> Done:
    """function(*args) in a new process; `function` is importable by name, arguments and result can be pickled.

    work  a folder for the two files that carry them
    Raises what the function raised where that is one of fewstep's errors, and FewstepError for anything else,
    a child the system ended for want of memory included.
    """
    work.mkdir(parents=True, exist_ok=True)
    job, answer = work / "job.pickle", work / "answer.pickle"
    answer.unlink(missing_ok=True)
    job.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
    name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
    command = [sys.executable, "-m", f"{__package__}.child", str(job), str(answer)]
    with open(work / "stderr.txt", "wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors)
        try:
            code = process.wait()
        finally:  # Ctrl-C, or whatever else ends the wait: the child never outlives it
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    job.unlink(missing_ok=True)
    if not answer.exists():
        raise _died(name, code, work / "stderr.txt")
    kind, value, peak = pickle.loads(answer.read_bytes())  # written by our own child a moment ago
    answer.unlink()
    if kind == "error":
        raise value
    return Done(value, peak)


def _died(name: str, code: int, stderr: Path) -> FewstepError:
    if code == -signal.SIGKILL:
        return FewstepError(
            f"the system ended the process that ran {name}, most likely for want of memory",
            fix="close other programs, or export on a machine with more memory (see --dry-run for how much)",
        )
    tail = stderr.read_text(errors="replace").strip().splitlines()[-1:]
    return FewstepError(f"the process that ran {name} ended with code {code}: {' '.join(tail)[:300]}")


def peak_rss_bytes() -> int:
    """The most memory this process had resident so far; 0 where the system does not say.

    VmHWM on Linux: getrusage's figure there includes the parent's at the time of the fork.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _die_with_parent() -> None:
    """Our stdin is a pipe nobody writes to: it ends when the parent is gone, whatever ended it."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(job: str, answer: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    _die_with_parent()
    module, name, args = pickle.loads(Path(job).read_bytes())
    try:
        reply: tuple[str, Any, int] = ("value", getattr(import_module(module), name)(*args), peak_rss_bytes())
    except FewstepError as error:
        reply = ("error", error, peak_rss_bytes())
    Path(answer).write_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    main(*sys.argv[1:])
