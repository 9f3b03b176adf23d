"""Stable Diffusion 1.x: CLIP text encoder, UNet with cross attention, AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor as TorchTensor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from export.family import Component, Family, Part
from export.source import Source, read_json
from export.trace import without_weights
from runtime.pipelines.diffusion import Defaults, DiffusionConfig, Sizes, Vae
from runtime.samplers import SchedulerConfig
from runtime.signature import BATCH, Dim, Signature, Tensor


class TextEncoder(nn.Module):
    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model(input_ids=input_ids).last_hidden_state,)


class UNet(nn.Module):
    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: TorchTensor, timestep: TorchTensor, encoder_hidden_states: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


class VaeDecoder(nn.Module):
    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model.decode(latents, return_dict=False)[0],)


class VaeEncoder(nn.Module):
    """The mean of the latent distribution: deterministic, so that a picture always encodes alike."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model.encode(image).latent_dist.mode(),)


def _configs(source: Source, reduced: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Configs of text encoder, UNet and VAE. The twin has one layer where the model repeats several."""
    text, unet, vae = (read_json(source.root / part / "config.json") for part in ("text_encoder", "unet", "vae"))
    if reduced:
        text, unet, vae = text | {"num_hidden_layers": 2}, unet | {"layers_per_block": 1}, vae | {"layers_per_block": 1}
    return text, unet, vae


def _scale(blocks: list[Any]) -> int:
    """Each block but the last halves the edge."""
    return int(2 ** (len(blocks) - 1))


def _longest(edge: int) -> int:
    """The longest latent edge that is accepted, where the model was trained at `edge`."""
    return max(128, 4 * edge)


def parts(source: Source, reduced: bool) -> list[Part]:
    text_config, unet_config, vae_config = _configs(source, reduced)
    with without_weights():
        text = CLIPTextModel(CLIPTextConfig(**text_config)).eval()
        unet = UNet2DConditionModel.from_config(unet_config).eval()
        vae = AutoencoderKL.from_config(vae_config).eval()
    hidden, length = text.config.hidden_size, text.config.max_position_embeddings
    channels, pixels = vae.config.latent_channels, _scale(vae.config.block_out_channels)
    edge, step = unet.config.sample_size, _scale(unet.config.block_out_channels)

    def latent(name: str) -> Dim:
        return Dim(name=name, min=step, opt=edge, max=_longest(edge), multiple=step)

    def pixel(name: str) -> Dim:
        return Dim(name=name, min=step * pixels, opt=edge * pixels, max=_longest(edge) * pixels, multiple=pixels * step)

    sequence = Dim(name="sequence", min=1, opt=length, max=length)
    context = Dim(name="sequence", min=1, opt=length, max=16 * length)
    latents = (BATCH, channels, latent("height"), latent("width"))
    image = Tensor(name="image", dtype="float32", dims=(BATCH, vae.config.in_channels, pixel("image_height"), pixel("image_width")))
    sample = Tensor(name="sample", dtype="float32", dims=(BATCH, unet.config.in_channels, *latents[2:]))
    states = Tensor(name="encoder_hidden_states", dtype="float32", dims=(BATCH, context, unet.config.cross_attention_dim))
    ids = Tensor(name="input_ids", dtype="int64", dims=(BATCH, sequence), values="below", limit=text.config.vocab_size)
    timestep = Tensor(name="timestep", dtype="float32", dims=(BATCH,), values="below", limit=1000)
    text_component, unet_component, vae_component = Component("text_encoder", text), Component("unet", unet), Component("vae", vae)
    return [
        Part(
            "text_encoder",
            text_component,
            TextEncoder(text),
            Signature(inputs=(ids,), outputs=(Tensor(name="last_hidden_state", dtype="float32", dims=(BATCH, sequence, hidden)),)),
            least_bits=8,  # its error bends every step alike: at int4 the sample draws 7 of 100 prompts wrong by that alone
        ),
        Part(
            "unet",
            unet_component,
            UNet(unet),
            Signature(
                inputs=(sample, timestep, states),
                outputs=(Tensor(name="noise_pred", dtype="float32", dims=(BATCH, unet.config.out_channels, *latents[2:])),),
            ),
        ),
        Part(
            "vae_decoder",
            vae_component,
            VaeDecoder(vae),
            Signature(inputs=(Tensor(name="latents", dtype="float32", dims=latents),), outputs=(image,)),
        ),
        Part(
            "vae_encoder",
            vae_component,
            VaeEncoder(vae),
            Signature(inputs=(image,), outputs=(Tensor(name="latents", dtype="float32", dims=latents),)),
        ),
    ]


def config(source: Source) -> dict[str, Any]:
    unet, vae = (read_json(source.root / part / "config.json") for part in ("unet", "vae"))
    scheduler = read_json(source.root / "scheduler" / "scheduler_config.json")
    # diffusers' StableDiffusionPipeline corrects old files so on load: they were written before these fields existed.
    scheduler |= {"steps_offset": 1, "clip_sample": False}
    pixels, step = _scale(vae["block_out_channels"]), _scale(unet["block_out_channels"])
    edge = unet["sample_size"] * pixels
    sizes = Sizes(min=step * pixels, max=_longest(unet["sample_size"]) * pixels, default=edge, multiple=step * pixels)
    return DiffusionConfig(
        scheduler=SchedulerConfig.parse(scheduler),
        vae=Vae(
            scaling_factor=vae.get("scaling_factor", 0.18215),
            shift_factor=vae.get("shift_factor") or 0.0,
            scale_factor=pixels,
            latent_channels=vae["latent_channels"],
        ),
        sizes=sizes,
        defaults=Defaults.read(source.root),
    ).dump()


def assets(source: Source) -> Mapping[str, Path]:
    folders = (source.root / "tokenizer", source.root / "scheduler")
    return {f"{folder.name}/{file.name}": file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()}


FAMILY = Family("stable-diffusion", "diffusion", ("StableDiffusionPipeline",), parts, config, assets)
