"""From logits to scores: what a model's rules and a request's values do to them, one function each.

Order and meaning are those of transformers' logits processors, with which tests compare the numbers, and for what these
do not have, of OpenAI's API. Arithmetic is float32, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.language.sampling import UNBOUNDED, Bounds, Sampling

Scores = NDArray[np.float32]
F = TypeVar("F", np.float32, np.float64)

TOP_H_TOKENS: Final = 100
"""`top_h` looks at that many of the likeliest tokens and takes out all others."""


def process(
    logits: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds = UNBOUNDED,
    most: Scores | None = None,
) -> Scores:  # fmt: skip
    """Scores [vocab] of the candidates, from logits [vocab] and the tokens so far; what may not be chosen is -inf.

    `most` [vocab] is the highest score that a token may have: -inf where the form of the answer does not allow it.
    """
    scores = np.array(logits, np.float32)
    with np.errstate(over="ignore"):  # of the extremes that stand for values that are no numbers
        for change in RULES:
            change(scores, tokens, sampling, bounds)
        if most is not None:  # last: a rule may raise a score
            np.minimum(scores, most, out=scores)
        if sampling.temperature == 0:
            return scores
        scores /= np.float32(sampling.temperature)
    if np.isfinite(scores.max()):
        for thin in WARPERS:
            thin(scores, sampling)
    return scores


def softmax(scores: NDArray[F]) -> NDArray[F]:
    """Probabilities [n] of scores [n]."""
    exponentials: NDArray[F] = np.exp(scores - scores.max())
    exponentials /= exponentials.sum()
    return exponentials


def log_softmax(scores: Scores) -> Scores:
    """Logarithms of the probabilities, along the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    found: Scores = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


# Rules, which hold for greedy answers too: each changes scores [vocab] in place.


