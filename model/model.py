"""What flows through the toolchain: a Model made of Parts, and the shape of the passes that change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..runtime.manifest import GridSpec, GuidanceSpec, SampleSpec, TensorSpec
from ..runtime.plan import Plan
from ..runtime.process import Process
from ..runtime.progress import Progress
from ..targets import Target
from .quantized import Quantized

__all__ = ["Context", "Example", "Model", "Part", "Pass", "Small", "TokenizerFiles"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Example:
    """How to make inputs a part would really see. Data, not code, so that it crosses process borders."""

    sizes: Mapping[str, tuple[int, ...]]
    """Free axis -> sizes to try, the default first: {"batch": (2, 3), "height": (64, 48)}."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Input -> [low, high) of uniform values; integers where the dtype says so. Absent: standard normal."""

    def default_sizes(self) -> dict[str, int]:
        return {axis: sizes[0] for axis, sizes in self.sizes.items()}

    def other_sizes(self) -> dict[str, int]:
        """Another size for every free axis that has one."""
        return {axis: sizes[-1] for axis, sizes in self.sizes.items()}

    def feeds(self, inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        """Named arrays for `inputs` with the free axes set to `sizes`; equal arguments give equal arrays."""
        rng = np.random.default_rng(seed)
        feeds: dict[str, Array] = {}
        for spec in inputs:
            shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape)
            if spec.name in self.ranges:
                values = rng.uniform(*self.ranges[spec.name], size=shape)
                if np.issubdtype(np.dtype(spec.dtype), np.integer):
                    values = np.floor(values)
            else:
                values = rng.standard_normal(shape)
            feeds[spec.name] = np.asarray(values, dtype=spec.dtype)
        return feeds


@dataclass(frozen=True, eq=False)
class Part:
    """One network: unet or transformer, vae_decoder, text_encoder."""

    name: str
    module: Any
    """torch.nn.Module in eval mode; forward takes `inputs` in order and returns a tensor, or a tuple like `outputs`."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: Example
    config: Mapping[str, Any] = field(default_factory=dict)
    """The part's config.json, carried into the bundle so that optimum opens it."""
    portable: bool = True
    """Whether pickle can carry the module to another process; not so for code of the caller's own script."""
    quantized: Quantized | None = None
    """What of it is quantized; the module stays as it was."""
    margin: int | None = None
    """Of a decoder: latent cells around what is drawn that matter to it; None: the whole latent does."""

    def parameters(self) -> int:
        return sum(int(tensor.numel()) for tensor in self.module.parameters())

    def work(self) -> int:
        """Parameters times the pixels or cells of the default size: how dear one forward is, roughly."""
        sizes = self.example.default_sizes()
        return self.parameters() * sizes.get("height", 1) * sizes.get("width", 1)

    def weight_bytes(self) -> int:
        """Bytes of all weights and buffers as they lie in memory."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum(int(tensor.numel()) * int(tensor.element_size()) for tensor in tensors)


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a checkpoint: its folder, and how prompts are cut and padded."""

    folder: Path
    max_length: int
    pad_id: int


class Pass(Protocol):
    """A frozen dataclass whose fields are all of its configuration: prune, distill or quantize."""

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Yields what it does, fractions counting the pass alone, and returns the new model."""
        ...


@dataclass(frozen=True)
class Context:
    """What a pass may know beside the model."""

    target: Target
    plan: Plan
    """What the bundle will run unless told otherwise."""
    work: Path
    """A scratch folder that goes away with the run."""
    store: Path
    """A folder that outlives a run that was cut off: what took long is kept there, by a key of all it came from. It
    goes away when the bundle stands."""
    seed: int = 0
    teacher: Model | None = None
    """The model before any pass: what passes that train learn from. None: the one they are given."""


@dataclass(frozen=True, eq=False)
class Model:
    """A diffusion model between checkpoint and bundle. Passes make new ones; the parts' modules may be shared."""

    name: str
    task: str
    """text-to-image, class-conditional or unconditional."""
    denoiser: str
    """The part that denoises: unet or transformer."""
    parts: Mapping[str, Part]
    process: Process
    prediction: str
    """epsilon, v_prediction, sample or flow."""
    sample: SampleSpec
    grid: GridSpec = GridSpec()  # noqa: RUF009 - frozen
    guidance: GuidanceSpec = GuidanceSpec()  # noqa: RUF009 - frozen
    steps: int | None = None
    """How many steps it was made for, where it was: few-step students."""
    classes: int | None = None
    """Number of class labels of a class-conditional model."""
    tokenizer: TokenizerFiles | None = None
    prompts: tuple[str, ...] = ()
    """What the model draws well, from prompts.txt of its folder: what it is tried and calibrated on."""
    scheduler: Mapping[str, Any] | None = None
    """scheduler_config.json with its `_class_name`; None for a model that never had a diffusers scheduler."""
    license: str = ""
    """The licence in words, as the model card or the licence file names it."""
    license_files: tuple[Path, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    """Every pass so far, with all of its fields."""
    original: Any = None
    """The diffusers pipeline the parts came from: what the gate compares the bundle with."""
    small: Small | None = None
    """Whose denoiser the part "small" is; pairs.with_small puts it there."""

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts.values())

    @classmethod
    def from_module(
        cls,
        module: Any,
        *,
        sample_shape: tuple[int, ...],
        process: Process,
        prediction: str = "epsilon",
        name: str = "model",
        classes: int | None = None,
        call: Callable[..., Any] | None = None,
        dynamic: tuple[str, ...] = (),
        guidance: float = 1.0,
        license: str = "",
    ) -> Model:
        """Any torch.nn.Module that denoises, as a Model; see adapter.from_module, which documents the arguments."""
        from .adapter import from_module

        return from_module(
            module,
            sample_shape=sample_shape,
            process=process,
            prediction=prediction,
            name=name,
            classes=classes,
            call=call,
            dynamic=dynamic,
            guidance=guidance,
            license=license,
        )

    def after(self, done: Pass, parts: Mapping[str, Part], **measured: Any) -> Model:
        """The model a pass made: `parts` replace those of the same name, and the pass is written into history.

        measured  what the pass found out about its result, for the record: plain JSON
        """
        record: dict[str, Any] = {"pass": type(done).__name__}
        if dataclasses.is_dataclass(done):
            record |= {key: _plain(value) for key, value in dataclasses.asdict(done).items()}
        record |= measured
        return replace(self, parts={**self.parts, **parts}, history=(*self.history, record))


@dataclass(frozen=True, eq=False)
class Small:
    """A model whose denoiser another model carries beside its own."""

    model: Model
    share: float | None
    """Of the default plan's calls that go to it; None: it draws alone, in its own few steps."""


def _plain(value: Any) -> Any:
    """A field as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
