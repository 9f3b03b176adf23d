"""Stable Diffusion XL: two CLIP text encoders, a UNet with pooled text and sizes as added conditions (Podell et al.
2023, arXiv:2307.01952). Its refiner has the second text encoder alone, and takes a score for the size aimed at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from diffusers import UNet2DConditionModel
from torch import Tensor as TorchTensor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from export.architecture.ends import at_end
from export.checkpoint.source import PIPELINE, Source, read_json
from export.families import stable_diffusion as base
from export.family import Family, Part
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Dim, Tensor
from runtime.diffusion.defaults import ImageDefaults

PIPELINES: Final = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
ENCODERS: Final = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The text encoders, with their tokenizers. The refiner has the second alone."""
USUAL: Final = ImageDefaults(guidance_scale=5.0, strength=0.3)
"""As diffusers' StableDiffusionXLPipeline and StableDiffusionXLImg2ImgPipeline have it."""


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
        ended = at_end(output.last_hidden_state, input_ids, self.model.config.eos_token_id)
        return (output.hidden_states[-2], self.model.text_projection(ended))


def encoders(source: Source) -> list[str]:
    """The text encoders that a checkpoint has."""
    return [name for name in ENCODERS if name == "text_encoder_2" or base.class_of(source, name)]


def scored(source: Source) -> bool:
    """Whether the UNet takes a score of the picture's beauty in place of the size aimed at."""
    return read_json(source.root / PIPELINE).get("requires_aesthetics_score") is True


def text_part(name: str, config: Mapping[str, Any]) -> Part:
    """A text encoder: the first gives hidden states, the second the projected end token, too."""
    pooled = name == "text_encoder_2"
    with without_weights():
        kind = CLIPTextModelWithProjection if pooled else CLIPTextModel
        model: Any = kind(CLIPTextConfig(**config)).eval()
    shapes: dict[str, tuple[int | Dim, ...]] = {"penultimate_hidden_state": (base.tokens(model), config["hidden_size"])}
    if pooled:
        shapes["text_embeds"] = (config["projection_dim"],)

    def read(ids: TorchTensor) -> tuple[TorchTensor, ...]:
        found = model(ids, output_hidden_states=True)
        return (found.hidden_states[-2], *((found.text_embeds,) if pooled else ()))

    return base.text_part(name, model, (ProjectedTextEncoder if pooled else TextEncoder)(model), read, shapes)


def parts(source: Source, reduced: bool) -> list[Part]:
    texts = dict(zip(encoders(source), base.configs(source, *encoders(source), reduced=reduced), strict=True))
    unet_config, vae_config = base.configs(source, "unet", "vae", reduced=reduced)
    projection, conditions = texts["text_encoder_2"]["projection_dim"], 5 if scored(source) else 6
    base.require(source, "vae", vae_config, latents_mean=None, latents_std=None)
    base.require_unet(source, unet_config, vae_config, sum(config["hidden_size"] for config in texts.values()))
    base.require(
        source, "unet", unet_config, addition_embed_type="text_time",
        projection_class_embeddings_input_dim=conditions * (unet_config["addition_time_embed_dim"] or 0) + projection,
    )  # fmt: skip
    with without_weights():
        unet = UNet2DConditionModel.from_config(unet_config).eval()
        vae = base.autoencoder(source, vae_config)
    grid = base.Grid.of(source, unet_config, vae_config)

    return [
        *(text_part(name, config) for name, config in texts.items()),
        *base.denoising_parts(
            source,
            unet,
            grid,
            texts["text_encoder_2"]["max_position_embeddings"],
            Tensor(name="text_embeds", dtype="float32", dims=(BATCH, projection)),
            Tensor(
                name="time_ids", dtype="float32", dims=(BATCH, conditions), values="below", limit=grid.sizes.default
            ),
            reduced=reduced,
        ),
        # The published VAE's values leave float16: what diffusers calls force_upcast. A retrained one says so in its
        # config.
        *base.vae_parts(source, vae, grid, float16=not vae_config["force_upcast"]),
    ]


def config(source: Source) -> dict[str, Any]:
    zeros = read_json(source.root / PIPELINE).get("force_zeros_for_empty_prompt", True)
    present = encoders(source)
    return base.settings(
        source,
        base.Grid.of(source, *base.configs(source, "unet", "vae")),
        base.schedule(source),
        defaults=ImageDefaults.read(source.root, USUAL),
        added={
            "force_zeros_for_empty_prompt": zeros,
            **({} if len(present) == len(ENCODERS) else {"text_encoders": present}),
            **({"aesthetic": True} if scored(source) else {}),
        },
    )


def assets(source: Source) -> Mapping[str, Path]:
    return base.files(source, {ENCODERS[name]: name for name in encoders(source)})


def notes(source: Source) -> tuple[str, ...]:
    return base.notes(source, base.schedule(source))


FAMILY = Family(
    "stable-diffusion-xl",
    "diffusion",
    PIPELINES,
    parts,
    config,
    assets,
    notes,
    base.ADDITIONS,
)
