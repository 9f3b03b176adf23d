"""From logits to the next token: the best one or a drawn one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.errors import EngineError
from runtime.language.processors import Scores, process, softmax
from runtime.language.sampling import UNBOUNDED, Bounds, Sampling


def choose(
    logits: Scores, tokens: Sequence[int], sampling: Sampling, rng: np.random.Generator, bounds: Bounds = UNBOUNDED,
    most: Scores | None = None,
) -> int:  # fmt: skip
    """The next token, from the logits [vocab] behind `tokens`; `most` [vocab] is the highest score that each may have.
    Equal generators give equal tokens. Raises EngineError on NaN.
    """
    require_numbers(logits, sampling)
    scores = process(logits, tokens, sampling, bounds, most)
    if sampling.temperature or most is not None:
        require_candidates(scores)
    if sampling.temperature == 0:
        return int(scores.argmax())
    candidates = np.flatnonzero(scores > -np.inf)
    cumulated = np.cumsum(softmax(scores[candidates].astype(np.float64)))
    drawn = np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")
    return int(candidates[min(drawn, len(candidates) - 1)])


def require_numbers(logits: Scores, sampling: Sampling) -> None:
    """Raise EngineError for NaN, unless the model's rules remove it."""
    if np.isnan(logits).any() and not sampling.rules.remove_invalid_values:
        raise EngineError(
            "the decoder gave logits that are not numbers: verify the bundle, or build it with a higher precision"
        )


def require_candidates(scores: Scores) -> None:
    """Raise EngineError where no token may be chosen."""
    if not np.isfinite(scores.max()):
        raise EngineError(
            "the rules of the model's generation_config.json leave no token to choose, or none that the request's "
            "grammar allows: build the bundle with fewer of them"
        )
