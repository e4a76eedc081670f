"""Integers in the denoiser: ours beside plain ONNX Runtime and nncf, the same bits and the same calibration calls.

    pip install nncf; python benchmarks/quantization.py [--steps 8] [--seeds 32] [--schemes w8a8 w4a8 ...]

Only the U-Net changes: text encoder and decoder are the float32 bundle's, so latents differ by the U-Net alone. Prompts
and seeds are none of those calibrated on. For every U-Net: PSNR and RMS error of the final latents against float32 with
equal seeds, SQNR of one call on float32's own trajectory (worst step), size on disk, and core time of a call at batch
2, all U-Nets of an engine taking turns.

plain ONNX Runtime  quantize_static, QDQ, per channel, MinMax (its default), Conv, MatMul and Gemm
plain nncf          nncf.quantize of the OpenVINO IR with its defaults, and with model_type=TRANSFORMER
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import save, spread

from fewstep.export import Exported, export_bundle, onnx, quality
from fewstep.export.plans import plan_of
from fewstep.model import load
from fewstep.model.trajectories import trajectories
from fewstep.runtime import Pipeline
from fewstep.runtime.backends import open_session
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.manifest import PartSpec

ROOT = Path(__file__).parents[1]
CALIBRATED = 32
"""Trajectories the peers calibrate on; all their calls."""
HELD_OUT = 10_000
"""First seed of what is measured on."""


def exported(model: Path, target: str, steps: int, out: Path, scheme: str | None) -> tuple[Path, float]:
    """A bundle and the seconds it took; one that is there already is taken."""
    began = time.perf_counter()
    if not (out / "manifest.json").exists():
        floors = out.with_suffix(".toml")  # what is bad shall be measured, not refused
        floors.write_text(
            "".join(
                f"[quality.{name}]\npart_relative_error = 9.0\npart_snr_db = -99.0\npipeline_psnr_db = -99.0\n"
                for name in ("float32", "int8", "int4")
            )
        )
        events = export_bundle(
            model, target, out, steps=steps, recipe=floors, quantize=scheme, measure_speed=False
        )
        for event in events:
            done = event
        assert isinstance(done, Exported)
    return out, time.perf_counter() - began


def plain_onnxruntime(graph: Path, out: Path, calls: Sequence[Mapping[str, Any]], model: Any) -> None:
    """From what torch.onnx.export writes: on a graph without the shapes of inner values quantize_static gives up."""
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(calls)

        def get_next(self) -> Any:
            return next(self.rest, None)

    logging.disable(logging.WARNING)
    ready = out / "prepared.onnx"
    onnx.write_plain(onnx.trace(model.parts[model.denoiser]), out)
    (out / "model.onnx").rename(ready)
    q.quant_pre_process(str(ready), str(ready), skip_symbolic_shape=True)
    q.quantize_static(
        str(ready),
        str(out / "model.onnx"),
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
    )
    ready.unlink()


def plain_nncf(
    xml: Path, out: Path, calls: Sequence[Mapping[str, Any]], _: Any, *, transformer: bool
) -> None:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    model = openvino.Core().read_model(str(xml))
    data = nncf.Dataset(list(calls), lambda feeds: feeds)
    kind = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    quantized = nncf.quantize(model, data, subset_size=len(calls), **kind)
    openvino.save_model(quantized, str(out / "openvino_model.xml"), compress_to_fp16=False)


def latents(bundle: Path, graph: Path, spec: PartSpec, steps: int, prompts: Sequence[str]) -> Any:
    """[n, ...] final latents with the denoiser's graph replaced."""
    found = []
    with closing(open_session(graph, spec, threads=1)) as session, _pipeline(bundle, session) as pipeline:
        for number, prompt in enumerate(prompts):
            made = pipeline(prompt, num_inference_steps=steps, seed=HELD_OUT + number, output_type="latent")
            found.append(made.images[0])
    return np.stack(found)


def _pipeline(bundle: Path, session: Any) -> Pipeline:
    opened = Bundle.open(bundle, check="size")
    return Pipeline(opened, threads=1, _sessions={opened.manifest.denoiser: session})


def calls_sqnr(
    graph: Path, spec: PartSpec, calls: Sequence[Mapping[str, Any]], right: Sequence[Any]
) -> list[float]:
    with closing(open_session(graph, spec, threads=1)) as session:
        name = spec.outputs[0].name
        return [
            quality.sqnr_db(want, session.run(feeds)[name]) for feeds, want in zip(calls, right, strict=True)
        ]


