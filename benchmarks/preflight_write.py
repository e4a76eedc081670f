"""Put the rates that preflight.py found into [profile] of targets/: values alone, every comment stays.

    python benchmarks/preflight_write.py

Of results/preflight.json, and there of the kinds that were fitted to networks in a run of that script.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from common import RESULTS
from preflight import KINDS

from fewstep.targets import load_target

TARGETS = Path(__file__).parents[1] / "targets"
MEASURED = ("laptop-cpu", "intel-cpu", "web-wasm")
"""Whose rates are this machine's; android-cpu's are of phones."""


def main() -> None:
    found = json.loads((RESULTS / "preflight.json").read_text())["rates"]
    kinds = {label: kind for label, kind in KINDS.items() if found.get(label, {}).get("networks")}
    for target in MEASURED:
        own = {label: kind for label, kind in kinds.items() if kind.target == target}
        if not own:
            continue
        file = TARGETS / f"{target}.toml"
        text = file.read_text()
        head: dict[str, Any] = {"base_mib": round(fmean(found[label]["base_mib"] for label in own), 1)}
        if target != "web-wasm":
            head["between_us"] = round(fmean(found[label]["between_us"] for label in own), 1)
        text = put(text, "profile", head)
        for label, kind in own.items():
            text = put(text, f"profile.{kind.table}", found[label]["rates"])
        file.write_text(text)
        load_target(target)
        print(f"{file.name}: {', '.join(own)}")


def put(text: str, table: str, values: dict[str, Any]) -> str:
    """The TOML text with values of one table replaced where it has such keys, comments in one column."""
    begin = text.index(f"\n[{table}]") + 1
    end = text.find("\n[", begin) + 1 or len(text)
    head, *lines = text[begin:end].rstrip("\n").split("\n")
    rows = []
    for line in lines:
        key, _, rest = line.partition(" = ")
        value, _, comment = rest.partition("#")
        rows.append((f"{key} = {values.get(key, value.strip())}", comment.strip()) if rest else (line, ""))
    width = max(len(row) for row, comment in rows if comment)
    body = "\n".join(f"{row.ljust(width)}  # {comment}" if comment else row for row, comment in rows)
    gap = re.search(r"\n*$", text[begin:end])
    return text[:begin] + f"{head}\n{body}" + (gap.group() if gap else "\n") + text[end:]


if __name__ == "__main__":
    main()
