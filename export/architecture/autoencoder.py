"""diffusers' autoencoders of pictures as two submodels, one for each direction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor as TorchTensor
from torch import nn

from export.family import Component, Part
from runtime.bundle.signature import Signature, Tensor

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
AUTOENCODERS: Final[Mapping[str, type[Autoencoder]]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
}
"""Those that a pipeline or an addition may have, by the name of their class."""


class VaeDecoder(nn.Module):
    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model.decode(latents, return_dict=False)[0],)


class VaeEncoder(nn.Module):
    """The mean of the latent distribution: deterministic, so that a picture always encodes alike. The tiny autoencoder
    has no distribution.
    """

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: TorchTensor) -> tuple[TorchTensor, ...]:
        return (latents_of(self.model, image),)


def latents_of(model: Autoencoder, image: TorchTensor) -> TorchTensor:
    """What the library's pipelines draw on, of a picture [batch, 3, height, width], -1 to 1."""
    encoded: Any = model.encode(image)
    latents: TorchTensor = encoded.latents if isinstance(model, AutoencoderTiny) else encoded.latent_dist.mode()
    return latents


def coder_parts(
    model: Autoencoder, place: Path | None, image: Tensor, latents: Tensor, scale: int, float16: bool
) -> list[Part]:
    """Decoder and encoder between pictures and latents, one of which lies on `scale` pixels of an edge. `place` is the
    folder of the weights where that is not the source's; `float16` as in `Part`.
    """
    components = (Component("vae", model, place),)
    decode = Signature(inputs=(latents,), outputs=(image.following(latents, times=scale),))
    encode = Signature(inputs=(image,), outputs=(latents.following(image, over=scale),))
    return [
        Part(
            "vae_decoder",
            components,
            VaeDecoder(model),
            lambda z: (model.decode(z).sample,),
            decode,
            least_bits=8,
            float16=float16,
        ),
        Part(
            "vae_encoder",
            components,
            VaeEncoder(model),
            lambda x: (latents_of(model, x),),
            encode,
            least_bits=8,
            float16=float16,
        ),
    ]
