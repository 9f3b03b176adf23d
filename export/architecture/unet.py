"""diffusers' UNet2DConditionModel as a submodel, with the inputs that its kinds have besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from export.family import Reference
from runtime.diffusion.controls import MID, is_down

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
        return (model(sample, timestep, states, **arguments(dict(zip(names, more, strict=True)))).sample,)

    return denoise


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The library's arguments for these inputs: some of them it takes in lists and mappings."""
    named: dict[str, Any] = {}
    if added := {name: inputs[name] for name in ADDED if name in inputs}:
        named["added_cond_kwargs"] = added
    if "timestep_cond" in inputs:
        named["timestep_cond"] = inputs["timestep_cond"]
    if MID in inputs:
        named["down_block_additional_residuals"] = [value for name, value in inputs.items() if is_down(name)]
        named["mid_block_additional_residual"] = inputs[MID]
    return named
