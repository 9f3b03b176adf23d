"""Train the sample picture model `shapes-diffusion`: a small but real diffusers StableDiffusionPipeline, on one CPU
core.

    python -m samples.recipes.train_diffusion --run runs/diffusion    # train, resume, and write the best weights
    python -m samples.recipes.train_diffusion --score samples/shapes-diffusion

Five stages, each resumable from the run folder after any kill: the VAE, the text encoder, the cached latents, the UNet,
and the decoder once more, which may run beside the UNet (`--decoder`). A run folder without checkpoints starts from the
weights already exported, so training goes on where another machine stopped (`--fresh` starts anew).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from runtime.diffusion.defaults import DEFAULTS, ImageDefaults
from samples.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    held_out,
    picture_scenes,
    render,
    test_prompts,
)
from samples.world.scoring import score_picture

EXPORTED: Final = Path(__file__).parents[1] / "shapes-diffusion"
EDGE: Final = 128
LATENT_CHANNELS: Final = 8
LATENT_STD: Final = 2.0
"""Standard deviation of every latent channel before `scaling_factor`: not 1, so a runtime that forgets the factor fails
visibly.
"""
TOKENS: Final = 32
WIDTH: Final = 128
"""Hidden size of the text encoder."""


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast each stage trains."""

    seed: int = 0
    jitter: float = 0.02
    vae_steps: int = 2600
    vae_full_steps: int = 300
    """Last VAE steps on whole pictures; the earlier ones see quarter pictures, four times as many a second."""
    vae_batch: int = 32
    vae_lr: float = 3e-3
    kl: float = 3e-4
    """Weight of the mean KL of a latent element: high enough that every channel gets a like share of what there is to
    tell.
    """
    decoder_steps: int = 1500
    decoder_batch: int = 8
    decoder_lr: float = 2e-3
    decoder_noise: float = 0.5
    """Most noise on the latents that the decoder refines on, as a share of their standard deviation."""
    text_steps: int = 400
    text_batch: int = 128
    text_lr: float = 2e-3
    renders: int = 2
    """Jittered pictures of each scene whose latents are cached."""
    unet_steps: int = 4500
    unet_decay_steps: int = 3600
    unet_batch: int = 64
    unet_lr: float = 2.5e-3
    emphasis: float = 4.0
    """Loss weight of the latents where things are: a small thing is 4 of 64, and its colour would be learned last."""
    caption_dropout: float = 0.15
    singles: float = 0.33
    """Share of training scenes with one thing."""
    pure_noise: float = 0.04
    """Share of samples that start from noise alone, as sampling does: the last training timestep still leaks the
    picture's mean.
    """
    evaluate_every: int = 500
    inference_steps: int = 20
    guidance_scale: float = 1.5
    """As yet 2 bends shapes (4 to 5 % fewer right) and 3 does worse: the UNet without a caption is the least trained.
    """


def validation(caption: str) -> bool:
    """Whether a training-side caption is kept for choosing the best weights (about 3 %)."""
    return hashlib.sha256(f"validation {caption}".encode()).digest()[0] < 8


def training_scenes() -> list[Scene]:
    """Scenes the models may learn from, in a fixed order."""
    return [scene for scene in picture_scenes() if not held_out(scene.caption) and not validation(scene.caption)]


def validation_scenes() -> list[Scene]:
    """About 100 scenes that are neither trained on nor part of the test."""
    return [scene for scene in picture_scenes() if not held_out(scene.caption) and validation(scene.caption)]


# Models


