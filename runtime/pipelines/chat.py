"""Conversations about pictures with a vision-language model of LLaVA's kind (Liu et al. 2023), or with a language model
alone.

The submodels that a chat bundle has, and what this pipeline calls them with:

    vision_encoder   pixel_values float32 [images, 3, height, width] -> image_features float32 [images, patches, hidden]
    token_embedding  input_ids int64 [1, sequence] -> inputs_embeds float32 [1, sequence, hidden]
    decoder          inputs_embeds, attention_mask int64 [1, total], position_ids int64 [1, sequence] -> logits float32
                     [1, 1, vocab]

The decoder gives the logits of the last position only, and keeps keys and values in the call's slot. The prompt has one
placeholder token per picture, which is repeated once per patch, and the picture's features take the place of those
tokens' embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
from pydantic import Field, ValidationError, model_validator

from runtime.bundle.manifest import Frozen
from runtime.bundle.signature import Array
from runtime.engine import Slot
from runtime.errors import BundleError, ContextLengthExceeded, InvalidInput
from runtime.language.decoding import Sampling, Scores, Span, choose
from runtime.language.text import ChatText, Detokenizer, Message, StopStrings
from runtime.pipeline import Call, Event, Example, ModelPipeline, Outputs, Pipeline
from runtime.tasks.chat import ChatDefaults, ChatRequest, Finished, TextDelta
from runtime.vision.images import Picture, PictureFile
from runtime.vision.preprocessing import ImagePreprocessor

T = TypeVar("T")
Step = Generator[Call | Event, Outputs | None, T]
"""A part of the pipeline that results in a T."""


LONGEST: Final = 1 << 24
"""Tokens, or features of one: more than any model has."""


class ChatConfig(Frozen):
    """The settings of a chat bundle: `Manifest.config`, written when the bundle is built.

    Lengths are in tokens. A model that sees has both `image_token_id` and `tokens_per_image` (the patches a picture
    becomes). `bos_token_id` is put before every prompt whose template did not write it; null when the model's tokenizer
    puts none. `prefill_chunk` cuts long prompts into decoder calls of at most that many tokens; 0 is one call.
    """

    context_length: int = Field(ge=1, le=LONGEST)
    vocab_size: int = Field(ge=1, le=LONGEST)
    hidden_size: int = Field(ge=1, le=LONGEST)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    image_token_id: int | None = None
    tokens_per_image: int = Field(default=0, ge=0, le=LONGEST)
    prefill_chunk: int = Field(default=0, ge=0, le=LONGEST)
    defaults: ChatDefaults = ChatDefaults()

    @model_validator(mode="after")
    def _sees_or_not(self) -> ChatConfig:
        if self.has_vision != bool(self.tokens_per_image):
            raise ValueError("image_token_id and tokens_per_image belong together")
        if self.tokens_per_image >= self.context_length:
            raise ValueError(
                f"a picture takes {self.tokens_per_image} tokens, the model's context is {self.context_length}"
            )
        return self

    @property
    def has_vision(self) -> bool:
        return self.image_token_id is not None


@dataclass
class Conversation:
    """What the decoder already holds of a conversation: pass the same one for each turn, and only what is new is
    computed.

    `held` identifies the positions in the slot: token ids, and for a picture's positions a number made from its content
    (see `Prompt`). A turn that shares no beginning with the one before simply starts anew. One request at a time may
    use it.
    """

    slot: Slot = field(default_factory=Slot)
    held: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it: `ids`, with one placeholder per patch, and its pictures in order.

    `keys` are the ids with each placeholder replaced by a negative number that tells its picture from others, so that
    equal keys mean equal positions.
    """

    ids: list[int]
    keys: list[int]
    images: list[Picture | PictureFile]