def _bias(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    for sequence, bias in sampling.rules.sequence_bias:
        if _follows(tokens, sequence[:-1]):
            scores[sequence[-1]] += np.float32(bias)


def _penalize_repetition(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    if sampling.repetition_penalty != 1 and tokens:
        seen = np.unique(tokens)
        penalty = np.float32(sampling.repetition_penalty)
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)


def _penalize_counts(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    answer = tokens[bounds.prompt :]
    if answer and (sampling.frequency_penalty or sampling.presence_penalty):
        seen, counts = np.unique(answer, return_counts=True)
        penalties = counts * sampling.frequency_penalty + sampling.presence_penalty
        scores[seen] -= penalties.astype(np.float32)


def _forbid_repeated_ngrams(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    size = sampling.rules.no_repeat_ngram_size
    if 0 < size <= len(tokens):
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), size)
        prefix = np.asarray(tokens[len(tokens) + 1 - size :])
        scores[windows[(windows[:, :-1] == prefix).all(axis=1), -1]] = -np.inf


def _forbid_words(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    for sequence in sampling.rules.bad_words_ids:
        if _follows(tokens, sequence[:-1]) and not (len(sequence) == 1 and sequence[0] in bounds.ends):
            scores[sequence[-1]] = -np.inf


def _forbid_early_ends(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    rules, length = sampling.rules, len(tokens)
    if length < rules.min_length or length - bounds.prompt < rules.min_new_tokens:
        scores[list(bounds.ends)] = -np.inf


def _force(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    rules, length = sampling.rules, len(tokens)
    if rules.forced_bos_token_id is not None and length == 1:
        _allow_only(scores, [rules.forced_bos_token_id])
    if rules.forced_eos_token_id and length == bounds.longest - 1:
        _allow_only(scores, rules.forced_eos_token_id)


def _remove_invalid(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    if sampling.rules.remove_invalid_values:
        extremes = np.finfo(np.float32)
        scores[np.isnan(scores)] = 0
        np.clip(scores, extremes.min, extremes.max, out=scores)


def _favour_late_ends(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    start, factor = sampling.rules.exponential_decay_length_penalty or (len(tokens), 1.0)
    beyond = len(tokens) - bounds.prompt - start
    if beyond > 0:
        finite = [token for token in bounds.ends if np.isfinite(scores[token])]
        scores[finite] += np.abs(scores[finite]) * np.float32(factor**beyond - 1)


def _suppress(scores: Scores, tokens: Sequence[int], sampling: Sampling, bounds: Bounds) -> None:
    rules = sampling.rules
    suppressed = rules.suppress_tokens + (rules.begin_suppress_tokens if len(tokens) == bounds.prompt else ())
    scores[[token for token in suppressed if token < len(scores)]] = -np.inf


RULES: Final[tuple[Callable[[Scores, Sequence[int], Sampling, Bounds], None], ...]] = (
    _bias,
    _penalize_repetition,
    _penalize_counts,
    _forbid_repeated_ngrams,
    _forbid_words,
    _forbid_early_ends,
    _force,
    _remove_invalid,
    _favour_late_ends,
    _suppress,
)


def _follows(tokens: Sequence[int], prefix: Sequence[int]) -> bool:
    """Whether the tokens so far end in these."""
    return not prefix or (len(prefix) <= len(tokens) and list(tokens[-len(prefix) :]) == list(prefix))


def _allow_only(scores: Scores, tokens: Sequence[int]) -> None:
    scores[:] = -np.inf
    scores[list(tokens)] = 0


# Warpers, for drawn answers: each takes unlikely candidates out of scores [vocab], in place.


def _keep_entropy(scores: Scores, sampling: Sampling) -> None:
    """Keep the likeliest tokens that have no more than a share of the entropy together (top-H, Potraghloo
    et al. 2025).
    """
    if sampling.rules.top_h is None:
        return
    order = np.argsort(-scores, kind="stable")[:TOP_H_TOKENS]
    shares = softmax(scores[order])
    terms = np.where(shares > 0, -shares * np.log(np.maximum(shares, np.finfo(np.float32).tiny)), np.float32(0))
    most = np.float32(sampling.rules.top_h) * _entropy(shares)
    kept = (np.cumsum(terms, dtype=np.float32) <= most) & (shares > 0)
    kept[0] = True
    removed = np.ones(len(scores), bool)
    removed[order[kept]] = False
    scores[removed] = -np.inf


def _keep_top_k(scores: Scores, sampling: Sampling) -> None:
    """Equals of the last one stay, as there."""
    if 0 < sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf


def _keep_top_p(scores: Scores, sampling: Sampling) -> None:
    if sampling.top_p < 1 and len(possible := np.flatnonzero(scores > -np.inf)):  # few behind top_k: sorting takes long
        order = possible[np.argsort(scores[possible], kind="stable")]
        unlikely = np.cumsum(softmax(scores[order]), dtype=np.float32) <= np.float32(1 - sampling.top_p)
        unlikely[-1] = False
        scores[order[unlikely]] = -np.inf


def _keep_min_p(scores: Scores, sampling: Sampling) -> None:
    if sampling.rules.min_p:
        shares = softmax(scores)
        least = np.float32(sampling.rules.min_p) * shares.max()
        scores[(shares < least) & (np.arange(len(shares)) != shares.argmax())] = -np.inf


def _keep_typical(scores: Scores, sampling: Sampling) -> None:
    """Keep the tokens whose surprise is nearest to the expected one, up to that mass (Meister et al. 2022,
    arXiv:2202.00666).
    """
    mass = sampling.rules.typical_p
    if mass == 1:
        return
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


def _cut_epsilon(scores: Scores, sampling: Sampling) -> None:
    epsilon = sampling.rules.epsilon_cutoff
    if 0 < epsilon < 1:
        scores[(softmax(scores) < np.float32(epsilon)) & (scores < scores.max())] = -np.inf


def _cut_eta(scores: Scores, sampling: Sampling) -> None:
    if 0 < sampling.rules.eta_cutoff < 1:
        shares, cutoff = softmax(scores), np.float32(sampling.rules.eta_cutoff)
        least = min(cutoff, np.sqrt(cutoff) * np.exp(-_entropy(shares)))
        scores[(shares < least) & (scores < scores.max())] = -np.inf


WARPERS: Final[tuple[Callable[[Scores, Sampling], None], ...]] = (
    _keep_entropy,
    _keep_top_k,
    _keep_top_p,
    _keep_min_p,
    _keep_typical,
    _cut_epsilon,
    _cut_eta,
)


def _entropy(shares: Scores) -> np.float32:
    """Of probabilities [n], in nats."""
    present = shares[shares > 0]
    return np.float32(-(present * np.log(present)).sum())
