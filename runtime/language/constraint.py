"""Answers of a given form: which tokens may follow, by the library llguidance (extra `constrained`)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tokenizers import Tokenizer

from runtime import limits
from runtime.errors import InvalidInput, MissingDependency
from runtime.language.calls import CallForm
from runtime.language.grammar import OWN_KEY, Grammar
from runtime.language.processors import Scores
from runtime.language.tools import Tool
from runtime.optional import require

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

BITS: Final = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
MOST: Final = np.where(BITS, np.float32(np.inf), np.float32(-np.inf))
"""What eight bits of the library's mask mean for scores, [256, 8]: at 128,000 tokens a tenth of the time that masks of
booleans take.
"""
OPTIONS: Final = {"whitespace_pattern": r"[ \n\r\t]{1,32}"}
"""How the library reads schemas. Blanks between the parts of a value are bounded, since models are known to write them
without end.
"""
HEADER: Final = '%llguidance {"no_forcing": true}'
"""The model chooses the tokens of a text that is certain, too. By default the library chooses them with the tokenizer,
which would take a text like "</s>" for the special token.
"""
PLACE: Final = re.compile(r"^at \d+\(\d+\): ")
SHOWN: Final = re.compile(r"\n\s*\d+ \| ")
"""Where the library's messages name a line of the grammar, and where they begin to show it."""
STUCK: Final = "NoExtension"
"""How the library's messages begin where the form goes on and no token does."""
REASON_LENGTH: Final = 300
"""Characters of the library's messages that are passed on."""


class Constraint:
    """The form of one answer, token by token, but for tokens that are `forbidden` anyway."""

    def __init__(self, matcher: LLMatcher, forbidden: Sequence[int] = ()) -> None:
        self._matcher, self._forbidden = matcher, forbidden

    def fork(self) -> Constraint:
        """One for another answer, which begins where this one is."""
        return Constraint(self._matcher.deep_copy(), self._forbidden)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def most(self, count: int) -> Scores:
        """The highest scores that the first `count` tokens may have, [count]: inf for those that may follow, -inf for
        others. End tokens may follow where the answer can be complete.

        Raises InvalidInput where the model has no token for what comes next, or the limits do not allow to go on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found = MOST.take(bits, axis=0).reshape(-1)
        if len(found) < count:
            found = np.pad(found, (0, count - len(found)), constant_values=-np.inf)
        found[[token for token in self._forbidden if token < count]] = -np.inf
        return found[:count]

    def push(self, token: int) -> None:
        """Go on with an allowed token. Raises InvalidInput where the limits do not allow it."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason = _reason(self._matcher.get_error())
        if reason.startswith(STUCK):
            raise InvalidInput("grammar", "cannot be followed any further: the model has no token for what comes next")
        raise InvalidInput("grammar", f"cannot be followed any further, it is too complex: {reason}")


class Constraints:
    """Makes the constraints of one model's answers, from its tokenizer, the number of its logits and its end tokens."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends

    def open(self, grammar: Grammar) -> Constraint:
        """Raises InvalidInput for a grammar that cannot be followed, MissingDependency without llguidance."""
        return self._opened(lambda: _form(grammar), "grammar")

    def calls(self, form: CallForm, tools: Sequence[Tool], must: bool) -> Constraint:
        """An answer that calls one of these functions at its end, or unless it `must` call, is a text. Raises as `open`
        does, naming `tools`.
        """
        return self._opened(lambda: _calls(form, tools, must), "tools")

    def _opened(self, form: Callable[[], str], field: str) -> Constraint:
        """The constraint of an answer that begins at `start` of a grammar in the library's notation."""
        require("llguidance", "constrained")
        from llguidance import LLMatcher

        lark = LLMatcher.grammar_from_lark(f"{HEADER}\nstart: {form()}")
        matcher = LLMatcher(self._tokens, lark, log_level=0, limits=_limits())
        if matcher.is_error():
            raise InvalidInput(field, f"cannot be followed: {_reason(matcher.get_error())}")
        return Constraint(matcher, () if self._ends else self._tokens.eos_tokens)

    def prepare(self) -> None:
        """Read the vocabulary before the first request, if the library is there and reads it."""
        with suppress(MissingDependency, InvalidInput):
            self.open(Grammar.json())

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """The vocabulary as the library reads it; takes up to a second."""
        from llguidance import LLTokenizer

        count = max(self._vocabulary, 1 + max(self._tokenizer.get_vocab().values(), default=0))
        try:
            return LLTokenizer(self._tokenizer.to_str(), n_vocab=count, eos_token=list(self._ends) or None)
        except ValueError as error:
            raise InvalidInput(
                "grammar",
                f"cannot be followed by this model, whose tokenizer llguidance does not read "
                f"({_reason(str(error))}): leave it out",
            ) from None


def _form(grammar: Grammar) -> str:
    """A grammar in the library's notation."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(grammar.text, '')}/" if grammar.kind == "regex" else _schema(json.loads(grammar.text))


def _schema(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, OWN_KEY: OPTIONS})}"


def _calls(form: CallForm, tools: Sequence[Tool], must: bool) -> str:
    """A call of one of the functions, perhaps behind a text, or only a text."""
    names = " | ".join(f"call_{i}" for i in range(len(tools)))
    end = json.dumps(form.after) if form.after else ""
    rules = [
        f"call_{i}: {json.dumps(tool.name + form.middle)} {_schema({'type': 'object', **tool.parameters})} {end}"
        for i, tool in enumerate(tools)
    ]
    head = json.dumps(form.before)
    if must:
        return "\n".join([f"{head} ({names})", *rules])
    return "\n".join([f"head ({names}) | TEXT", f"head[lazy]: TEXT {head}", r"TEXT: /(.|\n)*/", *rules])


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=limits.GRAMMAR_WORK.most,
        step_lexer_fuel=limits.GRAMMAR_STEP.most,
        max_lexer_states=limits.GRAMMAR_STATES.most,
        max_grammar_size=limits.GRAMMAR_SYMBOLS.most,
        verbose_errors=False,
    )


def _reason(text: str) -> str:
    """The library's message in one line, without the grammar that it repeats."""
    found = " ".join(SHOWN.split(PLACE.sub("", text))[0].replace("<non-verbose/>", "").split())
    return found if len(found) <= REASON_LENGTH else f"{found[:REASON_LENGTH]}..."
