"""LoRA files for tests, random: in the layouts that diffusers and kohya's trainer write."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
ORIGINAL = {
    r"^conv_in$": "input_blocks.0.0",
    r"^conv_out$": "out.2",
    r"^time_embedding\.linear_([12])$": lambda m: f"time_embed.{2 * (int(m[1]) - 1)}",
    r"^add_embedding\.linear_([12])$": lambda m: f"label_emb.0.{2 * (int(m[1]) - 1)}",
    r"^down_blocks\.(\d)\.downsamplers\.0\.conv": lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op",
    r"^down_blocks\.(\d)\.(resnets|attentions)\.0": lambda m: f"input_blocks.{2 * int(m[1]) + 1}.{PLACE[m[2]]}",
    r"^mid_block\.(resnets|attentions)\.(\d)": lambda m: f"middle_block.{2 * int(m[2]) + PLACE[m[1]]}",
    r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)": lambda m: f"output_blocks.{2 * int(m[1]) + int(m[3])}."
    f"{PLACE[m[2]]}",
    r"^up_blocks\.0\.upsamplers\.0\.conv": "output_blocks.1.2.conv",
}  # fmt: skip
"""The names of a UNet of two blocks with one layer each, whose second has attention, in the original code."""
PLACE = {"resnets": 0, "attentions": 1}
RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection"}  # fmt: skip

Keep = Callable[[str], bool]


def layers(model: nn.Module, keep: Keep) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and keep(path):
            yield path, module


def matrices(layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up of a layer."""
    outputs, *inputs = layer.weight.shape
    down, up = ((rank, *inputs), (outputs, rank, *(1 for _ in inputs[1:])))
    return torch.randn(down, generator=generator) * 0.3, torch.randn(up, generator=generator) * 0.3


def of_diffusers(path: Path, models: Mapping[str, nn.Module], keep: Keep, ranks: tuple[int, ...] = (4,)) -> Path:
    """As `save_lora_weights` writes it, of layers whose ranks differ in turn."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for folder, model in models.items():
        for number, (name, layer) in enumerate(layers(model, keep)):
            down, up = matrices(layer, ranks[number % len(ranks)], generator)
            tensors[f"{folder}.{name}.lora_A.weight"], tensors[f"{folder}.{name}.lora_B.weight"] = down, up
    save_file(tensors, path)
    return path


def of_kohya(
    path: Path, models: Mapping[str, nn.Module], keep: Keep, original: bool = False, ranks: tuple[int, ...] = (4,)
) -> Path:
    """As kohya's trainer writes it, with alphas; `original` gives the UNet's layers the names of the original code."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    for folder, model in models.items():
        for number, (name, layer) in enumerate(layers(model, keep)):
            rank = ranks[number % len(ranks)]
            down, up = matrices(layer, rank, generator)
            if folder.startswith("text") and name != "text_projection":
                name = f"text_model.{name.removeprefix('text_model.')}"
            elif original and folder == "unet":
                name = original_name(name)
            flat = KOHYA[folder] + name.replace(".", "_")
            tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = down, up
            tensors[f"{flat}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)
    return path


def original_name(name: str) -> str:
    for pattern, replacement in ORIGINAL.items():
        if re.search(pattern, name):
            name = re.sub(pattern, replacement, name)  # type: ignore[arg-type]
            block, _, last = name.rpartition(".")
            return f"{block}.{RESNET[last]}" if last in RESNET else name
    return name


def fused(pipe: Any, *files: tuple[Path, float]) -> None:
    """Let a pipeline of diffusers load files and fuse them, each with its scale."""
    for path, scale in files:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="one")
        pipe.set_adapters(["one"], [scale])
        pipe.fuse_lora()
        pipe.unload_lora_weights()
