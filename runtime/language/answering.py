"""One answer, token by token: which are chosen, what they spell, and how likely they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from runtime.language.choice import choose
from runtime.language.constraint import Constraint
from runtime.language.decoder import Step
from runtime.language.guessing import Guessing
from runtime.language.logprobs import Logprobs
from runtime.language.processors import Scores
from runtime.language.sampling import Bounds, Sampling
from runtime.language.text import Detokenizer, StopStrings
from runtime.pipeline import Event, Pipeline, through
from runtime.tasks.chat import Finished, TextDelta, ToolCalled


class Answer:
    """The text of an answer as its tokens come, up to the first stop string. `stopped` says that one was found,
    `number` which of a request's answers it is.

    `spelled` characters were written by its tokens, `passed` of them may be passed on.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], number: int = 0) -> None:
        self._tokenizer, self._strings, self.number = tokenizer, stops, number
        self._spelling, self._stops = Detokenizer(tokenizer), StopStrings(stops)
        self.spelled = self.passed = 0

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def push(self, token: int) -> str:
        """What may be passed on with this token; nothing behind a stop string."""
        return "" if self.stopped else self._pass(self._spelling.push(token))

    def flush(self) -> str:
        """What is left at the end."""
        if self.stopped:
            return ""
        text, held = self._pass(self._spelling.flush()), self._stops.flush()
        self.passed += len(held)
        return text + held

    def stops(self, tokens: Sequence[int]) -> bool:
        """Whether the text of an answer's tokens has a stop string."""
        text = self._tokenizer.decode(list(tokens)) if self._strings else ""
        return any(stop in text for stop in self._strings)

    def _pass(self, text: str) -> str:
        passed = self._stops.push(text)
        self.spelled += len(text)
        self.passed += len(passed)
        return passed


@dataclass
class Choice:
    """How the tokens of one answer are chosen. `constraint` is the form that it must have."""

    sampling: Sampling
    bounds: Bounds
    rng: np.random.Generator
    constraint: Constraint | None = None

    def token(self, logits: Scores, tokens: Sequence[int]) -> int:
        """The next token, from the logits [vocab] behind `tokens`. Raises InvalidInput, EngineError."""
        if self.constraint is None:
            return choose(logits, tokens, self.sampling, self.rng, self.bounds)
        most = self.constraint.most(len(logits))
        token = choose(logits, tokens, self.sampling, self.rng, self.bounds, most)
        self.constraint.push(token)
        return token

    @property
    def complete(self) -> bool:
        """Whether the answer has its form, and nothing may follow."""
        return self.constraint is not None and self.constraint.complete


def continued(
    tokens: list[int], logits: Scores, choice: Choice, logprobs: Logprobs, answer: Answer, guessing: Guessing
) -> Step[Sequence[int]]:
    """Choose a token, pass on what it spells, feed it. Returns the tokens behind those of the prompt."""
    bounds, sent = choice.bounds, len(tokens)
    while True:
        token = choice.token(logits, tokens)
        tokens.append(token)
        if token in bounds.ends:
            break
        logprobs.push(token, logits, answer.spelled)
        text = answer.push(token)
        if text or sent == bounds.prompt:
            yield TextDelta(text, answer.number, len(tokens) - sent, logprobs.passed(answer.passed))
            sent = len(tokens)
        if answer.stopped or choice.complete or len(tokens) == bounds.longest:
            break
        logits = yield from guessing.feed(token, bounds.longest - len(tokens))
    guessing.forget()
    if text := answer.flush():
        yield TextDelta(text, answer.number, len(tokens) - sent, logprobs.passed(answer.passed))
    return tokens[bounds.prompt :]


def repeated(answered: Pipeline, count: int) -> Pipeline:
    """A pipeline that gives one answer, with `count` - 1 equal ones behind it, whose tokens are not computed again."""
    said: list[TextDelta | ToolCalled] = []

    def more(event: Event) -> Iterator[Event]:
        yield event
        if isinstance(event, TextDelta | ToolCalled):
            said.append(event)
        if isinstance(event, Finished):
            for number in range(1, count):
                yield from (replace(one, answer=number, tokens=0) for one in said)
                yield replace(event, answer=number, guessed_tokens=0, accepted_tokens=0)

    return through(answered, more)
