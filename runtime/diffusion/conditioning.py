"""Conditioning: from prompts to tokens to the hidden states of one or several text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion import emphasis
from runtime.diffusion.calls import Arrays, Part, run
from runtime.diffusion.emphasis import Chunks
from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import BundleError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a model: its submodel and the folder of its tokenizer.

    `states` is its output with the hidden state of every token, float32 [batch, sequence, hidden]; `pooled` the one
    with a vector for each prompt, float32 [batch, projection], where the denoiser takes it.
    """

    submodel: str
    tokenizer: str
    states: str
    pooled: str | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch for each text encoder, one prompt's chunks after another's: every prompt has `chunks`.
    `zeros` rows of zeros precede the encoded ones.
    """

    encoded: tuple[Chunks, ...]
    chunks: int = 1
    zeros: int = 0


@dataclass(frozen=True)
class TextStates:
    """Hidden states float32 [rows, sequence of all chunks, hidden of all encoders], and pooled prompts float32 [rows,
    projection], those of the first chunk, by the name of their output.
    """

    states: Floats
    pooled: Arrays


class Conditioning:
    """The text encoders of a model, with their tokenizers in `folders`.

    With `zeros_for_empty` an empty negative prompt is zeros, not the encoding of an empty text. Raises BundleError
    where the tokenizers do not read the same number of tokens.
    """

    def __init__(self, encoders: Sequence[TextEncoder], folders: Sequence[Path], zeros_for_empty: bool = False) -> None:
        self.encoders = encoders
        self.tokenizers = [ClipTokenizer(folder) for folder in folders]
        self.zeros_for_empty = zeros_for_empty
        if len({tokenizer.limit for tokenizer in self.tokenizers}) > 1:
            limits = ", ".join(f"{tokenizer.folder} {tokenizer.limit}" for tokenizer in self.tokenizers)
            raise BundleError(
                f"the tokenizers differ in how many tokens they read ({limits}), expected the same: copy both again"
            )

    @property
    def origins(self) -> Mapping[str, str]:
        """The source of the token ids and of each pooled prompt."""
        pooled = {encoder.pooled: encoder.submodel for encoder in self.encoders if encoder.pooled}
        return {"input_ids": " or ".join(str(tokenizer.folder) for tokenizer in self.tokenizers), **pooled}

    def tokenize(self, prompt: str, negative: str, guided: bool, weighted: bool = False) -> Prompts:
        """The negative prompt's row, where there is guidance, then the prompt's; `weighted` ones as in `emphasis`. The
        shorter is followed by empty chunks.

        Raises InvalidInput naming `prompt` or `negative_prompt` when one is too long.
        """
        read = emphasis.read if weighted else emphasis.plain
        prompts = [read(tokenizer, prompt, "prompt") for tokenizer in self.tokenizers]
        negatives = [read(tokenizer, negative, "negative_prompt") for tokenizer in self.tokenizers]
        encoded = guided and bool(negative or not self.zeros_for_empty)
        rows = [negatives, prompts] if encoded else [prompts]
        count = max(len(chunks.ids) for row in rows for chunks in row)
        joined = (
            emphasis.join(chunks.padded(count, tokenizer.row([])) for chunks in column)
            for tokenizer, *column in zip(self.tokenizers, *rows, strict=True)
        )
        return Prompts(tuple(joined), count, zeros=int(guided and not encoded))

    def encode(self, prompts: Prompts) -> Part[TextStates]:
        """Run each text encoder once."""
        states, pooled = [], {}
        for encoder, chunks in zip(self.encoders, prompts.encoded, strict=True):
            outputs = yield from run(encoder.submodel, input_ids=chunks.ids)
            weighted = emphasis.weigh(outputs[encoder.states], chunks.weights)
            rows = weighted.reshape(-1, prompts.chunks * weighted.shape[1], weighted.shape[2])
            states.append(_after_zeros(rows, prompts.zeros))
            if encoder.pooled:
                pooled[encoder.pooled] = _after_zeros(outputs[encoder.pooled][:: prompts.chunks], prompts.zeros)
        return TextStates(np.concatenate(states, axis=-1), pooled)


def _after_zeros(rows: Floats, zeros: int) -> Floats:
    return np.concatenate([np.zeros((zeros, *rows.shape[1:]), np.float32), rows]) if zeros else rows