def build_vae() -> AutoencoderKL:
    """An AutoencoderKL of factor 16: pictures [n, 3, 128, 128] in [-1, 1], latents [n, 8, 8, 8]."""
    return AutoencoderKL(
        block_out_channels=(16, 24, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=EDGE,
        scaling_factor=1 / LATENT_STD,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the captions is one token; anything else falls back to bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []

    def split(word: str) -> list[str]:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            for i in range(len(pieces) - 1, 0, -1):
                if pieces[i - 1 : i + 1] == [left, right]:
                    pieces[i - 1 : i + 1] = [left + right]
        return pieces

    for word in sorted({word for scene in picture_scenes() for word in scene.caption.split()}):
        pieces = split(word)  # later merges rank behind earlier ones, so no word learned before can come apart
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
    tokens = alphabet + [token + "</w>" for token in alphabet] + [left + right for left, right in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder: tokens [n, 32] to features [n, 32, 128]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """The denoiser: latents [n, 8, 8, 8], timesteps [n] and text features [n, 32, 128] to v [n, 8, 8, 8]."""
    return UNet2DConditionModel(
        sample_size=EDGE // 16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; trailing timesteps, because the first step must be the noisiest
    one trained.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# Training


def orthogonal(update: Tensor) -> Tensor:
    """The nearest half-orthogonal matrices to updates [n, rows, columns], by five Newton-Schulz steps (Muon, Jordan et
    al. 2024).
    """
    x = update.bfloat16() / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()


class Training:
    """A module with its optimizer, its moving average and its step count, saved as one safetensors file.

    Weight matrices and convolutions take Muon's steps, which learn about twice as much from a picture as Adam's; the
    rest takes AdamW's.
    """

    def __init__(
        self, module: nn.Module, path: Path, lr: float, *, steps: int, decay_steps: int, ema: float = 0.999
    ) -> None:
        self.module, self.path, self.steps, self.decay_steps, self.lr, self.ema = (
            module,
            path,
            steps,
            decay_steps,
            lr,
            ema,
        )
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        matrices = {
            name: p
            for name, p in self.parameters.items()
            if p.ndim > 1 and "embed" not in name and min(p.shape[:2]) > 4
        }
        self.momentum = {name: torch.zeros_like(p) for name, p in matrices.items()}
        shapes = {(p.shape[0], p[0].numel()) for p in matrices.values()}
        self.stacks = [
            [name for name, p in matrices.items() if (p.shape[0], p[0].numel()) == shape] for shape in sorted(shapes)
        ]
        self.others = {name: p for name, p in self.parameters.items() if name not in matrices}
        self.optimizer = torch.optim.AdamW(
            [{"params": [*self.others.values()]}], lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.step = 0

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def update(self, loss: Tensor) -> None:
        """One optimizer step: warm-up, then a constant rate, then a linear decay to zero."""
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        rate = self.lr * min(1.0, (self.step + 1) / 100, max(self.steps - self.step, 1) / self.decay_steps)
        nn.utils.clip_grad_norm_(self.others.values(), 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self._muon(rate)
        self.step += 1
        weight = 1 - min(self.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], weight)

    def run(self, folder: Path, loss: Callable[[int], Tensor], every: int) -> None:
        """Train to the end on the loss of each step; save, and log to the folder, every so many steps."""
        since, total = time.monotonic(), 0.0
        while not self.done:
            found = loss(self.step)
            self.update(found)
            total += found.item()
            if self.step % every == 0 or self.done:
                self.save()
                log(folder, step=self.step, loss=round(total / every, 4), seconds=round(time.monotonic() - since))
                total = 0.0

    @torch.no_grad()
    def _muon(self, rate: float, momentum: float = 0.95) -> None:
        for names in self.stacks:
            weights, ahead = [self.parameters[name] for name in names], []
            for name, weight in zip(names, weights, strict=True):
                assert weight.grad is not None
                self.momentum[name].lerp_(weight.grad, 1 - momentum)
                ahead.append(weight.grad.lerp(self.momentum[name], momentum).flatten(1))  # Nesterov's look ahead
            steps = orthogonal(torch.stack(ahead))
            scale = (
                0.2 * max(steps.shape[1:]) ** 0.5
            )  # elements as large as AdamW's steps make them, so that one rate fits both
            for weight, step in zip(weights, steps, strict=True):
                weight.mul_(1 - 0.01 * rate).sub_(step.view_as(weight), alpha=rate * scale)

    def save(self) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": p for name, p in self.average.items()}
        tensors |= {f"momentum.{name}": p for name, p in self.momentum.items()}
        for name, p in self.others.items():
            tensors |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        save_tensors(self.path, tensors, {"step": str(self.step)})

    @torch.no_grad()
    def load(self) -> bool:
        """Take up the saved state, if there is one."""
        if not self.path.exists():
            return False
        with safe_open(self.path, "pt") as file:
            self.step = int(file.metadata()["step"])
        tensors = load_file(self.path)
        kinds: dict[str, Mapping[str, Tensor]] = {
            "model": self.parameters,
            "average": self.average,
            "momentum": self.momentum,
        }
        for kind, values in kinds.items():
            for name, value in values.items():
                value.copy_(tensors[f"{kind}.{name}"])
        for name, p in self.others.items():
            self.optimizer.state[p] = {
                key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return True

    def averaged(self) -> nn.Module:
        """The module with its averaged weights in place of the trained ones, until `restore`."""
        self.trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._fill(self.average)
        return self.module.eval()

    def restore(self) -> None:
        self._fill(self.trained)
        self.module.train()

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def log(run: Path, **fields: Any) -> None:
    """Add a row to the run's log and show it."""
    line = json.dumps({"time": time.strftime("%H:%M:%S", time.gmtime()), **fields})
    print(line, flush=True)
    with (run / "log.jsonl").open("a") as file:
        file.write(line + "\n")


def rng_for(plan: TrainingPlan, stage: int, step: int) -> np.random.Generator:
    """Random numbers of one training step: a resumed run draws what an unbroken one would have."""
    return np.random.default_rng((plan.seed, stage, step))


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_pictures(decoded: Tensor) -> NDArray[np.uint8]:
    """float [n, 3, h, w] in [-1, 1] to uint8 [n, h, w, 3]."""
    pictures: NDArray[np.uint8] = (
        ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    )
    return pictures


def vae_batch(plan: TrainingPlan, scenes: Sequence[Scene], step: int) -> Tensor:
    """Pictures for a VAE step: quarter pictures around scattered things first, whole pictures in the end."""
    rng = rng_for(plan, 1, step)
    if step >= plan.vae_steps - plan.vae_full_steps:
        return to_tensor(
            np.stack([render(scenes[i], rng) for i in rng.integers(len(scenes), size=plan.vae_batch // 4)])
        )
    crops = []
    for i in rng.integers(len(scenes), size=plan.vae_batch):
        x, y = (
            np.array(PLACES[scenes[i].things[-1].place]) + rng.uniform(-0.45, -0.05, 2)
        ) * EDGE  # so that most of the thing is seen
        x, y = (int(np.clip(corner, 0, EDGE // 2)) for corner in (x, y))
        crops.append(render(scenes[i], rng, jitter=0.1)[y : y + EDGE // 2, x : x + EDGE // 2])
    return to_tensor(np.stack(crops))


def picture_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """L1 and L2, more where a thing is than on the plain ground, plus L1 of neighbours' differences, which keeps edges
    sharp, and L1 of the means of 8x8 pixels, which brings the colours first.
    """
    ground = pictures.flatten(2).median(2).values[:, :, None, None]
    weight = 1 + 2 * ((pictures - ground).abs().amax(1, keepdim=True) > 0.1)
    error = decoded - pictures
    coarse = F.avg_pool2d(error, 8).abs().mean()
    return (
        (weight * (error.abs() + error.square())).mean()
        + 4 * coarse
        + error.diff(dim=2).abs().mean()
        + error.diff(dim=3).abs().mean()
    )


def train_vae(plan: TrainingPlan, run: Path, vae: AutoencoderKL) -> None:
    """Train the VAE, then give every latent channel zero mean and the same variance."""
    training = Training(
        vae, run / "vae.safetensors", plan.vae_lr, steps=plan.vae_steps, decay_steps=plan.vae_steps // 2, ema=0.99
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] -= 5  # little noise at first
    training.load()
    scenes = training_scenes()
    torch.manual_seed(plan.seed + training.step)
    while not training.done:
        pictures = vae_batch(plan, scenes, training.step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = picture_loss(decoded.float(), pictures)
        ramp = min(
            1.0, 2 * training.step / plan.vae_steps
        )  # at full weight from the start, the KL empties the latents before they help
        training.update(loss + plan.kl * ramp**2 * kl)
        if training.step % 50 == 0:
            log(run, stage="vae", step=training.step, loss=round(loss.item(), 4), kl=round(kl.item(), 3))
        if training.step % 200 == 0 or training.done:
            training.save()
    training.averaged()
    even_latents(vae, to_tensor(np.stack([render(scene, np.random.default_rng(plan.seed)) for scene in scenes[::7]])))


@torch.no_grad()
def even_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Rescale the VAE's inner ends so that each channel of its latents has zero mean and LATENT_STD: what diffusion
    learns best from.
    """
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pictures.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) / LATENT_STD
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    before.bias[:LATENT_CHANNELS] -= mean
    before.bias[:LATENT_CHANNELS] /= std
    before.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    before.bias[LATENT_CHANNELS:] -= 2 * std.log()


ATTRIBUTES: Final = tuple(
    (place, field, ("none", *values))
    for place in PLACES
    for field, values in (("size", tuple(SIZES)), ("colour", tuple(COLOURS)), ("shape", SHAPES))
)


def attributes(scene: Scene) -> list[int]:
    """Class numbers of what is where, in the order of ATTRIBUTES, and of the background last."""
    at = {thing.place: thing for thing in scene.things}
    classes = [values.index(getattr(at[place], field)) if place in at else 0 for place, field, values in ATTRIBUTES]
    return [*classes, list(BACKGROUNDS).index(scene.background)]


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token numbers [n, 32], padded as StableDiffusionPipeline pads them."""
    ids: Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def train_text(plan: TrainingPlan, run: Path, encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Train the text encoder to say, at every token from the end of text on, what is where: features a UNet can read at
    once.
    """
    widths = [len(values) for *_, values in ATTRIBUTES] + [len(BACKGROUNDS)]
    head = nn.Linear(WIDTH, sum(widths))
    both = nn.ModuleDict({"encoder": encoder, "head": head})
    training = Training(
        both, run / "text.safetensors", plan.text_lr, steps=plan.text_steps, decay_steps=plan.text_steps // 2, ema=0.99
    )
    training.load()
    scenes = training_scenes()
    singles = np.array([len(scene.things) == 1 for scene in scenes])
    tokens, classes = tokenize(tokenizer, [s.caption for s in scenes]), torch.tensor([attributes(s) for s in scenes])

    def losses(tokens: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        features = encoder(tokens).last_hidden_state
        ends = tokens == tokenizer.eos_token_id
        rows = ends.nonzero()[:, 0]
        parts = head(features[ends]).split(widths, dim=1)
        loss = torch.stack([F.cross_entropy(part, classes[rows, i]) for i, part in enumerate(parts)]).mean()
        right = torch.stack([part.argmax(1) == classes[rows, i] for i, part in enumerate(parts)]).all(0).float().mean()
        return loss, right

    while not training.done:
        rng = rng_for(plan, 2, training.step)
        chosen = torch.from_numpy(choose(rng, singles, plan.text_batch, plan.singles))
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = losses(tokens[chosen], classes[chosen])
        training.update(loss)
        if training.step % 100 == 0 or training.done:
            training.save()
            unseen = validation_scenes()
            with torch.no_grad():
                _, right = losses(
                    tokenize(tokenizer, [s.caption for s in unseen]), torch.tensor([attributes(s) for s in unseen])
                )
            log(run, stage="text", step=training.step, loss=round(loss.item(), 5), validation=round(right.item(), 3))
    training.averaged()


def decoder_training(plan: TrainingPlan, run: Path, vae: AutoencoderKL) -> Training:
    """The state of the decoder's own training, taken up where the run left it; the encoder stays as the
    UNet knows it.
    """
    part = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    path = run / "decoder.safetensors"
    training = Training(
        part, path, plan.decoder_lr, steps=plan.decoder_steps, decay_steps=plan.decoder_steps // 2, ema=0.99
    )
    training.load()
    return training


def train_decoder(plan: TrainingPlan, run: Path, vae: AutoencoderKL) -> None:
    """Teach the decoder alone to draw sharp pictures from the cached kind of latents, and from ones a little off, as a
    UNet makes them.
    """
    training, scenes = decoder_training(plan, run, vae), training_scenes()
    singles = np.array([len(scene.things) == 1 for scene in scenes])
    torch.manual_seed(plan.seed + training.step)
    while not training.done:
        rng = rng_for(plan, 5, training.step)
        pictures = to_tensor(
            np.stack([render(scenes[i], rng) for i in choose(rng, singles, plan.decoder_batch, plan.singles)])
        )
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mean.float()
            off = plan.decoder_noise * LATENT_STD * torch.rand(len(latents), 1, 1, 1)
            decoded = vae.decode(latents + off * torch.randn_like(latents)).sample
        loss = picture_loss(decoded.float(), pictures)
        training.update(loss)
        if training.step % 50 == 0 or training.done:
            training.save()
            log(run, stage="decoder", step=training.step, loss=round(loss.item(), 4))


def emphasis(scene: Scene, weight: float, cells: int = EDGE // 16) -> Tensor:
    """Loss weights [8, 8] of a scene's latents: `weight` where the caption puts a thing, 1 on the ground, scaled to a
    mean of 1.

    They depend on the caption alone, so what the UNet learns to expect stays unbiased.
    """
    y, x = (torch.stack(torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")) + 0.5) / cells
    weights = torch.ones(cells, cells)
    for thing in scene.things:
        px, py = PLACES[thing.place]
        reach = SIZES[thing.size] + 0.5 / cells
        weights[((x - px).abs() < reach) & ((y - py).abs() < reach)] = weight
    return weights / weights.mean()


def choose(rng: np.random.Generator, singles: NDArray[np.bool_], count: int, share: float) -> NDArray[np.int64]:
    """Scene numbers for a batch, `share` of them scenes with one thing."""
    weights = np.where(singles, share / singles.sum(), (1 - share) / (~singles).sum())
    return rng.choice(len(singles), size=count, p=weights)


@torch.no_grad()
def cached_latents(plan: TrainingPlan, run: Path, vae: AutoencoderKL) -> Tensor:
    """Scaled latents of the training scenes, float16 [scene, render, 8, 8, 8]; encoded once for a run."""
    path = run / "latents.safetensors"
    if not path.exists():
        scenes, parts = training_scenes(), []
        for start in range(0, len(scenes), 16):
            rng = rng_for(plan, 3, start)
            pictures = [
                render(scene, rng, jitter=plan.jitter)
                for scene in scenes[start : start + 16]
                for _ in range(plan.renders)
            ]
            with torch.autocast("cpu", torch.bfloat16):
                latents = vae.encode(to_tensor(np.stack(pictures))).latent_dist.mean
            parts.append((latents.float() * vae.config.scaling_factor).half().unflatten(0, (-1, plan.renders)))
            if start % 512 == 0:
                log(run, stage="latents", scene=start, of=len(scenes))
        save_tensors(path, {"latents": torch.cat(parts)})
    return load_file(path)["latents"]


def unet_training(plan: TrainingPlan, run: Path, pipeline: StableDiffusionPipeline) -> Training:
    """The state of the UNet's training, taken up where the run left it."""
    training = Training(
        pipeline.unet, run / "unet.safetensors", plan.unet_lr, steps=plan.unet_steps, decay_steps=plan.unet_decay_steps
    )
    training.load()
    return training


def predict(unet: UNet2DConditionModel, text: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """What a UNet says of noisy latents at timesteps t, with text features."""
    predicted: Tensor = unet(noisy, t, text).sample
    return predicted


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    weights: Tensor,
    scheduler: DDIMScheduler,
    plan: TrainingPlan,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """The weighted error of what `predict` says of noisy latents at timesteps that are drawn here."""
    noise = torch.randn(clean.shape, generator=generator)
    last = scheduler.config.num_train_timesteps - 1
    t = torch.from_numpy(
        (last * rng.random(len(clean)) ** 0.4).astype(np.int64)
    )  # layout and colour are decided in high noise
    pure = torch.from_numpy(rng.random(len(clean)) < plan.pure_noise)
    t = torch.where(pure, last, t)
    noisy = torch.where(pure[:, None, None, None], noise, scheduler.add_noise(clean, noise, t))
    with torch.autocast("cpu", torch.bfloat16):
        predicted = predict(noisy, t)
    error = (predicted.float() - scheduler.get_velocity(clean, noise, t)).square().mean(1)
    return (weights * error).mean()


def train_unet(plan: TrainingPlan, run: Path, pipeline: StableDiffusionPipeline, training: Training) -> None:
    """Train the UNet on cached latents and text features; keep the weights that draw the validation prompts best in
    `run / "best"`.
    """
    pipeline.text_encoder.eval()
    unet, scheduler = pipeline.unet.train(), pipeline.scheduler
    unet.set_attn_processor(
        AttnProcessor()
    )  # on a CPU and 64 tokens, plain products train 1.6 times as fast as torch's fused attention
    latents, scenes = cached_latents(plan, run, pipeline.vae), training_scenes()
    singles = np.array([len(scene.things) == 1 for scene in scenes])
    weights = torch.stack([emphasis(scene, plan.emphasis) for scene in scenes])
    with torch.no_grad():
        captions = tokenize(pipeline.tokenizer, [scene.caption for scene in scenes] + [""])
        features = torch.cat([pipeline.text_encoder(chunk).last_hidden_state for chunk in captions.split(256)])

    if not (run / "best.json").exists():
        evaluate(plan, run, pipeline, training)  # a warm start may be better than what its first steps make of it
    started, since, total = time.monotonic(), training.step, 0.0
    while not training.done:
        rng = rng_for(plan, 4, training.step)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = choose(rng, singles, plan.unet_batch, plan.singles)
        clean = latents[chosen, rng.integers(plan.renders, size=len(chosen))].float()
        text = features[np.where(rng.random(len(chosen)) < plan.caption_dropout, len(scenes), chosen)]
        loss = denoising_loss(partial(predict, unet, text), clean, weights[chosen], scheduler, plan, rng, generator)
        training.update(loss)
        total += loss.item()
        if training.step % 100 == 0:
            rate = (training.step - since) * plan.unet_batch / (time.monotonic() - started)
            log(run, stage="unet", step=training.step, loss=round(total / 100, 4), pictures_per_second=round(rate, 1))
            total = 0.0
        if training.step % plan.evaluate_every == 0 or training.done:
            training.save()
            evaluate(plan, run, pipeline, training)
            started, since = time.monotonic(), training.step


def evaluate(plan: TrainingPlan, run: Path, pipeline: StableDiffusionPipeline, training: Training) -> None:
    """Score the averaged weights on the validation prompts and keep them in `run / "best"` if none scored better."""
    if (run / "decoder.safetensors").exists():
        decoder_training(plan, run, pipeline.vae).averaged()
    training.averaged()
    report = score_pipeline(pipeline, validation_scenes(), plan, sheet=run / f"step{training.step:06}.png")
    log(run, stage="validation", step=training.step, **report)
    best = run / "best.json"
    if not best.exists() or report["right"] >= json.loads(best.read_text())["right"]:
        export_pipeline(pipeline, run / "best")
        best.write_text(json.dumps({"step": training.step, **report}))
    training.restore()


# Pipeline


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The four models as a pipeline without a safety checker."""
    return StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export_pipeline(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Write the pipeline as float16 safetensors in diffusers' layout, each file whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    vae, text_encoder, unet = (deepcopy(part).half() for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet))
    assemble(vae, text_encoder, pipeline.tokenizer, unet).save_pretrained(partial)
    bpe = json.loads((partial / "tokenizer/tokenizer.json").read_text())["model"]
    (partial / "tokenizer/vocab.json").write_text(
        json.dumps(bpe["vocab"], ensure_ascii=False)
    )  # older transformers read these two
    (partial / "tokenizer/merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]) + "\n"
    )
    for path in partial.glob("*/config.json"):
        config = {
            key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"
        }  # a path of this machine
        path.write_text(json.dumps(config, indent=2) + "\n")
    defaults = ImageDefaults(steps=TrainingPlan.inference_steps, guidance_scale=TrainingPlan.guidance_scale)
    (partial / DEFAULTS).write_text(defaults.model_dump_json(exclude_none=True, indent=2) + "\n")
    move_files(partial, out)


def move_files(source: Path, target: Path) -> None:
    """Move every file of one folder to its place in another."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(source)


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """An exported pipeline in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], plan: TrainingPlan, batch: int = 50
) -> Iterator[NDArray[np.uint8]]:
    """Pictures uint8 [128, 128, 3] of the prompts by plain diffusers; prompt i starts from the noise of seed i."""
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        yield from to_pictures(
            pipeline(
                part,
                num_inference_steps=plan.inference_steps,
                guidance_scale=plan.guidance_scale,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
                output_type="pt",
            ).images
            * 2
            - 1
        )


def score_pipeline(
    pipeline: StableDiffusionPipeline, scenes: Sequence[Scene], plan: TrainingPlan, sheet: Path | None = None
) -> dict[str, Any]:
    """Share of scenes drawn right in everything, by number of things and by attribute; `sheet` gets the first pictures
    as a PNG.
    """
    pictures = list(draw(pipeline, [scene.caption for scene in scenes], plan))
    scores = [score_picture(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    if sheet is not None:
        rows = [np.concatenate(pictures[i : i + 10], axis=1) for i in range(0, len(pictures) // 10 * 10, 10)][:6]
        cv2.imwrite(str(sheet), np.concatenate(rows)[..., ::-1])
    wrong = Counter(name for score in scores for name in score.wrong)
    singles = [bool(score) for score, scene in zip(scores, scenes, strict=True) if len(scene.things) == 1]
    pairs = [bool(score) for score, scene in zip(scores, scenes, strict=True) if len(scene.things) == 2]
    return {
        "right": round(float(np.mean([bool(score) for score in scores])), 4),
        "singles": round(float(np.mean(singles)), 4),
        "pairs": round(float(np.mean(pairs)), 4),
        "wrong": dict(wrong),
    }


def open_run(plan: TrainingPlan, run: Path, start: Path | None) -> StableDiffusionPipeline:
    """The run's pipeline with a trained VAE and text encoder: its own, else those of the exported `start`, else trained
    now.
    """
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    encoders = run / "encoders"
    if encoders.exists():
        return load_pipeline(encoders)
    if start is not None and start.exists() and not (run / "vae.safetensors").exists():
        pipeline = load_pipeline(start)
    else:
        tokenizer = build_tokenizer()
        pipeline = assemble(build_vae(), build_text_encoder(tokenizer), tokenizer, build_unet())
        train_vae(plan, run, pipeline.vae)
        train_text(plan, run, pipeline.text_encoder, tokenizer)
        (run / "best.json").write_text(json.dumps({"step": 0, "right": 0.0}))  # an untrained UNet needs no scoring
    export_pipeline(pipeline, encoders)
    return load_pipeline(encoders)  # float16 as exported, so the UNet learns from the very features it will meet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/diffusion"), help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=EXPORTED, help="folder of the exported pipeline")
    parser.add_argument("--fresh", action="store_true", help="do not start from the exported weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--decoder", action="store_true", help="only refine the decoder; may run beside the UNet's training"
    )
    parser.add_argument("--export", action="store_true", help="only write the run's averaged weights of now to --out")
    parser.add_argument(
        "--score", type=Path, metavar="FOLDER", help="only score an exported pipeline on the test prompts"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = TrainingPlan()
    if options.score:
        print(json.dumps(score_pipeline(load_pipeline(options.score), test_prompts(), plan), indent=1))
        return
    pipeline = open_run(plan, options.run, None if options.fresh else options.out)
    if options.decoder:
        train_decoder(plan, options.run, pipeline.vae)
        return
    training = unet_training(plan, options.run, pipeline)
    if options.export:
        training.averaged()
        if (options.run / "decoder.safetensors").exists():
            decoder_training(plan, options.run, pipeline.vae).averaged()
        export_pipeline(pipeline, options.out)
        return
    train_unet(plan, options.run, pipeline, training)
    train_decoder(plan, options.run, pipeline.vae)
    evaluate(plan, options.run, pipeline, training)
    export_pipeline(load_pipeline(options.run / "best"), options.out)


if __name__ == "__main__":
    main()
