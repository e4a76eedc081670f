"""What a bundle says about itself: manifest.json as frozen dataclasses.

spec/bundle.md is the prose, spec/manifest.schema.json the JSON schema; this module is the reader and writer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BundleError
from .paths import check_paths
from .strictjson import check_plain, decode, dumps, encode, loads

__all__ = [
    "SCHEMA_VERSION",
    "DynamicShift",
    "FileSpec",
    "GridSpec",
    "GuidanceSpec",
    "Manifest",
    "PartSpec",
    "SampleSpec",
    "TensorSpec",
    "TokenizerSpec",
]

SCHEMA_VERSION = 1
VERSION_KEY = "fewstep_bundle"
"""The top-level key that holds the schema version and tells our manifest from other files of that name."""

NAME = "manifest.json"

JSON = Mapping[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; `shape` mixes fixed sizes and named free axes ("batch", "height")."""

    name: str
    dtype: str
    """numpy's name: float32, float16, int64, int32, ..."""
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PartSpec:
    """One network of the pipeline as a graph file for one engine."""

    engine: str
    """The backend module that opens it: onnxruntime, openvino, ..."""
    graph: str
    """Path inside the bundle, for instance unet/model.onnx."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str = "float32"
    """What the engine is asked to compute in: float32, bfloat16 or float16. A device that lacks it takes float32."""
    device: str = "cpu"
    """cpu, gpu or npu: what the engine runs the graph on."""
    executed: str = "device"
    """What ran this very graph at the gate. device: such a device; emulated: its maker's emulator; converted: another
    engine or processor, which proves the conversion alone."""
    quantization: JSON = field(default_factory=dict)
    """Bits the weights really take, what layers' inputs are rounded to, and every tensor left alone; empty: nothing is
    quantized."""
    margin: int | None = None
    """Of a decoder: latent cells around what is drawn that matter to it; None: the whole latent does. See tiling.py."""


@dataclass(frozen=True)
class SampleSpec:
    """The picture and the latent the denoiser works on. Sizes in pixels; latent size = size / factor."""

    height: int
    width: int
    """The default size, the one the model was trained at."""
    channels: int
    """Channels of the denoiser's sample: 4 for SD latents, 3 for an RGB pixel model."""
    factor: int = 1
    """Pixels per latent cell along each side; 1 for a pixel model."""
    multiple: int = 1
    """Height and width are multiples of this many pixels: factor times the denoiser's own downsampling."""
    fixed: bool = False
    """True when the graphs take only the default size."""
    scaling_factor: float = 1.0
    """decoder input = latent / scaling_factor + shift_factor (diffusers AutoencoderKL)."""
    shift_factor: float = 0.0


@dataclass(frozen=True)
class TokenizerSpec:
    file: str
    """Path inside the bundle of a tokenizers JSON file."""
    max_length: int
    """Every prompt is cut or padded to exactly this many ids."""
    pad_id: int


@dataclass(frozen=True)
class DynamicShift:
    """A flow's shift that grows with the image, diffusers' use_dynamic_shifting; see grids.resolution_shift."""

    kind: str = "exponential"
    """exponential or linear: diffusers' time_shift_type."""
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096


@dataclass(frozen=True)
class GridSpec:
    """How the model's own scheduler spaces its times; samplers traced at run time follow it."""

    spacing: str = "auto"
    """A name from grids.GRIDS; auto: what the users of the model's process expect."""
    steps_offset: int = 0
    final: str = "clean"
    """clean: the last step ends at sigma 0. first: DDIM's ends at the first trained level (set_alpha_to_one=False).
    sigma_min: every sampler's does (final_sigmas_type)."""
    shift: float = 1.0
    """Of a rectified flow: t' = shift t / (1 + (shift - 1) t); 1 is none."""
    dynamic: DynamicShift | None = None
    """What to compute `shift` from where it depends on the size of the image."""
    terminal: float | None = None
    """Of a rectified flow: stretch the times so that the last one before clean is this (shift_terminal)."""
    sigma_min: float | None = None
    """The least and the largest noise level of a grid over levels, where they are not the process's."""
    sigma_max: float | None = None
    ends: str = ""
    """The grid whose first and last level bound a grid over levels, as in diffusers' Euler; empty: the process's."""
    rho: float = 7.0
    """Of a Karras grid; 7 in Karras et al. 2022, section 3 <arXiv:2206.00364>."""


