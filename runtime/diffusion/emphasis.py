"""Weighted prompts of any length, read as Automatic1111's web UI reads them (its wiki, "Attention/emphasis" and
"Infinite prompt length"; emphasis "Original").

    (word:1.3)          weight 1.3
    (word)  [word]      weight 1.1, and 1 / 1.1; brackets inside brackets multiply
    \\( \\) \\[ \\] \\\\      the character itself
    BREAK               what follows begins a new chunk

Text becomes chunks of as many tokens as the text encoder reads (75 with CLIP, and start and end), which are encoded one
by one. Where a chunk is full, what follows its last comma moves on to the next, if that is at most 20 tokens. Prompt
editing ([from:to:when]) and AND are no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import InvalidInput
from runtime.limits import PROMPT_CHUNKS, PROMPT_WEIGHT

Floats = NDArray[np.float32]
Token = tuple[int, float]
"""A token id and its weight."""

BRACKET: Final = 1.1
"""The weight of a pair of round brackets; square ones divide by it."""
BACKTRACK: Final = 20
"""The web UI's setting comma_padding_backtrack."""
PIECE: Final = re.compile(
    r"\\(?P<literal>[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
BREAK: Final = re.compile(r"\bBREAK\b")
CLOSES: Final = {")": "(", "]": "["}
SPECIAL: Final = re.compile(r"([\\()\[\]])")
"""What is no letter in a weighted prompt."""


@dataclass
class Piece:
    """A text and its weight. A text of None is a BREAK."""

    text: str | None
    weight: float = 1.0


def escaped(prompt: str) -> str:
    """The weighted prompt in which every character of a prompt stands for itself."""
    return SPECIAL.sub(r"\\\1", prompt)


@dataclass(frozen=True)
class Chunks:
    """A prompt in chunks: token ids int64 [chunks, sequence], and the weight of each, float32 of the same shape."""

    ids: NDArray[np.int64]
    weights: Floats

    def padded(self, count: int, empty: NDArray[np.int64]) -> Chunks:
        """With so many chunks: further ones are those of an empty text, int64 [sequence]."""
        more = np.tile(empty, (count - len(self.ids), 1))
        return Chunks(np.concatenate([self.ids, more]), np.concatenate([self.weights, np.ones_like(more, np.float32)]))


def parse(prompt: str) -> list[Piece]:
    """The texts of a prompt in order; neighbours differ in weight. Brackets that are not closed count to the end."""
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for found in PIECE.finditer(prompt):
        kind, text = found.lastgroup, found[found.lastgroup or 0]
        if kind == "open":
            opened[text].append(len(pieces))
        elif kind == "weight" and opened["("]:
            _multiply(pieces[opened["("].pop() :], float(text))
        elif kind == "close" and opened[CLOSES[text]]:
            _multiply(pieces[opened[CLOSES[text]].pop() :], _weight(CLOSES[text]))
        else:
            pieces += _texts(text if kind in ("literal", "text") else found[0], kind == "literal")
    for bracket, starts in opened.items():
        for start in starts:
            _multiply(pieces[start:], _weight(bracket))
    return list(_joined(pieces))


def _weight(bracket: str) -> float:
    return BRACKET if bracket == "(" else 1 / BRACKET


def _multiply(pieces: Iterable[Piece], weight: float) -> None:
    for piece in pieces:
        piece.weight *= weight


def _texts(text: str, literal: bool) -> Iterator[Piece]:
    for index, part in enumerate([text] if literal else BREAK.split(text)):
        if index:
            yield Piece(None)
        yield Piece(part)


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbours of equal weight as one, so that they are tokenized together."""
    for (weight, is_break), run in groupby(pieces, lambda piece: (piece.weight, piece.text is None)):
        texts = [piece.text for piece in run]
        yield from [Piece(None) for _ in texts] if is_break else [Piece("".join(filter(None, texts)), weight)]


def read(tokenizer: ClipTokenizer, prompt: str, field: str) -> Chunks:
    """The chunks of a weighted prompt. Raises InvalidInput for `field`: too many chunks, a weight beyond the limit."""
    found, section = list[list[Token]](), list[Token]()
    for piece in parse(prompt):
        if abs(piece.weight) > PROMPT_WEIGHT.most:
            shown = f"weighs '{piece.text}' by {piece.weight:.4g}"
            raise InvalidInput(field, f"{shown}, expected {-PROMPT_WEIGHT.most} to {PROMPT_WEIGHT.most}")
        if piece.text is None:
            found += _chunks(section, tokenizer.comma, tokenizer.room) or [[]]
            section = []
        else:
            section += [(token, piece.weight) for token in tokenizer.tokens(piece.text, field)]
    found += _chunks(section, tokenizer.comma, tokenizer.room)
    PROMPT_CHUNKS.count(field, len(found))
    rows = found or [[]]
    ids = np.stack([tokenizer.row([token for token, _ in row]) for row in rows])
    weights = np.ones(ids.shape, np.float32)
    for row, chunk in zip(weights, rows, strict=True):
        row[1 : 1 + len(chunk)] = [weight for _, weight in chunk]
    return Chunks(ids, weights)


def plain(tokenizer: ClipTokenizer, prompt: str, field: str) -> Chunks:
    """A prompt without weights, which must fit into one chunk. Raises InvalidInput for `field` where it does not."""
    ids = tokenizer(prompt, field)[np.newaxis]
    return Chunks(ids, np.ones(ids.shape, np.float32))


def join(prompts: Iterable[Chunks]) -> Chunks:
    """The chunks of several prompts, one after another."""
    found = list(prompts)
    return Chunks(np.concatenate([one.ids for one in found]), np.concatenate([one.weights for one in found]))


def _chunks(section: Sequence[Token], comma: int | None, room: int) -> list[list[Token]]:
    """Tokens in chunks of at most `room`, divided behind a comma near the end where there is one."""
    found, chunk, last = list[list[Token]](), list[Token](), -1
    for token in section:
        if len(chunk) == room:
            near = token[0] != comma and last >= 0 and room - last <= BACKTRACK
            cut = last + 1 if near else room
            found.append(chunk[:cut])
            chunk, last = chunk[cut:], -1
        elif token[0] == comma:
            last = len(chunk)
        chunk.append(token)
    return [*found, chunk] if chunk else found


def weigh(states: Floats, weights: Floats) -> Floats:
    """Hidden states [chunks, sequence, hidden] times the weights of their tokens, each chunk's mean restored."""
    if (weights == 1).all():
        return states
    weighted = states * weights[..., np.newaxis]
    restored = states.mean((1, 2), keepdims=True) / weighted.mean((1, 2), keepdims=True)
    return np.asarray(weighted * restored, np.float32)
