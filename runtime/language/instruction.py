"""The instruction that an encoder of pictures reads beside them, as the Q-Former of InstructBLIP (Dai et al. 2023,
arXiv:2305.06500): the texts of the conversation, in tokens of a tokenizer of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import Field

from runtime.bundle.manifest import Frozen
from runtime.errors import ContextLengthExceeded
from runtime.language.text import Message, PlainText

FOLDER: Final = "qformer_tokenizer"
"""Folder of the tokenizer, in checkpoints and in bundles."""
INPUT: Final = "instruction_ids"
"""The encoder's input."""


class InstructionConfig(Frozen):
    """The most tokens of an instruction, and the number of its vocabulary."""

    length: int = Field(ge=1)
    vocab_size: int = Field(ge=1)


class Instructions:
    """Makes the tokens of instructions. Raises BundleError when the tokenizer does not fit."""

    def __init__(self, root: Path, config: InstructionConfig) -> None:
        self.text, self.longest = PlainText(root / FOLDER), config.length
        self.text.require_below(config.vocab_size)

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of the texts of all messages. Raises InvalidInput, ContextLengthExceeded."""
        texts = (part for message in messages for part in message.content if isinstance(part, str))
        ids = self.text.tokens(" ".join(filter(None, texts)), "messages")
        if len(ids) > self.longest:
            raise ContextLengthExceeded(
                "messages",
                f"their texts have {len(ids)} tokens for the encoder of pictures, which reads {self.longest}: shorten "
                "them",
            )
        return ids
