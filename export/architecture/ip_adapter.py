"""Image adapters (IP-Adapter; Ye et al. 2023, arXiv 2308.06721): a UNet whose cross-attention reads features of
pictures beside the prompt. Each adapter is a file of projections for the UNet, as diffusers' `load_ip_adapter` reads
it, of one of several kinds (`export.architecture.projections`); the encoder of the pictures lies beside it, in the
folder image_encoder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from diffusers import UNet2DConditionModel
from torch import Tensor as TorchTensor
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from export.architecture import projections
from export.architecture.matching import check_made_for
from export.architecture.pictures import Attention, adapted
from export.architecture.pictures import Projections as Together
from export.architecture.projections import Projection
from export.checkpoint.component import component_config, open_file
from export.checkpoint.source import Source, TensorRef
from export.family import Component, Part
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Signature, Tensor
from runtime.diffusion.styles import EMBEDS, ENCODER, HIDDEN, PIXELS, SCALES, Features, Styles, embeds_name
from runtime.errors import UnsupportedModel

KIND: Final = "ip_adapter"


class Weights(nn.Module):
    """What a file holds of the UNet: the projection of pictures, and keys and values of each cross-attention."""

    def __init__(self, unet: UNet2DConditionModel, index: int) -> None:
        super().__init__()
        layers = {
            str(2 * number + 1): nn.ModuleDict({"to_k_ip": one.to_k_ip[index], "to_v_ip": one.to_v_ip[index]})
            for number, one in enumerate(adapted(unet))
        }
        self.add_module("image_proj", unet.encoder_hid_proj.image_projection_layers[index])
        self.add_module("ip_adapter", nn.ModuleDict(layers))


class ImageEncoder(nn.Module):
    """`pixel_values` to the outputs of these `names`: image_embeds [batch, projection], and hidden_states [batch,
    positions, hidden] of the last layer but one.
    """

    def __init__(self, model: CLIPVisionModelWithProjection, names: Collection[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, pixel_values: TorchTensor) -> tuple[TorchTensor, ...]:
        return seen(self.model(pixel_values, output_hidden_states=HIDDEN in self.names), self.names)


def seen(output: Any, names: Collection[str]) -> tuple[TorchTensor, ...]:
    """What an encoder's output holds under these names."""
    return tuple(output.image_embeds if name == EMBEDS else output.hidden_states[-2] for name in names)


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
    encoder = _encoder(added[0].path.parent)
    found = [_projection(one.path, unet, encoder.config) for one in added]
    with without_weights():
        _install(unet, found)
    components = []
    for index, one in enumerate(added):
        weights = Weights(unet, index)
        if not reduced:
            check_made_for(one.path, projections.named(one.path, _tensors(one.path)), weights, "adapter")
        components.append(
            Component(f"{KIND}.{one.name}", weights, one.path, named=partial(projections.named, one.path))
        )
    features = _features(encoder.config, found)
    inputs = [
        Tensor(name=embeds_name(i), dtype="float32", dims=(BATCH, one.positions, one.width), condition=condition)
        for i, one in enumerate(features)
    ]
    scales = Tensor(name=SCALES, dtype="float32", dims=(BATCH, len(added)), values="ones", condition=condition)
    return Adapters(tuple(components), (*inputs, scales), (_encoder_part(encoder, added[0].path.parent, features),))


def styles(source: Source) -> Styles | None:
    """The settings of the pipeline; None without adapters."""
    added = source.added(KIND)
    if not added:
        return None
    config = _encoder_config(added[0].path.parent)
    found = _features(config, [projections.read(one.path, _tensors(one.path)) for one in added])
    return Styles(names=tuple(one.name for one in added), edge=config.image_size, features=found)


def _features(config: CLIPVisionConfig, several: Iterable[Projection]) -> tuple[Features, ...]:
    """What each adapter reads of an encoder with this config."""
    pooled = Features(output=EMBEDS, positions=1, width=config.projection_dim)
    positions = (config.image_size // config.patch_size) ** 2 + 1
    hidden = Features(output=HIDDEN, positions=positions, width=config.hidden_size)
    return tuple(hidden if one.hidden else pooled for one in several)


def _tensors(file: Path) -> Mapping[str, TensorRef]:
    if file.is_dir():
        raise UnsupportedModel(f"{file} is a folder, expected the .safetensors file of an adapter, beside {ENCODER}/")
    return open_file(file).tensors


def _projection(file: Path, unet: UNet2DConditionModel, encoder: CLIPVisionConfig) -> Projection:
    """That of an adapter for this UNet and encoder."""
    found = projections.read(file, _tensors(file))
    if found.context != unet.config.cross_attention_dim:
        raise UnsupportedModel(
            f"{file} makes tokens of width {found.context}, the UNet has cross_attention_dim "
            f"{unet.config.cross_attention_dim}: this adapter was made for another base model"
        )
    given = encoder.hidden_size if found.hidden else encoder.projection_dim
    if found.width != given:
        raise UnsupportedModel(
            f"{file} reads features of width {found.width}, {ENCODER} beside it gives {given}: take the encoder that "
            "was published with the adapter"
        )
    return found


def _install(unet: UNet2DConditionModel, several: Sequence[Projection]) -> None:
    """Do what `load_ip_adapter` does, without weights."""
    context = unet.config.cross_attention_dim
    processors = {
        name: one if name.endswith("attn1.processor") else _processor(unet, name, context, len(several))
        for name, one in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = Together([one.make() for one in several]).eval()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def _processor(unet: UNet2DConditionModel, name: str, context: int, count: int) -> Any:
    """The number of tokens is of no account: those of each adapter are given apart."""
    attention: Any = unet.get_submodule(name.removesuffix(".processor"))
    return Attention(attention.to_k.out_features, context, [projections.TOKENS] * count)


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


def _encoder_part(model: CLIPVisionModelWithProjection, folder: Path, features: Iterable[Features]) -> Part:
    edge = model.config.image_size
    pixels = Tensor(name=PIXELS, dtype="float32", dims=(BATCH, 3, edge, edge))
    shapes = {one.output: (one.width,) if one.output == EMBEDS else (one.positions, one.width) for one in features}
    outputs = tuple(Tensor(name=name, dtype="float32", dims=(BATCH, *dims)) for name, dims in shapes.items())
    return Part(
        ENCODER,
        (Component(ENCODER, model, folder / ENCODER),),
        ImageEncoder(model, tuple(shapes)),
        lambda pixels: seen(model(pixel_values=pixels, output_hidden_states=True), tuple(shapes)),
        Signature(inputs=(pixels,), outputs=outputs),
        least_bits=8,
    )