@dataclass(frozen=True)
class GuidanceSpec:
    kind: str = "none"
    """cfg: classifier-free guidance with two predictions a call; none: one."""
    scale: float = 1.0
    """The default guidance scale; 1 switches the second prediction off."""


@dataclass(frozen=True)
class FileSpec:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    name: str
    task: str
    """text-to-image, class-conditional or unconditional."""
    process: JSON
    prediction: str
    """What the denoiser's output means: one of PREDICTIONS; plan.x0_conversion has their formulas."""
    denoiser: str
    """The part that denoises: unet or transformer."""
    parts: Mapping[str, PartSpec]
    sample: SampleSpec
    plans: Mapping[str, JSON]
    """Named plans as Plan.to_json writes them; "default" is the one a run uses unless told otherwise."""
    sampler: str
    """The sampler traced when a run asks for another number of steps than the default plan has."""
    grid: GridSpec = GridSpec()
    guidance: GuidanceSpec = GuidanceSpec()
    tokenizer: TokenizerSpec | None = None
    classes: int | None = None
    """Number of class labels of a class-conditional model."""
    target: JSON = field(default_factory=dict)
    """Name and limits of the device the bundle was made for."""
    history: tuple[JSON, ...] = ()
    """Every pass the model went through, with all of its fields."""
    quality: JSON = field(default_factory=dict)
    """What the gate measured at export."""
    speed: JSON = field(default_factory=dict)
    """Latency against the un-optimized export, measured at export on the same host in the same run."""
    license: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the tools that made the bundle."""
    files: Mapping[str, FileSpec] = field(default_factory=dict)
    """Every file of the bundle but the manifest itself."""

    @property
    def graphs(self) -> dict[str, str]:
        """What a plan's rows may call -> its part: "denoiser", and by name every part with the denoiser's inputs."""
        wanted = [tensor.name for tensor in self.parts[self.denoiser].inputs]
        alike = [n for n, part in self.parts.items() if [tensor.name for tensor in part.inputs] == wanted]
        return {**{name: name for name in alike if name != self.denoiser}, "denoiser": self.denoiser}

    @classmethod
    def from_json(cls, data: str | bytes | JSON) -> Manifest:
        """Read what `to_json` wrote, as text or already parsed.

        Every field must be there and no other, of its type and in its range; every path must be safe; every
        file a part or the tokenizer names must be listed. Raises BundleError naming the field.
        """
        if isinstance(data, str | bytes):
            data = loads(data, NAME)
        else:
            check_plain(data, NAME)
            data = encode(data)
        if not isinstance(data, dict) or VERSION_KEY not in data:
            raise BundleError(
                f"{NAME} has no {VERSION_KEY!r}", fix="this is not a fewstep bundle: run fewstep export"
            )
        version = data[VERSION_KEY]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise BundleError(
                f"{NAME}: schema version {str(version)[:40]}",
                expected=f"{SCHEMA_VERSION}",
                fix="update fewstep, or export the bundle again",
            )
        manifest = decode(cls, {key: value for key, value in data.items() if key != VERSION_KEY}, NAME)
        _check(manifest)
        return manifest

    def to_json(self) -> str:
        """The one text for this manifest: sorted keys, no times. BundleError for what JSON cannot carry."""
        data = {VERSION_KEY: SCHEMA_VERSION, **encode(self)}
        check_plain(data, NAME)
        return dumps(data)


TASKS = ("text-to-image", "class-conditional", "unconditional")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow", "score", "residual", "resnoise")
SPACINGS = (
    *("auto", "trailing", "leading", "leading_open", "linspace", "linspace_levels", "linspace_open"),
    *("sgm_uniform", "quadratic", "shifted", "karras", "exponential", "beta", "logsnr", "lu", "arctan"),
    *("linear_quadratic", "ays_sd15", "ays_sdxl", "ays_svd", "lcm", "tcd", "pcm"),
    *("turbo", "lightning", "hyper", "dmd2"),
)
"""auto and the names of grids.GRIDS, which a test keeps equal; grids imports this file, not the reverse."""
FINALS = ("clean", "first", "sigma_min")
SHIFTS = ("exponential", "linear")
GUIDANCES = ("none", "cfg")
DEVICES = ("cpu", "gpu", "npu")
PRECISIONS = ("float32", "bfloat16", "float16")
EXECUTED = ("device", "emulated", "converted")
DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool"),
)
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def _check(m: Manifest) -> None:
    """What the types do not say. Raises BundleError."""

    def need(ok: bool, what: str, found: object, expected: str) -> None:
        if not ok:
            shown = found if isinstance(found, int | float) else repr(str(found)[:80])
            raise BundleError(f"{NAME}: {what} is {shown}", expected=expected, fix="export the bundle again")

    def one_of(what: str, found: str, known: tuple[str, ...]) -> None:
        need(found in known, what, found, f"one of {', '.join(known)}")

    one_of("task", m.task, TASKS)
    one_of("prediction", m.prediction, PREDICTIONS)
    one_of("grid.spacing", m.grid.spacing, SPACINGS)
    one_of("grid.final", m.grid.final, FINALS)
    one_of("grid.ends", m.grid.ends, ("", *SPACINGS[1:7]))
    g, d = m.grid, m.grid.dynamic
    need(0 < g.shift <= 1e3, "grid.shift", g.shift, "above 0, at most 1000")
    need(g.terminal is None or 0 < g.terminal < 1, "grid.terminal", g.terminal, "between 0 and 1")
    need(0 < g.rho <= 1e3, "grid.rho", g.rho, "above 0, at most 1000")
    for what, sigma in (("sigma_min", g.sigma_min), ("sigma_max", g.sigma_max)):
        need(sigma is None or sigma > 0, f"grid.{what}", sigma, "above 0")
    if d is not None:
        one_of("grid.dynamic.kind", d.kind, SHIFTS)
        ordered = 0 < d.base_tokens < d.max_tokens
        need(ordered, "grid.dynamic.base_tokens", d.base_tokens, "above 0 and below max_tokens")
    one_of("guidance.kind", m.guidance.kind, GUIDANCES)
    need(m.denoiser in m.parts, "denoiser", m.denoiser, f"one of the parts: {', '.join(sorted(m.parts))}")
    need(m.classes is None or 0 < m.classes < 2**31, "classes", m.classes, "at least 1")
    for what in ("height", "width", "channels", "factor", "multiple"):
        need(0 < getattr(m.sample, what) <= 2**16, f"sample.{what}", getattr(m.sample, what), "1 to 65536")
    need(m.sample.scaling_factor != 0, "sample.scaling_factor", m.sample.scaling_factor, "not 0: it divides")

    check_paths(m.files)
    for path, file in m.files.items():
        need(
            re.fullmatch("[0-9a-f]{64}", file.sha256) is not None,
            f"sha256 of {path}",
            file.sha256,
            "64 hex digits",
        )
        need(0 <= file.bytes < 2**63, f"size of {path}", file.bytes, "0 or more bytes")
    for name, part in m.parts.items():
        need(IDENTIFIER.fullmatch(name) is not None, "name of a part", name, "letters, digits and _")
        need(
            IDENTIFIER.fullmatch(part.engine) is not None,
            f"engine of {name}",
            part.engine,
            "the name of an engine",
        )
        one_of(f"device of {name}", part.device, DEVICES)
        one_of(f"precision of {name}", part.precision, PRECISIONS)
        one_of(f"executed of {name}", part.executed, EXECUTED)
        known = part.margin is None or 0 <= part.margin < 2**16
        need(known, f"margin of {name}", part.margin, "0 to 65535, or null")
        need(part.graph in m.files, f"graph of {name}", part.graph, "a file of the list in files")
        for tensors, which in ((part.inputs, "inputs"), (part.outputs, "outputs")):
            names = [tensor.name for tensor in tensors]
            need(len(set(names)) == len(names), f"{which} of {name}", ", ".join(names), "different names")
            for tensor in tensors:
                one_of(f"dtype of {name} {tensor.name}", tensor.dtype, DTYPES)
                for size in tensor.shape:
                    ok = bool(size) if isinstance(size, str) else 0 < size < 2**31
                    need(
                        ok,
                        f"shape of {name} {tensor.name}",
                        tensor.shape,
                        "axis names and sizes of at least 1",
                    )
    if m.tokenizer is not None:
        need(m.tokenizer.file in m.files, "tokenizer.file", m.tokenizer.file, "a file of the list in files")
        need(
            2 < m.tokenizer.max_length <= 2**16, "tokenizer.max_length", m.tokenizer.max_length, "3 to 65536"
        )
        need(0 <= m.tokenizer.pad_id < 2**31, "tokenizer.pad_id", m.tokenizer.pad_id, "a token id")
