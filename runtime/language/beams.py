"""Beam search: several answers are continued side by side, and the likeliest is taken. As transformers' generate does
it, token for token, with its length penalty and its three ways to stop.

`BeamSearch` decides, from the logits behind each beam, which beams are continued by which tokens. `search` runs the
decoder for it: a beam that two others continue from is forked, a beam that one continues from goes on in its slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.language.choice import require_numbers
from runtime.language.decoder import Conversation, Step, decode_token
from runtime.language.processors import Scores, log_softmax, process
from runtime.language.sampling import Beams, Bounds, Sampling

NEVER: Final = np.float32(-1e9)
"""The score of what is no candidate. That of transformers, since sums with it decide in rare cases."""


class Beam(NamedTuple):
    """An answer so far, without its prompt, and its score."""

    tokens: tuple[int, ...]
    score: np.float32


class Branch(NamedTuple):
    """The next token of a beam, which continues beam `parent` of the step before."""

    parent: int
    token: int


@dataclass
class BeamSearch:
    """The state of one search. `stopped` says of the tokens of an answer whether they end it, besides end tokens."""

    prompt: Sequence[int]
    bounds: Bounds
    sampling: Sampling
    beams: Beams
    stopped: Callable[[Sequence[int]], bool] = lambda tokens: False
    running: list[Beam] = field(init=False)
    answers: list[Beam | None] = field(init=False)
    """The best finished answers, best first; None where there are not yet so many."""
    done: bool = False
    _promising: bool = True
    """Whether a running beam may still become better than the finished answers."""

    def __post_init__(self) -> None:
        others = self.beams.count - 1
        self.running = [Beam((), np.float32(0)), *[Beam((), NEVER)] * others]
        self.answers = [None] * self.beams.count

    def advance(self, logits: Sequence[Scores]) -> list[Branch]:
        """Continue the running beams, from the logits [vocab] behind each of them; what the beams of the next step are.

        Raises EngineError for logits that are not numbers.
        """
        found = self._candidates(logits)
        ended = [self._ends(beam) for beam, _ in found]
        scores = np.array([beam.score for beam, _ in found]) + np.where(ended, NEVER, np.float32(0))
        chosen = np.argsort(-scores, kind="stable")[: self.beams.count]
        self._finish([beam for beam, _ in found[: self.beams.count]], ended)
        self.running = [Beam(found[i][0].tokens, scores[i]) for i in chosen]
        self._promising = self._promising and self._can_improve()
        full = None not in self.answers and self.beams.early_stopping is True
        self.done = not self._promising or full or all(ended)
        return [found[i][1] for i in chosen]

    def _candidates(self, logits: Sequence[Scores]) -> list[tuple[Beam, Branch]]:
        """The best continuations of all beams, best first: enough that `count` of them do not end."""
        scores = np.stack([self._scores(*pair) for pair in zip(self.running, logits, strict=True)])
        most = max(2, 1 + len(self.bounds.ends)) * self.beams.count
        order = _largest(scores.reshape(-1), most)
        branches = [Branch(*divmod(int(place), scores.shape[1])) for place in order]
        return [
            (Beam((*self.running[parent].tokens, token), scores[parent, token]), Branch(parent, token))
            for parent, token in branches
        ]

    def _scores(self, beam: Beam, logits: Scores) -> Scores:
        require_numbers(logits, self.sampling)
        found = process(log_softmax(logits), [*self.prompt, *beam.tokens], self.sampling, self.bounds)
        return (log_softmax(found) if self.beams.renormalize else found) + beam.score

    def _ends(self, beam: Beam) -> bool:
        longest = len(self.prompt) + len(beam.tokens) >= self.bounds.longest
        return longest or beam.tokens[-1] in self.bounds.ends or self.stopped(beam.tokens)

    def _finish(self, best: Sequence[Beam], ended: Sequence[bool]) -> None:
        """Put those of the best candidates that end among the answers."""
        if not self._promising or (None not in self.answers and self.beams.early_stopping is True):
            return
        new = [
            Beam(beam.tokens, beam.score / np.float32(len(beam.tokens) ** self.beams.length_penalty))
            for beam, over in zip(best, ended, strict=False)
            if over
        ]
        ranked = sorted([*filter(None, self.answers), *new], key=lambda beam: -beam.score)[: self.beams.count]
        self.answers = [*ranked, *[None] * (self.beams.count - len(ranked))]

    def _can_improve(self) -> bool:
        """Whether the best beam, as it is now or at the longest, has a better score than the worst answer."""
        length = len(self.running[0].tokens)
        if self.beams.early_stopping == "never" and self.beams.length_penalty > 0:
            length = self.bounds.longest - len(self.prompt)
        best = self.running[0].score / np.float32(length**self.beams.length_penalty)
        return bool(best > min((NEVER if answer is None else answer.score) for answer in self.answers))


def search(state: BeamSearch, conversation: Conversation, logits: Scores) -> Step[list[tuple[int, ...]]]:
    """The answers of a search, best first, from the logits [vocab] behind the prompt that the conversation holds.

    The conversation keeps the prompt alone: each beam is continued in a slot of its own.
    """
    branches = state.advance([logits] * state.beams.count)
    held = [conversation] * state.beams.count
    while not state.done:
        uses = Counter(parent for parent, _ in branches)
        behind, forks = list[Scores](), list[Conversation]()
        for parent, token in branches:
            alone = held[parent] is not conversation and uses[parent] == 1
            forks.append(held[parent] if alone else held[parent].fork())
            behind.append((yield from decode_token(token, forks[-1])))
        held = forks
        branches = state.advance(behind)
    return [answer.tokens for answer in state.answers if answer is not None]


def _largest(scores: Scores, count: int) -> NDArray[np.intp]:
    """Where the largest scores are, largest first."""
    count = min(count, len(scores))
    found = np.argpartition(-scores, count - 1)[:count]
    ordered: NDArray[np.intp] = found[np.argsort(-scores[found], kind="stable")]
    return ordered
