"""The peers' half of benchmarks/x86.py: how each is installed, given the model, and made to draw.

diffusers runs in our environment. optimum-onnx and openvino-genai hold other versions back and live in environments of
their own, made here on first use. All draw 4 steps of LCM without guidance, one image, on as many threads as we do.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIMUM, OPENVINO = ROOT / ".venv-optimum", ROOT / ".venv-openvino"
PINS = {
    OPTIMUM: [
        "torch==2.13.0",
        "optimum-onnx==0.1.0",
        "diffusers==0.39.0",
        "transformers==4.57.6",
        "onnxruntime==1.31.1",
    ],
    OPENVINO: [
        "torch==2.13.0",
        "torchvision==0.28.0",  # pinned, or pip takes one that brings another torch
        "optimum-intel[openvino,diffusers]==2.2.0",
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1.0",
        "nncf==3.4.0",
        "diffusers==0.39.0",
    ],
}

SHARED = """
import json, os, sys, time
folder, size, steps, images, threads = sys.argv[1], *map(int, sys.argv[2:6])
wall, cpu = time.perf_counter(), time.process_time()
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1]) * 1024
spent = {}
def timed(stage, function):
    def run(*args, **options):
        before = time.process_time()
        try:
            return function(*args, **options)
        finally:
            spent[stage] = spent.get(stage, 0.0) + time.process_time() - before
    return run
def report(draw):
    draw(1)  # whatever happens once
    load = {"wall_s": time.perf_counter() - wall, "core_s": time.process_time() - cpu}
    found = []
    for _ in range(images):
        spent.clear()
        before, clock = time.process_time(), time.perf_counter()
        draw(steps)
        total = {"core_s": time.process_time() - before, "wall_s": time.perf_counter() - clock}
        found.append(total | {"stages_core_s": dict(spent)})
    print(json.dumps({"load": load, "images": found, "peak_rss_bytes": peak()}))
"""
DIFFUSERS = """
import warnings; warnings.simplefilter("ignore")
import torch, diffusers
torch.set_num_threads(threads)
pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, safety_checker=None)
pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
for part in (pipe.unet, pipe.vae):
    part.to(memory_format=torch.channels_last)
pipe.unet.forward = timed("unet", pipe.unet.forward)
pipe.vae.decode = timed("decoder", pipe.vae.decode)
pipe.text_encoder.forward = timed("text", pipe.text_encoder.forward)
report(lambda n: pipe("a cat", num_inference_steps=n, guidance_scale=1.0, height=size, width=size, output_type="np"))
"""
ORT = """
import warnings; warnings.simplefilter("ignore")
from optimum.onnxruntime import ORTDiffusionPipeline
import diffusers, onnxruntime
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = threads
pipe = ORTDiffusionPipeline.from_pretrained(folder, session_options=options)
pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
pipe.unet.forward = timed("unet", pipe.unet.forward)
pipe.vae_decoder.forward = timed("decoder", pipe.vae_decoder.forward)
pipe.text_encoder.forward = timed("text", pipe.text_encoder.forward)
report(lambda n: pipe("a cat", num_inference_steps=n, guidance_scale=1.0, height=size, width=size, output_type="np"))
"""
GENAI = """
import openvino_genai
pipe = openvino_genai.Text2ImagePipeline(folder)
pipe.set_scheduler(openvino_genai.Scheduler.from_config(
    os.path.join(folder, "scheduler", "scheduler_config.json"), openvino_genai.Scheduler.Type.LCM))
pipe.reshape(1, size, size, 1.0)  # without free sizes, as its documentation advises
pipe.compile("CPU", INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY", ENABLE_CPU_PINNING=False)
last = [0.0]
def step(number, count, latent):
    now = time.process_time()
    spent["unet"] = spent.get("unet", 0.0) + now - last[0]
    last[0] = now
    return False
def draw(n):
    last[0] = time.process_time()
    pipe.generate("a cat", width=size, height=size, num_inference_steps=n, guidance_scale=1.0,
                  rng_seed=0, callback=step)
    spent["decoder"] = time.process_time() - last[0]
report(draw)  # unet: with the text encoder's part, which no callback follows
"""
PTQ = """
# quantized as a transformer by nncf, which is what OpenVINO's own notebooks do: the U-Net of an exported folder
import sys, numpy as np, openvino as ov, nncf
model, rng = ov.Core().read_model(sys.argv[1]), np.random.default_rng(0)
sizes = {"batch": 1, "size": int(sys.argv[3]), "width": int(sys.argv[4]), "length": int(sys.argv[5])}
def feed():
    given = {"sample": rng.standard_normal((1, 4, sizes["size"], sizes["size"])).astype(np.float32),
             "encoder_hidden_states": rng.standard_normal((1, sizes["length"], sizes["width"])).astype(np.float32)}
    for port in model.inputs:
        if port.get_any_name() == "timestep":
            shape = [] if port.partial_shape.rank.get_length() == 0 else [1]
            given["timestep"] = np.full(shape, 499, port.get_element_type().to_dtype())
    return given
done = nncf.quantize(model, nncf.Dataset([feed()]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
ov.save_model(done, sys.argv[2], compress_to_fp16=False)
"""

PEERS: dict[str, tuple[Path | None, str, str]] = {
    "diffusers bfloat16": (None, DIFFUSERS, "source"),
    "optimum ONNX Runtime float32": (OPTIMUM, ORT, "onnx"),
    "OpenVINO GenAI bfloat16": (OPENVINO, GENAI, "ov"),
    "OpenVINO GenAI int8": (OPENVINO, GENAI, "ovint8"),
}
"""Name -> environment, code behind SHARED, folder in the work folder."""


def command(name: str, work: Path, *numbers: int) -> list[str]:
    """numbers: side of the image, steps, images, threads"""
    venv, code, folder = PEERS[name]
    python = sys.executable if venv is None else str(venv / "bin/python")
    return [python, "-c", SHARED + code, str(work / folder), *map(str, numbers)]


def prepare(work: Path, latent: int, width: int, length: int) -> None:
    """Give every peer the model in work/source, a folder of diffusers; what is there already is kept."""
    for venv, pins in PINS.items():
        if not venv.exists():
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([venv / "bin/pip", "install", "-q", *pins], check=True)
            # its wheel wants another build of torch than the processor's, and nothing here wants it
            subprocess.run([venv / "bin/pip", "uninstall", "-q", "-y", "torchvision"], check=True)
    offline = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    for venv, kind, folder in ((OPTIMUM, "onnx", "onnx"), (OPENVINO, "openvino", "ov")):
        if not (work / folder / "unet").exists():
            export = [venv / "bin/optimum-cli", "export", kind, "--model", work / "source"]
            subprocess.run([*export, "--task", "text-to-image", work / folder], check=True, env=offline)
    if not (work / "ovint8/unet/openvino_model.bin").exists():
        shutil.copytree(work / "ov", work / "ovint8", dirs_exist_ok=True)
        graphs = [str(work / folder / "unet/openvino_model.xml") for folder in ("ov", "ovint8")]
        sizes = [str(number) for number in (latent, width, length)]
        subprocess.run([OPENVINO / "bin/python", "-c", PTQ, *graphs, *sizes], check=True, env=offline)
