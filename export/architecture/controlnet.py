"""Control networks (Zhang et al. 2023, arXiv 2302.05543): what diffusers' ControlNetModel adds to a UNet, each a
submodel of its own. Their outputs, the residuals, are inputs of the UNet under the same names.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from diffusers import ControlNetModel
from torch import Tensor as TorchTensor
from torch import nn

from export.architecture.matching import check_made_for
from export.architecture.unet import arguments
from export.checkpoint.additions import Addition
from export.checkpoint.component import CONFIG, open_file
from export.checkpoint.single_file import Stored
from export.checkpoint.source import TensorRef, read_json
from export.family import Component, Part, Reference
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.diffusion.controls import residual_names, submodel
from runtime.errors import UnsupportedModel

CLASS: Final = "ControlNetModel"
COND: Final = "controlnet_cond_embedding."
FIRST: Final = f"{COND}conv_in.weight"
LORA: Final = "lora_controlnet"
"""Prefixes of the picture's embedding, and of what only a Control-LoRA has."""
Naming = Callable[[Mapping[str, TensorRef]], Mapping[str, TensorRef]]
EMBEDDING: Final = "conditioning_embedding_out_channels"
"""The field whose length says how small the picture becomes."""
PLAIN: Final[Mapping[str, object]] = {
    "conditioning_channels": 3,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "global_pool_conditions": False,
}
"""Fields of a network's config, each with the only value that is supported."""
FEWER: Final = {"layers_per_block": 1, "transformer_layers_per_block": 1}
"""The twin has one layer where the model repeats several."""


