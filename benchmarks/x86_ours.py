"""Our half of benchmarks/x86.py: graphs of every kind for one model, and images drawn with them.

    python benchmarks/x86_ours.py lower SOURCE WORK [KIND ...]
    python benchmarks/x86_ours.py draw WORK KIND DECODER STEPS IMAGES THREADS

The integers are stand-ins: every quantizable layer but the first and the last convolution at 8 bits, weights rounded to
the nearest, inputs in the range one random input gave them. That is the speed of `fewstep export` with the quantize
pass, not its quality.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import x86_profile

KINDS = {
    "ONNX Runtime float32": ("onnxruntime", "float32", False),
    "ONNX Runtime int8": ("onnxruntime", "float32", True),
    "OpenVINO bfloat16": ("openvino", "bfloat16", False),
    "OpenVINO int8": ("openvino", "bfloat16", True),
}
"""Name -> engine, precision of what is not quantized, whether the rest is."""
LARGE = 1 << 30
"""Bytes of weights above which only the default size is lowered: tracing free sizes takes minutes."""
TIMES = (999, 759, 499, 259)
"""Timesteps of LCM's 4 steps (Luo et al. 2023, arXiv:2310.04378): every 20th of 50, from the last."""


def lower(source: str, work: Path, kinds: list[str]) -> None:
    """The parts of every kind into work/KIND/PART; `tiny_decoder` and `vae_decoder` side by side."""
    from fewstep.export import onnx, openvino, parts
    from fewstep.model import load
    from fewstep.model.model import Part
    from fewstep.model.trajectories import run_part
    from fewstep.model.upsampling import split_upsampling

    model = load(source)
    if model.parts[model.denoiser].weight_bytes() > LARGE:
        model = parts.fixed(model)
    for part in [*model, _tiny(model)]:
        feeds = part.example.feeds(part.inputs, part.example.default_sizes() | {"batch": 1}, seed=0)
        wanted = run_part(part, feeds)
        np.savez(work / f"{part.name}.npz", **feeds, **{f"wanted.{name}": y for name, y in wanted.items()})
        counted = {"as it was": x86_profile.work(part, feeds)}
        split_upsampling(part.module)
        counted["lowered"] = x86_profile.work(part, feeds)
        (work / f"{part.name}.json").write_text(json.dumps(counted))
        described = replace(part, quantized=_stand_in(part, feeds))
        traced = onnx.trace(part)
        for kind in kinds:
            engine, precision, quantized = KINDS[kind]
            chosen: Part = described if quantized else part
            ours, folder = onnx.Traced(chosen, traced.program), work / kind / part.name
            if engine == "openvino":
                spec = openvino.write(ours, folder, opset=23, weights="float16", precision=precision)
            else:
                spec = onnx.write(ours, folder, opset=23)
            ends = [[asdict(each) for each in end] for end in (part.inputs, part.outputs)]
            (folder / "spec.json").write_text(
                json.dumps({"graph": Path(spec.graph).name, "ends": ends}, default=list)
            )


def _tiny(model: Any) -> Any:
    """The tiny decoder with random weights, as a part beside the exact one."""
    from fewstep.distill.tiny_network import TinyNetwork
    from fewstep.distill.tiny_shape import choose_shape

    decoder = model.parts["vae_decoder"]
    shape, _ = choose_shape(model, (), ())
    return replace(decoder, name="tiny_decoder", module=TinyNetwork(shape).eval())


def _stand_in(part: Any, feeds: dict[str, Any]) -> Any:
    import torch

    from fewstep.model.quantized import Activations, Layer, Quantized
    from fewstep.quant.simulate import quantizable
    from fewstep.quant.weights import nearest

    layers = quantizable(part)
    convolutions = [name for name, module in layers.items() if isinstance(module, torch.nn.Conv2d)]
    for name in {*convolutions[:1], *convolutions[-1:]}:
        del layers[name]
    seen: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Any:
        return lambda _, inputs: seen.__setitem__(name, (float(inputs[0].min()), float(inputs[0].max())))

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    with torch.no_grad():
        part.module(*(torch.from_numpy(feeds[spec.name]) for spec in part.inputs))
    for hook in hooks:
        hook.remove()
    found = {}
    for name, module in layers.items():
        how = None
        if not isinstance(module, torch.nn.Embedding):
            low, high = min(seen[name][0], 0.0), max(seen[name][1], 0.0)
            scale = max((high - low) / 255, 1e-8)
            how = Activations(scale, round(-low / scale))
        found[name] = Layer(nearest(module.weight.detach().numpy(), 8), how)
    return Quantized(found)


