"""Image adapters (IP-Adapter; Ye et al. 2023, arXiv 2308.06721): a UNet whose cross-attention reads features of
pictures beside the prompt. Each adapter is a file of projections for the UNet, as diffusers' `load_ip_adapter` reads
it; the encoder of the pictures lies beside it, in the folder image_encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from torch import Tensor as TorchTensor
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from export.architecture.pictures import Attention, Projections, adapted
from export.checkpoint.component import component_config, open_file
from export.checkpoint.source import Source
from export.family import Component, Part
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Signature, Tensor
from runtime.diffusion.styles import EMBEDS, ENCODER, PIXELS, SCALES, Styles, embeds_name
from runtime.errors import UnsupportedModel

KIND: Final = "ip_adapter"
TOKENS: Final = 4
"""Tokens that a plain adapter makes of a picture."""
PROJECTION: Final = "image_proj.proj.weight"
"""The tensor that only a plain adapter has: the others (plus, full face, FaceID) project otherwise."""


class Weights(nn.Module):
    """What a file holds of the UNet: the projection of pictures, and keys and values of each cross-attention."""

    def __init__(self, unet: UNet2DConditionModel, index: int) -> None:
        super().__init__()
        projection = unet.encoder_hid_proj.image_projection_layers[index]
        layers = {
            str(2 * number + 1): nn.ModuleDict({"to_k_ip": one.to_k_ip[index], "to_v_ip": one.to_v_ip[index]})
            for number, one in enumerate(adapted(unet))
        }
        self.add_module("image_proj", nn.ModuleDict({"proj": projection.image_embeds, "norm": projection.norm}))
        self.add_module("ip_adapter", nn.ModuleDict(layers))


class ImageEncoder(nn.Module):
    """`pixel_values` to image_embeds [batch, projection]."""

    def __init__(self, model: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.model(pixel_values).image_embeds,)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a UNet: their weights, its further inputs, and the submodel that encodes pictures."""

    components: tuple[Component, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    parts: tuple[Part, ...] = ()


def adapt(source: Source, unet: UNet2DConditionModel, condition: bool, reduced: bool) -> Adapters:
    """Give the UNet the adapters that a build adds, without weights. `condition` is as in `Tensor`.

    Raises NotFound, SourceError, or UnsupportedModel for another kind of adapter and for one of another base model.
    """
    added = source.added(KIND)
    if not added:
        return Adapters()
    width = {_width(one.path, unet) for one in added}
    encoder = _encoder(added[0].path.parent)
    if width != {encoder.config.projection_dim}:
        raise UnsupportedModel(
            f"{added[0].path} reads features of width {', '.join(map(str, sorted(width)))}, {ENCODER} beside it gives "
            f"{encoder.config.projection_dim}: take the encoder that was published with the adapter"
        )
    with without_weights():
        _install(unet, len(added), encoder.config.projection_dim)
    components = []
    for index, one in enumerate(added):
        weights = Weights(unet, index)
        if not reduced:
            _check(one.path, weights)
        components.append(Component(f"{KIND}.{one.name}", weights, one.path))
    embeds = (BATCH, 1, encoder.config.projection_dim)
    inputs = [Tensor(name=embeds_name(i), dtype="float32", dims=embeds, condition=condition) for i in range(len(added))]
    scales = Tensor(name=SCALES, dtype="float32", dims=(BATCH, len(added)), values="ones", condition=condition)
    return Adapters(tuple(components), (*inputs, scales), (_encoder_part(encoder, added[0].path.parent),))


def styles(source: Source) -> Styles | None:
    """The settings of the pipeline; None without adapters."""
    added = source.added(KIND)
    if not added:
        return None
    config = _encoder_config(added[0].path.parent)
    return Styles(names=tuple(one.name for one in added), edge=config.image_size, width=config.projection_dim)


def _width(file: Path, unet: UNet2DConditionModel) -> int:
    """The width of the features that an adapter reads."""
    if file.is_dir():
        raise UnsupportedModel(f"{file} is a folder, expected the .safetensors file of an adapter, beside {ENCODER}/")
    tensors = open_file(file).tensors
    if PROJECTION not in tensors:
        raise UnsupportedModel(
            f"{file} has no {PROJECTION}: expected a plain IP-Adapter. Those of other kinds (plus, full face, FaceID) "
            "cannot be built"
        )
    rows, width = tensors[PROJECTION].shape
    if rows != TOKENS * unet.config.cross_attention_dim:
        raise UnsupportedModel(
            f"{file} makes tokens of width {rows // TOKENS}, the UNet has cross_attention_dim "
            f"{unet.config.cross_attention_dim}: this adapter was made for another base model"
        )
    return width


def _install(unet: UNet2DConditionModel, count: int, width: int) -> None:
    """Do what `load_ip_adapter` does, without weights."""
    context = unet.config.cross_attention_dim
    processors = {
        name: one if name.endswith("attn1.processor") else _processor(unet, name, context, count)
        for name, one in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    projections = [ImageProjection(width, context, TOKENS) for _ in range(count)]
    unet.encoder_hid_proj = Projections(projections).eval()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def _processor(unet: UNet2DConditionModel, name: str, context: int, count: int) -> Any:
    attention: Any = unet.get_submodule(name.removesuffix(".processor"))
    return Attention(attention.to_k.out_features, context, [TOKENS] * count)


def _check(file: Path, weights: Weights) -> None:
    """Raises UnsupportedModel where the file holds the weights of another UNet."""
    found = {name: ref.shape for name, ref in open_file(file).tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in weights.state_dict().items()}
    other = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if other:
        raise UnsupportedModel(
            f"{file} has {len(found)} tensors, expected {len(expected)}; {other[0]} is {found.get(other[0])}, expected "
            f"{expected.get(other[0])}: this adapter was made for another base model"
        )


def _encoder_config(folder: Path) -> CLIPVisionConfig:
    config = component_config(folder / ENCODER)
    if config.get("model_type") != "clip_vision_model":
        raise UnsupportedModel(
            f"{folder / ENCODER} is of the kind {config.get('model_type')}, expected clip_vision_model: take the "
            "encoder that was published with the adapter"
        )
    return CLIPVisionConfig(**{key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")})


def _encoder(folder: Path) -> CLIPVisionModelWithProjection:
    with without_weights():
        return CLIPVisionModelWithProjection(_encoder_config(folder)).eval()


def _encoder_part(model: CLIPVisionModelWithProjection, folder: Path) -> Part:
    edge = model.config.image_size
    pixels = Tensor(name=PIXELS, dtype="float32", dims=(BATCH, 3, edge, edge))
    embeds = Tensor(name=EMBEDS, dtype="float32", dims=(BATCH, model.config.projection_dim))
    return Part(
        ENCODER,
        (Component(ENCODER, model, folder / ENCODER),),
        ImageEncoder(model),
        lambda pixels: (model(pixel_values=pixels).image_embeds,),
        Signature(inputs=(pixels,), outputs=(embeds,)),
        least_bits=8,
    )