class ControlNet(nn.Module):
    """A control network on the first inputs of its UNet, a picture, and the UNet's added conditions of these
    `names`.
    """

    def __init__(self, model: ControlNetModel, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(
        self,
        sample: TorchTensor,
        timestep: TorchTensor,
        encoder_hidden_states: TorchTensor,
        picture: TorchTensor,
        *more: TorchTensor,
    ) -> tuple[TorchTensor, ...]:
        named = arguments(dict(zip(self.names, more, strict=True)))
        down, mid = self.model(sample, timestep, encoder_hidden_states, picture, return_dict=False, **named)
        return (*down, mid)


def library(model: ControlNetModel, *names: str) -> Reference:
    """The library's own forward with the same inputs and outputs."""

    def control(
        sample: TorchTensor, timestep: TorchTensor, states: TorchTensor, picture: TorchTensor, *more: TorchTensor
    ) -> tuple[TorchTensor, ...]:
        found = model(sample, timestep, states, picture, **arguments(dict(zip(names, more, strict=True))))
        return (*found.down_block_res_samples, found.mid_block_res_sample)

    return control


@dataclass(frozen=True)
class Base:
    """What control networks are made for: the config of a UNet, the inputs that they have in common with it (latents,
    timestep and hidden states, then added conditions), and the picture that they are shown, float32 [batch, 3, height,
    width], 0 to 1, with `scale` pixels along a latent.
    """

    unet: Mapping[str, Any]
    inputs: tuple[Tensor, ...]
    picture: Tensor
    scale: int

    @property
    def residuals(self) -> tuple[Tensor, ...]:
        """What the networks add to the UNet's hidden states, each float32 [batch, channels, height, width]."""
        shapes = residual_shapes(self.unet)
        named = zip(residual_names(len(shapes)), shapes, strict=True)
        return tuple(_smaller(self.inputs[0], channels, over, name) for name, (channels, over) in named)

    def part(self, addition: Addition, reduced: bool) -> Part:
        """The submodel of a network that a build adds. Raises NotFound, SourceError, or UnsupportedModel for another
        kind of network and for one of another UNet.
        """
        name, more = submodel(addition.name), [tensor.name for tensor in self.inputs[3:]]
        if addition.path.is_dir():
            model, named = _model(addition.path, reduced), None
            self._check(addition.path / CONFIG, model.config)
        else:
            model, named = self._of_file(addition.path, reduced)
        return Part(
            name,
            (Component(name, model, addition.path, named),),
            ControlNet(model, *more),
            library(model, *more),
            Signature(inputs=(*self.inputs[:3], self.picture, *self.inputs[3:]), outputs=self.residuals),
            convolutional=True,
        )

    def _of_file(self, file: Path, reduced: bool) -> tuple[ControlNetModel, Naming]:
        """The network of a single file, which says nothing of its config: that follows from the UNet, as in
        `ControlNetModel.from_unet`.
        """
        known = inspect.signature(ControlNetModel).parameters
        config = {key: value for key, value in self.unet.items() if key in known}
        config |= {"in_channels": self.inputs[0].dims[1]}
        named = partial(_named, file, config["layers_per_block"])
        tensors = named(open_file(file).tensors)
        config[EMBEDDING] = _embedding(tensors)
        if 2 ** (len(config[EMBEDDING]) - 1) != self.scale:
            raise UnsupportedModel(
                f"{file} reads pictures in {len(config[EMBEDDING])} steps, expected as many as make {self.scale} "
                "pixels one latent: this control network was made for another base model"
            )
        with without_weights():
            model = ControlNetModel.from_config(config).eval()
        if not reduced:
            check_made_for(file, tensors, model, "control network")
        return model, named

    def _check(self, file: Path, config: Mapping[str, Any]) -> None:
        """Raises UnsupportedModel where a network is of another UNet, or of a kind that is not supported."""
        latents, _, states = self.inputs[:3]
        alike = ("addition_embed_type", "projection_class_embeddings_input_dim")
        expected: dict[str, object] = {"in_channels": latents.dims[1], "cross_attention_dim": states.dims[2]}
        expected |= {key: self.unet[key] for key in alike}
        other = {key: value for key, value in expected.items() if config[key] != value}
        if residual_shapes(config) != residual_shapes(self.unet):
            other |= {key: self.unet[key] for key in ("block_out_channels", "layers_per_block")}
        if 2 ** (len(config[EMBEDDING]) - 1) != self.scale:
            other[EMBEDDING] = f"as many as make {self.scale} pixels one latent"
        if other:
            found = ", ".join(f"{key} {config[key]!r} (expected {value!r})" for key, value in other.items())
            raise UnsupportedModel(f"{file} says {found}: this control network was made for another base model")
        for key, value in PLAIN.items():
            if config[key] != value:
                raise UnsupportedModel(f"{file} says {key} {config[key]!r}, expected {value!r}: no other can be built")


def _model(folder: Path, reduced: bool) -> ControlNetModel:
    """The network of a folder, without weights."""
    config = read_json(folder / CONFIG)
    if config.get("_class_name") != CLASS:
        raise UnsupportedModel(
            f"{folder / CONFIG} is of the class {config.get('_class_name')}, expected {CLASS}: no other kind of "
            "control network can be added"
        )
    with without_weights():
        return ControlNetModel.from_config({**config, **(FEWER if reduced else {})}).eval()


def _named(file: Path, layers: int, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors of a single file under the library's names, by its own conversion (`from_single_file`). Raises
    UnsupportedModel where they are of no control network.
    """
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    if any(name.startswith(LORA) for name in tensors):
        raise UnsupportedModel(f"{file} is a Control-LoRA, expected the whole control network that it was made of")
    stored = {name: Stored(ref) for name, ref in tensors.items()}
    found = convert_controlnet_checkpoint(stored, {"layers_per_block": layers})
    named = {name: one.ref for name, one in found.items() if one is not None}
    if FIRST not in named:
        raise UnsupportedModel(
            f"{file} is no control network: expected tensors such as control_model.input_hint_block.0.weight, or "
            f"{FIRST} as diffusers names it"
        )
    return named


def _embedding(tensors: Mapping[str, TensorRef]) -> list[int]:
    """The channels through which a network's embedding of its picture goes."""
    blocks = itertools.takewhile(tensors.__contains__, (f"{COND}blocks.{2 * i + 1}.weight" for i in itertools.count()))
    return [tensors[name].shape[0] for name in (FIRST, *blocks)]


def residual_shapes(unet: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The channels of each residual, and how many latents lie along one of its places, in the order of the library:
    those of the down blocks, then that of the middle one.
    """
    channels, layers = unet["block_out_channels"], unet["layers_per_block"]
    each = list(layers) if isinstance(layers, list | tuple) else [layers] * len(channels)
    found = [(channels[0], 1)]
    for block, (width, count) in enumerate(zip(channels, each, strict=True)):
        found += [(width, 2**block)] * count
        if block < len(channels) - 1:
            found.append((width, 2 ** (block + 1)))
    return [*found, found[-1]]


def _smaller(latents: Tensor, channels: int, over: int, name: str) -> Tensor:
    """A tensor of that many channels, along one place of which `over` latents lie."""
    edges = [_shorter(dim, over) if isinstance(dim, Dim) and over > 1 else dim for dim in latents.dims[2:]]
    found = latents.model_copy(update={"name": name, "dims": (BATCH, channels, *edges)})
    return found.following(latents, over=over)


def _shorter(dim: Dim, over: int) -> Dim:
    lengths = {name: -(-getattr(dim, name) // over) for name in ("min", "opt", "max")}
    return dim.model_copy(update={"name": f"{dim.name}_{over}", **lengths, "multiple": max(1, dim.multiple // over)})
