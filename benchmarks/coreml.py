"""Core ML packages from Linux: what conversion takes, and how near the package is to torch when MIL is evaluated here.

    python benchmarks/coreml.py parts emoji-64        every part in float32 and float16, both forms of attention
    python benchmarks/coreml.py parts sd15            the same for the SD-1.5 architecture (random weights)
    python benchmarks/coreml.py phone sd15            its U-Net as targets/iphone-15-pro.toml has it: palettes, chunks
    python benchmarks/coreml.py images                whole emoji-64 bundles with palettes, images at equal seeds
    python benchmarks/coreml.py speed                 a call of the U-Net through MIL beside torch eager
    python benchmarks/coreml.py kmeans                palettes of a layer, beside coremltools' own k-means

Each part is lowered and checked in processes of its own, so that peak memory is theirs. Writes results/coreml.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save

from fewstep.export import child, coreml, gate, parts
from fewstep.export.coreml_weights import palette
from fewstep.export.onnx import trace
from fewstep.export.recipe import Exported, export_bundle
from fewstep.model import load
from fewstep.model.trajectories import run_part
from fewstep.targets import Target, load_target

MODELS = {"emoji-64": Path(__file__).parents[1] / "models" / "emoji-64", "sd15": "arch:sd15"}
FORMS = {
    "float32": ("float32", {}),
    "float16": ("float16", {}),
    "float16 split": ("float16", {"attention": "split_einsum"}),
}


def target_of(precision: str, options: dict[str, Any]) -> Target:
    plain = load_target("mac-m-series")
    backend = replace(plain.backend, options=options)
    return replace(plain, backend=backend, recipe=replace(plain.recipe, precision=precision))


def figures(part: Any, target: Target, work: Path) -> dict[str, Any]:
    stored, folder = work / f"{part.name}.pt", work / "out" / part.name
    if not stored.exists():  # the part's own tensors are mapped from it
        parts._store(part, stored)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bare, began = replace(part, module=None), time.perf_counter()
    done = child.call(parts._lower_stored, stored, bare, folder, None, target, True, work=work)
    seconds, spec = time.perf_counter() - began, done.value
    began = time.perf_counter()
    tried, here = gate.cases(part, few=part.work() > gate.DEAR), parts.here(spec, target)
    feeds, graph = list(tried.values()), work / "out" / spec.graph
    ran = child.call(gate.run_graph, graph, here.spec, feeds, here.opener, work=work)
    check_seconds = time.perf_counter() - began
    quality = gate.compare(part.name, list(tried), [run_part(part, case) for case in feeds], ran.value)
    packages = sorted(folder.glob("*.mlpackage"))
    size = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in packages}
    return {
        "parameters": part.parameters(),
        "lower_seconds": round(seconds, 1),
        "lower_peak_rss_mib": done.peak_rss_bytes >> 20,
        "check_seconds": round(check_seconds, 1),
        "check_peak_rss_mib": ran.peak_rss_bytes >> 20,
        "bytes": size,
        "snr_db": round(quality.snr_db, 1),
        "bits_per_weight": spec.quantization.get("bits_per_weight"),
    }


def measure(
    which: str, forms: dict[str, tuple[str, dict[str, Any]]], names: set[str] | None = None
) -> dict[str, Any]:
    model = parts.fixed(load(MODELS[which]))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as work:
        for part in model:
            if names is not None and part.name not in names:
                continue
            for label, (precision, options) in forms.items():
                if "split" in label and part.name == "text_encoder":
                    continue
                row = figures(part, target_of(precision, options), Path(work))
                found.setdefault(part.name, {})[label] = row
                print(which, part.name, label, row, flush=True)
                keep(f"{which} parts", found)
    return found


IMAGES = {
    "6 bits": {"weights": "palette", "bits": 6},
    "6 bits, tables of 16 channels": {"weights": "palette", "bits": 6, "group": 16},
    "4 bits, tables of 16 channels": {"weights": "palette", "bits": 4, "group": 16},
    "mixed 3 to 8": {
        "weights": "palette",
        "bits": 4,
        "group": 16,
        "mixed": ["*conv_in=8", "*conv_out=8", "*time_emb*=8", "*.to_v=6", "*.to_out.0=6", "*shortcut=6"],
    },
    "float16": {},
    "8 bits": {"weights": "palette", "bits": 8},
    "int4, blocks of 32": {"weights": "linear", "bits": 4, "group": 32},
}


def images() -> dict[str, Any]:
    """Bundles of emoji-64, whole: images against diffusers at equal seeds, as the gate draws them."""
    found, model = {}, load(MODELS["emoji-64"])
    for label, options in IMAGES.items():
        with tempfile.TemporaryDirectory(dir="/tmp") as work:
            recipe = Path(work) / "recipe.toml"
            lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
            floors = [
                "[quality.int4]",
                "part_relative_error = 1.0",
                "part_snr_db = 0.0",
                "pipeline_psnr_db = 0.0",
            ]
            recipe.write_text("\n".join(["[backend.options]", *lines, *floors]) + "\n")
            out = Path(work) / "bundle"
            events = list(export_bundle(model, "mac-m-series", out, recipe=recipe, measure_speed=False))
            done = events[-1]
            assert isinstance(done, Exported)
            quality = done.manifest.quality
            found[label] = {
                "psnr_db": quality["pipeline"]["psnr_db"],
                "parts_snr_db": {name: part["snr_db"] for name, part in quality["parts"].items()},
                "graphs_bytes": sum(f.stat().st_size for f in out.rglob("*.mlpackage/**/*") if f.is_file()),
                "seconds": done.seconds,
            }
            print(label, found[label], flush=True)
            keep("images of emoji-64", found)
    return found


def speed() -> dict[str, Any]:
    part = parts.fixed(load(MODELS["emoji-64"])).parts["unet"]
    found = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as work:
        for label in ("float32", "float16"):
            target = target_of(*FORMS[label])
            spec = coreml.lower(trace(part), Path(work) / label / part.name, target)
            session = coreml.stand_in(spec, target).opener(Path(work) / label / spec.graph, spec)
            feeds = next(iter(gate.cases(part, few=True).values()))
            torch_ms, mil_ms = [], []
            for _ in range(30):  # in turns: the host's load is the same for both
                began = time.perf_counter()
                run_part(part, feeds)
                between = time.perf_counter()
                session.run(feeds)
                mil_ms.append(1e3 * (time.perf_counter() - between))
                torch_ms.append(1e3 * (between - began))
            found[label] = {
                "torch_ms": min(torch_ms),
                "mil_ms": min(mil_ms),
                "times": min(mil_ms) / min(torch_ms),
            }
            print(label, found[label], flush=True)
    return found


def kmeans() -> dict[str, Any]:
    """A layer of 1280 x 1280 x 3 x 3 weights: seconds and squared error, ours and coremltools'."""
    from coremltools.models.neural_network.quantization_utils import (
        _get_kmeans_lookup_table_and_weight as theirs,
    )

    weights = (np.random.default_rng(0).standard_normal((1280, 1280, 3, 3)) * 0.02).astype(np.float16)
    found = {}
    for bits in (4, 6, 8):
        began = time.perf_counter()
        indices, tables = palette(weights, bits, len(weights))
        ours_s = time.perf_counter() - began
        began = time.perf_counter()
        lut, labels = theirs(bits, weights)
        theirs_s = time.perf_counter() - began
        errors = [
            float(np.mean((table[index].reshape(weights.shape).astype(np.float64) - weights) ** 2))
            for table, index in ((tables[0], indices), (lut.astype(np.float64), np.asarray(labels)))
        ]
        found[f"{bits} bits"] = {
            "weights": weights.size,
            "seconds": round(ours_s, 2),
            "coremltools_seconds": round(theirs_s, 2),
            "error_over_coremltools": errors[0] / errors[1],
        }
        print(bits, found[f"{bits} bits"], flush=True)
    return found


def keep(section: str, found: Any) -> None:
    file = RESULTS / "coreml.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known.pop("host", None)
    before = known.get(section, {})
    merged = {name: {**before.get(name, {}), **row} for name, row in found.items()}
    save("coreml", {**known, section: {**before, **merged}})


def main() -> None:
    what, *more = sys.argv[1:] or [""]
    if what == "parts":
        forms = {name: FORMS[name] for name in more[1].split(",")} if len(more) > 1 else FORMS
        measure(more[0], forms, set(more[2].split(",")) if len(more) > 2 else None)
    elif what == "phone":
        options = dict(load_target("iphone-15-pro").backend.options)
        measure(more[0], {"split, 6 bits, chunks": ("float16", options)}, {"unet"})
    elif what in ("images", "speed", "kmeans"):
        section = {"images": "images of emoji-64", "speed": "speed of emoji-64", "kmeans": "kmeans"}[what]
        keep(section, {"images": images, "speed": speed, "kmeans": kmeans}[what]())
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
