"""What takes the place of blocks that were cut out of a diffusers network: modules with their signatures and no work.

Imported only where torch is already needed. What stays of a block keeps the name it had, and so do its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

__all__ = ["HALVES", "NoAttention", "NoBlock", "NoTransformer", "SkipPath", "ThinBlock", "ThinModulatedBlock"]

Tensor = Any

HALVES = ("attn1", "attn2", "ff")
"""What a BasicTransformerBlock adds to its input, in this order."""


class SkipPath(nn.Module):  # type: ignore[misc]
    """A ResnetBlock2D without its residual branch: the identity, or the 1x1 convolution beside the branch.

    hidden_states [batch, in channels, height, width] -> [batch, out channels, height, width]
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv_shortcut, self.scale = block.conv_shortcut, float(block.output_scale_factor)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        return hidden_states if self.scale == 1 else hidden_states / self.scale


class NoTransformer(nn.Module):  # type: ignore[misc]
    """A Transformer2DModel that does nothing: hidden_states [batch, channels, height, width] come out as they are."""

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
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


class NoAttention(nn.Module):  # type: ignore[misc]
    """An Attention with a residual connection of its own, as UNet2DModel has them, that does nothing."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.scale = float(block.rescale_output_factor)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        return hidden_states if self.scale == 1 else hidden_states / self.scale


class ThinBlock(nn.Module):  # type: ignore[misc]
    """A BasicTransformerBlock of plain layer norms without some of attn1, attn2 and ff, and without their norms.

    block  a BasicTransformerBlock, or a ThinBlock
    kept   names out of attn1, attn2, ff
    hidden_states [batch, tokens, width] -> the same shape
    """

    def __init__(self, block: Any, kept: frozenset[str]) -> None:
        super().__init__()
        self.only_cross_attention = block.only_cross_attention
        for norm, name in (("norm1", "attn1"), ("norm2", "attn2"), ("norm3", "ff")):
            setattr(self, norm, getattr(block, norm) if name in kept else None)
            setattr(self, name, getattr(block, name) if name in kept else None)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        if self.attn1 is not None:
            context = encoder_hidden_states if self.only_cross_attention else None
            seen = self.norm1(hidden_states)
            mixed = self.attn1(seen, encoder_hidden_states=context, attention_mask=attention_mask)
            hidden_states = hidden_states + mixed
        if self.attn2 is not None:
            seen, mask = self.norm2(hidden_states), encoder_attention_mask
            mixed = self.attn2(seen, encoder_hidden_states=encoder_hidden_states, attention_mask=mask)
            hidden_states = hidden_states + mixed
        return hidden_states if self.ff is None else hidden_states + self.ff(self.norm3(hidden_states))


class ThinModulation(nn.Module):  # type: ignore[misc]
    """Half of an AdaLayerNormZero, or nothing of it but the embedding that DiT's output layer shares with its first
    block (Peebles and Xie 2022, arXiv:2212.09748).

    norm  the AdaLayerNormZero; its linear layer gives shift, scale and gate of attention, then of the feed-forward
    half  0 attention's, 1 the feed-forward's, None neither
    """

    def __init__(self, norm: Any, half: int | None) -> None:
        super().__init__()
        self.emb = norm.emb
        if half is None:
            return
        whole = norm.linear
        width = whole.out_features // 2
        self.silu = norm.silu
        like = {"device": whole.weight.device, "dtype": whole.weight.dtype}
        self.linear = nn.Linear(whole.in_features, width, bias=whole.bias is not None, **like)
        with torch.no_grad():
            for name, mine in self.linear.named_parameters():
                mine.copy_(getattr(whole, name)[half * width : (half + 1) * width])

    def forward(self, timestep: Tensor, class_labels: Tensor, dtype: Any) -> Any:
        """(shift, scale, gate), [batch, 1, width] each."""
        seen = self.emb(timestep, class_labels, hidden_dtype=dtype)
        return self.linear(self.silu(seen))[:, None].chunk(3, dim=-1)


class ThinModulatedBlock(nn.Module):  # type: ignore[misc]
    """A DiT block without its attention, without its feed-forward, or without both.

    block  a BasicTransformerBlock with adaLN-Zero
    kept   attn1, or ff, or neither
    hidden_states [batch, tokens, width] -> the same shape
    """

    def __init__(self, block: Any, kept: frozenset[str]) -> None:
        super().__init__()
        self.norm1 = ThinModulation(block.norm1, {"attn1": 0, "ff": 1}[min(kept)] if kept else None)
        self.norm = block.norm1.norm if "attn1" in kept else None
        self.attn1 = block.attn1 if "attn1" in kept else None
        self.norm3 = block.norm3 if "ff" in kept else None
        self.ff = block.ff if "ff" in kept else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        norm: Any = self.norm3 if self.attn1 is None else self.norm
        half: Any = self.ff if self.attn1 is None else self.attn1
        if half is None:
            return hidden_states
        shift, scale, gate = self.norm1(timestep, class_labels, hidden_states.dtype)
        return hidden_states + gate * half(norm(hidden_states) * (1 + scale) + shift)


class NoBlock(nn.Module):  # type: ignore[misc]
    """A BasicTransformerBlock that does nothing."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        return hidden_states
