"""Networks of random weights that the rates of a device are found on: the kinds that are exported, in other sizes."""

from __future__ import annotations

from typing import Any

from fewstep.model.model import Example, Part
from fewstep.runtime.manifest import TensorSpec

UNETS = {
    # name -> channels of the stages, layers a block, heads, width of the text, side of the latent
    "unet 64": ((64, 128, 256), 2, 4, 128, 16),
    "unet 96": ((96, 192, 288), 1, 6, 192, 24),
    "unet 128": ((128, 256, 512), 1, 8, 256, 32),
    "unet 320": ((320, 640), 1, 8, 512, 32),
}
DECODERS = {
    # name -> channels of the stages, side of the latent
    "decoder 24": ((24, 48, 96), 16),
    "decoder 64": ((64, 128, 128), 24),
    "decoder 128": ((96, 128, 256, 256), 24),
    "decoder 192": ((96, 192, 192), 64),
}
TRANSFORMERS = {
    # name -> heads, width of one, layers, side of the latent
    "transformer 256": (4, 64, 8, 32),
    "transformer 384": (6, 64, 6, 16),
}
ENCODERS = {
    # name -> width, layers, heads, tokens
    "encoder 256": (256, 6, 4, 48),
    "encoder 512": (512, 6, 8, 77),
}
NAMES = (*UNETS, *DECODERS, *TRANSFORMERS, *ENCODERS)


def network(name: str) -> Part:
    """One of NAMES as the part it would be in a bundle."""
    import torch

    torch.manual_seed(0)
    batch = {"batch": (2, 3)}
    if name in UNETS:
        return _unet(*UNETS[name], batch)
    if name in DECODERS:
        return _decoder(*DECODERS[name], batch)
    if name in TRANSFORMERS:
        return _transformer(*TRANSFORMERS[name], batch)
    return _encoder(*ENCODERS[name], batch)


def _unet(channels: Any, layers: int, heads: int, width: int, side: int, batch: Any) -> Part:
    from diffusers import UNet2DConditionModel

    from fewstep.model.wrappers import TextDenoiser

    crossed = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        cross_attention_dim=width,
        attention_head_dim=heads,
    )
    return Part(
        "unet",
        TextDenoiser(unet).eval(),
        (
            TensorSpec("sample", "float32", ("batch", 4, side, side)),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", 32, width)),
        ),
        (TensorSpec("out_sample", "float32", ("batch", 4, side, side)),),
        Example(batch, {"timestep": (0, 999)}),
    )


def _decoder(channels: Any, side: int, batch: Any) -> Part:
    from diffusers import AutoencoderKL

    from fewstep.model.wrappers import Decoder

    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    out = side * 2 ** (len(channels) - 1)
    return Part(
        "vae_decoder",
        Decoder(vae).eval(),
        (TensorSpec("latent_sample", "float32", ("batch", 4, side, side)),),
        (TensorSpec("sample", "float32", ("batch", 3, out, out)),),
        Example(batch),
    )


def _transformer(heads: int, width: int, layers: int, side: int, batch: Any) -> Part:
    from diffusers import DiTTransformer2DModel

    from fewstep.model.wrappers import LabelledDenoiser

    network = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=layers,
        sample_size=side,
        in_channels=4,
        out_channels=4,
        num_embeds_ada_norm=10,
        patch_size=2,
    )
    return Part(
        "transformer",
        LabelledDenoiser(network, 4).eval(),
        (
            TensorSpec("sample", "float32", ("batch", 4, side, side)),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("class_labels", "int64", ("batch",)),
        ),
        (TensorSpec("out_sample", "float32", ("batch", 4, side, side)),),
        Example(batch, {"timestep": (0, 999), "class_labels": (0, 10)}),
    )


def _encoder(width: int, layers: int, heads: int, tokens: int, batch: Any) -> Part:
    from transformers import CLIPTextConfig, CLIPTextModel

    from fewstep.model.wrappers import TextEncoder

    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokens,
            bos_token_id=0,
            eos_token_id=4095,
        )
    )
    return Part(
        "text_encoder",
        TextEncoder(encoder).eval(),
        (TensorSpec("input_ids", "int64", ("batch", tokens)),),
        (
            TensorSpec("last_hidden_state", "float32", ("batch", tokens, width)),
            TensorSpec("pooler_output", "float32", ("batch", width)),
        ),
        Example(batch, {"input_ids": (0, 4096)}),
    )
