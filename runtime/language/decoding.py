"""From logits to the next token: the rules of a model's generation_config.json, then the best token or a drawn one.

Order and meaning are those of transformers' logits processors, with which tests compare the numbers. Arithmetic is
float32, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field

from runtime import limits
from runtime.bundle.manifest import Frozen
from runtime.errors import EngineError, InvalidInput

Scores = NDArray[np.float32]
F = TypeVar("F", np.float32, np.float64)
Token = Annotated[int, Field(ge=0)]
Tokens = tuple[Token, ...]
Share = Annotated[float, Field(ge=0, le=1)]

TOP_H_TOKENS: Final = 100
"""`top_h` looks at that many of the likeliest tokens and takes out all others."""


class Rules(Frozen):
    """What a model's generation_config.json rules besides what a request can choose. Names are the file's; the defaults
    change nothing.

    Forbidden or preferred tokens hold for every answer, the shares (`min_p`, `typical_p`, `epsilon_cutoff`,
    `eta_cutoff`, `top_h`) where tokens are drawn. Lengths are in tokens; `min_length` counts the prompt.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    sequence_bias: tuple[tuple[Annotated[Tokens, Field(min_length=1)], float], ...] = ()
    """Added to the score of each sequence's last token where the others stand before it."""
    bad_words_ids: tuple[Annotated[Tokens, Field(min_length=1)], ...] = ()
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    min_length: int = Field(default=0, ge=0)
    min_new_tokens: int = Field(default=0, ge=0)
    forced_bos_token_id: Token | None = None
    """The token behind a prompt of one token."""
    forced_eos_token_id: Annotated[Tokens, BeforeValidator(lambda one: (one,) if isinstance(one, int) else one)] = ()
    """One of them is the last token that the length allows."""
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """Behind that many tokens, the end becomes likelier by that factor, token by token."""
    suppress_tokens: Tokens = ()
    begin_suppress_tokens: Tokens = ()
    min_p: Share = 0.0
    top_h: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    epsilon_cutoff: Share = 0.0
    eta_cutoff: Share = 0.0


