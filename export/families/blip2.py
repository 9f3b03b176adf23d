"""BLIP-2: vision transformer, Q-Former with learned queries, language model (Li et al. 2023, arXiv:2301.12597).

The language model is OPT or Flan-T5, as in the published models. A prompt has the queries of every picture in front,
then the text; there is no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor as TorchTensor
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration
from transformers.activations import ACT2FN

from export.architecture import seq2seq
from export.architecture.decoders import (
    LEARNED,
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
from runtime.errors import SourceError, UnsupportedModel, did_you_mean
from runtime.language.config import ChatConfig
from runtime.pipelines.seq2seq import Seq2SeqConfig

IMAGE: Final = "<image>"
"""The placeholder that transformers' processor adds to tokenizers without one."""
TWIN_WINDOW: Final = 8
CONFIGS: Final = ("vision_config", "qformer_config", "text_config")


class VisionEncoder(nn.Module):
    """Vision transformer: pixel_values [images, 3, height, width] to image_embeds [images, 1 + patches, hidden]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, pixel_values: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.vision_model(pixel_values).last_hidden_state,)


class QFormer(nn.Module):
    """Q-Former and projection: image_embeds [images, patches, hidden] to image_features [images, queries, hidden of the
    language model].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.query_tokens, self.qformer, self.projection = model.query_tokens, model.qformer, model.language_projection

    def forward(self, image_embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        queries = self.qformer.layernorm(self.query_tokens).expand(image_embeds.shape[0], -1, -1)
        found = self.qformer.encoder(  # the model's own forward makes a mask that hides nothing
            queries, encoder_hidden_states=image_embeds, query_length=queries.shape[1]
        )
        return (self.projection(found.last_hidden_state),)


class TokenEmbedding(nn.Module):
    """Embeddings of the language model: input_ids [batch, sequence] to inputs_embeds [batch, sequence, hidden]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids: TorchTensor) -> tuple[TorchTensor, ...]:
        return (self.embed_tokens(input_ids),)


def _config(source: Source, reduced: bool) -> Blip2Config:
    """The model's config, checked. Raises UnsupportedModel or SourceError naming what cannot be built."""
    file = source.root / "config.json"
    data = read_json(file)
    for part in CONFIGS:  # graphs compute in float32
        data[part] = {
            key: value for key, value in (data.get(part) or {}).items() if key not in ("dtype", "torch_dtype")
        }
    try:
        found = Blip2Config.from_dict(data)
    except Exception as error:  # configs are checked with exceptions of every kind
        raise SourceError(
            f"{file} is no config that transformers can read: {' '.join(str(error).split())}. Correct it"
        ) from None
    text = found.text_config
    if not text.is_encoder_decoder:
        require_known(file, text, LEARNED)
    else:
        seq2seq.require_known(file, text)
    _require(file, found)
    if not reduced:
        return found
    data["vision_config"] |= {"num_hidden_layers": 2}
    data["qformer_config"] |= {"num_hidden_layers": 2}
    data["text_config"] = seq2seq.reduced(text) if text.is_encoder_decoder else reduced_decoder(text, TWIN_WINDOW)
    return Blip2Config.from_dict(data)


def _require(file: Path, config: Blip2Config) -> None:
    """Raises UnsupportedModel or SourceError naming what in a config is not built."""
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    for name, value in (
        ("vision_config.hidden_act", vision.hidden_act),
        ("qformer_config.hidden_act", qformer.hidden_act),
        ("text_config.hidden_act", text.dense_act_fn if text.is_encoder_decoder else activation(text)),
    ):
        if value not in ACT2FN:
            raise UnsupportedModel(
                f"{file}: {name} is {value!r}, which transformers does not have: {did_you_mean(str(value), ACT2FN)}"
            )
    if getattr(text, "word_embed_proj_dim", text.hidden_size) != text.hidden_size:
        raise UnsupportedModel(
            f"{file}: text_config.word_embed_proj_dim is {text.word_embed_proj_dim}, expected "
            f"{text.hidden_size} (hidden_size), which pictures are projected to: take a checkpoint with such a decoder"
        )
    if config.num_query_tokens < 1:
        raise SourceError(f"{file}: num_query_tokens is {config.num_query_tokens}, expected 1 or more. Correct it")


def _see(model: Any) -> Reference:
    return lambda pixel_values: (model.vision_model(pixel_values).last_hidden_state,)


def _query(model: Any) -> Reference:
    """The steps of the library's `get_image_features` behind the vision model."""

    def reference(image_embeds: TorchTensor) -> tuple[TorchTensor, ...]:
        found = model.qformer(
            query_embeds=model.query_tokens.expand(image_embeds.shape[0], -1, -1),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:-1], dtype=torch.int64),
        )
        return (model.language_projection(found.last_hidden_state),)

    return reference


