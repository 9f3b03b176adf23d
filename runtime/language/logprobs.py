"""How likely the tokens of an answer were, for the model: log probabilities of its logits, before any setting of the
request or rule of the model changes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from tokenizers import Tokenizer

from runtime.language.processors import Scores, log_softmax
from runtime.language.text import REPLACEMENT

BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of one byte in vocabularies of SentencePiece."""
REMEMBERED: Final = 10_000
"""Tokens whose bytes are kept."""


@dataclass(frozen=True)
class TokenLogprob:
    """The token `id`: the bytes that it spells behind other text, which may be a part of a character, and the logarithm
    of its probability. `top` are the likeliest tokens in its place, likeliest first, as many as were asked for.
    """

    id: int
    piece: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """What it spells; U+FFFD for bytes that are no whole character."""
        return self.piece.decode(errors="replace")


class Pieces:
    """The bytes that tokens spell behind other text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._of = lru_cache(REMEMBERED)(self._spelled)

    def __getitem__(self, token: int) -> bytes:
        return self._of(token)

    def _spelled(self, token: int) -> bytes:
        once, twice = (str(self._tokenizer.decode([token] * n, skip_special_tokens=False)) for n in (1, 2))
        text = twice[len(once) :]  # decoders treat the start of a text apart
        if REPLACEMENT not in text:
            return text.encode()
        name = self._tokenizer.id_to_token(token) or ""
        if found := BYTE.fullmatch(name):
            return bytes([int(found[1], 16)])
        if all(letter in LETTERS for letter in name):
            return bytes(LETTERS[letter] for letter in name)
        return text.encode()


class Logprobs:
    """Of one answer's tokens, held until the text that they begin is passed on. `count` is how many of the likeliest
    tokens each has besides; with None nothing is looked up.
    """

    def __init__(self, pieces: Pieces, count: int | None) -> None:
        self._pieces, self._count = pieces, count
        self._held: list[tuple[int, TokenLogprob]] = []

    def push(self, token: int, logits: Scores, start: int) -> None:
        """Note a token that was chosen of logits [vocab] and spells the answer's text from character `start` on."""
        if self._count is not None:
            self._held.append((start, self._looked_up(token, log_softmax(logits))))

    def passed(self, end: int) -> tuple[TokenLogprob, ...]:
        """Those that begin before character `end`, each once."""
        count = next((i for i, (start, _) in enumerate(self._held) if start >= end), len(self._held))
        found, self._held = self._held[:count], self._held[count:]
        return tuple(one for _, one in found)

    def _looked_up(self, token: int, scores: Scores) -> TokenLogprob:
        count = min(self._count or 0, len(scores))
        best = np.argpartition(-scores, count - 1)[:count] if count else np.array([], np.intp)
        order = best[np.lexsort((best, -scores[best]))]
        top = tuple(TokenLogprob(int(i), self._pieces[int(i)], float(scores[i])) for i in order)
        return TokenLogprob(token, self._pieces[token], float(scores[token]), top)


def _letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes as (GPT-2): those that can be printed as themselves, the
    others in order from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


LETTERS: Final = _letters()
