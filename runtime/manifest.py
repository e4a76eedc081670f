"""What a bundle says about itself: manifest.json as frozen dataclasses.

spec/bundle.md is the prose, spec/manifest.schema.json the JSON schema; this module is the Python reader and writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1

JSON = Mapping[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: `shape` mixes fixed sizes and named free axes ("batch", "height", ...)."""

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
    executed: bool = True
    """Whether the gate ran this very graph on this very engine; False means converted, not executed."""


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
    """Height and width must be multiples of this many pixels (factor times the denoiser's own downsampling)."""
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
class GridSpec:
    """How the model's own scheduler spaces its times; samplers traced at run time follow it."""

    spacing: str = "trailing"
    """leading, trailing or linspace: diffusers' timestep_spacing."""
    steps_offset: int = 0
    final: str = "clean"
    """clean: the last step ends at sigma 0. first: at the first trained level (diffusers set_alpha_to_one=False)."""


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
    """epsilon, v_prediction, sample or flow: what the denoiser's output means."""
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
