"""One .safetensors file with a whole Stable Diffusion 1.x in it, as model sites publish them."""

from __future__ import annotations

from pathlib import Path

from ..runtime.errors import CheckpointError
from .checks import check_finite, read_header
from .diffusers_folder import read_index
from .families import from_pipeline
from .libraries import diffusers, quiet
from .model import Model

__all__ = ["configuration_of", "load_single_file", "summarize_single_file"]

PREFIXES = {
    # the CompVis names of a latent diffusion checkpoint (github.com/CompVis/stable-diffusion, ldm/models)
    "unet": ("model.diffusion_model.",),
    "vae_decoder": ("first_stage_model.decoder.", "first_stage_model.post_quant_conv."),
    "text_encoder": ("cond_stage_model.transformer.",),
}


def summarize_single_file(file: Path) -> dict[str, int]:
    """Part -> elements of its weights. Raises CheckpointError for a file of another kind."""
    tensors = read_header(file)
    counts = {
        part: sum(tensor.count() for tensor in tensors if tensor.name.startswith(prefixes))
        for part, prefixes in PREFIXES.items()
    }
    absent = [part for part, count in counts.items() if not count]
    if absent:
        raise CheckpointError(
            f"{file} has no {' and no '.join(absent)}: its tensors are called {tensors[0].name}, ...",
            expected="a whole Stable Diffusion 1.x in one file",
            fix="pass the diffusers folder it belongs to",
        )
    return counts


def configuration_of(file: Path, config: Path | None) -> Path:
    """The folder that says what a file's weights are of: `config`, or the one it lies in. Raises CheckpointError."""
    if config is None and (file.parent / "model_index.json").exists():
        config = file.parent
    if config is None:
        raise CheckpointError(
            f"{file} holds weights alone",
            expected="a diffusers folder of the same family beside it, for the tokenizer and the configuration",
            fix="put the file into that folder, or pass config=folder",
        )
    return config


def load_single_file(file: Path, config: Path | None) -> Model:
    """Read it with diffusers' own converter; nothing is fetched.

    config  a diffusers folder of the same family: its configuration and tokenizer, not its weights. Unless given, the
            folder the file lies in, where that is one.
    """
    summarize_single_file(file)
    config = configuration_of(file, config)
    index = read_index(config)
    check_finite([file])
    try:
        with quiet():
            pipeline = getattr(diffusers(), index.pipeline).from_single_file(
                str(file),
                config=str(config),
                local_files_only=True,
                safety_checker=None,
                feature_extractor=None,
            )
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} cannot be read with the configuration of {config} ({type(error).__name__}: {line})",
            fix="take the folder the file was made from",
        ) from error
    for name in index.networks():
        getattr(pipeline, name).float().eval()
    return from_pipeline(pipeline, file.stem, config)
