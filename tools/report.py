"""A benchmark as one HTML file: no scripts, no network, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from .console import human_bytes, human_rate, human_seconds
from .plots import bars, stacked, strips

__all__ = ["flatten", "html_table", "page", "picture", "render", "section"]

MIB = 2**20
SERIES = {"image": "Whole image", "text": "Text encoder", "step": "One step", "decode": "Decoder"}
COMPARED = SERIES | {"core": "Processor time an image", "cold": "Fresh process to first image"}
STAGES = {"text": "text encoder", "denoise": "denoising", "decode": "decoder"}
PIXELATED_BELOW = 200
"""Pictures narrower than this are enlarged with hard edges: smoothing would show detail that is not there."""


def render(report: Mapping[str, Any], pictures: Mapping[str, Sequence[str]]) -> str:
    """report: the document tools/bench.py builds (schema 1); pictures: label -> base64 PNGs."""
    bundles: list[Mapping[str, Any]] = report["bundles"]
    body = [
        _head(report, bundles[0]),
        _tiles(bundles[0]),
        _verdicts(report),
        _pictures(report, pictures),
        _timings(bundles),
        _cold(bundles),
        _memory(bundles),
        _sizes(bundles),
        _quality(bundles),
        _host(report),
    ]
    return page("fewstep bench: " + ", ".join(bundle["label"] for bundle in bundles), body)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page that needs nothing beside it; parts are ready HTML, and empty ones are left out."""
    template = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(part for part in parts if part))


