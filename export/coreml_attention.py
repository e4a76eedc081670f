"""Attention in the form the Neural Engine runs well, as a rewrite of diffusers' modules.

Apple ("Deploying Transformers on the Apple Neural Engine", Apple Machine Learning Research, June 2022): data lies as
[batch, channels, 1, length], linear layers are convolutions of 1x1, and every head is one small einsum by itself
without a transposed copy of anything but the keys. The result is the same function, exact but for rounding.

Imported only where torch is already needed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel

__all__ = ["SwiftDenoiser", "split_einsum"]

Tensor = Any
Module = Any


def split_einsum(module: Module, query_chunk: int = 0) -> Module:
    """A copy of a network with its attention rewritten; it shares the weights. Layers keep their names.

    query_chunk  so many queries at a time where there are more; 0: all at once. Bounds the largest array, which has
                 length times length values a head.
    Transformers of diffusers' U-Nets are rewritten whole, other attention (DiT, VAE) by itself, between transposes.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    rewritten = copy.deepcopy(module, shared)
    for name, inner in list(rewritten.named_modules()):
        if isinstance(inner, Transformer2DModel) and _is_plain(inner):
            _put(rewritten, name, SpatialTransformer(inner, query_chunk))
    for name, inner in list(rewritten.named_modules()):
        if isinstance(inner, Attention) and _is_known(inner):
            _put(rewritten, name, SplitAttention(inner, query_chunk))
    return rewritten


def _put(module: Module, name: str, new: Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(module.get_submodule(above), last, new.eval())


def _is_known(attention: Module) -> bool:
    """Whether an Attention does no more than _attend and its frame do."""
    absent = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    return all(getattr(attention, name, None) is None for name in absent) and attention.to_q is not None


def _is_plain(transformer: Module) -> bool:
    """Whether a Transformer2DModel is one over pictures, of blocks with layer norms."""
    if not transformer.is_input_continuous:
        return False
    for block in transformer.transformer_blocks:
        names = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff")
        if not all(hasattr(block, name) for name in names):
            return False
        if (
            getattr(block, "norm_type", "layer_norm") != "layer_norm"
            or getattr(block, "pos_embed", None) is not None
        ):
            return False
        for name in ("norm1", "norm2", "norm3"):
            if not isinstance(getattr(block, name), torch.nn.LayerNorm | None):
                return False
        for name in ("attn1", "attn2"):
            inner = getattr(block, name)
            if inner is not None and not (
                isinstance(inner, Attention) and _is_known(inner) and not inner.residual_connection
            ):
                return False
        if block.ff is not None and not _is_geglu(block.ff):
            return False
    return True


def _is_geglu(feed_forward: Module) -> bool:
    return len(feed_forward.net) >= 3 and type(feed_forward.net[0]).__name__ == "GEGLU"


def _convolution(linear: Module) -> Module:
    """A linear layer as a convolution of 1x1 over the same memory; a convolution stays as it is."""
    if isinstance(linear, torch.nn.Conv2d):
        return linear
    out, inner = linear.weight.shape
    conv = torch.nn.Conv2d(inner, out, 1, bias=linear.bias is not None, device="meta")
    conv.weight = torch.nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
    if linear.bias is not None:
        conv.bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
    return conv


def _normed(x: Tensor, norm: Module) -> Tensor:
    """A layer norm over the channels of [batch, channels, 1, length]."""
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    x = centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        x = x * norm.weight[:, None, None]
    return x if norm.bias is None else x + norm.bias[:, None, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, query_chunk: int) -> Tensor:
    """softmax(q k / sqrt(width of a head)) v, head by head.

    q [batch, channels, 1, queries], k and v [batch, channels, 1, keys] -> [batch, channels, 1, queries]
    """
    width = q.shape[1] // heads
    keys = k.transpose(1, 3)  # [batch, keys, 1, channels], the one transposed copy
    size = query_chunk or q.shape[3]
    parts = []
    for start in range(0, q.shape[3], size):
        group = q[:, :, :, start : start + size]
        every = []
        for head in range(heads):
            here = slice(head * width, (head + 1) * width)
            scores = torch.einsum("bchq,bkhc->bkhq", group[:, here], keys[:, :, :, here]) * width**-0.5
            every.append(torch.einsum("bkhq,bchk->bchq", scores.softmax(1), v[:, here]))
        parts.append(torch.cat(every, 1))
    return torch.cat(parts, 3) if len(parts) > 1 else parts[0]


class Projections(torch.nn.Module):  # type: ignore[misc]
    """The four projections of an Attention under their old names, as convolutions."""

    def __init__(self, attention: Module) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (_convolution(getattr(attention, f"to_{end}")) for end in "qkv")
        self.to_out = torch.nn.ModuleList([_convolution(attention.to_out[0])])
        self.heads, self.rescale = attention.heads, float(attention.rescale_output_factor)

    def attended(self, x: Tensor, context: Tensor, query_chunk: int) -> Tensor:
        out = _attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, query_chunk)
        return self.to_out[0](out)


