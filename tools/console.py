"""What a command shows: progress on stderr, one answer on stdout."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar

from ..runtime.errors import MissingExtra

T = TypeVar("T")

PLAIN_SECONDS = 2.0
"""Between two lines of progress where there is no terminal: a log is read later, not watched."""

__all__ = [
    "Answer",
    "add_threads",
    "bar",
    "human_bytes",
    "human_rate",
    "human_seconds",
    "needs",
    "note",
    "positive",
    "table",
    "watch",
]


@dataclass(frozen=True)
class Answer:
    """What a command has to say: `data` for --json, `text` for people."""

    data: dict[str, Any]
    text: str
    exit_code: int = field(default=0)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 to 10,000; nobody has more cores or more patience."""
    value = int(text)
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{value}, expected 1 to 10000")
    return value


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around an import: a third-party library that is missing becomes the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fewstep"):
            raise
        raise MissingExtra.of(error.name or "a library", extra) from None


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, help="cores for one run of a graph (default: all)")


def note(text: str) -> None:
    """One line on stderr, where it disturbs nobody who reads the answer."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str) -> Iterator[Callable[[float | None, str], None]]:
    """Yields `update(fraction, note)`: a bar on a terminal, elsewhere a plain line now and then.

    fraction  0 to 1; None where nobody knows how far it is

    Without rich a terminal gets the plain lines too.
    """
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        except ImportError:
            pass
        else:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
            with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
                task = progress.add_task(title, total=1.0, note="")
                yield lambda fraction, text: progress.update(task, completed=fraction, note=text)
            return

    last = -inf

    def plain(fraction: float | None, text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_SECONDS:
            note(
                " ".join([f"{title}:", *([f"{fraction:.0%}"] if fraction is not None else []), text]).rstrip()
            )
            last = time.monotonic()

    yield plain


def watch(events: Iterable[T], title: str, describe: Callable[[T], tuple[float | None, str]]) -> list[T]:
    """Run a generator to its end, draw its events and return them; `describe` gives (fraction, note).

    However it ends, the generator is closed here and now: one that the garbage collector finds at the end of the
    process can no longer remove what it wrote.
    """
    seen = []
    try:
        with bar(title) as update:
            for event in events:
                seen.append(event)
                update(*describe(event))
    finally:
        if isinstance(events, Generator):
            events.close()
    return seen


def table(rows: Iterable[Iterable[object]], header: Iterable[str] = ()) -> str:
    """Columns padded to their widest cell; numbers are whatever text the caller made of them."""
    cells = [[str(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    if not cells:
        return ""
    widths = [max(len(row[i]) if i < len(row) else 0 for row in cells) for i in range(max(map(len, cells)))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in cells]
    if header:
        lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def human_bytes(count: float | None) -> str:
    """1536 -> "1.5 KiB"; None -> "unknown"."""
    if count is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def human_rate(per_second: float | None) -> str:
    """41.25 -> "41.2"; 16680.3 -> "16,680"."""
    if per_second is None:
        return "unknown"
    return f"{per_second:.3g}" if per_second < 1000 else f"{per_second:,.0f}"


def human_seconds(seconds: float | None) -> str:
    """0.0123 -> "12.3 ms"; three digits are more than a latency deserves."""
    if seconds is None:
        return "unknown"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
