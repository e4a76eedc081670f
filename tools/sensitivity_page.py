"""Which layers suffer from how few bits, as one HTML file: layers over steps as a heat map, the worst in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from ..quant.table import FLOAT, Table, bits_of, decibels, kind_of, split
from .console import human_bytes
from .report import html_table, page, section

__all__ = ["render"]

WORST = 20
"""Rows of the table of worst layers."""

SHADES = 10
"""Of the map: as many as an eye keeps apart beside each other."""

SPAN_DB = 50.0
"""From the darkest shade to the page's own colour: 8 bits or so, at 6 dB each."""

CELL = 16
"""Pixels a row is high."""

STYLE = (
    "@media (min-width: 34.01rem) { .heat { grid-template-columns: minmax(8rem, 24rem) 1fr 4.5rem; } } "
    f".heat svg {{ height: {CELL}px; }}"
    ".heat .label, .heat .value { font-size: 11px; line-height: 1.3; white-space: nowrap; overflow: hidden; "
    "text-overflow: ellipsis; } .heat text { fill: var(--soft); font-size: 11px; }"
    ".worst td:first-child { overflow-wrap: anywhere; min-width: 9rem; }"
    ".swatch { display: inline-block; width: 1.4em; height: .8em; }"
    + "".join(
        f".h{i} {{ --h: color-mix(in oklab, var(--bad) {round(100 * i / (SHADES - 1))}%, var(--page)); "
        "fill: var(--h); background: var(--h); }"
        for i in range(SHADES)
    )
)


def render(table: Table, chosen: Mapping[str, str]) -> str:
    """A page of one part.

    chosen  layer -> option; layers that are not named stay floats
    """
    body = [
        f"<style>{STYLE}</style>",
        _head(table, chosen),
        _worst(table, chosen),
        _kinds(table),
        *_maps(table, chosen),
    ]
    return page(f"fewstep sensitivity: {table.part}", body)


def _head(table: Table, chosen: Mapping[str, str]) -> str:
    bits = table.average_bits(chosen)
    stored = sum(table.stored_bits(layer, chosen.get(layer, FLOAT)) for layer in table.layers)
    lead = f"<b>{escape(table.part)}</b> at {bits:.2f} bits a weight"
    if any(option != FLOAT for option in chosen.values()):
        lead += f": {decibels(table.predicted(chosen)):.1f} dB of signal over noise are predicted at the end"
    count: dict[str, int] = {}
    for layer in table.layers:
        option = chosen.get(layer, FLOAT)
        count[option] = count.get(option, 0) + 1
    mix = ", ".join(f"{number} {escape(option)}" for option, number in sorted(count.items()))
    how = {
        "exact": "Measured with one layer quantized at a time.",
        "local": "Estimated from each layer's own error and how much of it arrives.",
    }
    return (
        f'<p class="soft small">fewstep sensitivity</p><h1>{escape(table.part)}</h1><p class="lead">{lead}.</p>'
        f'<p class="soft small">{len(table.layers)} layers: {mix}; {human_bytes(math.ceil(stored / 8))} of weights. '
        f"{how.get(table.mode, '')} The prediction adds the layers' squared errors.</p>"
    )


def _worst(table: Table, chosen: Mapping[str, str]) -> str:
    now = [(layer, option) for layer, option in chosen.items() if option != FLOAT]
    total = table.predicted(chosen)
    if not now or total <= 0:
        return ""
    rows = []
    for layer, option in sorted(now, key=lambda item: -table.error(*item))[:WORST]:
        error = table.error(layer, option)
        numbers = (
            f"{decibels(error):.1f} dB",
            f"{100 * error / total:.1f} %",
            human_bytes(math.ceil(table.stored_bits(layer, option) / 8)),
        )
        texts = (_short(layer), kind_of(layer), option)
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        rows.append(cells + "".join(f'<td class="n">{number}</td>' for number in numbers))
    header = ("layer", "kind", "option", "alone, at the end", "of all noise", "size")
    text = "Those that make most of the noise as chosen: raise them first."
    return section("Worst layers", text, f'<div class="worst">{html_table(header, rows, numbers=3)}</div>')