def _head(report: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    host, summary = report["host"], first["summary"]
    lead = f"<b>{escape(first['label'])}</b> draws an image in {human_seconds(summary['image']['p50'])}"
    lead += f" ({first['steps']} steps, {escape(first['sampler'])}) on this host"
    main = next(
        (c for c in report["comparisons"] if c["metric"] == "image" and c["a"] == first["label"]), None
    )
    if main:
        lead += (
            f": {_verdict(main)} than {escape(main['b'])}."
            if main["verdict"] != "no difference"
            else (f": {_verdict(main)} against {escape(main['b'])}.")
        )
    else:
        lead += ". No baseline was measured with it, so nothing is claimed about speed-ups."
    where = f"{host['cpu']}, {host['cores']['usable']} cores, {host['os']}, {report['created']}"
    return (
        f'<p class="soft small">fewstep bench</p><h1>{escape(first["name"])}</h1>'
        f'<p class="lead">{lead}</p><p class="soft small">{escape(where)}</p>'
    )


def _verdict(comparison: Mapping[str, Any]) -> str:
    kind = comparison["verdict"].replace("no difference", "same")
    return f'<span class="{kind}">{escape(comparison["text"])}</span>'


def _tiles(first: Mapping[str, Any]) -> str:
    summary = first["summary"]
    tiles = [
        (human_seconds(summary["image"]["p50"]), "an image, warm (p50)"),
        (human_seconds(summary["cold"]["process"]["p50"]), "from nothing to the first image"),
        (human_rate(summary["it_per_s"]), "steps a second"),
        (human_bytes(summary["peak_rss_bytes"]), "peak memory"),
        (human_bytes(first["size"]["total"]), "on disk"),
    ]
    cells = "".join(
        f'<div class="tile"><b>{value}</b><span class="soft small">{name}</span></div>'
        for value, name in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _verdicts(report: Mapping[str, Any]) -> str:
    if not report["comparisons"]:
        return ""
    rows = [(c["a"], c["b"], COMPARED[c["metric"]], _verdict(c)) for c in report["comparisons"]]
    cells = ["".join(f"<td>{escape(v)}</td>" for v in row[:3]) + f"<td>{row[3]}</td>" for row in rows]
    return section(
        "Faster or not",
        "Median of the rounds' ratios with its exact 95 % interval; the bundles ran in turn. "
        "Of twenty pairs of equal bundles about one would be called different.",
        html_table(("bundle", "against", "what", "verdict"), cells),
    )


def _pictures(report: Mapping[str, Any], pictures: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for bundle in report["bundles"]:
        figures = []
        for prompt, png in zip(bundle["captions"], pictures[bundle["label"]], strict=True):
            figures.append(picture(png, prompt, bundle["width"]))
        if figures:
            psnr = bundle.get("psnr_db")
            same = f", {psnr:.1f} dB from {escape(bundle['psnr_against'])}" if psnr else ""
            head = f'<p class="small soft">{escape(bundle["label"])}{same}</p>'
            parts.append(f'{head}<div class="pictures">{"".join(figures)}</div>')
    return section("Pictures", "The same seeds for every bundle.", "".join(parts)) if parts else ""


def picture(png: str, caption: str, width: int) -> str:
    """png: base64; width: in pixels, which decides how it is enlarged."""
    pixelated = ' class="small-picture"' if width < PIXELATED_BELOW else ""
    text = escape(caption, quote=True)
    image = f'<img{pixelated} alt="{text}" src="data:image/png;base64,{png}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _timings(bundles: Sequence[Mapping[str, Any]]) -> str:
    parts, rows = [], []
    for key, title in COMPARED.items():
        series = [(b["label"], [1000 * s for s in b["samples"]["warm"].get(key, [])]) for b in bundles]
        if key in SERIES and any(samples for _, samples in series):
            parts.append(f"<p class='small'><b>{title}</b></p>{strips(series, 'ms')}")
        for b in bundles:
            if (s := b["summary"].get(key, {})).get("n"):
                cells = "".join(f'<td class="n">{human_seconds(s[p])}</td>' for p in ("p50", "p90", "p99"))
                rows.append(
                    f'<td>{title}</td><td>{escape(b["label"])}</td>{cells}<td class="n">{s["n"]}</td>'
                )
    stages = [
        (b["label"], {n: 1000 * b["summary"][k]["p50"] for k, n in STAGES.items() if k in b["summary"]})
        for b in bundles
    ]
    parts.append(f"<p class='small'><b>Where the time goes</b></p>{stacked(stages, 'ms')}")
    parts.append(html_table(("what", "bundle", "p50", "p90", "p99", "samples"), rows, numbers=4))
    return section(
        "Warm", "Every dot is one measurement, the box the middle half, the line the median.", "".join(parts)
    )


def _cold(bundles: Sequence[Mapping[str, Any]]) -> str:
    names = {
        "start": "interpreter",
        "import": "import",
        "open": "open the bundle",
        "image": "load graphs, first image",
    }
    rows = [
        (b["label"], {n: 1000 * b["summary"]["cold"][k]["p50"] for k, n in names.items()})
        for b in bundles
        if b["samples"]["cold"]
    ]
    text = "A fresh process each time, from its start to the first image; the files were in the page cache."
    return section("Cold", text, stacked(rows, "ms")) if rows else ""


def _memory(bundles: Sequence[Mapping[str, Any]]) -> str:
    rows = [(b["label"], (b["summary"]["peak_rss_bytes"] or 0) / MIB) for b in bundles]
    text = "The most a fresh process held up to and including its first image (VmHWM)."
    return section("Peak memory", text, bars(rows, "MiB")) if any(v for _, v in rows) else ""


def _sizes(bundles: Sequence[Mapping[str, Any]]) -> str:
    parts = list(dict.fromkeys(part for b in bundles for part in b["size"]["parts"]))
    rows = []
    for part in [*parts, "total"]:
        sizes = [b["size"]["parts"].get(part) if part != "total" else b["size"]["total"] for b in bundles]
        cells = "".join(f'<td class="n">{"" if s is None else human_bytes(s)}</td>' for s in sizes)
        rows.append(f"<td>{escape(part)}</td>{cells}")
    return section(
        "On disk", "", html_table(("part", *(b["label"] for b in bundles)), rows, numbers=len(bundles))
    )


def _quality(bundles: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for b in bundles:
        rows = [f"<td>{escape(k)}</td><td class='n'>{escape(v)}</td>" for k, v in flatten(b["quality"])]
        if rows:
            table = html_table(("what the gate measured at export", ""), rows, numbers=1)
            parts.append(f"<details><summary>{escape(b['label'])} ({len(rows)})</summary>{table}</details>")
    return (
        section("Against the original", "Measured when the bundle was made.", "".join(parts)) if parts else ""
    )


def _host(report: Mapping[str, Any]) -> str:
    flags = [name for name, have in report["host"]["flags"].items() if have]
    rows = [*flatten({**report["host"], "flags": ", ".join(flags)}), *flatten({"job": report["job"]})]
    table = html_table(("", ""), [f"<td>{escape(k)}</td><td>{escape(v)}</td>" for k, v in rows])
    return section(
        "Host and job",
        "Repeat it with:",
        f"<p><code>{escape(' '.join(report['command']))}</code></p>"
        f"<details><summary>Everything known about this host</summary>{table}</details>"
        "<p class='soft small'>Every raw sample is in report.json beside this page.</p>",
    )


def flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) rows, for people; long lists are counted, not shown."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and len(value) > 8:
            rows.append((name, f"{len(value)} values"))
        elif isinstance(value, list | tuple):
            rows.append((name, ", ".join(map(str, value))))
        else:
            rows.append((name, f"{value:.6g}" if isinstance(value, float) else str(value)))
    return rows


def section(title: str, text: str, content: str) -> str:
    line = f'<p class="soft small">{text}</p>' if text else ""
    return f"<section><h2>{title}</h2>{line}{content}</section>"


def html_table(header: Iterable[str], rows: Iterable[str], numbers: int = 0) -> str:
    """rows: ready <td> cells; the last `numbers` columns are aligned right."""
    names = list(header)
    first = len(names) - numbers
    head = "".join(f"<th{' class=n' if i >= first else ''}>{escape(n)}</th>" for i, n in enumerate(names))
    body = "".join(f"<tr>{cells}</tr>" for cells in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