def open_part(work: Path, kind: str, name: str, threads: int) -> Any:
    from fewstep.runtime.backends import open_session
    from fewstep.runtime.manifest import PartSpec, TensorSpec

    folder = work / kind / name
    said = json.loads((folder / "spec.json").read_text())
    inputs, outputs = (
        tuple(TensorSpec(end["name"], end["dtype"], tuple(end["shape"])) for end in ends)
        for ends in said["ends"]
    )
    engine, precision, _ = KINDS[kind]
    spec = PartSpec(engine, said["graph"], inputs, outputs, precision=precision)
    return open_session(folder / said["graph"], spec, threads=threads)


def draw(work: Path, kind: str, decoder: str, steps: int, images: int, threads: int) -> dict[str, Any]:
    """Images in this process: tokens to pixels by LCM's steps, without guidance.

    decoder  KIND of the exact decoder, or tiny
    """
    from fewstep.tools.host import peak_rss_bytes

    began, cpu = time.perf_counter(), time.process_time()
    name = "tiny_decoder" if decoder == "tiny" else "vae_decoder"
    sessions = {
        "text_encoder": open_part(work, kind, "text_encoder", threads),
        "unet": open_part(work, kind, "unet", threads),
        name: open_part(work, kind if decoder == "tiny" else decoder, name, threads),
    }
    example = {part: dict(np.load(work / f"{part}.npz")) for part in sessions}
    drawing = list(_image(sessions, example, name, 1))  # compiles at the first run
    load = {"wall_s": time.perf_counter() - began, "core_s": time.process_time() - cpu}
    found = []
    for _ in range(images):
        marks = [("", time.process_time(), time.perf_counter())]
        for stage in _image(sessions, example, name, steps):
            marks.append((stage, time.process_time(), time.perf_counter()))
        stages: dict[str, float] = defaultdict(float)
        for before, after in pairwise(marks):
            stages[after[0]] += after[1] - before[1]
        total = {"core_s": marks[-1][1] - marks[0][1], "wall_s": marks[-1][2] - marks[0][2]}
        found.append(total | {"stages_core_s": dict(stages)})
    assert drawing[-1] == "decoder"
    return {"load": load, "images": found, "peak_rss_bytes": peak_rss_bytes()}


def _image(sessions: dict[str, Any], example: dict[str, Any], decoder: str, steps: int) -> Iterator[str]:
    """LCM's multistep sampling of an epsilon model, by the numbers of Stable Diffusion's scheduler."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    ids = example["text_encoder"]["input_ids"]
    context = next(iter(sessions["text_encoder"].run({"input_ids": ids}).values()))
    yield "text"
    feeds = {name: x for name, x in example["unet"].items() if not name.startswith("wanted.")}
    rng, x = np.random.default_rng(0), feeds["sample"]
    x0 = x
    for number, t in enumerate(TIMES[:steps]):
        time_of = np.full_like(feeds["timestep"], t)
        feeds |= {"sample": x, "timestep": time_of, "encoder_hidden_states": context}
        noise = next(iter(sessions["unet"].run(feeds).values()))
        x0 = (x - np.sqrt(1 - kept[t]) * noise) / np.sqrt(kept[t])
        if number + 1 < steps:
            after = kept[TIMES[number + 1]]
            x = np.sqrt(after) * x0 + np.sqrt(1 - after) * rng.standard_normal(x.shape)
            x = x.astype(np.float32)
        yield "unet"
    latent = (x0 / np.std(x0)).astype(np.float32)  # a net of random weights leaves any scale
    sessions[decoder].run({"latent_sample": latent})
    yield "decoder"


def main() -> None:
    job, *rest = sys.argv[1:]
    if job == "lower":
        lower(rest[0], Path(rest[1]), rest[2:] or list(KINDS))
    else:
        work, kind, decoder, *numbers = rest
        print(json.dumps(draw(Path(work), kind, decoder, *map(int, numbers))))


if __name__ == "__main__":
    main()