class SplitBlock(torch.nn.Module):  # type: ignore[misc]
    """A BasicTransformerBlock, or what is left of one, over [batch, channels, 1, length]."""

    def __init__(self, block: Module, query_chunk: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1, self.attn2 = (None if a is None else Projections(a) for a in (block.attn1, block.attn2))
        self.ff: Module = None
        self.only_cross, self.query_chunk = bool(block.only_cross_attention), query_chunk
        if block.ff is not None:
            self.ff, first = torch.nn.Module(), torch.nn.Module()
            first.proj = _convolution(block.ff.net[0].proj)
            self.ff.net = torch.nn.ModuleList([first, torch.nn.Identity(), _convolution(block.ff.net[2])])

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        for norm, inner, crossed in (
            (self.norm1, self.attn1, self.only_cross),
            (self.norm2, self.attn2, context is not None),
        ):
            if inner is not None:
                normed = _normed(x, norm)
                out = inner.attended(normed, context if crossed else normed, self.query_chunk)
                x = x + (out if inner.rescale == 1 else out / inner.rescale)
        if self.ff is not None:
            value, gate = self.ff.net[0].proj(_normed(x, self.norm3)).chunk(2, dim=1)
            x = x + self.ff.net[2](value * torch.nn.functional.gelu(gate))
        return x


class SpatialTransformer(torch.nn.Module):  # type: ignore[misc]
    """A Transformer2DModel over [batch, channels, height, width] that never leaves channels first."""

    def __init__(self, transformer: Module, query_chunk: int) -> None:
        super().__init__()
        self.norm = transformer.norm
        self.proj_in, self.proj_out = _convolution(transformer.proj_in), _convolution(transformer.proj_out)
        blocks = [SplitBlock(block, query_chunk) for block in transformer.transformer_blocks]
        self.transformer_blocks = torch.nn.ModuleList(blocks)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: Any = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As Transformer2DModel; encoder_hidden_states may be [batch, width, 1, length] as well."""
        assert attention_mask is None, "no part here has masks"
        assert encoder_attention_mask is None, "no part here has masks"
        batch, channels, height, width = hidden_states.shape
        context = _channels_first(encoder_hidden_states)
        x = self.proj_in(self.norm(hidden_states).reshape(batch, channels, 1, height * width))
        for block in self.transformer_blocks:
            x = block(x, context)
        x = self.proj_out(x).reshape(batch, channels, height, width) + hidden_states
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


class SplitAttention(Projections):
    """An Attention in the place of another: [batch, length, width], or a picture with a norm and a residual."""

    def __init__(self, attention: Module, query_chunk: int) -> None:
        super().__init__(attention)
        self.group_norm, self.residual = attention.group_norm, bool(attention.residual_connection)
        self.query_chunk = query_chunk

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None, "no part here has masks"
        shape, picture = hidden_states.shape, hidden_states.dim() == 4
        x = hidden_states.reshape(*shape[:2], 1, -1) if picture else _channels_first(hidden_states)
        if self.group_norm is not None:
            x = self.group_norm(x)
        context = x if encoder_hidden_states is None else _channels_first(encoder_hidden_states)
        out = self.attended(x, context, self.query_chunk)
        out = out.reshape(shape) if picture else out[:, :, 0].transpose(1, 2)
        if self.residual:
            out = out + hidden_states
        return out if self.rescale == 1 else out / self.rescale


class SwiftDenoiser(torch.nn.Module):  # type: ignore[misc]
    """A text-conditioned U-Net fed encoder_hidden_states [batch, width, 1, length]; see coreml_layout.py."""

    def __init__(self, network: Module) -> None:
        super().__init__()
        self.network = network
        self.split = any(isinstance(module, SpatialTransformer) for module in network.modules())

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        states = encoder_hidden_states
        if not self.split:  # attention that is split takes them as they come
            states = states[:, :, 0].transpose(1, 2)
        return self.network(sample, timestep, states, return_dict=False)[0]


def _channels_first(states: Tensor | None) -> Tensor:
    """[batch, length, width] as [batch, width, 1, length]; what is that already stays."""
    return states if states is None or states.dim() == 4 else states.transpose(1, 2)[:, :, None]
