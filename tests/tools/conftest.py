"""Bundles small enough to build, run and damage in milliseconds: three graphs written by hand, no torch."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fewstep.runtime import plan
from fewstep.runtime.bundle import BundleWriter
from fewstep.runtime.golden import golden_latent
from fewstep.runtime.manifest import GuidanceSpec, Manifest, PartSpec, SampleSpec, TensorSpec, TokenizerSpec
from fewstep.runtime.pipeline import Pipeline
from fewstep.runtime.process import DiscreteVP

LENGTH, WIDTH, VOCABULARY, OPSET = 77, 4, 514, 20


def tensor(name, dtype, *shape):
    return TensorSpec(name, dtype, shape)


UNET_IN = (tensor("sample", "float32", "batch", 4, "height", "width"), tensor("timestep", "float32", "batch"))
STATES = tensor("encoder_hidden_states", "float32", "batch", LENGTH, WIDTH)
UNET_OUT = (tensor("out_sample", "float32", "batch", 4, "height", "width"),)


def save(path, nodes, inputs, outputs, weights):
    """One ONNX file whose inputs and outputs are the given specs."""
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def values(specs):
        return [helper.make_tensor_value_info(s.name, types[s.dtype], list(s.shape)) for s in specs]

    initial = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "part", values(inputs), values(outputs), initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


def unet(path, *, text, gain):
    """out = tanh(gain sample + timestep / 1000 + mean of the text states): everything it is fed."""
    axes = np.array([1, 2, 3])
    nodes = [
        helper.make_node("Mul", ["sample", "gain"], ["scaled"]),
        helper.make_node("Mul", ["timestep", "thousandth"], ["time"]),
        helper.make_node("Unsqueeze", ["time", "axes"], ["time4"]),
        helper.make_node("Add", ["scaled", "time4"], ["timed"]),
    ]
    last = "timed"
    if text:
        nodes += [
            helper.make_node("ReduceMean", ["encoder_hidden_states", "inner"], ["mean"], keepdims=1),
            helper.make_node("Unsqueeze", ["mean", "last"], ["mean4"]),
            helper.make_node("Add", ["timed", "mean4"], ["told"]),
        ]
        last = "told"
    nodes.append(helper.make_node("Tanh", [last], ["out_sample"]))
    weights = {"gain": np.float32(gain), "thousandth": np.float32(1e-3), "axes": axes}
    if text:
        weights |= {"inner": np.array([1, 2]), "last": np.array([3])}
    save(path, nodes, (*UNET_IN, STATES) if text else UNET_IN, UNET_OUT, weights)


def write_bundle(dest, *, text=True, gain=0.5, name="tiny", golden=True):
    rng = np.random.default_rng(0)
    with BundleWriter(dest) as writer:
        folder = writer.folder
        unet(folder / "unet/model.onnx", text=text, gain=gain)
        latent = tensor("latent_sample", "float32", "batch", 4, "height", "width")
        picture = tensor("sample", "float32", "batch", 3, "pixel_height", "pixel_width")
        decoder = [
            helper.make_node("Conv", ["latent_sample", "weight"], ["cells"]),
            helper.make_node("DepthToSpace", ["cells"], ["sample"], blocksize=2),
        ]
        weight = rng.standard_normal((12, 4, 1, 1)).astype(np.float32)
        save(folder / "vae_decoder/model.onnx", decoder, (latent,), (picture,), {"weight": weight})
        graphs = {
            "unet": ((*UNET_IN, STATES) if text else UNET_IN, UNET_OUT),
            "vae_decoder": ((latent,), (picture,)),
        }
        if text:
            ids, states = (
                tensor("input_ids", "int64", "batch", LENGTH),
                tensor("last_hidden_state", "float32", "batch", LENGTH, WIDTH),
            )
            table = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
            look_up = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
            save(folder / "text_encoder/model.onnx", look_up, (ids,), (states,), {"table": table})
            graphs["text_encoder"] = ((ids,), (states,))
            (folder / "tokenizer").mkdir()
            (folder / "tokenizer/tokenizer.json").write_text(tokenizer_json())
        process = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
        manifest = Manifest(
            name=name,
            task="text-to-image" if text else "unconditional",
            process=process.to_json(),
            prediction="epsilon",
            denoiser="unet",
            parts={
                part: PartSpec("onnxruntime", f"{part}/model.onnx", *specs) for part, specs in graphs.items()
            },
            sample=SampleSpec(height=16, width=16, channels=4, factor=2, multiple=4),
            plans={"default": plan("ddim", 4, process).to_json()},
            sampler="ddim",
            guidance=GuidanceSpec("cfg", 3.0) if text else GuidanceSpec(),
            tokenizer=TokenizerSpec("tokenizer/tokenizer.json", LENGTH, VOCABULARY - 1) if text else None,
            target={"id": "laptop-cpu"},
            history=({"pass": "none"},),
            quality={"unet": {"relative_error": 1e-6}},
            license="Apache-2.0",
            versions={"fewstep": "0.1.0"},
        )
        writer.commit(manifest)
    if golden:
        store_golden(dest)
    return dest


def store_golden(dest, **changes):
    """Put the bundle's golden latent into its manifest, as export does."""
    with Pipeline.from_pretrained(dest) as pipeline:
        record = golden_latent(pipeline)
    path = dest / "manifest.json"
    data = json.loads(path.read_text())
    data["quality"]["golden"] = {**record, **changes}
    path.write_text(json.dumps(data))


def tokenizer_json():
    """CLIP's tokenizer without merges: every letter a token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *marks])}
    assert len(vocab) == VOCABULARY
    tokenizer = Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>", unk_token=marks[1]))
    space = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    word = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(word, "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ends = [(mark, vocab[mark]) for mark in reversed(marks)]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def pixel_bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundles") / "free", text=False, name="free")


@pytest.fixture
def start():
    """Start a command that Ctrl-C can stop, also where these tests run in the background (`pytest &` ignores it)."""

    def run(*words, **options):
        return subprocess.Popen(
            [sys.executable, "-m", "fewstep.tools.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **options,
        )

    return run


@pytest.fixture
def appears():
    """Wait until a file that matches is in the folder, or the process is over: `appears(folder, "*", process)`."""

    def wait(folder, pattern, process):
        while not list(folder.glob(pattern)) and process.poll() is None:
            time.sleep(0.02)

    return wait


@pytest.fixture
def make_bundle():
    return write_bundle


@pytest.fixture
def golden_of():
    return store_golden


@pytest.fixture
def own_bundle(tmp_path):
    """A bundle of the test's own, to damage."""
    return write_bundle(tmp_path / "own")


@pytest.fixture
def fewstep():
    """Run the command in a process of its own: `fewstep("run", bundle)` -> CompletedProcess."""

    def run(*words, **options):
        command = [sys.executable, "-m", "fewstep.tools.cli", *map(str, words)]
        environment = {**os.environ, **options.pop("env", {})}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=600, env=environment, **options
        )

    return run
