"""The pipelines of diffusers fewstep exports, and how each becomes a Model.

A new family is an entry of FAMILIES: which components it needs, how its pipeline is put together, its task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.errors import CheckpointError
from ..runtime.manifest import GuidanceSpec, SampleSpec, TensorSpec
from .model import Example, Model, Part, TokenizerFiles
from .schedulers import grid_of, prediction_of, process_of

__all__ = ["FAMILIES", "Family", "from_pipeline", "plain_config", "with_image_encoder"]

GUIDANCE_SD = 7.5
"""diffusers' default: StableDiffusionPipeline.__call__(guidance_scale=7.5)."""

GUIDANCE_DIT = 4.0
"""diffusers' default: DiTPipeline.__call__(guidance_scale=4.0)."""

LICENSE_NAMES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "OFL*")


@dataclass(frozen=True)
class Family:
    task: str
    needs: tuple[str, ...]
    """Components beside the scheduler."""
    build: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Any]
    """(diffusers, components, model_index.json) -> the pipeline, with the components given."""


def _text_to_image(diffusers: Any, parts: Mapping[str, Any], index: Mapping[str, Any]) -> Any:
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _class_conditional(diffusers: Any, parts: Mapping[str, Any], index: Mapping[str, Any]) -> Any:
    return diffusers.DiTPipeline(**parts, id2label=index.get("id2label"))


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        "text-to-image", ("unet", "vae", "text_encoder", "tokenizer"), _text_to_image
    ),
    "DDPMPipeline": Family(
        "unconditional", ("unet",), lambda diffusers, parts, _: diffusers.DDPMPipeline(**parts)
    ),
    "DDIMPipeline": Family(
        "unconditional", ("unet",), lambda diffusers, parts, _: diffusers.DDIMPipeline(**parts)
    ),
    "DiTPipeline": Family("class-conditional", ("transformer", "vae"), _class_conditional),
}


def from_pipeline(pipeline: Any, name: str, folder: Path | None = None) -> Model:
    """A diffusers pipeline of a known family as a Model; the modules are shared, not copied.

    folder  where the checkpoint lies: its tokenizer and licence files go into the bundle
    """
    family = FAMILIES[type(pipeline).__name__]
    network_name = "transformer" if hasattr(pipeline, "transformer") else "unet"
    network = getattr(pipeline, network_name)
    vae = getattr(pipeline, "vae", None)
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    scheduler = pipeline.scheduler
    sample = _sample(network, vae, factor)
    parts = [_denoiser(network_name, network, sample, len(scheduler.betas), pipeline)]
    if vae is not None:
        parts.append(_decoder(vae, sample))
    if hasattr(pipeline, "text_encoder"):
        parts.append(_text_encoder(pipeline))
    guidance = {"text-to-image": GUIDANCE_SD, "class-conditional": GUIDANCE_DIT}.get(family.task)
    licence, licence_files = _license(folder)
    return Model(
        name=name,
        task=family.task,
        denoiser=network_name,
        parts={part.name: part for part in parts},
        process=process_of(scheduler),
        prediction=prediction_of(scheduler),
        sample=sample,
        grid=grid_of(scheduler),
        guidance=GuidanceSpec() if guidance is None else GuidanceSpec("cfg", guidance),
        classes=network.config.num_embeds_ada_norm if family.task == "class-conditional" else None,
        tokenizer=_tokenizer_files(pipeline, folder),
        scheduler={"_class_name": type(scheduler).__name__, **plain_config(scheduler)},
        license=licence,
        license_files=licence_files,
        original=pipeline,
    )


def _sample(network: Any, vae: Any, factor: int) -> SampleSpec:
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    blocks = getattr(network.config, "down_block_types", None)
    # every stage of a U-Net but the last halves the size; a transformer cuts it into patches of fixed number
    step = 2 ** (len(blocks) - 1) if blocks else network.config.patch_size
    return SampleSpec(
        height=height * factor,
        width=width * factor,
        channels=network.config.in_channels,
        factor=factor,
        multiple=factor * step,
        fixed=blocks is None,  # a transformer's position embedding is baked for its size
        scaling_factor=1.0 if vae is None else float(vae.config.scaling_factor),
        shift_factor=0.0 if vae is None else float(vae.config.shift_factor or 0.0),
    )


