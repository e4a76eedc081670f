"""The names a latent diffusion checkpoint has in one file, for writing one (CompVis, ldm/modules)."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}


def unet_name(name, layers, attention):
    """diffusers' name of a U-Net weight -> CompVis's.

    layers     layers_per_block
    attention  for every up block, whether it has cross-attention
    """
    for ours, theirs in TOP.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    block, _, rest = name.partition(".")
    if block == "mid_block":
        kind, number, rest = rest.split(".", 2)
        place = f"middle_block.{2 * int(number) if kind == 'resnets' else 1}"
        return f"{place}.{resnet(rest) if kind == 'resnets' else rest}"
    i, kind, j, rest = rest.split(".", 3)
    i, j = int(i), int(j)
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * i + layers}.{2 if attention[i] else 1}.{rest}"
    place = (
        f"input_blocks.{(layers + 1) * i + j + 1}"
        if block == "down_blocks"
        else f"output_blocks.{(layers + 1) * i + j}"
    )
    return f"{place}.{0 if kind == 'resnets' else 1}.{resnet(rest) if kind == 'resnets' else rest}"


def resnet(rest):
    layer, _, tail = rest.partition(".")
    return f"{RESNET[layer]}.{tail}"


def vae_name(name, blocks):
    """diffusers' name of an AutoencoderKL weight -> CompVis's."""
    for i in range(blocks):
        for ours, theirs in (
            (f"encoder.down_blocks.{i}.resnets.", f"encoder.down.{i}.block."),
            (f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample."),
            (f"decoder.up_blocks.{i}.resnets.", f"decoder.up.{blocks - 1 - i}.block."),
            (f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{blocks - 1 - i}.upsample."),
        ):
            name = name.replace(ours, theirs)
    for ours, theirs in (
        ("mid_block.resnets.0.", "mid.block_1."),
        ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.", "mid.attn_1."),
        ("attn_1.group_norm.", "attn_1.norm."),
        ("attn_1.to_q.", "attn_1.q."),
        ("attn_1.to_k.", "attn_1.k."),
        ("attn_1.to_v.", "attn_1.v."),
        ("attn_1.to_out.0.", "attn_1.proj_out."),
        ("conv_shortcut.", "nin_shortcut."),
        ("conv_norm_out.", "norm_out."),
    ):
        name = name.replace(ours, theirs)
    return name


def write(folder, file):
    """One .safetensors file with the weights of a diffusers folder made by `tiny_sd`."""
    from safetensors.torch import load_file, save_file

    whole = {}
    for name, tensor in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        whole["model.diffusion_model." + unet_name(name, layers=1, attention=(False, True))] = tensor
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        theirs = vae_name(name, blocks=2)
        kernel = "attn_1" in theirs and "norm" not in theirs and tensor.ndim == 2
        whole["first_stage_model." + theirs] = tensor[:, :, None, None].contiguous() if kernel else tensor
    for name, tensor in load_file(folder / "text_encoder/model.safetensors").items():
        name = name if name.startswith("text_model.") else "text_model." + name
        whole["cond_stage_model.transformer." + name] = tensor
    save_file(whole, file)
    return file
