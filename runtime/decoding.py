"""From logits to the next token: repetition penalty, temperature, top-k, top-p, then the best token or a drawn one.

Order and meaning are those of transformers' logits processors, with which a test compares the numbers. Arithmetic is float32, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError, InvalidInput

Scores = NDArray[np.float32]
F = TypeVar("F", np.float32, np.float64)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises InvalidInput naming the value that is out of range.

    `temperature` 0 is greedy: the best token, top-k and top-p aside. `top_k` 0 and `top_p` 1 leave the candidates as they are.
    `repetition_penalty` above 1 makes tokens of the prompt and the answer so far less likely (Keskar et al. 2019, CTRL).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise InvalidInput("temperature", f"is {self.temperature}, expected 0 (greedy) or 0.01 to 100")
        if self.top_k < 0:
            raise InvalidInput("top_k", f"is {self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InvalidInput("top_p", f"is {self.top_p}, expected more than 0 and at most 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise InvalidInput("repetition_penalty", f"is {self.repetition_penalty}, expected 0.01 to 100 (1 is no penalty)")


def process(logits: Scores, tokens: Sequence[int], sampling: Sampling) -> Scores:
    """Scores [vocab] of the candidates, from logits [vocab] and the tokens so far; what may not be chosen is -inf."""
    scores = np.array(logits, np.float32)
    if sampling.repetition_penalty != 1 and tokens:
        seen = np.unique(tokens)
        penalty = np.float32(sampling.repetition_penalty)
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    if sampling.temperature == 0:
        return scores
    scores /= np.float32(sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf  # equals of the last one stay, as there
    if sampling.top_p < 1:
        order = np.argsort(scores, kind="stable")
        unlikely = np.cumsum(softmax(scores[order]), dtype=np.float32) <= np.float32(1 - sampling.top_p)
        unlikely[-1] = False
        scores[order[unlikely]] = -np.inf
    return scores


def choose(logits: Scores, tokens: Sequence[int], sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token, from the logits [vocab] behind `tokens`. Equal generators give equal tokens. Raises EngineError on NaN."""
    if np.isnan(logits).any():
        raise EngineError("the decoder gave logits that are not numbers: verify the bundle, or build it with a higher precision")
    scores = process(logits, tokens, sampling)
    if sampling.temperature == 0:
        return int(scores.argmax())
    candidates = np.flatnonzero(scores > -np.inf)
    cumulated = np.cumsum(softmax(scores[candidates].astype(np.float64)))
    drawn = np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")
    return int(candidates[min(drawn, len(candidates) - 1)])


def softmax(scores: NDArray[F]) -> NDArray[F]:
    """Probabilities [n] of scores [n]."""
    exponentials: NDArray[F] = np.exp(scores - scores.max())
    exponentials /= exponentials.sum()
    return exponentials
