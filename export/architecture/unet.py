"""diffusers' UNet2DConditionModel as a submodel, with the inputs that its kinds have besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn

from export.architecture.pictures import Factor, adapted
from export.family import Reference
from runtime.diffusion.controls import MID, is_down
from runtime.diffusion.styles import EMBEDS, SCALES

ADDED: Final = ("text_embeds", "time_ids")
"""Inputs that diffusers takes in a mapping of added conditions."""


class UNet(nn.Module):
    """A UNet on sample, timestep and hidden states, and on further inputs of these `names`."""

    def __init__(self, model: UNet2DConditionModel, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        named = arguments(dict(zip(self.names, more, strict=True)))
        return (self.model(sample, timestep, encoder_hidden_states, return_dict=False, **named)[0],)


def library(model: UNet2DConditionModel, *names: str) -> Reference:
    """The library's own forward with the same inputs."""

    def denoise(sample: Tensor, timestep: Tensor, states: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        named = arguments(dict(zip(names, more, strict=True)))
        if pictures := named.get("added_cond_kwargs", {}).get(EMBEDS):
            projections = model.encoder_hid_proj.image_projection_layers
            pooled = [isinstance(one, ImageProjection) for one in projections]
            named["added_cond_kwargs"][EMBEDS] = [
                embeds if flat else embeds[:, None] for flat, (embeds, _) in zip(pooled, pictures, strict=True)
            ]
            for processor in adapted(model):
                processor.scale = [Factor(scale) for _, scale in pictures]
        return (model(sample, timestep, states, **named).sample,)

    return denoise


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The library's arguments for these inputs: some of them it takes in lists and mappings. Pictures of image adapters
    are pairs of features [batch, positions, width] and scale [batch, 1, 1] (`export.architecture.ip_adapter`).
    """
    named: dict[str, Any] = {}
    added: dict[str, Any] = {name: inputs[name] for name in ADDED if name in inputs}
    if SCALES in inputs:
        embeds = [value for name, value in inputs.items() if name.startswith(f"{EMBEDS}_")]
        scales = inputs[SCALES]
        added[EMBEDS] = [(one, scales[:, index, None, None]) for index, one in enumerate(embeds)]
    if added:
        named["added_cond_kwargs"] = added
    if "timestep_cond" in inputs:
        named["timestep_cond"] = inputs["timestep_cond"]
    if MID in inputs:
        named["down_block_additional_residuals"] = [value for name, value in inputs.items() if is_down(name)]
        named["mid_block_additional_residual"] = inputs[MID]
    return named
