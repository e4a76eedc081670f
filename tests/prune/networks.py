"""Denoisers with every kind of block, of a few thousand random weights."""

import torch

from fewstep.model.libraries import diffusers, quiet
from fewstep.model.model import Example, Part
from fewstep.model.wrappers import LabelledDenoiser, PlainDenoiser, TextDenoiser
from fewstep.runtime.manifest import TensorSpec

SAMPLE = TensorSpec("sample", "float32", ("batch", 4, 8, 8))
TIME = TensorSpec("timestep", "float32", ("batch",))
OUT = (TensorSpec("out_sample", "float32", ("batch", 4, 8, 8)),)


def text_unet(**changes):
    """Three stages, the inner two of equal width; 2 layers a block, a middle block."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **changes,
    }
    network = _random("UNet2DConditionModel", config)
    states = TensorSpec("encoder_hidden_states", "float32", ("batch", 5, 8))
    return Part("unet", TextDenoiser(network).eval(), (SAMPLE, TIME, states), OUT, _example())


def plain_unet():
    """With attentions that have a residual connection of their own."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return Part("unet", PlainDenoiser(_random("UNet2DModel", config)).eval(), (SAMPLE, TIME), OUT, _example())


def dit():
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    labels = TensorSpec("class_labels", "int64", ("batch",))
    module = LabelledDenoiser(_random("DiTTransformer2DModel", config), 4)
    return Part("transformer", module.eval(), (SAMPLE, TIME, labels), OUT, _example(class_labels=(0, 11)))


def output(part):
    """Of one batch, always the same."""
    feeds = part.example.feeds(part.inputs, {"batch": 2}, seed=3)
    with torch.no_grad():
        return part.module(*(torch.from_numpy(feeds[spec.name]) for spec in part.inputs))


def _random(kind, config):
    torch.manual_seed(0)
    with quiet():
        network = getattr(diffusers(), kind).from_config(config)
    for tensor in network.parameters():  # DiT's gates start at zero, behind which every error would hide
        torch.nn.init.normal_(tensor, std=0.2)
    return network


def _example(**ranges):
    return Example({"batch": (2, 3)}, {"timestep": (0, 999), **ranges})
