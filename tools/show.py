"""`fewstep show`: what is in a bundle, or in a model before it becomes one."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.manifest import NAME, Manifest
from .console import Answer, human_bytes, needs, table
from .report import flatten

__all__ = ["add", "call"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="MODEL|BUNDLE", help="a bundle's folder, or what `fewstep export` takes"
    )


def call(args: argparse.Namespace) -> Answer:
    path = Path(args.source)
    # whatever else exists and is no checkpoint gets the bundle reader's error, which says what it is instead
    if (path / NAME).exists() or (path.is_dir() and not (path / "model_index.json").exists()):
        return _bundle(path)
    return _model(args.source)


def _bundle(path: Path) -> Answer:
    manifest = Bundle.open(path, check="size").manifest
    folders: Counter[str] = Counter()
    for name, spec in manifest.files.items():
        folders[name.split("/")[0]] += spec.bytes
    parts: list[dict[str, Any]] = [
        {
            "part": name,
            "engine": part.engine,
            "device": part.device,
            "precision": part.precision,
            "executed": part.executed,
            "quantization": dict(part.quantization),
            "bytes": folders[part.graph.split("/")[0]],
            "inputs": [_tensor(spec) for spec in part.inputs],
            "outputs": [_tensor(spec) for spec in part.outputs],
        }
        for name, part in manifest.parts.items()
    ]
    plans: list[dict[str, Any]] = [
        {
            "plan": name,
            "sampler": plan["sampler"],
            "steps": plan["steps"],
            "calls": len(plan["calls"]),
        }
        for name, plan in manifest.plans.items()
    ]
    data = {
        "kind": "bundle",
        "path": str(path),
        **_common(manifest),
        "sampler": manifest.sampler,
        "grid": asdict(manifest.grid),
        "target": dict(manifest.target),
        "parts": parts,
        "plans": plans,
        "history": [dict(entry) for entry in manifest.history],
        "quality": {key: value for key, value in manifest.quality.items() if key != "golden"},
        "speed": dict(manifest.speed),
        "license": manifest.license,
        "versions": dict(manifest.versions),
        "files": len(manifest.files),
        "bytes": sum(folders.values()),
    }
    cells = [
        (
            p["part"],
            p["engine"],
            p["device"],
            p["precision"],
            _integers(p["quantization"]),
            human_bytes(p["bytes"]),
        )
        for p in parts
    ]
    tensors = [f"{p['part']}: {', '.join(p['inputs'])} -> {', '.join(p['outputs'])}" for p in parts]
    target = manifest.target.get("id") or "none named"
    traced = f"{manifest.sampler} on the {manifest.grid.spacing} grid"
    head = [
        *_head(data),
        ("other steps", traced),
        ("target", target),
        ("licence", manifest.license or "not stated"),
    ]
    sections = [
        table([*head, ("on disk", f"{human_bytes(data['bytes'])} in {data['files']} files")]),
        table(cells, ("part", "engine", "device", "precision", "integers", "on disk")),
        _listed("inputs -> outputs", tensors),
        table([p.values() for p in plans], ("plan", "sampler", "steps", "network calls")),
        _listed("history", [", ".join(f"{k}={v}" for k, v in flatten(entry)) for entry in manifest.history]),
        _listed("quality", [f"{k}: {v}" for k, v in flatten(data["quality"])]),
        _listed("speed", [f"{k}: {v}" for k, v in flatten(manifest.speed)]),
        _listed("made with", [", ".join(f"{k} {v}" for k, v in manifest.versions.items())]),
    ]
    sections += [
        _listed(
            f"left in floating point in {p['part']}", [", ".join(p["quantization"].get("left_alone", {}))]
        )
        for p in parts
    ]
    for how, words in (
        ("converted", "converted, not executed"),
        ("emulated", "executed by an emulator alone"),
    ):
        if named := [p["part"] for p in parts if p["executed"] == how]:
            sections.append(f"{words}: {', '.join(named)}")
    return Answer(data, "\n\n".join(section for section in sections if section))


def _model(source: str) -> Answer:
    with needs("export"):
        from ..model import load

        model = load(source)
    parts: list[dict[str, Any]] = [
        {"part": name, "parameters": part.parameters(), "bytes": part.weight_bytes()}
        for name, part in model.parts.items()
    ]
    data = {
        "kind": "model",
        "path": source,
        **_common(model),
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts),
        "bytes": sum(part["bytes"] for part in parts),
    }
    cells = [(p["part"], f"{p['parameters']:,}", human_bytes(p["bytes"])) for p in parts]
    total = ("total", f"{data['parameters']:,}", human_bytes(data["bytes"]))
    return Answer(
        data, f"{table(_head(data))}\n\n{table([*cells, total], ('part', 'parameters', 'weights'))}"
    )


def _common(source: Manifest | Any) -> dict[str, Any]:
    """What a model and a bundle both say of themselves."""
    process = source.process if isinstance(source, Manifest) else source.process.to_json()
    sample, guidance = source.sample, source.guidance
    return {
        "name": source.name,
        "task": source.task,
        # a thousand betas say less than how they were made
        "process": {k: v if not isinstance(v, list) else f"{len(v)} values" for k, v in process.items()},
        "prediction": source.prediction,
        "size": [sample.height, sample.width],
        "size_multiple": sample.multiple,
        "size_fixed": sample.fixed,
        "guidance": {"kind": guidance.kind, "scale": guidance.scale},
        "classes": source.classes,
    }


def _head(data: dict[str, Any]) -> list[tuple[str, str]]:
    height, width = data["size"]
    sizes = "this size only" if data["size_fixed"] else f"or any multiple of {data['size_multiple']}"
    guidance = data["guidance"]
    return [
        ("name", data["name"]),
        ("task", data["task"] + (f", {data['classes']} classes" if data["classes"] else "")),
        ("size", f"{width} x {height} pixels, {sizes}"),
        ("process", ", ".join(f"{key} {value}" for key, value in data["process"].items())),
        ("prediction", data["prediction"]),
        (
            "guidance",
            f"{guidance['kind']}, scale {guidance['scale']:g}" if guidance["kind"] != "none" else "none",
        ),
    ]


def _integers(quantization: dict[str, Any]) -> str:
    """What of a part is integers: bits its weights take, scales and what was left alone counted in, and its inputs."""
    if not quantization:
        return "none"
    inputs = [bits for bits in quantization["layers_by_input_bits"] if bits != "float"]
    rounded = f", inputs of {' and '.join(inputs)} bits" if inputs else ""
    return f"{quantization['bits_per_weight']:.2f} bits a weight{rounded}"


def _tensor(spec: Any) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _listed(title: str, lines: list[str]) -> str:
    lines = [line for line in lines if line]
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""