NO_RULES: Final = Rules()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises InvalidInput naming the value that is out of range.

    `temperature` 0 is greedy: the best token, top-k and top-p aside. `top_k` 0 and `top_p` 1 leave the candidates as
    they are. `repetition_penalty` above 1 makes tokens of the prompt and the answer so far less likely (Keskar et al.
    2019, CTRL).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    rules: Rules = NO_RULES

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= limits.TEMPERATURE.most:
            raise InvalidInput(
                "temperature", f"is {self.temperature}, expected 0 (greedy) or 0.01 to {limits.TEMPERATURE.most}"
            )
        if self.top_k < 0:
            raise InvalidInput("top_k", f"is {self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InvalidInput("top_p", f"is {self.top_p}, expected more than 0 and at most 1")
        if not 0.01 <= self.repetition_penalty <= limits.PENALTY.most:
            most = limits.PENALTY.most
            raise InvalidInput(
                "repetition_penalty", f"is {self.repetition_penalty}, expected 0.01 to {most} (1 is no penalty)"
            )


@dataclass(frozen=True)
class Span:
    """Where an answer begins and ends: the tokens of its prompt, the most tokens that prompt and answer may have, and
    the end tokens.
    """

    prompt: int = 0
    longest: int = 0
    ends: tuple[int, ...] = ()


ANYWHERE: Final = Span()


def process(logits: Scores, tokens: Sequence[int], sampling: Sampling, span: Span = ANYWHERE) -> Scores:
    """Scores [vocab] of the candidates, from logits [vocab] and the tokens so far; what may not be chosen is -inf."""
    scores = np.array(logits, np.float32)
    with np.errstate(over="ignore"):  # of the extremes that stand for values that are no numbers
        _apply_rules(scores, tokens, sampling, span)
        if sampling.temperature == 0:
            return scores
        scores /= np.float32(sampling.temperature)
    if not np.isfinite(scores.max()):
        return scores
    rules = sampling.rules
    if rules.top_h is not None:
        _keep_entropy(scores, rules.top_h)
    if 0 < sampling.top_k < len(scores):
        scores[
            scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ] = -np.inf  # equals of the last one stay, as there
    if sampling.top_p < 1:
        order = np.argsort(scores, kind="stable")
        unlikely = np.cumsum(softmax(scores[order]), dtype=np.float32) <= np.float32(1 - sampling.top_p)
        unlikely[-1] = False
        scores[order[unlikely]] = -np.inf
    if rules.min_p:
        shares = softmax(scores)
        scores[(shares < np.float32(rules.min_p) * shares.max()) & ~_best(shares)] = -np.inf
    if rules.typical_p < 1:
        _keep_typical(scores, rules.typical_p)
    if 0 < rules.epsilon_cutoff < 1:
        scores[(softmax(scores) < np.float32(rules.epsilon_cutoff)) & (scores < scores.max())] = -np.inf
    if 0 < rules.eta_cutoff < 1:
        shares, cutoff = softmax(scores), np.float32(rules.eta_cutoff)
        least = min(cutoff, np.sqrt(cutoff) * np.exp(-_entropy(shares)))
        scores[(shares < least) & (scores < scores.max())] = -np.inf
    return scores


def choose(
    logits: Scores, tokens: Sequence[int], sampling: Sampling, rng: np.random.Generator, span: Span = ANYWHERE
) -> int:
    """The next token, from the logits [vocab] behind `tokens`. Equal generators give equal tokens. Raises EngineError
    on NaN.
    """
    if np.isnan(logits).any() and not sampling.rules.remove_invalid_values:
        raise EngineError(
            "the decoder gave logits that are not numbers: verify the bundle, or build it with a higher precision"
        )
    scores = process(logits, tokens, sampling, span)
    if sampling.temperature == 0:
        return int(scores.argmax())
    if not np.isfinite(scores.max()):
        raise EngineError(
            "the rules of the model's generation_config.json leave no token to choose: build the bundle with fewer of "
            "them"
        )
    candidates = np.flatnonzero(scores > -np.inf)
    cumulated = np.cumsum(softmax(scores[candidates].astype(np.float64)))
    drawn = np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")
    return int(candidates[min(drawn, len(candidates) - 1)])


def softmax(scores: NDArray[F]) -> NDArray[F]:
    """Probabilities [n] of scores [n]."""
    exponentials: NDArray[F] = np.exp(scores - scores.max())
    exponentials /= exponentials.sum()
    return exponentials


def _apply_rules(scores: Scores, tokens: Sequence[int], sampling: Sampling, span: Span) -> None:
    """Change scores [vocab] as the rules say that hold for greedy answers, too."""
    rules, length = sampling.rules, len(tokens)
    for sequence, bias in rules.sequence_bias:
        if _follows(tokens, sequence[:-1]):
            scores[sequence[-1]] += np.float32(bias)
    if sampling.repetition_penalty != 1 and tokens:
        seen = np.unique(tokens)
        penalty = np.float32(sampling.repetition_penalty)
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    if 0 < rules.no_repeat_ngram_size <= length:
        scores[_repeating(tokens, rules.no_repeat_ngram_size)] = -np.inf
    for sequence in rules.bad_words_ids:
        if _follows(tokens, sequence[:-1]) and not (len(sequence) == 1 and sequence[0] in span.ends):
            scores[sequence[-1]] = -np.inf
    ends = list(span.ends)
    if length < rules.min_length or length - span.prompt < rules.min_new_tokens:
        scores[ends] = -np.inf
    if rules.forced_bos_token_id is not None and length == 1:
        _force(scores, [rules.forced_bos_token_id])
    if rules.forced_eos_token_id and length == span.longest - 1:
        _force(scores, rules.forced_eos_token_id)
    if rules.remove_invalid_values:
        extremes = np.finfo(np.float32)
        scores[np.isnan(scores)] = 0
        np.clip(scores, extremes.min, extremes.max, out=scores)
    if rules.exponential_decay_length_penalty is not None:
        start, factor = rules.exponential_decay_length_penalty
        beyond = length - span.prompt - start
        if beyond > 0:
            finite = [token for token in ends if np.isfinite(scores[token])]
            scores[finite] += np.abs(scores[finite]) * np.float32(factor**beyond - 1)
    scores[[token for token in rules.suppress_tokens if token < len(scores)]] = -np.inf
    if length == span.prompt:
        scores[[token for token in rules.begin_suppress_tokens if token < len(scores)]] = -np.inf


def _follows(tokens: Sequence[int], prefix: Sequence[int]) -> bool:
    """Whether the tokens so far end in these."""
    return not prefix or (len(prefix) <= len(tokens) and list(tokens[-len(prefix) :]) == list(prefix))


def _repeating(tokens: Sequence[int], size: int) -> list[int]:
    """The tokens that would end a sequence of `size` tokens that was there before."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), size)
    prefix = np.asarray(tokens[len(tokens) + 1 - size :])
    found: list[int] = windows[(windows[:, :-1] == prefix).all(axis=1), -1].tolist()
    return found


def _force(scores: Scores, tokens: Sequence[int]) -> None:
    scores[:] = -np.inf
    scores[list(tokens)] = 0


def _best(scores: Scores) -> NDArray[np.bool_]:
    """Where the first of the largest scores is, bool [vocab]."""
    return np.asarray(np.arange(len(scores)) == scores.argmax())


def _entropy(shares: Scores) -> np.float32:
    """Of probabilities [n], in nats."""
    present = shares[shares > 0]
    return np.float32(-(present * np.log(present)).sum())


def _keep_entropy(scores: Scores, share: float) -> None:
    """Keep the likeliest tokens that have no more than a share of the entropy together (top-H, Potraghloo
    et al. 2025).
    """
    order = np.argsort(-scores, kind="stable")[:TOP_H_TOKENS]
    shares = softmax(scores[order])
    terms = np.where(shares > 0, -shares * np.log(np.maximum(shares, np.finfo(np.float32).tiny)), np.float32(0))
    kept = (np.cumsum(terms, dtype=np.float32) <= np.float32(share) * _entropy(shares)) & (shares > 0)
    kept[0] = True
    removed = np.ones(len(scores), bool)
    removed[order[kept]] = False
    scores[removed] = -np.inf


def _keep_typical(scores: Scores, mass: float) -> None:
    """Keep the tokens whose surprise is nearest to the expected one, up to that mass (Meister et al. 2022,
    arXiv:2202.00666).
    """
    shares = softmax(scores)
    with np.errstate(divide="ignore"):
        surprise = -np.log(shares)
    distance = np.abs(surprise - _entropy(shares))
    order = np.argsort(distance, kind="stable")
    cumulated = np.cumsum(shares[order], dtype=np.float32)
    last = min(int((cumulated < np.float32(mass)).sum()), len(scores) - 1)
    removed = distance[order] > distance[order[last]]
    removed[0] = False
    scores[order[removed]] = -np.inf
