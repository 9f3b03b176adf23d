"""Models whose pictures reach a language model through a Q-Former with learned queries (Li et al. 2023,
arXiv:2301.12597): what BLIP-2 and InstructBLIP have in common.

A prompt has the queries of its picture in front, then the text; there is no chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from torch import Tensor as TorchTensor
from torch import nn

from export.architecture import seq2seq
from export.architecture.configs import parsed, require_activation
from export.architecture.decoders import (
    Decoder,
    activation,
    decoder_signature,
    library_decoder,
    reduced_decoder,
    require_known,
)
from export.architecture.generation import Generation, read_generation
from export.checkpoint.source import Source, read_json
from export.checkpoint.tokenizer import tokenizer_file
from export.family import Component, Family, Part, Reference
from export.graph.trace import without_weights
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.errors import SourceError, UnsupportedModel
from runtime.language.config import ChatConfig
from runtime.language.vision import TILES
from runtime.pipelines.seq2seq import Seq2SeqConfig

IMAGE: Final = "<image>"
"""The placeholder that transformers' processors add to tokenizers without one."""
CONFIGS: Final = ("vision_config", "qformer_config", "text_config")
ENCODERS: Final = ("vision_encoder", "qformer")
ABSOLUTE: Final = "absolute"
"""The positions of a Q-Former's texts. Older configs could state others, which transformers no longer has."""


class VisionEncoder(nn.Module):
    """Vision transformer: pixel_values [images, 3, height, width] to image_embeds [images, 1 + patches, hidden]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, pixel_values: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.vision_model(pixel_values).last_hidden_state,)


class TokenEmbedding(nn.Module):
    """Embeddings of the language model: input_ids [batch, sequence] to inputs_embeds [batch, sequence, hidden]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.embed_tokens(input_ids),)


@dataclass(frozen=True)
class QFormerFamily:
    """A family of models with a vision transformer, a Q-Former and a language model; what they differ in.

    `name` is the family's, `model` and `config` are the library's classes, `decoders` the language models without an
    encoder that it can have. `qformer(component)` is the part from image_embeds to image_features. `settings(config)`
    are further fields of ChatConfig, `files(source)` further assets.
    """

    name: str
    model: type[Any]
    config: type[Any]
    decoders: Collection[str]
    qformer: Callable[[Component], Part]
    settings: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    files: Callable[[Source], Mapping[str, Path]] = lambda source: {}

    @property
    def family(self) -> Family:
        architectures = (self.model.__name__,)
        return Family(
            self.name, self.pipeline, architectures, self.parts, self.pipeline_config, self.assets, self.notes
        )

    def pipeline(self, source: Source) -> str:
        return "seq2seq" if self.read_config(source).text_config.is_encoder_decoder else "chat"

    def parts(self, source: Source, reduced: bool) -> list[Part]:
        with without_weights():
            model = self.model(self.read_config(source, reduced)).eval()
            if model.config.text_config.is_encoder_decoder:
                seq2seq.untie(model, source)
        component = Component("", model)
        return [vision_part(component), self.qformer(component), embedding_part(component), *language_parts(component)]

    def pipeline_config(self, source: Source) -> dict[str, Any]:
        model, generation = self.read_config(source), self._generation(source)
        text = model.text_config
        start: dict[str, Any] = {"decoder_start_token_id": seq2seq.start_token(text)} if text.is_encoder_decoder else {}
        return (Seq2SeqConfig if text.is_encoder_decoder else ChatConfig)(
            context_length=_context(text),
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            bos_token_id=None,
            eos_token_ids=generation.ends,
            image_token_id=_image_token(source, model),
            tokens_per_image=model.num_query_tokens,
            most_pictures=1,
            prompt="plain",
            encoders=ENCODERS,
            defaults=generation.defaults,
            **self.settings(model),
            **start,
        ).model_dump(mode="json")

    def assets(self, source: Source) -> Mapping[str, Path]:
        self.read_config(source)  # transformers reads it for the tokenizer, too
        tokenizer = tokenizer_file(source.root, IMAGE)
        return {"tokenizer/tokenizer.json": tokenizer, **processors(source), **self.files(source)}

    def notes(self, source: Source) -> tuple[str, ...]:
        return self._generation(source).notes

    def read_config(self, source: Source, reduced: bool = False) -> Any:
        """The model's config, checked. Raises UnsupportedModel or SourceError naming what cannot be built."""
        file = source.root / "config.json"
        found = parsed(file, self.config, CONFIGS, {})
        text = found.text_config
        if text.is_encoder_decoder:
            seq2seq.require_known(file, text)
        else:
            require_known(file, text, self.decoders)
        require_vision(file, found)
        _require_language(file, text)
        if not reduced:
            return found
        shorter = seq2seq.reduced(text) if text.is_encoder_decoder else reduced_decoder(text)
        return parsed(file, self.config, CONFIGS, {**REDUCED, "text_config": shorter})

    def _generation(self, source: Source) -> Generation:
        data = read_json(source.root / "config.json")
        return read_generation(source.root, data, self.read_config(source).text_config.vocab_size)


REDUCED: Final[Mapping[str, Mapping[str, Any]]] = {
    "vision_config": {"num_hidden_layers": 2},
    "qformer_config": {"num_hidden_layers": 2},
}
"""The changes to a config that make the twin."""