def _embed(model: Any) -> Reference:
    return lambda input_ids: (model.get_input_embeddings()(input_ids),)


def parts(source: Source, reduced: bool) -> list[Part]:
    with without_weights():
        model = Blip2ForConditionalGeneration(_config(source, reduced)).eval()
        if model.config.is_encoder_decoder:
            seq2seq.untie(model, source.open().tensors)
    component = Component("", model)
    return [*vision_parts(component), embedding_part(component), *language_parts(component)]


def language_parts(component: Component) -> list[Part]:
    """The language model: a decoder, or a text encoder and a decoder."""
    model: Any = component.model
    language, text = model.language_model, model.config.text_config
    if text.is_encoder_decoder:
        return seq2seq.language_parts(component, language)
    module, reference = Decoder(language.model, language.lm_head), library_decoder(language)
    return [Part("decoder", (component,), module, reference, decoder_signature(text), activations=False)]


def vision_parts(component: Component) -> list[Part]:
    """Vision transformer and Q-Former."""
    model: Any = component.model
    vision, text = model.config.vision_config, model.config.text_config
    images = Dim(name="images", min=1, opt=1, max=16)
    patches = (vision.image_size // vision.patch_size) ** 2
    pixels = Tensor(name="pixel_values", dtype="float32", dims=(images, 3, vision.image_size, vision.image_size))
    seen = Tensor(name="image_embeds", dtype="float32", dims=(images, 1 + patches, vision.hidden_size))
    features = Tensor(
        name="image_features", dtype="float32", dims=(images, model.config.num_query_tokens, text.hidden_size)
    )
    return [
        Part("vision_encoder", (component,), VisionEncoder(model), _see(model), Signature(inputs=(pixels,),
            outputs=(seen,))),
        Part("qformer", (component,), QFormer(model), _query(model), Signature(inputs=(seen,), outputs=(features,))),
    ]  # fmt: skip


def embedding_part(component: Component) -> Part:
    """The embeddings of the language model."""
    model: Any = component.model
    text = model.config.text_config
    sequence = Dim(name="sequence", min=1, opt=1, max=_context(text))
    ids = Tensor(name="input_ids", dtype="int64", dims=(BATCH, sequence), values="below", limit=text.vocab_size)
    embeds = Tensor(name="inputs_embeds", dtype="float32", dims=(BATCH, sequence, text.hidden_size))
    signature = Signature(inputs=(ids,), outputs=(embeds,))
    return Part("token_embedding", (component,), TokenEmbedding(model), _embed(model), signature, activations=False)


def config(source: Source) -> dict[str, Any]:
    model, generation = _config(source, reduced=False), _generation(source)
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
        prompt="plain",
        encoders=("vision_encoder", "qformer"),
        defaults=generation.defaults,
        **start,
    ).model_dump(mode="json")


def _context(text: Any) -> int:
    return seq2seq.context_of(text) if text.is_encoder_decoder else int(text.max_position_embeddings)


def pipeline(source: Source) -> str:
    return "seq2seq" if _config(source, reduced=False).is_encoder_decoder else "chat"


def _image_token(source: Source, model: Blip2Config) -> int:
    """The placeholder of a query. Checkpoints published before transformers 4.46 name none: then it is the token that
    the processor adds to the tokenizer.
    """
    tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer_file(source, IMAGE)))
    token, named = tokenizer.token_to_id(IMAGE), model.image_token_index
    if token is None or named not in (None, token):
        raise SourceError(
            f"{source.root / 'config.json'}: image_token_index is {named}, the tokenizer has {IMAGE} as {token}: take "
            "both from the same checkpoint"
        )
    return token


def notes(source: Source) -> tuple[str, ...]:
    return _generation(source).notes


def _generation(source: Source) -> Generation:
    data = read_json(source.root / "config.json")
    return read_generation(source.root, data, _config(source, reduced=False).text_config.vocab_size)


def assets(source: Source) -> Mapping[str, Path]:
    _config(source, reduced=False)  # transformers reads it for the tokenizer, too
    vision = {
        f"preprocessor/{name}": source.root / name for name in ("preprocessor_config.json", "processor_config.json")
    }
    return {"tokenizer/tokenizer.json": tokenizer_file(source, IMAGE)} | {
        path: file for path, file in vision.items() if file.is_file()
    }


FAMILY = Family("blip2", pipeline, ("Blip2ForConditionalGeneration",), parts, config, assets, notes)
