"""Plots as inline SVG that flow with the page: positions in per cent, text and strokes in real pixels.

No viewBox: a scaled drawing has unreadable text on a phone. Colours are CSS classes (c0, c1, ...), so that
the page decides them for light and dark. Every axis starts at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

import numpy as np

__all__ = ["bars", "curves", "stacked", "strips", "ticks"]

ROW = 34
AXIS = 22
HEIGHT = 190
"""Pixels of a plot of curves, its axis not counted."""
COLOURS = 6
"""Of the page's style sheet."""


def ticks(top: float, about: int = 4) -> list[float]:
    """Round numbers from 0 up to and not past `top`, steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not (top > 0 and math.isfinite(top)):
        return [0.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(int(top / step * 1.0001) + 1)]


def strips(rows: Sequence[tuple[str, Sequence[float]]], unit: str) -> str:
    """One row a series: every sample a dot, the middle half a box, the median a line."""
    top = max((max(samples) for _, samples in rows if samples), default=0.0) * 1.04
    drawn = []
    for i, (label, samples) in enumerate(rows):
        if not samples:
            continue
        p25, p50, p75 = np.percentile(samples, (25, 50, 75))
        marks = [
            f'<rect class="box c{i}" x="{_at(p25, top)}" y="7" width="{_at(p75 - p25, top)}" height="20"/>',
            *(
                f'<circle class="dot c{i}" cx="{_at(value, top)}" cy="{11 + (n * 7) % 13}" r="2.5"/>'
                for n, value in enumerate(samples)
            ),
            f'<rect class="median c{i}" x="{_at(p50, top)}" y="3" width="2" height="28"/>',
        ]
        drawn.append(_row(label, f"{_short(p50)} {unit}", "".join(marks)))
    return _plot(drawn, top, unit)


def bars(rows: Sequence[tuple[str, float]], unit: str) -> str:
    """One bar a row."""
    top = max((value for _, value in rows), default=0.0) * 1.04
    drawn = [
        _row(label, f"{_short(value)} {unit}", _bar(0, value, top, f"c{i}"))
        for i, (label, value) in enumerate(rows)
    ]
    return _plot(drawn, top, unit)


def stacked(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str) -> str:
    """One bar a row, cut into named stages; a legend below."""
    top = max((sum(stages.values()) for _, stages in rows), default=0.0) * 1.04
    names = list(dict.fromkeys(name for _, stages in rows for name in stages))
    drawn = []
    for label, stages in rows:
        start, marks = 0.0, []
        for name, value in stages.items():
            marks.append(_bar(start, value, top, f"s{names.index(name)}", f"{name}: {_short(value)} {unit}"))
            start += value
        drawn.append(_row(label, f"{_short(start)} {unit}", "".join(marks)))
    legend = "".join(f'<span class="key s{i}">{escape(name)}</span>' for i, name in enumerate(names))
    return _plot(drawn, top, unit) + f'<p class="legend">{legend}</p>'


def curves(lines: Sequence[tuple[str, Sequence[float | None]]], unit: str, step: str) -> str:
    """Lines over 1, 2, 3, ...; None is left out, what lies below 0 is drawn at 0. A legend below.

    step  what the horizontal axis counts
    """
    values = [value for _, line in lines for value in line if value is not None]
    top, count = max(values, default=0.0) * 1.04, max((len(line) for _, line in lines), default=0)

    def x(i: int) -> str:  # the first tenth is the scale's
        return f"{10 + 88 * i / max(1, count - 1):.2f}%"

    def y(value: float) -> str:
        return f"{HEIGHT * (1 - max(0.0, value) / top) if top > 0 else HEIGHT:.1f}"

    marks = []
    for tick in ticks(top):
        text = f'<text x="9%" y="{y(tick)}" dy="4" text-anchor="end">{_short(tick)}</text>'
        marks.append(f'<line class="rule" x1="10%" x2="98%" y1="{y(tick)}" y2="{y(tick)}"/>{text}')
    for number, (label, line) in enumerate(lines):
        places = [(x(i), y(v), v) for i, v in enumerate(line) if v is not None]
        for (x1, y1, _), (x2, y2, _) in pairwise(places):
            marks.append(f'<line class="curve k{number % COLOURS}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
        for cx, cy, value in places:
            tip = f"<title>{escape(label)}: {_short(value)} {unit}</title>"
            marks.append(f'<circle class="c{number % COLOURS}" cx="{cx}" cy="{cy}" r="2.5">{tip}</circle>')
    for i in sorted({0, (count - 1) // 2, count - 1}) if count else ():
        marks.append(f'<text x="{x(i)}" y="{HEIGHT + 16}" text-anchor="middle">{step} {i + 1}</text>')
    legend = "".join(
        f'<span class="key k{i % COLOURS}">{escape(label)}</span>' for i, (label, _) in enumerate(lines)
    )
    drawing = f'<svg width="100%" height="{HEIGHT + AXIS}" role="img">{"".join(marks)}</svg>'
    return f'<div class="curves">{drawing}</div><p class="legend">{legend} (in {unit})</p>'


def _plot(rows: Sequence[str], top: float, unit: str) -> str:
    """Rows above their axis. The axis is one more row, so that its ticks stand under the drawings."""
    marks = []
    for value in ticks(top):
        anchor = (
            "start" if value == 0 else "end" if value > 0.95 * top else "middle"
        )  # none may leave the page
        text = f"{_short(value)} {unit}" if value else "0"
        marks.append(f'<text x="{_at(value, top)}" y="15" text-anchor="{anchor}">{text}</text>')
    axis = f'<svg class="axis" width="100%" height="{AXIS}" aria-hidden="true">{"".join(marks)}</svg>'
    return f'<div class="plot">{"".join(rows)}<span></span>{axis}<span></span></div>'


def _row(label: str, value: str, marks: str) -> str:
    name = escape(label)
    drawing = f'<svg width="100%" height="{ROW}" role="img" aria-label="{name}: {value}">{marks}</svg>'
    return f'<span class="label">{name}</span>{drawing}<span class="value">{value}</span>'


def _bar(start: float, value: float, top: float, colour: str, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    place = f'x="{_at(start, top)}" y="7" width="{_at(value, top)}" height="20"'
    return f'<rect class="bar {colour}" {place}>{tip}</rect>'


def _at(value: float, top: float) -> str:
    return f"{100 * value / top if top else 0:.2f}%"


def _short(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
