"""Stable Diffusion XL: two CLIP text encoders, a UNet with pooled text and sizes as added conditions (Podell et al.
2023, arXiv:2307.01952).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from diffusers import UNet2DConditionModel
from torch import Tensor as TorchTensor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from export.checkpoint.source import PIPELINE, Source, read_json
from export.families import stable_diffusion as base
from export.family import Family, Part
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Tensor
from runtime.tasks.image import ImageDefaults

TIME_IDS: Final = 6
"""Height and width of the original, top and left of the crop, height and width aimed at."""
USUAL: Final = ImageDefaults(guidance_scale=5.0)
"""As diffusers' StableDiffusionXLPipeline has it."""


class TextEncoder(nn.Module):
    """What goes into the last layer: `input_ids` to penultimate_hidden_state [batch, sequence, hidden]."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model(input_ids=input_ids, output_hidden_states=True).hidden_states[-2],)


class ProjectedTextEncoder(nn.Module):
    """The same, and text_embeds [batch, projection]: the last layer's output at the end token, projected."""

    def __init__(self, model: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        output = self.model(input_ids=input_ids, output_hidden_states=True)
        return (output.hidden_states[-2], output.text_embeds)


def parts(source: Source, reduced: bool) -> list[Part]:
    names = ("text_encoder", "text_encoder_2", "unet", "vae")
    text_config, text_2_config, unet_config, vae_config = base.configs(source, *names, reduced=reduced)
    hidden, hidden_2, projection = (
        text_config["hidden_size"],
        text_2_config["hidden_size"],
        text_2_config["projection_dim"],
    )
    base.require(source, "vae", vae_config, latents_mean=None, latents_std=None)
    base.require_unet(source, unet_config, vae_config, hidden + hidden_2)
    base.require(
        source, "unet", unet_config, addition_embed_type="text_time",
        projection_class_embeddings_input_dim=TIME_IDS * (unet_config["addition_time_embed_dim"] or 0) + projection,
    )  # fmt: skip
    with without_weights():
        text = CLIPTextModel(CLIPTextConfig(**text_config)).eval()
        text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**text_2_config)).eval()
        unet = UNet2DConditionModel.from_config(unet_config).eval()
        vae = base.autoencoder(source, vae_config)
    grid, length = base.Grid.of(source, unet_config, vae_config), base.tokens(text)

    def read(ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (text(ids, output_hidden_states=True).hidden_states[-2],)

    def read_2(ids: TorchTensor) -> tuple[TorchTensor, ...]:
        found = text_2(ids, output_hidden_states=True)
        return (found.hidden_states[-2], found.text_embeds)

    return [
        base.text_part("text_encoder", text, TextEncoder(text), read, {"penultimate_hidden_state": (length, hidden)}),
        base.text_part(
            "text_encoder_2",
            text_2,
            ProjectedTextEncoder(text_2),
            read_2,
            {"penultimate_hidden_state": (base.tokens(text_2), hidden_2), "text_embeds": (projection,)},
        ),
        *base.denoising_parts(
            source,
            unet,
            grid,
            length.opt,
            Tensor(name="text_embeds", dtype="float32", dims=(BATCH, projection)),
            Tensor(name="time_ids", dtype="float32", dims=(BATCH, TIME_IDS), values="below", limit=grid.sizes.default),
            reduced=reduced,
        ),
        # The published VAE's values leave float16: what diffusers calls force_upcast. A retrained one says so in its
        # config.
        *base.vae_parts(source, vae, grid, float16=not vae_config["force_upcast"]),
    ]


def config(source: Source) -> dict[str, Any]:
    zeros = read_json(source.root / PIPELINE).get("force_zeros_for_empty_prompt", True)
    return base.settings(
        source,
        base.Grid.of(source, *base.configs(source, "unet", "vae")),
        base.schedule(source),
        defaults=ImageDefaults.read(source.root, USUAL),
        added={"force_zeros_for_empty_prompt": zeros},
    )


def assets(source: Source) -> Mapping[str, Path]:
    return base.files(source, {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"})


def notes(source: Source) -> tuple[str, ...]:
    return base.notes(source, base.schedule(source))


FAMILY = Family(
    "stable-diffusion-xl",
    "diffusion",
    ("StableDiffusionXLPipeline",),
    parts,
    config,
    assets,
    notes,
    base.ADDITIONS,
)