def require_vision(file: Path, config: Any) -> None:
    """Raises UnsupportedModel or SourceError naming what of a vision transformer or Q-Former is not built."""
    vision, qformer = config.vision_config, config.qformer_config
    require_activation(file, "vision_config.hidden_act", vision.hidden_act)
    require_activation(file, "qformer_config.hidden_act", qformer.hidden_act)
    for name, part in (("vision_config", vision), ("qformer_config", qformer)):
        if part.num_attention_heads < 1 or part.hidden_size % part.num_attention_heads:
            raise SourceError(
                f"{file}: {name}.num_attention_heads is {part.num_attention_heads}, expected a divisor of "
                f"{part.hidden_size} (hidden_size). Correct it"
            )
    positions = getattr(qformer, "position_embedding_type", ABSOLUTE)
    if positions != ABSOLUTE:
        raise UnsupportedModel(
            f"{file}: qformer_config.position_embedding_type is {positions!r}, expected '{ABSOLUTE}', the only one "
            "that transformers computes: take a checkpoint with such a Q-Former"
        )
    for field, value in (
        ("num_query_tokens", config.num_query_tokens),
        ("qformer_config.cross_attention_frequency", qformer.cross_attention_frequency),
    ):
        if value < 1:
            raise SourceError(f"{file}: {field} is {value}, expected 1 or more. Correct it")


def _require_language(file: Path, text: Any) -> None:
    """Raises UnsupportedModel naming what of a language model is not built."""
    function = text.dense_act_fn if text.is_encoder_decoder else activation(text)
    require_activation(file, "text_config.hidden_act", function)
    if getattr(text, "word_embed_proj_dim", text.hidden_size) != text.hidden_size:
        raise UnsupportedModel(
            f"{file}: text_config.word_embed_proj_dim is {text.word_embed_proj_dim}, expected "
            f"{text.hidden_size} (hidden_size), which pictures are projected to: take a checkpoint with such a decoder"
        )


def vision_part(component: Component) -> Part:
    """The vision transformer."""
    model: Any = component.model
    vision = model.config.vision_config
    images, size = Dim(name="images", min=1, opt=1, max=TILES), vision.image_size
    pixels = Tensor(name="pixel_values", dtype="float32", dims=(images, 3, size, size))
    signature = Signature(inputs=(pixels,), outputs=(image_embeds(model, images),))
    return Part("vision_encoder", (component,), VisionEncoder(model), _see(model), signature)


def image_embeds(model: Any, images: Dim) -> Tensor:
    """What the vision transformer gives: the class token and the patches of every picture."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return Tensor(name="image_embeds", dtype="float32", dims=(images, 1 + patches, vision.hidden_size))


def image_features(model: Any, images: Dim) -> Tensor:
    """What the language model gets of every picture."""
    dims = images, model.config.num_query_tokens, model.config.text_config.hidden_size
    return Tensor(name="image_features", dtype="float32", dims=dims)


def embedding_part(component: Component) -> Part:
    """The embeddings of the language model."""
    model: Any = component.model
    text = model.config.text_config
    sequence = Dim(name="sequence", min=1, opt=1, max=_context(text))
    ids = Tensor(name="input_ids", dtype="int64", dims=(BATCH, sequence), values="below", limit=text.vocab_size)
    embeds = Tensor(name="inputs_embeds", dtype="float32", dims=(BATCH, sequence, text.hidden_size))
    signature = Signature(inputs=(ids,), outputs=(embeds,))
    module = TokenEmbedding(model.language_model)
    return Part("token_embedding", (component,), module, _embed(model), signature, activations=False)


def language_parts(component: Component) -> list[Part]:
    """The language model: a decoder, or a text encoder and a decoder."""
    model: Any = component.model
    language, text = model.language_model, model.config.text_config
    if text.is_encoder_decoder:
        return seq2seq.language_parts(component, language)
    module, reference = Decoder(language.model, language.lm_head), library_decoder(language)
    return [Part("decoder", (component,), module, reference, decoder_signature(text), activations=False)]


def processors(source: Source) -> dict[str, Path]:
    """The files of a checkpoint's image processor, by their path in a bundle."""
    files = (source.root / name for name in ("preprocessor_config.json", "processor_config.json"))
    return {f"preprocessor/{file.name}": file for file in files if file.is_file()}


def unit(vectors: TorchTensor) -> TorchTensor:
    """Vectors of length 1 along the last axis, by operators that every target has."""
    return vectors / (vectors * vectors).sum(dim=-1, keepdim=True).sqrt()


def _see(model: Any) -> Reference:
    return lambda pixel_values: (model.vision_model(pixel_values).last_hidden_state,)


def _embed(model: Any) -> Reference:
    return lambda input_ids: (model.language_model.get_input_embeddings()(input_ids),)


def _context(text: Any) -> int:
    return seq2seq.context_of(text) if text.is_encoder_decoder else int(text.max_position_embeddings)


def _image_token(source: Source, model: Any) -> int:
    """The placeholder of a query. Checkpoints published before transformers 4.46 name none: then it is the token that
    the processor adds to the tokenizer.
    """
    tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer_file(source.root, IMAGE)))
    token, named = tokenizer.token_to_id(IMAGE), model.image_token_index
    if token is None or named not in (None, token):
        raise SourceError(
            f"{source.root / 'config.json'}: image_token_index is {named}, the tokenizer has {IMAGE} as {token}: take "
            "both from the same checkpoint"
        )
    return token
