"""The settings of a chat bundle."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, model_validator

from runtime.bundle.manifest import Frozen
from runtime.language.instruction import InstructionConfig
from runtime.tasks.chat import ChatDefaults

LONGEST: Final = 1 << 24
"""Tokens, or features of one: more than any model has."""


class ChatConfig(Frozen):
    """The settings of a chat bundle: `Manifest.config`, written when the bundle is built.

    Lengths are in tokens. A model that sees has both `image_token_id` and `tokens_per_image` (the features that the
    vision encoder gives for one tile of a picture). `layout` names how a picture becomes tiles and positions of the
    prompt, a file of `runtime/language/layouts/`, and `layout_options` are that layout's own settings. `bos_token_id`
    is put before every prompt whose template did not write it; null when the model's tokenizer puts none.
    `caption` is the text of a last message that has pictures alone: what the model writes captions for.
    `prompt` "template" is written by the model's chat template, "plain" is the pictures, then the texts (see
    `PlainText`). `encoders` turn pixels into features, each taking the outputs of the one before. `instruction` says
    how the last of them reads the texts of the conversation, where it does. A prompt takes `most_pictures`; 0 is any
    number that its context holds. `prefill_chunk` cuts long prompts into decoder calls of at most that many tokens; 0
    is one call. `draft` says that the bundle has a draft (`runtime.language.drafting`).
    """

    context_length: int = Field(ge=1, le=LONGEST)
    vocab_size: int = Field(ge=1, le=LONGEST)
    hidden_size: int = Field(ge=1, le=LONGEST)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    image_token_id: int | None = None
    tokens_per_image: int = Field(default=0, ge=0, le=LONGEST)
    layout: str = "fixed"
    layout_options: dict[str, Any] = Field(default_factory=dict)
    prompt: Literal["template", "plain"] = "template"
    caption: str = ""
    encoders: tuple[str, ...] = ("vision_encoder",)
    instruction: InstructionConfig | None = None
    most_pictures: int = Field(default=0, ge=0)
    prefill_chunk: int = Field(default=0, ge=0, le=LONGEST)
    draft: bool = False
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