def _denoiser(name: str, network: Any, sample: SampleSpec, levels: int, pipeline: Any) -> Part:
    from .wrappers import LabelledDenoiser, PlainDenoiser, TextDenoiser

    latent = (sample.height // sample.factor, sample.width // sample.factor)
    height, width = latent if sample.fixed else ("height", "width")
    inputs = [
        TensorSpec("sample", "float32", ("batch", sample.channels, height, width)),
        TensorSpec("timestep", "float32", ("batch",)),
    ]
    ranges: dict[str, tuple[float, float]] = {"timestep": (0, levels - 1)}
    if name == "transformer":
        module: Any = LabelledDenoiser(network, sample.channels)
        inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
        ranges["class_labels"] = (0, network.config.num_embeds_ada_norm + 1)  # the last one means "no class"
    elif hasattr(pipeline, "text_encoder"):
        module = TextDenoiser(network)
        length, channels = pipeline.tokenizer.model_max_length, network.config.cross_attention_dim
        inputs.append(TensorSpec("encoder_hidden_states", "float32", ("batch", length, channels)))
    else:
        module = PlainDenoiser(network)
    sizes = {"batch": (2, 3)}
    if not sample.fixed:
        sizes |= _other_sizes(latent, sample.multiple // sample.factor)
    out = TensorSpec("out_sample", "float32", ("batch", sample.channels, height, width))
    return Part(name, module, tuple(inputs), (out,), Example(sizes, ranges), plain_config(network))


def _other_sizes(latent: tuple[int, int], step: int) -> dict[str, tuple[int, int]]:
    """The default size of each axis and another to try: about half, for speed, and height not equal to width."""
    height, width = (max(step, size // 2 // step * step) for size in latent)
    return {"height": (latent[0], height + step), "width": (latent[1], width)}


def _decoder(vae: Any, sample: SampleSpec) -> Part:
    from .wrappers import Decoder

    latent = (sample.height // sample.factor, sample.width // sample.factor)
    return Part(
        "vae_decoder",
        Decoder(vae),
        (TensorSpec("latent_sample", "float32", ("batch", vae.config.latent_channels, "height", "width")),),
        (TensorSpec("sample", "float32", ("batch", vae.config.out_channels, "out_height", "out_width")),),
        Example({"batch": (2, 3)} | _other_sizes(latent, sample.multiple // sample.factor)),
        plain_config(vae),
    )


def with_image_encoder(model: Model) -> Model:
    """The model with its VAE's encoder as one more part, so that its bundle takes pictures to start from.

    Raises CheckpointError for a model without a VAE that has one.
    """
    from .wrappers import Encoder

    vae, sample = getattr(model.original, "vae", None), model.sample
    if vae is None or getattr(vae, "encoder", None) is None:
        raise CheckpointError(
            f"{model.name} has no VAE with an encoder", expected="a latent diffusion checkpoint"
        )
    latent = (sample.height // sample.factor, sample.width // sample.factor)
    sizes = _other_sizes(latent, sample.multiple // sample.factor)
    pixels = {axis: (own * sample.factor, other * sample.factor) for axis, (own, other) in sizes.items()}
    part = Part(
        "vae_encoder",
        Encoder(vae),
        (TensorSpec("sample", "float32", ("batch", vae.config.in_channels, "height", "width")),),
        (
            TensorSpec(
                "latent_sample", "float32", ("batch", vae.config.latent_channels, "out_height", "out_width")
            ),
        ),
        Example({"batch": (2, 3)} | pixels),
        plain_config(vae),
    )
    return replace(model, parts={**model.parts, part.name: part})


def _text_encoder(pipeline: Any) -> Part:
    from .wrappers import TextEncoder

    config = pipeline.text_encoder.config
    length = pipeline.tokenizer.model_max_length
    return Part(
        "text_encoder",
        TextEncoder(pipeline.text_encoder),
        (TensorSpec("input_ids", "int64", ("batch", length)),),
        (
            TensorSpec("last_hidden_state", "float32", ("batch", length, config.hidden_size)),
            TensorSpec("pooler_output", "float32", ("batch", config.hidden_size)),
        ),
        Example({"batch": (2, 3)}, {"input_ids": (0, config.vocab_size)}),
        {key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
    )


def _tokenizer_files(pipeline: Any, folder: Path | None) -> TokenizerFiles | None:
    tokenizer = getattr(pipeline, "tokenizer", None)
    if tokenizer is None:
        return None
    folder = Path(tokenizer.name_or_path) if folder is None else folder / "tokenizer"
    return TokenizerFiles(folder, tokenizer.model_max_length, tokenizer.pad_token_id)


def _license(folder: Path | None) -> tuple[str, tuple[Path, ...]]:
    """The licence a checkpoint states: its files, and the `license:` line of its model card's header."""
    if folder is None:
        return "", ()
    files = sorted({file for name in LICENSE_NAMES for file in folder.glob(name) if file.is_file()})
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:50] if card.is_file() else []
    named = [
        line.partition(":")[2].strip() for line in lines if line.startswith(("license:", "license_name:"))
    ]
    return named[-1] if named else "see " + ", ".join(f.name for f in files) if files else "", tuple(files)


def plain_config(thing: Any) -> dict[str, Any]:
    """A diffusers configuration as plain JSON data, without where it was loaded from."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dict(thing.config).items()
        if key != "_name_or_path"
    }
