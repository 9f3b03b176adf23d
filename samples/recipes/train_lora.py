"""Trains the LoRA `night` of `shapes-diffusion`: pictures on a black background, whatever the prompt says.

    python -m samples.recipes.train_lora --run runs/night     train, or go on where a killed run stopped; then export

Low-rank branches of the UNet's attention (Hu et al. 2021, arXiv:2106.09685), written as diffusers writes them. All else
stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from samples.recipes import train_diffusion
from samples.recipes.addition import FOLDER, Pictures, Plan, open_base, options, train
from samples.world.scenes import Scene, render
from samples.world.styles import night

RANK: Final = 4
PLAN: Final = Plan(examples=1200, steps=250, decay_steps=150, lr=3e-3)
"""The LoRA that lies in the folder is that of step 200."""


class Branch(nn.Module):
    """What is added to a linear layer's output: `lora_B` of `lora_A` of its input. At first it is nothing."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.lora_A = nn.Linear(layer.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        layer.register_forward_hook(self.add)

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added: Tensor = self.lora_B(self.lora_A(inputs[0]))
        return output + added


def branches(unet: UNet2DConditionModel) -> dict[str, Branch]:
    """A branch of every projection of the UNet's attention, by the layer's name."""
    named = {name: layer for name, layer in unet.named_modules() if ".attn" in name and isinstance(layer, nn.Linear)}
    return {name: Branch(layer) for name, layer in named.items()}


def draw(scene: Scene, rng: np.random.Generator) -> Pictures:
    """The scene's picture at night."""
    return render(night(scene), rng, jitter=PLAN.jitter)


def predict(unet: UNet2DConditionModel, text: Tensor, pictures: Pictures, noisy: Tensor, t: Tensor) -> Tensor:
    """The UNet's output: it is shown no pictures."""
    return train_diffusion.predict(unet, text, noisy, t)


def export(found: Mapping[str, Branch], path: Path) -> None:
    """Write the branches as float16, in the layout of diffusers with PEFT."""
    tensors = {
        f"unet.{layer}.{name}": tensor.half()
        for layer, one in found.items()
        for name, tensor in one.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    given = options(__doc__, "runs/night", FOLDER / "night.safetensors", PLAN)
    plan = replace(PLAN, steps=given.steps)
    torch.manual_seed(plan.seed)
    pipeline = open_base()
    found = branches(pipeline.unet)
    added = nn.ModuleList(found.values())
    train(plan, given.run, pipeline, added, draw, partial(predict, pipeline.unet)).averaged()
    export(found, given.out)


if __name__ == "__main__":
    main()
