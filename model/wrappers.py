"""The parts of a pipeline as modules with plain tensor arguments: what an exporter can trace.

Argument order is the part's input order. Imported only where torch is already needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Adapted", "Decoder", "LabelledDenoiser", "PlainDenoiser", "TextDenoiser", "TextEncoder"]

Tensor = Any


class TextDenoiser(torch.nn.Module):  # type: ignore[misc]
    """sample [batch, channels, height, width], timestep [batch], encoder_hidden_states [batch, length, width]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.network(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class PlainDenoiser(torch.nn.Module):  # type: ignore[misc]
    """A network without conditioning: sample [batch, channels, height, width], timestep [batch]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.network(sample, timestep, return_dict=False)[0]


class LabelledDenoiser(torch.nn.Module):  # type: ignore[misc]
    """A class-conditional network: sample, timestep [batch], class_labels [batch] int64.

    DiT predicts the noise and, in further channels, its variance; samplers use the noise alone.
    """

    def __init__(self, network: Any, channels: int) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        predicted = self.network(sample, timestep=timestep, class_labels=class_labels, return_dict=False)[0]
        return predicted[:, : self.channels]


class Decoder(torch.nn.Module):  # type: ignore[misc]
    """latent_sample [batch, channels, height / factor, width / factor] -> image in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, getattr(vae, "post_quant_conv", None)

    def forward(self, latent_sample: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        return self.decoder(latent_sample)


class Encoder(torch.nn.Module):  # type: ignore[misc]
    """Image in [-1, 1] -> the mean of its latents, [batch, channels, height / factor, width / factor]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, getattr(vae, "quant_conv", None)

    def forward(self, sample: Tensor) -> Tensor:
        moments = self.encoder(sample)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments.chunk(2, dim=1)[0]


class TextEncoder(torch.nn.Module):  # type: ignore[misc]
    """input_ids [batch, length] int64 -> last_hidden_state [batch, length, width], pooler_output [batch, width]."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(input_ids)
        return output.last_hidden_state, output.pooler_output


class Adapted(torch.nn.Module):  # type: ignore[misc]
    """Any module behind `call(module, sample, timestep[, class_labels])`; see Model.from_module.

    shape  what the module's sample looks like without its batch, where that is not [channels, height, width]
    """

    def __init__(
        self, module: Any, call: Callable[..., Any] | None, shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.module, self.call, self.shape = module, call, shape

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.run(sample, timestep, *(() if class_labels is None else (class_labels,)))

    def run(self, sample: Tensor, timestep: Tensor, *more: Tensor) -> Tensor:
        call = self.call or (lambda module, *inputs: module(*inputs))
        output = call(self.module, self.seen(sample), timestep, *more)
        if hasattr(output, "sample"):  # what diffusers models return
            output = output.sample
        elif isinstance(output, tuple):
            output = output[0]
        return output if self.shape is None else output.reshape(sample.shape)

    def seen(self, sample: Tensor) -> Tensor:
        return sample if self.shape is None else sample.reshape(-1, *self.shape)


class ObservingAdapted(Adapted):
    """The same for a process with an observation: `call(module, sample, timestep, observation[, class_labels])`."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, observation: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        labels = () if class_labels is None else (class_labels,)
        return self.run(sample, timestep, self.seen(observation), *labels)