def _kinds(table: Table) -> str:
    options = [option for option in table.options if 8 not in bits_of(option)]
    found = {option: table.by_kind(option) for option in options}
    if not options:
        return ""
    kinds = list(dict.fromkeys(kind for by in found.values() for kind in by))
    kinds.sort(key=lambda kind: min(by[kind]["mean_db"] for by in found.values() if kind in by))
    rows = []
    for kind in kinds:
        one = next(by[kind] for by in found.values() if kind in by)
        each = "".join(
            f'<td class="n">{by[kind]["mean_db"]:.1f}</td>' if kind in by else '<td class="n"></td>'
            for by in found.values()
        )
        size = f'<td class="n">{one["layers"]:.0f}</td><td class="n">{one["weights"]:,.0f}</td>'
        rows.append(f"<td>{escape(kind)}</td>{size}{each}")
    header = ("kind", "layers", "weights", *(f"{option}, dB" for option in options))
    text = "Signal over noise of the part's output, the mean over layers of a kind and over steps."
    return section("Kinds of layers", text, html_table(header, rows, numbers=len(header) - 1))


def _maps(table: Table, chosen: Mapping[str, str]) -> list[str]:
    """One of the choice, where there is one, and one of the fewest bits of weights and of inputs."""
    maps = []
    if any(option != FLOAT for option in chosen.values()):
        maps.append(("As chosen", [chosen.get(layer, FLOAT) for layer in table.layers]))
    for kind, title in (("w", "Weights"), ("a", "Inputs")):
        mine = [option for option in table.options if option[0] == kind]
        if mine:
            least = min(mine, key=lambda option: int(option[1:]))
            maps.append((f"{title} of {least[1:]} bits", [least] * len(table.layers)))
    return [
        section(title, _legend() if i == 0 else "", _map(table, options))
        for i, (title, options) in enumerate(maps)
    ]


def _legend() -> str:
    shades = "".join(f'<span class="swatch h{i}"></span>' for i in reversed(range(SHADES)))
    return (
        f"Signal over noise of the part's output with one layer quantized: {shades} from 10 dB or less to "
        f"{10 + SPAN_DB:g} dB or more. A column is a call of the plan; the number is of the final latents."
    )


def _map(table: Table, options: Sequence[str]) -> str:
    """A row for each layer that its option quantizes."""
    steps, rows = len(table.steps), []
    for i, (layer, option) in enumerate(zip(table.layers, options, strict=True)):
        singles = [table.options.index(single) for single in split(option)]
        if not singles or not table.takes(layer, option):
            continue
        noise: NDArray[np.float64] = sum(table.nsr[i, j] for j in singles)  # type: ignore[assignment]
        cells = []
        for k, value in enumerate(noise):
            tip = f"<title>call {table.steps[k] + 1}: {decibels(value):.1f} dB</title>"
            place = f'x="{100 * k / steps:.2f}%" width="{100 / steps:.2f}%" height="{CELL}"'
            cells.append(f'<rect class="h{_shade(decibels(value))}" {place}>{tip}</rect>')
        name, final = escape(layer), f"{decibels(table.error(layer, option)):.1f} dB"
        drawing = f'<svg width="100%" height="{CELL}" role="img" aria-label="{name}: {final}">{"".join(cells)}</svg>'
        label = f'<span class="label" title="{name}">{option} {escape(_short(layer))}</span>'
        rows.append(f'{label}{drawing}<span class="value">{final}</span>')
    return f'<div class="plot heat">{"".join(rows)}{_axis(table.steps)}</div>'


def _axis(steps: Sequence[int]) -> str:
    marks = "".join(
        f'<text x="{100 * (k + 0.5) / len(steps):.2f}%" y="12" text-anchor="middle">{step + 1}</text>'
        for k, step in enumerate(steps)
    )
    return f'<span></span><svg width="100%" height="{CELL}" aria-hidden="true">{marks}</svg><span></span>'


def _short(layer: str) -> str:
    """Without the wrapper's name, which all layers of a network share."""
    return layer.removeprefix("network.")


def _shade(db: float) -> int:
    """0: nothing to see."""
    share = (10 + SPAN_DB - db) / SPAN_DB
    return round(min(1.0, max(0.0, share)) * (SHADES - 1))
