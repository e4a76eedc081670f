"""Export the full Stable Diffusion 1.5 architecture (random weights): time, memory of every process, gate, one image.

    python benchmarks/sd15_export.py [arch:sd15] [--keep DIR]

Writes results/sd15_export.json. The limit of issue 2: no process above 2.5 times the U-Net's float32 weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import save

from fewstep.export import Exported, export_bundle

LIMIT = 2.5


class Memory:
    """Samples this process and its children every 2 s: the highest proportional set size of all together."""

    def __init__(self) -> None:
        self.peak_pss = self.peak_rss_sum = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(2.0):
            pids, sums = [os.getpid()], {"Pss": 0, "Rss": 0}
            for task in Path(f"/proc/{os.getpid()}/task").iterdir():
                pids += [int(pid) for pid in (task / "children").read_text().split()]
            for pid in pids:
                try:
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                except OSError:
                    continue
                for line in lines:
                    name = line.split(":")[0]
                    if name in sums:
                        sums[name] += int(line.split()[1]) * 1024
            self.peak_pss, self.peak_rss_sum = (
                max(self.peak_pss, sums["Pss"]),
                max(self.peak_rss_sum, sums["Rss"]),
            )

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def draw(bundle: Path) -> dict[str, Any]:
    """One image in two steps, in a process of its own: the worker of `fewstep bench`."""
    command = [sys.executable, "-m", "fewstep.tools.worker", str(bundle)]
    request = json.dumps({"do": "image", "prompt": "a cat", "seed": 3, "steps": 2, "sampler": "ddim"})
    done = subprocess.run(command, input=request + "\n", capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", nargs="?", default="arch:sd15")
    parser.add_argument("--keep", type=Path, help="leave the bundle here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sd15-") as name:
        out = args.keep or Path(name) / "bundle"
        memory, began = Memory(), time.perf_counter()
        for event in export_bundle(args.source, "laptop-cpu", out, overwrite=True):
            print(f"{time.perf_counter() - began:7.1f} s  {event.stage}  {event.note}", flush=True)
        memory.stop()
        assert isinstance(event, Exported)
        image = draw(out)
        unet = (out / "unet" / "model.onnx_data").stat().st_size
        peaks = {**event.peak_rss_bytes, "run": image["peak_rss_bytes"]}
        save(
            args.source.removeprefix("arch:").replace("-", "_") + "_export",
            {
                "source": args.source,
                "unet_bytes": unet,
                "seconds": {**event.seconds, "total": sum(event.seconds.values())},
                "peak_rss_over_unet": {key: round(value / unet, 2) for key, value in peaks.items()},
                "peak_rss_bytes": peaks,
                "all_processes": {"pss_bytes": memory.peak_pss, "rss_sum_bytes": memory.peak_rss_sum},
                "quality": {key: value for key, value in event.manifest.quality.items() if key != "golden"},
                "speed": dict(event.manifest.speed),
                "image_s": image,
            },
        )
        worst = max(peaks.values()) / unet
        print(f"highest peak of a process: {worst:.2f} x the U-Net's weights, limit {LIMIT}")


if __name__ == "__main__":
    main()