def core_ms(
    graphs: Mapping[str, tuple[Path, PartSpec]], feeds: Mapping[str, Any], rounds: int
) -> dict[str, Any]:
    """Every graph of one engine in turns."""
    sessions = {name: open_session(graph, spec, threads=1) for name, (graph, spec) in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(feeds)
        session.run(feeds)
    for number in range(rounds):
        order = list(sessions)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            began = time.process_time()
            sessions[name].run(feeds)
            times[name].append((time.process_time() - began) * 1e3)
    for session in sessions.values():
        session.close()
    return {name: spread(each) for name, each in times.items()}


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    model = load(args.model)
    plan = plan_of(model, "model", args.steps)
    known = model.prompts or ()
    ours_of, prompts = known[: len(known) // 2], known[len(known) // 2 :]
    shown = [prompts[i % len(prompts)] for i in range(args.seeds)]
    fed = [
        call
        for way in trajectories(model, plan, range(CALIBRATED), prompts=ours_of, batch=8)
        for call in way.calls
    ]
    held = next(
        iter(trajectories(model, plan, range(HELD_OUT, HELD_OUT + 8), prompts=shown[:8], batch=8))
    ).calls
    found: dict[str, Any] = {}
    for target, engine in (("laptop-cpu", "onnxruntime"), ("intel-cpu", "openvino")):
        base, _ = exported(args.model, target, args.steps, work / f"{target}-float", None)
        manifest = Bundle.open(base, check="size").manifest
        part = manifest.denoiser
        plain = manifest.parts[part]
        spec = PartSpec(
            engine, "", plain.inputs, plain.outputs
        )  # float32, whatever the target would compute in
        graphs = {"float32": (base / plain.graph, spec)}
        seconds: dict[str, float] = {}
        for scheme in args.schemes if engine == "onnxruntime" else args.openvino_schemes:
            out, took = exported(args.model, target, args.steps, work / f"{target}-{scheme}", scheme)
            mine = Bundle.open(out, check="size").manifest.parts[part]
            graphs[f"fewstep {scheme}"] = (out / mine.graph, spec)
            seconds[f"fewstep {scheme}"] = took
        peers: dict[str, Any] = {
            "onnxruntime": {"plain ONNX Runtime": plain_onnxruntime},
            "openvino": {
                "plain nncf": partial(plain_nncf, transformer=False),
                "nncf TRANSFORMER": partial(plain_nncf, transformer=True),
            },
        }[engine]
        for name, make in peers.items():
            out = work / name.replace(" ", "-")
            if not (out / Path(plain.graph).name).exists():
                out.mkdir(exist_ok=True)
                began = time.perf_counter()
                make(base / plain.graph, out, fed, model)
                seconds[name] = time.perf_counter() - began
            graphs[name] = (out / Path(plain.graph).name, spec)
        right = latents(base, *graphs["float32"], args.steps, shown)
        with closing(open_session(*graphs["float32"], threads=1)) as session:
            wanted = [session.run(dict(call))[spec.outputs[0].name] for call in held]
        two = {name: value[[0, 8]] for name, value in held[len(held) // 2].items()}
        times = core_ms(graphs, two, args.rounds)
        for name, (graph, _) in graphs.items():
            got = latents(base, graph, spec, args.steps, shown)
            each = calls_sqnr(graph, spec, held, wanted)
            size = sum(file.stat().st_size for file in graph.parent.iterdir() if file.stem == graph.stem)
            found[f"{engine} {name}"] = one = {
                "latent_psnr_db": quality.psnr_db(right, got),
                "latent_rms_error": float(np.sqrt(np.mean((got - right) ** 2))),
                "call_sqnr_db": {"worst": min(each), "median": float(np.median(each))},
                "bytes": size,
                "core_ms": times[name],
                "seconds": seconds.get(name),
            }
            print(
                f"{engine:12} {name:20} latent PSNR {one['latent_psnr_db']:5.1f} dB, "
                f"RMS {one['latent_rms_error']:.4f}, "
                f"call {min(each):5.1f} dB, {size / 1e6:6.2f} MB, {times[name]['median']:6.2f} core-ms",
                flush=True,
            )
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models/emoji-64")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a8", "w4", "w3.5", "w4a4"])
    parser.add_argument("--openvino-schemes", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--work", type=Path, help="keep the bundles here, and take those that are there")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="quantization-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        save("quantization", {"steps": args.steps, "seeds": args.seeds, "unets": measure(args, work)})
    finally:
        if args.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
