"""Trains the control network `edges` of `shapes-diffusion`: pictures whose edges lie where those of another lie.

    python -m samples.recipes.train_control --run runs/edges     train, or go on where a killed run stopped; then export

It begins as a copy of the UNet's first half (Zhang et al. 2023, arXiv:2302.05543). Things of the pictures lie further
from their named places than the UNet has ever drawn them, so that only the edges say where.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from export.preprocess import canny
from samples.recipes.addition import FOLDER, Pictures, Plan, open_base, options, train
from samples.world.edges import SHIFT
from samples.world.scenes import Scene, render

PLAN: Final = Plan(examples=2400, steps=2300, decay_steps=700, lr=2e-3)
"""The network that lies in the folder was trained in three runs, to steps 1000, 1500 and 2300, each with its decay."""
WIDTHS: Final = (8, 12, 16, 24, 32)
"""Channels of the layers that shrink a picture of edges by 16, as the autoencoder does."""


def draw(scene: Scene, rng: np.random.Generator) -> Pictures:
    """The scene's picture, its things off their places."""
    return render(scene, rng, jitter=SHIFT)


def build_network(pipeline: StableDiffusionPipeline) -> ControlNetModel:
    """The untrained network. Its output is nothing yet, but the layers that shrink the edges let them through: as
    diffusers begins them, a millionth of the edges is left after ten small ones, and nothing is learned of them.
    """
    network = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=WIDTHS)
    for parameter in network.controlnet_cond_embedding.parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, gain=2)  # SiLU halves what is small
        else:
            nn.init.zeros_(parameter)
    network.set_attn_processor(next(iter(pipeline.unet.attn_processors.values())))
    return network.requires_grad_(True).train()


def export(network: ControlNetModel, out: Path) -> None:
    """Write it as float16, as diffusers does it, without the path of the UNet that it was copied from."""
    network.half().save_pretrained(out)
    file = out / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
    file.write_text(json.dumps(config, indent=2) + "\n")


def predict(
    unet: UNet2DConditionModel, network: ControlNetModel, text: Tensor, pictures: Pictures, noisy: Tensor, t: Tensor
) -> Tensor:
    """The UNet's output where the network is shown the edges of the pictures."""
    edges = torch.from_numpy(np.stack([canny(picture) for picture in pictures]))
    shown = edges.permute(0, 3, 1, 2).float() / 255
    down, middle = network(noisy, t, text, shown, return_dict=False)
    found: Any = unet(noisy, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    predicted: Tensor = found.sample
    return predicted


def main() -> None:
    given = options(__doc__, "runs/edges", FOLDER / "edges", PLAN)
    plan = replace(PLAN, steps=given.steps)
    torch.manual_seed(plan.seed)
    pipeline = open_base()
    network = build_network(pipeline)
    train(plan, given.run, pipeline, network, draw, partial(predict, pipeline.unet, network)).averaged()
    export(network, given.out)


if __name__ == "__main__":
    main()
