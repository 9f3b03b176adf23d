"""What the recipes of additions to `shapes-diffusion` have in common: its frozen UNet learns to draw other pictures of
the same captions, with the help of what is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from samples.recipes.train_diffusion import (
    EXPORTED,
    Training,
    TrainingPlan,
    choose,
    denoising_loss,
    emphasis,
    load_pipeline,
    rng_for,
    save_tensors,
    to_tensor,
    tokenize,
    training_scenes,
)
from samples.world.scenes import Scene

FOLDER: Final = EXPORTED.parent / "shapes-additions"

Pictures = NDArray[np.uint8]
"""RGB [n, edge, edge, 3]."""
Draw = Callable[[Scene, np.random.Generator], Pictures]
"""The picture, [edge, edge, 3], that is to be drawn for the caption of a scene."""
Predict = Callable[[Tensor, Pictures, Tensor, Tensor], Tensor]
"""The UNet's output, from text features, the pictures that are learned, noisy latents and timesteps."""


@dataclass(frozen=True, kw_only=True)
class Plan(TrainingPlan):
    """How an addition is trained: on `examples` pictures, which are drawn and encoded once for a run."""

    examples: int
    steps: int
    decay_steps: int
    lr: float
    batch: int = 16
    save_every: int = 50


@dataclass(frozen=True, eq=False)
class Examples:
    """Pictures to learn: the scenes whose captions ask for them, and their scaled latents, float16 [n, 8, 8, 8]."""

    scenes: Sequence[Scene]
    pictures: Pictures
    latents: Tensor


def chosen_scenes(plan: Plan) -> list[Scene]:
    scenes = training_scenes()
    singles = np.array([len(scene.things) == 1 for scene in scenes])
    return [scenes[i] for i in choose(rng_for(plan, 6, 0), singles, plan.examples, plan.singles)]


@torch.no_grad()
def draw_examples(plan: Plan, run: Path, pipeline: StableDiffusionPipeline, draw: Draw) -> Examples:
    """Those of a run; drawn and encoded where it has none yet."""
    path, scenes = run / "examples.safetensors", chosen_scenes(plan)
    if not path.exists():
        pictures, latents = [], []
        for start in range(0, len(scenes), 16):
            rng = rng_for(plan, 7, start)
            pictures.append(np.stack([draw(scene, rng) for scene in scenes[start : start + 16]]))
            with torch.autocast("cpu", torch.bfloat16):
                found = pipeline.vae.encode(to_tensor(pictures[-1])).latent_dist.mean
            latents.append((found.float() * pipeline.vae.config.scaling_factor).half())
        drawn = torch.from_numpy(np.concatenate(pictures))
        save_tensors(path, {"pictures": drawn, "latents": torch.cat(latents)})
    tensors = load_file(path)
    return Examples(scenes, tensors["pictures"].numpy(), tensors["latents"])


def open_base() -> StableDiffusionPipeline:
    """The pipeline that is added to, frozen."""
    pipeline = load_pipeline(EXPORTED)
    pipeline.unet.set_attn_processor(AttnProcessor())  # as in `train_unet`
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False).eval()
    return pipeline


@torch.no_grad()
def text_features(pipeline: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    tokens = tokenize(pipeline.tokenizer, prompts)
    return torch.cat([pipeline.text_encoder(chunk).last_hidden_state for chunk in tokens.split(256)])


def train(
    plan: Plan, run: Path, pipeline: StableDiffusionPipeline, added: nn.Module, draw: Draw, predict: Predict
) -> Training:
    """Train what is added, which `predict` uses, or go on where a killed run stopped."""
    run.mkdir(parents=True, exist_ok=True)
    examples = draw_examples(plan, run, pipeline, draw)
    training = Training(
        added, run / "addition.safetensors", plan.lr, steps=plan.steps, decay_steps=plan.decay_steps, ema=0.99
    )
    training.load()
    weights = torch.stack([emphasis(scene, plan.emphasis) for scene in examples.scenes])
    features = text_features(pipeline, [*(scene.caption for scene in examples.scenes), ""])

    def loss(step: int) -> Tensor:
        rng = rng_for(plan, 8, step)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.integers(len(examples.scenes), size=plan.batch)
        text = features[np.where(rng.random(plan.batch) < plan.caption_dropout, len(examples.scenes), chosen)]
        says = partial(predict, text, examples.pictures[chosen])
        clean = examples.latents[chosen].float()
        return denoising_loss(says, clean, weights[chosen], pipeline.scheduler, plan, rng, generator)

    training.run(run, loss, plan.save_every)
    return training


def options(about: str | None, run: str, out: Path, plan: Plan) -> argparse.Namespace:
    """The options of such a recipe, as they were given."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path(run), help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=out, help="where the addition is written to")
    parser.add_argument("--steps", type=int, default=plan.steps, help="how long to train")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given
