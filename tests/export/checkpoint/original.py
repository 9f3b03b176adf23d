"""Writes a diffusers folder as one file in the layout of the original Stable Diffusion code."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
    "encoder.layers.": "transformer.resblocks.",
}  # fmt: skip


def small_files(folder: Path, output: Path) -> Path:
    """A copy of a folder without its weights."""
    return Path(shutil.copytree(folder, output, ignore=shutil.ignore_patterns("*.safetensors")))


def write_original(pipeline: Any, file: Path) -> Path:
    """The tensors of a pipeline of SD 1, 2 or XL, whose second kind of text encoder is OpenCLIP's."""
    clip, first_open = ("conditioner.embedders.0.", False) if hasattr(pipeline, "text_encoder_2") else (
        "cond_stage_model.", pipeline.text_encoder.config.hidden_act == "gelu",
    )  # fmt: skip
    tensors = {
        **_under("model.diffusion_model.", _unet(pipeline.unet)),
        **_under("first_stage_model.", _vae(pipeline.vae)),
        **_text(clip, pipeline.text_encoder, first_open),
    }
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= _text("conditioner.embedders.1.", pipeline.text_encoder_2, True)
    tensors["alphas_cumprod"] = torch.ones(3)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return file


def write_control(model: Any, file: Path, prefix: str) -> Path:
    """A control network."""
    tensors = {prefix + _hint(name): tensor for name, tensor in _unet(model)}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return file


def _hint(name: str) -> str:
    """A layer that only control networks have. The embedding's last one has the number of the published network's."""
    name = re.sub(r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", name)
    name = name.replace("controlnet_mid_block", "middle_block_out.0")
    name = re.sub(
        r"controlnet_cond_embedding\.blocks\.(\d+)", lambda found: f"input_hint_block.{2 * int(found[1]) + 2}", name
    )
    return name.replace("controlnet_cond_embedding.input_blocks.0.0", "input_hint_block.0").replace(
        "controlnet_cond_embedding.out.2", "input_hint_block.14"
    )


def _under(prefix: str, named: Iterator[tuple[str, torch.Tensor]]) -> State:
    return {prefix + name: tensor for name, tensor in named}


def _renamed(name: str, names: dict[str, str]) -> str:
    for theirs, original in names.items():
        name = name.replace(theirs, original)
    return name


def _unet(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    layers = model.config.layers_per_block + 1
    for name, tensor in model.state_dict().items():
        match name.split("."):
            case ["down_blocks", block, kind, layer, *rest]:
                last = kind == "downsamplers"
                number = 1 + int(block) * layers + (layers - 1 if last else int(layer))
                rest = ["op", *rest[1:]] if last else rest
                yield f"input_blocks.{number}.{int(kind == 'attentions')}.{_inside(kind, rest)}", tensor
            case ["mid_block", kind, layer, *rest]:
                yield f"middle_block.{2 * int(layer) + (kind == 'attentions')}.{_inside(kind, rest)}", tensor
            case ["up_blocks", block, kind, layer, *rest]:
                attends = hasattr(model.up_blocks[int(block)], "attentions")
                place = {"resnets": 0, "attentions": 1, "upsamplers": 1 + attends}[kind]
                layer = str(layers - 1) if kind == "upsamplers" else layer
                yield f"output_blocks.{int(block) * layers + int(layer)}.{place}.{_inside(kind, rest)}", tensor
            case _:
                yield _renamed(name, UNET), tensor


def _inside(kind: str, rest: list[str]) -> str:
    return _renamed(".".join(rest), RESNET) if kind == "resnets" else ".".join(rest)


def _vae(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = len(model.config.block_out_channels)
    for name, tensor in model.state_dict().items():
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name).replace("resnets", "block")
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
        name = re.sub(r"mid_block\.block\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = _renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        yield name, tensor


def _text(prefix: str, model: Any, is_open: bool) -> State:
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    if not is_open:
        return {f"{prefix}transformer.text_model.{name}": tensor for name, tensor in state.items()}
    prefix += "model."
    found = {f"{prefix}logit_scale": torch.ones(1)}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = tensor.T
        elif name == "embeddings.position_embedding.weight":
            found[f"{prefix}positional_embedding"] = tensor
        elif (kind := re.search(r"self_attn\.q_proj\.(weight|bias)$", name)) is not None:
            parts = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            joined = _renamed(name[: kind.start()], OPEN_CLIP)
            found[f"{prefix}{joined}attn.in_proj_{kind[1]}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            found[prefix + _renamed(name, OPEN_CLIP)] = tensor
    return found
