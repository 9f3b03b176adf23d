"""Trains the LoRA `night` of `shapes-diffusion`: pictures on a black background, whatever the prompt says.

    python -m samples.recipes.train_lora --run runs/night     train, or go on where a killed run stopped; then export

Low-rank branches of the UNet's attention (Hu et al. 2021, arXiv:2106.09685), written as diffusers writes them. All else
stays as it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from samples.recipes.train_diffusion import (
    EXPORTED,
    Training,
    TrainingPlan,
    choose,
    denoising_loss,
    emphasis,
    load_pipeline,
    log,
    predict,
    rng_for,
    save_tensors,
    to_tensor,
    tokenize,
    training_scenes,
)
from samples.world.scenes import Scene, render
from samples.world.styles import night

OUT: Final = EXPORTED.parent / "shapes-additions" / "night.safetensors"
RANK: Final = 4


@dataclass(frozen=True)
class Plan(TrainingPlan):
    """How long and how fast it trains, on `examples` pictures that are drawn and encoded once for a run. The LoRA that
    lies in the folder is that of step 200."""

    examples: int = 1200
    steps: int = 250
    decay_steps: int = 150
    batch: int = 16
    lr: float = 3e-3
    save_every: int = 50


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


def chosen_scenes(plan: Plan) -> list[Scene]:
    scenes = training_scenes()
    singles = np.array([len(scene.things) == 1 for scene in scenes])
    return [scenes[i] for i in choose(rng_for(plan, 6, 0), singles, plan.examples, plan.singles)]


@torch.no_grad()
def cached_latents(plan: Plan, run: Path, pipeline: StableDiffusionPipeline) -> Tensor:
    """Scaled latents of the scenes at night, float16 [scene, 8, 8, 8]; encoded once for a run."""
    path, parts = run / "latents.safetensors", []
    if not path.exists():
        scenes = chosen_scenes(plan)
        for start in range(0, len(scenes), 16):
            rng = rng_for(plan, 7, start)
            pictures = [render(night(one), rng, jitter=plan.jitter) for one in scenes[start : start + 16]]
            with torch.autocast("cpu", torch.bfloat16):
                latents = pipeline.vae.encode(to_tensor(np.stack(pictures))).latent_dist.mean
            parts.append((latents.float() * pipeline.vae.config.scaling_factor).half())
        save_tensors(path, {"latents": torch.cat(parts)})
    return load_file(path)["latents"]


@torch.no_grad()
def text_features(pipeline: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    tokens = tokenize(pipeline.tokenizer, prompts)
    return torch.cat([pipeline.text_encoder(chunk).last_hidden_state for chunk in tokens.split(256)])


def open_base() -> StableDiffusionPipeline:
    """The pipeline that is added to, frozen."""
    pipeline = load_pipeline(EXPORTED)
    pipeline.unet.set_attn_processor(AttnProcessor())  # as in `train_unet`
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False).eval()
    return pipeline


def train(plan: Plan, run: Path, pipeline: StableDiffusionPipeline, added: nn.Module) -> Training:
    """Train what is added to the UNet, or go on where a killed run stopped."""
    path, scenes, latents = run / "lora.safetensors", chosen_scenes(plan), cached_latents(plan, run, pipeline)
    training = Training(added, path, plan.lr, steps=plan.steps, decay_steps=plan.decay_steps, ema=0.99)
    training.load()
    weights = torch.stack([emphasis(scene, plan.emphasis) for scene in scenes])
    features = text_features(pipeline, [*(scene.caption for scene in scenes), ""])
    since, total = time.monotonic(), 0.0
    while not training.done:
        rng = rng_for(plan, 8, training.step)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.integers(len(scenes), size=plan.batch)
        text = features[np.where(rng.random(plan.batch) < plan.caption_dropout, len(scenes), chosen)]
        says = partial(predict, pipeline.unet, text)
        loss = denoising_loss(says, latents[chosen].float(), weights[chosen], pipeline.scheduler, plan, rng, generator)
        training.update(loss)
        total += loss.item()
        if training.step % plan.save_every == 0 or training.done:
            training.save()
            seconds = round(time.monotonic() - since)
            log(run, step=training.step, loss=round(total / plan.save_every, 4), seconds=seconds)
            total = 0.0
    return training


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/night"), help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=OUT, help="where the LoRA is written to")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="how long to train")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = Plan(steps=options.steps)
    torch.manual_seed(plan.seed)
    options.run.mkdir(parents=True, exist_ok=True)
    pipeline = open_base()
    found = branches(pipeline.unet)
    train(plan, options.run, pipeline, nn.ModuleList(found.values())).averaged()
    export(found, options.out)


if __name__ == "__main__":
    main()
