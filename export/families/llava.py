"""LLaVA 1.5: vision tower, two-layer projector, language model (Liu et al. 2023, arXiv:2310.03744). BakLLaVA is the
same code.

The tower is CLIP's or SigLIP's, the language model one of `export.architecture.decoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor as TorchTensor
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from export.architecture.configs import config_data, made, require_activation
from export.architecture.decoders import (
    Decoder,
    activation,
    decoder_signature,
    library_decoder,
    reduced_decoder,
    require_known,
)
from export.architecture.draft import KIND as DRAFT
from export.architecture.draft import draft_parts, drafted
from export.architecture.generation import Generation, read_generation
from export.checkpoint.source import Source, read_json
from export.checkpoint.tokenizer import tokenizer_file
from export.family import Component, Family, Part, Reference
from export.graph.trace import without_weights
from runtime.bundle.signature import Dim, Signature, Tensor
from runtime.errors import SourceError, UnsupportedModel
from runtime.language import templates
from runtime.language.config import ChatConfig
from runtime.language.vision import TILES

CAPTION: Final = "Describe the picture in one sentence."
"""What a picture alone stands for."""
CLASS_TOKENS: Final[Mapping[str, int]] = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Positions that a tower puts before those of the patches, by its `model_type`."""


class VisionEncoder(nn.Module):
    """Vision tower and projector: pixel_values [images, 3, height, width] to image_features [images,
    patches, hidden].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.layers = model.config.vision_feature_layer
        self.skip = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: TorchTensor) -> tuple[TorchTensor, ...]:
        with _without_pooling(self.tower):
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        layers = [self.layers] if isinstance(self.layers, int) else self.layers
        return (self.projector(torch.cat([states[layer][:, self.skip :] for layer in layers], dim=-1)),)


@contextmanager
def _without_pooling(tower: Any) -> Iterator[None]:
    """While active, a SigLIP tower leaves out the head behind its last layer, which LLaVA makes no use of."""
    if not getattr(tower, "use_head", False):
        yield
        return
    tower.use_head = False
    try:
        yield
    finally:
        tower.use_head = True


class TokenEmbedding(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.model.language_model.embed_tokens

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.embed_tokens(input_ids),)


@dataclass(frozen=True)
class VisionLanguage:
    """A family of models with a vision tower, a projector and a language model; what they differ in.

    `name` is the family's, `model` and `config` are the library's classes. `see(model)` is the library's own encoder:
    pixel_values [images, 3, height, width] to image_features [images, patches, hidden]. `layout(source, config)` are
    the fields of ChatConfig that say how a picture becomes tiles and positions. `tensors` are those that the layout
    reads, see `Component.tensors`.
    """

    name: str
    model: type[Any]
    config: type[Any]
    see: Callable[[Any], Reference]
    layout: Callable[[Source, Any], Mapping[str, Any]] = lambda source, config: {}
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        architectures = (self.model.__name__,)
        return Family(self.name, "chat", architectures, self.parts, self.settings, self.assets, self.notes, (DRAFT,))

    def parts(self, source: Source, reduced: bool) -> list[Part]:
        with without_weights():
            model = self.model(self.read_config(source, reduced)).eval()
        text, vision = model.config.text_config, model.config.vision_config
        states, head = drafted(source), model.lm_head
        decoder = decoder_signature(text, states)
        embeds, *_ = decoder.inputs
        images = Dim(name="images", min=1, opt=1, max=TILES)
        pixels = Tensor(
            name="pixel_values",
            dtype="float32",
            dims=(images, vision.num_channels, vision.image_size, vision.image_size),
        )
        ids = Tensor(name="input_ids", dtype="int64", dims=embeds.dims[:2], values="below", limit=text.vocab_size)
        features = Tensor(
            name="image_features", dtype="float32", dims=(images, patches(model.config), text.hidden_size)
        )
        components = (Component("", model, tensors=self.tensors),)
        return [
            Part("vision_encoder", components, VisionEncoder(model), self.see(model), Signature(inputs=(pixels,),
                outputs=(features,))),
            Part("token_embedding", components, TokenEmbedding(model), _embed(model), Signature(inputs=(ids,),
                outputs=(embeds,)),
                 activations=False),
            Part("decoder", components, Decoder(model.model.language_model, head, states),
                library_decoder(model, states), decoder, activations=False),
            *draft_parts(source, components[0], head, text, reduced),
        ]  # fmt: skip

    def settings(self, source: Source) -> dict[str, Any]:
        model = self.read_config(source, reduced=False)
        text, generation = model.text_config, self._generation(source)
        return ChatConfig(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            bos_token_id=_leading_token(tokenizer_file(source.root)),
            eos_token_ids=generation.ends,
            image_token_id=model.image_token_index,
            tokens_per_image=patches(model),
            caption=CAPTION,
            draft=drafted(source),
            **self.layout(source, model),
            defaults=generation.defaults,
        ).model_dump(mode="json")

    def notes(self, source: Source) -> tuple[str, ...]:
        return (*self._generation(source).notes, *self._miscounts(source))

    def assets(self, source: Source) -> Mapping[str, Path]:
        self.read_config(
            source, reduced=False
        )  # transformers reads it for the tokenizer, too, and its fault would be the tokenizer's
        text = ("special_tokens_map.json", *templates.FILES)
        vision = ("preprocessor_config.json", "processor_config.json")
        wanted = {f"tokenizer/{name}": source.root / name for name in text} | {
            f"preprocessor/{name}": source.root / name for name in vision
        }
        return {"tokenizer/tokenizer.json": tokenizer_file(source.root)} | {
            path: file for path, file in wanted.items() if file.is_file()
        }

    def read_config(self, source: Source, reduced: bool) -> Any:
        """The model's config, checked. Raises UnsupportedModel or SourceError naming what cannot be built."""
        file = source.root / "config.json"
        data = config_data(file, ("text_config", "vision_config"))
        found = made(file, self.config, data)
        require_known(file, found.text_config)
        _require_tower(file, found)
        if not 0 <= found.image_token_index < found.text_config.vocab_size:
            raise SourceError(
                f"{file}: image_token_index is {found.image_token_index}, expected the id of a token below "
                f"{found.text_config.vocab_size} "
                "(text_config.vocab_size). Correct it"
            )
        if not reduced:
            return found
        layers = found.vision_feature_layer
        data["vision_feature_layer"] = -2 if isinstance(layers, int) else [-1 - i % 3 for i in range(len(layers))]
        data["vision_config"] = data["vision_config"] | {"num_hidden_layers": 2}
        data["text_config"] = reduced_decoder(found.text_config)
        return self.config.from_dict(data)

    def _miscounts(self, source: Source) -> Iterator[str]:
        """A note where the processor's own file counts other positions for a picture than the tower gives: transformers
        would fail there.
        """
        file = source.root / "processor_config.json"
        found = read_json(file) if file.is_file() else {}
        config, size = self.read_config(source, reduced=False), found.get("patch_size")
        if not isinstance(size, int) or size < 1:
            return
        counted = (config.vision_config.image_size // size) ** 2 + (found.get("num_additional_image_tokens") or 0)
        counted -= found.get("vision_feature_select_strategy") == "default"
        if counted != patches(config):
            yield (
                f"{file.name} counts {counted} positions for a picture (patch_size, num_additional_image_tokens and "
                f"vision_feature_select_strategy), the vision tower gives {patches(config)}: prompts have as many as "
                "the tower gives"
            )

    def _generation(self, source: Source) -> Generation:
        data = read_json(source.root / "config.json")
        return read_generation(source.root, data, self.read_config(source, reduced=False).text_config.vocab_size)


def _require_tower(file: Path, config: Any) -> None:
    """Raises UnsupportedModel or SourceError naming what of a vision tower, or of the features taken from it, is not
    built.
    """
    vision, layers = config.vision_config, config.vision_feature_layer
    if vision.model_type not in CLASS_TOKENS:
        raise UnsupportedModel(
            f"{file}: its vision tower (vision_config.model_type) is a {vision.model_type}, expected one of "
            f"{', '.join(CLASS_TOKENS)}: "
            "take a checkpoint with such a tower"
        )
    count = vision.num_hidden_layers + 1
    chosen = [layers] if isinstance(layers, int) else list(layers)
    if not chosen or not all(-count <= layer < count for layer in chosen):
        raise SourceError(
            f"{file}: vision_feature_layer is {layers}, expected layers from {-count} to {count - 1}: the tower has "
            f"{count - 1} layers "
            "behind its embedding. Correct it"
        )
    for name, value in (
        ("vision_config.hidden_act", vision.hidden_act),
        ("text_config.hidden_act", activation(config.text_config)),
        ("projector_hidden_act", config.projector_hidden_act),
    ):
        require_activation(file, name, value)


def _see(model: Any) -> Reference:
    return lambda pixel_values: (torch.stack(list(model.get_image_features(pixel_values).pooler_output)),)


def _embed(model: Any) -> Reference:
    return lambda input_ids: (model.get_input_embeddings()(input_ids),)


def patches(model: Any) -> int:
    """Features that the encoder gives for a tile: those of the tower, without the first one where the model leaves it
    out.
    """
    side = model.vision_config.image_size // model.vision_config.patch_size
    first = 1 if model.vision_feature_select_strategy == "default" else 0
    return int(side * side) + CLASS_TOKENS[model.vision_config.model_type] - first


def _leading_token(tokenizer: Path) -> int | None:
    """The token that the model's tokenizer puts before every text by itself, if any."""
    try:
        ids = Tokenizer.from_file(str(tokenizer)).encode("").ids
    except Exception as error:  # the library raises no other class
        raise SourceError(f"{tokenizer} cannot be read: {error}. Download it again") from None
    return int(ids[0]) if ids else None


FAMILY = VisionLanguage("llava", LlavaForConditionalGeneration, LlavaConfig, _see).family
