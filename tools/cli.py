"""The `fewstep` command.

Exit codes: 0 done, 2 bad input, 5 a gate failed, 130 interrupted, 70 a bug. With --json stdout holds exactly
one JSON document whatever happens; progress and error lines go to stderr.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

from .. import __version__
from ..runtime.errors import BadInput, Cancelled, FewstepError, OutputError
from .console import Answer, note

__all__ = ["main", "run"]

COMMANDS = {
    "prune": "take out what a denoiser needs least",
    "export": "turn a model into a bundle for a target",
    "run": "draw images with a bundle",
    "serve": "draw in a browser: the web app and bundles on this machine",
    "bench": "measure bundles against each other on this host",
    "compare": "measure how far a bundle's pictures are from another's, or from its model's",
    "verify": "check a bundle: every hash, every graph, one replayed latent",
    "samplers": "list samplers and time grids, or draw a gallery of them",
    "distill": "prune, recover and distill a model by a recipe",
    "sensitivity": "measure which layers of a model suffer from how few bits",
    "tune": "fit a plan of few calls to a bundle's own model",
    "show": "say what is in a model or a bundle",
    "targets": "list the devices fewstep exports for",
    "doctor": "say what this host can do and what is missing",
    "demo": "export, verify, draw and measure the built-in model",
}
"""Command -> its line in the help; the module of that name here has `add(parser)` and `call(args)`."""

INTERNAL = 70


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are ours: one line, exit code 2, JSON on request."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message, fix=f"{self.prog} --help")


def build_parser(command: str | None = None) -> Parser:
    """The parser of the whole line; only the named command's module is imported, with its libraries."""
    parser = Parser(prog="fewstep", description="Ship diffusion models to devices.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fewstep {__version__}")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, line in COMMANDS.items():
        sub = commands.add_parser(name, help=line, description=line, parents=[common], allow_abbrev=False)
        if name == command:
            _module(name).add(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code; only --help and --version raise (SystemExit)."""
    argv = sys.argv[1:] if argv is None else argv
    as_json, debug = "--json" in argv, "--debug" in argv
    command = next((word for word in argv if word in COMMANDS), None)
    try:
        with _sigterm_interrupts():
            args = build_parser(command).parse_args(argv)
            answer: Answer = _module(args.command).call(args)
    except BrokenPipeError:
        return _broken_pipe()
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _fail(error, as_json)
    try:
        print(json.dumps(answer.data, indent=2, allow_nan=False) if as_json else answer.text, flush=True)
    except BrokenPipeError:
        return _broken_pipe()
    return answer.exit_code


def describe(error: BaseException) -> dict[str, Any]:
    """Any exception as the JSON document shows it, with the exit code that belongs to it."""
    # a library written in C that is interrupted while it is imported says that it failed, because of the interrupt
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        error = Cancelled("interrupted")
    elif isinstance(error, OSError) and not isinstance(error, FewstepError):
        # a full disk or a missing right is the user's world, wherever it is met
        error = OutputError(str(error), fix="check the path, its permissions and the free space")
    elif isinstance(error, MemoryError):
        error = BadInput(
            "not enough memory", fix="close other programs, or pass --low-memory or a smaller size"
        )
    if isinstance(error, FewstepError):
        parts = {"found": error.found, "expected": error.expected, "fix": error.fix}
        return {"type": type(error).__name__, "message": str(error), **parts, "exit_code": error.exit_code}
    message = f"{type(error).__name__}: {error}"[:400] + "; a bug in fewstep; fix: run again with --debug"
    return {"type": type(error).__name__, "message": message, "exit_code": INTERNAL}


def _module(command: str) -> Any:
    return import_module(f".{command}", __package__)


def _fail(error: BaseException, as_json: bool) -> int:
    if isinstance(error, SystemExit):  # argparse after --help or --version
        raise error
    said = describe(error)
    if as_json:
        print(json.dumps({"error": said}, indent=2), flush=True)
    note(f"fewstep: error: {' '.join(said['message'].split())}")
    return int(said["exit_code"])


def _broken_pipe() -> int:
    """Whoever read our output has seen enough (`fewstep show X | head`): leave without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM unwinds like Ctrl-C, so that temporary folders are removed on the way out."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: an embedding program owns the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run() -> NoReturn:
    """`main` as a program of its own."""
    code = main()
    if code == Cancelled.exit_code:
        # Python kills itself with SIGINT at the end, whatever main returned, if the interrupt once passed through C
        # code that runs Python (some extension modules while they are imported): leave before it can.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
