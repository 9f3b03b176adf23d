"""Answers of a language model with an encoder and a decoder, such as Flan-T5 in BLIP-2 (Li et al. 2023,
arXiv:2301.12597).

Besides the submodels of `runtime.pipelines.chat`:

    text_encoder   inputs_embeds float32 [1, source, hidden] -> keys and values of every layer of the decoder

They are computed once for a prompt and given to every call of the decoder, under the names that the encoder has for
them. The decoder begins with a token of its own, and nothing of a conversation is kept for the next turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from runtime.engine import Slot
from runtime.errors import ContextLengthExceeded, InvalidInput
from runtime.language.config import ChatConfig
from runtime.language.decoder import Conversation, Step, decode_token, embed, run
from runtime.language.processors import Scores
from runtime.language.vision import Prompt
from runtime.pipeline import Call, Room
from runtime.pipelines.chat import ChatPipeline
from runtime.tasks.chat import ChatRequest


class Seq2SeqConfig(ChatConfig):
    """`decoder_start_token_id` is the token that every answer follows. `context_length` holds for prompts, and for
    answers.
    """

    decoder_start_token_id: int = Field(ge=0)


class Seq2SeqPipeline(ChatPipeline):
    """Answers prompts with the submodels of one bundle."""

    name: ClassVar[str] = "seq2seq"
    settings: ClassVar[type[ChatConfig]] = Seq2SeqConfig
    config: Seq2SeqConfig

    def remember(self, room: Room) -> None:
        super().remember(replace(room, prefixes=0))  # an answer's states belong to its prompt's keys and values

    def begin(self, prompt: Prompt) -> list[int]:
        return [self.config.decoder_start_token_id]

    def _wanted(self, prompt: Prompt, request: ChatRequest) -> int:
        return 0  # prompt and answer have a context each

    def _room(self, prompt: Prompt, request: ChatRequest) -> int:
        context = self.config.context_length
        if len(prompt.ids) > context:
            raise ContextLengthExceeded(
                "messages",
                f"the prompt has {len(prompt.ids)} tokens ({prompt.seen} of them for {len(prompt.images)} pictures), "
                f"the model reads {context}: shorten it",
            )
        usual = context - 1 if request.fills_context else min(self.config.defaults.longest(1), context - 1)
        max_tokens = usual if request.max_tokens is None else request.max_tokens
        if max_tokens >= context:
            raise ContextLengthExceeded(
                "max_tokens", f"is {max_tokens}, answers of the model have {context - 1} tokens at most"
            )
        return max_tokens

    def _check_pruned(self) -> None:
        raise InvalidInput("picture_tokens", "is of models without an encoder of prompts: leave it out")

    def _prefill(self, prompt: Prompt, conversation: Conversation) -> Step[Scores]:
        """Encode the prompt, and let the decoder begin; the logits [vocab] of the first token."""
        embeds = yield from embed(prompt.ids)
        if self.vision:
            yield from self.vision.insert(prompt, 0, embeds)
        conversation.given = yield from run(Call("text_encoder", {"inputs_embeds": np.ascontiguousarray(embeds)}))
        conversation.slot, conversation.held = Slot(), []
        return (yield from decode_token(self.config.decoder_start_token_id, conversation))