class ChatPipeline(ModelPipeline):
    """Answers conversations with the submodels of one bundle.

    Made from the folder of the model's files and `Manifest.config`. Raises BundleError when settings or files do not
    fit.
    """

    name: ClassVar[str] = "chat"
    task: ClassVar[str] = ChatRequest.task

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> ChatPipeline:
        """The same as making one."""
        return cls(root, config)

    def __init__(self, root: Path, config: Mapping[str, Any]) -> None:
        try:
            self.config = ChatConfig.model_validate(dict(config))
        except ValidationError as error:
            raise BundleError(f"the chat settings cannot be read: {error}") from None
        self.text = ChatText(root / "tokenizer", self.config.image_token_id)
        token, largest = self.text.last
        if largest >= self.config.vocab_size:
            raise BundleError(
                f"{self.text.file} has the token '{token}' with id {largest}, the model has embeddings for ids below "
                f"{self.config.vocab_size} (vocab_size in its config.json): take both from the same checkpoint"
            )
        self.preprocessor = ImagePreprocessor.from_folder(root / "preprocessor") if self.config.has_vision else None

    @property
    def origins(self) -> Mapping[str, str]:
        """What makes each input of the submodels."""
        pixels = {"pixel_values": self.preprocessor.origin} if self.preprocessor else {}
        return pixels | {"input_ids": str(self.text.file), "inputs_embeds": "token_embedding"}

    def examples(self) -> Iterator[Example]:
        """Requests that try the model's files."""
        picture = np.zeros((24, 36, 3), np.uint8)
        shown: tuple[str | Picture, ...] = (picture, "x") if self.config.has_vision else ("x",)
        question, answer = Message("user", ("x",)), Message("assistant", ("x",))

        def example(what: str, *messages: Message, optional: bool = False) -> Example:
            return Example(what, ChatRequest(messages, max_tokens=1, seed=0), optional)

        yield example("a question", question)
        if self.config.has_vision:
            yield example("a picture", Message("user", shown))
            yield example("a picture behind the text", Message("user", ("x", picture)), optional=True)
            yield example("two pictures", Message("user", (picture, *shown)), optional=True)
        yield example("two turns", Message("user", shown), answer, question, optional=True)
        yield example("a system message", Message("system", ("x",)), question, optional=True)

    def __call__(self, request: ChatRequest, conversation: Conversation | None = None) -> Pipeline:
        """The generator that answers: TextDelta events, then Finished, whose completion tokens count the end token.

        Everything that can be wrong with a request raises here or before the generator's first call: InvalidInput
        naming the field, ContextLengthExceeded with the counts.
        """
        prompt = self.prompt(request)
        room = self.config.context_length - len(prompt.ids)
        usual = min(self.config.defaults.longest(len(prompt.ids)), max(room, 1))
        max_tokens = usual if request.max_tokens is None else request.max_tokens
        if max_tokens > room:
            raise ContextLengthExceeded(
                "messages" if room < 1 else "max_tokens",
                f"the prompt has {len(prompt.ids)} tokens ({len(prompt.images)} pictures at "
                f"{self.config.tokens_per_image} included) and "
                f"the answer may have {max_tokens}, the model's context is {self.config.context_length}: shorten the "
                "one or the other",
            )
        return self._answer(
            prompt, request, request.sampling(self.config.defaults), max_tokens, conversation or Conversation()
        )

    def prompt(self, request: ChatRequest) -> Prompt:
        """The tokens of a conversation. Raises InvalidInput naming the message at fault."""
        if request.images and not self.config.has_vision:
            raise InvalidInput("messages", "show pictures, but the model has no vision: send text only")
        for picture in request.images:
            if self.preprocessor is not None and isinstance(picture, PictureFile):
                self.preprocessor.check(picture.size, picture.field)
        ids = self.text.encode(request.messages)
        bos = self.config.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        image, repeat = self.config.image_token_id, self.config.tokens_per_image
        ids = [token for id in ids for token in [id] * (repeat if id == image else 1)]
        names = iter([name for picture in request.images for name in [_name(picture)] * repeat])
        return Prompt(ids, [next(names) if id == image else id for id in ids], request.images)

    def _answer(
        self, prompt: Prompt, request: ChatRequest, sampling: Sampling, max_tokens: int, conversation: Conversation
    ) -> Pipeline:
        rng = np.random.default_rng(request.seed)
        span = Span(len(prompt.ids), len(prompt.ids) + max_tokens, self.config.eos_token_ids)
        spelling, stops = Detokenizer(self.text.tokenizer), StopStrings((*request.stop, *self.config.defaults.stop))
        tokens, reason, completion = list(prompt.ids), "length", 0
        logits = yield from self._prefill(prompt, conversation)
        while True:
            token = choose(logits, tokens, sampling, rng, span)
            tokens.append(token)
            completion += 1
            if token in self.config.eos_token_ids:
                reason = "stop"
                break
            if text := stops.push(spelling.push(token)):
                yield TextDelta(text)
            if stops.found or completion == max_tokens:
                break
            embeds = yield from self._embed([token])
            logits = yield from self._decode(embeds, [token], conversation)
        if text := "" if stops.found else stops.push(spelling.flush()) + stops.flush():
            yield TextDelta(text)
        yield Finished("stop" if stops.found else reason, len(prompt.ids), completion)

    def _prefill(self, prompt: Prompt, conversation: Conversation) -> Step[Scores]:
        """Bring the decoder to the end of the prompt, leaving out what the conversation holds; the logits [vocab] that
        follow.
        """
        shared = _shared(conversation.held, prompt.keys[:-1])  # the last token is always run: its logits are needed
        features = yield from self._see(prompt, shared)
        ids, keys = prompt.ids[shared:], prompt.keys[shared:]
        embeds = yield from self._embed(ids)
        embeds[0, np.array(ids) == self.config.image_token_id] = features
        if not shared:
            conversation.slot = Slot()
        conversation.held, keep = conversation.held[:shared], shared or None
        size = self.config.prefill_chunk or len(ids)
        for start in range(0, len(ids), size):
            chunk = slice(start, start + size)
            logits = yield from self._decode(embeds[:, chunk], keys[chunk], conversation, keep)
            keep = None
        return logits

    def _see(self, prompt: Prompt, start: int) -> Step[Array]:
        """Features [placeholders, hidden] of the placeholders at and behind position `start`; encodes only their
        pictures.
        """
        if self.preprocessor is None:
            return np.empty((0, self.config.hidden_size), np.float32)
        passed = sum(id == self.config.image_token_id for id in prompt.ids[:start])
        first, within = divmod(passed, self.config.tokens_per_image)
        if first == len(prompt.images):
            return np.empty((0, self.config.hidden_size), np.float32)
        pixels = self.preprocessor(prompt.images[first:], "messages")
        features = (yield from _run(Call("vision_encoder", {"pixel_values": pixels})))["image_features"]
        if features.shape[1] != self.config.tokens_per_image:
            raise BundleError(
                f"the vision encoder gives {features.shape[1]} patches, the bundle says "
                f"{self.config.tokens_per_image}: build it again"
            )
        return features.reshape(-1, self.config.hidden_size)[within:]

    def _embed(self, ids: Sequence[int]) -> Step[Array]:
        """Embeddings [1, sequence, hidden] of tokens."""
        outputs = yield from _run(Call("token_embedding", {"input_ids": np.array([ids], np.int64)}))
        return outputs["inputs_embeds"]

    def _decode(
        self, embeds: Array, keys: Sequence[int], conversation: Conversation, keep: int | None = None
    ) -> Step[Scores]:
        """Feed embeddings [1, sequence, hidden] behind what the conversation holds; the logits [vocab] of the last."""
        past = len(conversation.held)
        total = past + len(keys)
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
        }
        outputs = yield from _run(Call("decoder", inputs, conversation.slot, keep))
        conversation.held.extend(
            keys
        )  # only now: if the call was abandoned, the next turn trims the slot to what is known
        return np.asarray(outputs["logits"][0, -1], np.float32)


def _run(call: Call) -> Step[Outputs]:
    outputs = yield call
    assert outputs is not None, "a driver answers a call with its outputs"
    return outputs


def _shared(held: Sequence[int], keys: Sequence[int]) -> int:
    """How many positions at the beginning are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, keys, strict=False)))


def _name(picture: Picture | PictureFile) -> int:
    """A negative number made from a picture's size and content, or from its file."""
    content = picture.data if isinstance(picture, PictureFile) else repr(picture.shape).encode() + picture.tobytes()
    digest = hashlib.sha256(content).digest()
    return -1 - int.from_bytes(digest[:8])
