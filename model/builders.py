"""Models made from a configuration alone, with random weights: for size and speed work, and for tests.

    build("sd15")           Stable Diffusion 1.5 at full size (860 M parameter U-Net)
    build("bk-sdm-small")   BK-SDM-Small and BK-SDM-Tiny (Kim et al. 2023, arXiv:2305.15798): the same with fewer blocks
    tiny_sd(folder)         the same architecture at 1/400 of the size, saved as a diffusers folder

Weights are drawn so that activations keep their size from layer to layer, so that errors and speeds are those of a
trained network, not of zeros.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .libraries import diffusers, quiet, torch, transformers

__all__ = ["ARCHITECTURES", "build_pipeline", "count_weights", "tiny_sd", "write_tokenizer"]

SD15_UNET: dict[str, Any] = {
    # huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

BK_SMALL_UNET: dict[str, Any] = {
    # huggingface.co/nota-ai/bk-sdm-small, unet/config.json: one layer a block and no middle block
    **SD15_UNET,
    "layers_per_block": 1,
    "mid_block_type": None,
}

BK_TINY_UNET: dict[str, Any] = {
    # huggingface.co/nota-ai/bk-sdm-tiny, unet/config.json: the innermost stage is gone as well
    **BK_SMALL_UNET,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}

SD15_VAE: dict[str, Any] = {
    # the same repository, vae/config.json
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}

CLIP_L: dict[str, Any] = {
    # the same repository, text_encoder/config.json
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}

SD_SCHEDULER: dict[str, Any] = {
    # the same repository, scheduler/scheduler_config.json
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": SD15_UNET,
    "bk-sdm-small": BK_SMALL_UNET,
    "bk-sdm-tiny": BK_TINY_UNET,
}
"""Name after `arch:` -> the U-Net's configuration; text encoder, VAE and scheduler are SD-1.5's in all of them."""


def build_pipeline(name: str, tokenizer_folder: Path, seed: int | None = 0) -> Any:
    """A StableDiffusionPipeline of a known architecture with random float32 weights.

    tokenizer_folder  where a small tokenizer is written: it has CLIP's special tokens, but spells words in bytes
    seed              None: its tensors have shapes and no memory
    """
    return _pipeline(ARCHITECTURES[name], SD15_VAE, CLIP_L, tokenizer_folder, seed)


def count_weights(name: str) -> dict[str, int]:
    """Elements of the weights of every part of a known architecture, without allocating them."""
    networks = _networks(ARCHITECTURES[name], SD15_VAE, CLIP_L)
    with torch().device("meta"):
        built = {part: make() for part, make in networks.items()}
    counts = {part: sum(tensor.numel() for tensor in module.parameters()) for part, module in built.items()}
    counts["vae_decoder"] = sum(t.numel() for t in built["vae"].decoder.parameters())
    del counts["vae"]
    return counts


def tiny_sd(folder: Path, seed: int = 0) -> Path:
    """Write a Stable-Diffusion-1.x folder with all its kinds of layer and 0.9 M parameters; returns `folder`."""
    unet = {
        **SD15_UNET,
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    vae = {
        **SD15_VAE,
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    text = {
        **CLIP_L,
        "vocab_size": 520,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 64,
        "bos_token_id": 518,
        "eos_token_id": 519,
        "pad_token_id": 519,
    }
    pipeline = _pipeline(unet, vae, text, folder / "tokenizer", seed)
    with quiet():
        pipeline.save_pretrained(folder)
    return folder


def _networks(unet: Any, vae: Any, text: Any) -> dict[str, Callable[[], Any]]:
    d, t = diffusers(), transformers()
    with quiet():
        kinds = d.UNet2DConditionModel, d.AutoencoderKL, t.CLIPTextModel, t.CLIPTextConfig
    return {
        "unet": lambda: kinds[0].from_config(unet),
        "vae": lambda: kinds[1].from_config(vae),
        "text_encoder": lambda: kinds[2](kinds[3](**text)),
    }


def _pipeline(unet: Any, vae: Any, text: Any, tokenizer_folder: Path, seed: int | None) -> Any:
    write_tokenizer(tokenizer_folder, text["vocab_size"])
    networks = _networks(unet, vae, text)
    parts = {
        name: _empty(make) if seed is None else _random(make, seed + i)
        for i, (name, make) in enumerate(networks.items())
    }
    with quiet():
        tokenizer = transformers().CLIPTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
        return diffusers().StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            scheduler=diffusers().DDIMScheduler(**SD_SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _empty(make: Callable[[], Any]) -> Any:
    with torch().device("meta"):
        return make().eval()


def _random(make: Callable[[], Any], seed: int) -> Any:
    """Build a module without its own slow initialization and fill it from one seeded generator.

    Matrices and kernels get variance 1 / fan-in, norms stay near 1, nothing is zero: a branch that starts at zero
    would hide every error behind it.
    """
    th = torch()
    module = _empty(make)
    module.to_empty(device="cpu")
    generator = th.Generator().manual_seed(seed)
    for name, tensor in module.named_parameters():
        with th.no_grad():
            if name.endswith("embedding.weight"):  # tokens and positions, at CLIP's own scale (0.02)
                tensor.normal_(0, 0.02, generator=generator)
            elif tensor.ndim >= 2:
                # a uniform draw of the same variance: three times as fast as a normal one
                bound = (3 / tensor[0].numel()) ** 0.5
                tensor.uniform_(-bound, bound, generator=generator)
            elif name.endswith("weight"):
                tensor.uniform_(0.9, 1.1, generator=generator)
            else:
                tensor.uniform_(-0.05, 0.05, generator=generator)
    for name, buffer in module.named_buffers():  # to_empty left them without values
        if not name.endswith("position_ids"):
            raise NotImplementedError(f"buffer {name} of {type(module).__name__} has no known value")
        buffer.copy_(th.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.eval()


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level CLIP tokenizer in the classic files: 256 bytes, 256 bytes that end a word, a few merges.

    vocabulary  entries in all; what words do not need is filled with unused ones, and the last two are
                <|startoftext|> and <|endoftext|>, as in CLIP
    """
    characters = _byte_characters()
    merges = [("a", "t</w>"), ("c", "at</w>"), ("d", "o"), ("do", "g</w>")]
    words = characters + [character + "</w>" for character in characters] + ["".join(pair) for pair in merges]
    words += [f"<|unused{i}|>" for i in range(vocabulary - len(words) - 2)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _byte_characters() -> list[str]:
    """GPT-2's printable character for every byte (Radford et al. 2019), in the order CLIP numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(len(rest))]
