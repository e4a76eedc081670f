"""A comparison as one HTML file, made of the same pieces as a benchmark's."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ..export.quality import MAX_DB
from .comparison import METRICS, Shortfall, shown, span
from .console import needs
from .pairs import Pair
from .plots import curves
from .report import flatten, html_table, page, picture, section

__all__ = ["render"]

TILES = ("image_psnr_db", "ssim", "latent_psnr_db", "network_sqnr_db", "retrieval_top1", "frechet_distance")


def render(report: Mapping[str, Any], worst: Mapping[str, Sequence[Pair]]) -> str:
    """report: the document tools/compare.py builds; worst: candidate's label -> pairs to show, with their images."""
    body = [
        _head(report),
        _tiles(report["candidates"][0]),
        _floors(report),
        _numbers(report),
        _curves(report),
    ]
    for candidate in report["candidates"]:
        body.append(_pictures(candidate["label"], report["reference"]["label"], worst[candidate["label"]]))
    labels = ", ".join(candidate["label"] for candidate in report["candidates"])
    return page(f"fewstep compare: {labels}", [*body, _job(report)])


def _head(report: Mapping[str, Any]) -> str:
    first, reference, n = report["candidates"][0], report["reference"], len(report["subjects"])
    got = first["metrics"]["image_psnr_db"]["value"]
    mine, theirs = escape(first["label"]), escape(reference["label"])
    psnr = shown("image_psnr_db", got, unit=True)
    lead = f"<b>{mine}</b> against {theirs}: a picture PSNR of {psnr}, the median of {n}."
    if got >= MAX_DB:
        lead = f"<b>{mine}</b> draws the very pictures of {theirs}."
    return (
        f'<p class="soft small">fewstep compare</p><h1>{escape(first["name"])}</h1><p class="lead">{lead}</p>'
        f'<p class="soft small">same prompts, same seeds; {escape(report["created"])}</p>'
    )


def _tiles(first: Mapping[str, Any]) -> str:
    cells = [
        f'<div class="tile"><b>{shown(name, first["metrics"][name]["value"], unit=True)}</b>'
        f'<span class="soft small">{METRICS[name].title}</span></div>'
        for name in TILES
        if name in first["metrics"]
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _floors(report: Mapping[str, Any]) -> str:
    if not report["floors"]:
        return ""
    short = [Shortfall(**s) for candidate in report["candidates"] for s in candidate["shortfalls"]]
    lines = [f'<p class="slower">{escape(str(s))}</p>' for s in short] or [
        '<p class="faster">All are met.</p>'
    ]
    asked = ", ".join(f"{name} {value:g}" for name, value in report["floors"].items())
    return section("Floors", escape(asked), "".join(lines))


def _numbers(report: Mapping[str, Any]) -> str:
    rows = []
    for candidate in report["candidates"]:
        for name, got in candidate["metrics"].items():
            interval = (
                "" if got["low"] is None else f"{shown(name, got['low'])} to {shown(name, got['high'])}"
            )
            half = span(name, got.get("p25"), got.get("p75"))
            worst = shown(name, got["worst"]) if "worst" in got else ""
            if "reference" in got:
                half = f"reference: {shown(name, got['reference'], unit=True)}"
            cells = (shown(name, got["value"], unit=True), interval, half, worst)
            numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
            rows.append(f"<td>{escape(candidate['label'])}</td><td>{METRICS[name].title}</td>{numbers}")
    header = ("candidate", "what", "median or value", "95 % interval", "middle half", "worst")
    text = (
        "Medians over pictures with their exact intervals, shares with Wilson's. A Frechet distance overestimates, the "
        "more the fewer the pictures; where there are enough, a bootstrap's interval is corrected for that."
    )
    return section(
        "Against " + escape(report["reference"]["label"]), text, html_table(header, rows, numbers=4)
    )


def _curves(report: Mapping[str, Any]) -> str:
    parts = []
    for key, title, axis in (
        ("own", "State after each step, each on its own trajectory: what errors add up to", "step"),
        (
            "led",
            "Network's output at each call, led along the reference's trajectory: its own error alone",
            "call",
        ),
    ):
        lines = [
            (c["label"], [None if q["p50"] >= MAX_DB else q["p50"] for q in c[key]])
            for c in report["candidates"]
            if c[key]
        ]
        if any(value is not None for _, line in lines for value in line):
            parts.append(f"<p class='small'><b>{title}</b></p>{curves(lines, 'dB', axis)}")
        elif lines:
            parts.append(f"<p class='small'><b>{title}</b>: no difference at any {axis}</p>")
    apart = [f"{c['label']}: {c['apart']}" for c in report["candidates"] if c["apart"]]
    parts += [f'<p class="small soft">{escape(text)}</p>' for text in apart]
    text = "SQNR, median over pictures. More is better; 20 dB is an error of a tenth, 40 dB of a hundredth."
    return section("Step by step", text, "".join(parts))


def _pictures(label: str, reference: str, worst: Sequence[Pair]) -> str:
    if all(pair.metrics["image_psnr_db"] >= MAX_DB for pair in worst):
        return ""
    drawn = []
    for pair in worst:
        width = pair.images[0].shape[1]
        both = "".join(
            picture(png, name, width) for png, name in zip(_pngs(pair), (reference, label), strict=True)
        )
        values = ", ".join(
            shown(n, pair.metrics[n], unit=True) for n in ("image_psnr_db", "ssim") if n in pair.metrics
        )
        head = (
            f"{escape(pair.subject.caption)}<br><span class='soft'>seed {pair.subject.seed}, {values}</span>"
        )
        drawn.append(f'<div class="pair"><p class="small">{head}</p>{both}</div>')
    text = f"The pictures of {escape(label)} that are furthest from the reference's, the worst first."
    return section("The worst pairs", text, f'<div class="pairs">{"".join(drawn)}</div>')


def _pngs(pair: Pair) -> Iterator[str]:
    with needs("onnx"):
        from ..runtime.backends.PIL import to_image
    for image in pair.images:
        data = io.BytesIO()
        to_image(np.rint(image * 255).astype(np.uint8)).save(data, "png")
        yield base64.b64encode(data.getvalue()).decode()


def _job(report: Mapping[str, Any]) -> str:
    keys = ("label", "target", "sampler", "steps", "calls", "guidance")
    rows = [
        "".join(f"<td>{escape(str(entry[key]))}</td>" for key in keys)
        for entry in (report["reference"], *report["candidates"])
    ]
    asked = [(k, v) for k, v in flatten(report["how"]) if v != "None"]
    asked_rows = [f"<td>{escape(k)}</td><td>{escape(v)}</td>" for k, v in asked]
    return section(
        "How it was drawn",
        "Repeat it with:",
        f"<p><code>{escape(' '.join(report['command']))}</code></p>{html_table(keys, rows)}"
        + (html_table(("asked for", ""), asked_rows) if asked else "")
        + "<p class='soft small'>Every picture's numbers are in compare.json beside this page.</p>",
    )
