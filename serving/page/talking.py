"""What is filled in on the page, as a request for an answer, and what is said so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from runtime.errors import InvalidInput
from runtime.language.grammar import Grammar
from runtime.language.logprobs import TokenLogprob
from runtime.language.overflow import OVERFLOWS
from runtime.tasks.chat import ChatRequest, TextDelta
from serving.cli.answering import Answering
from serving.dialects.python.requests import Message, chat_request
from serving.page.options import Options
from serving.page.scripting import scripts_of

OPTIONS: Final = Options(Answering, ("format", "regex"), {"context_overflow": OVERFLOWS})
"""The options of an answer, but for its form."""


SWITCHES: Final = {
    "fills_context": "The answer may have all that the context leaves",
    "raw": "The question is the prompt as the model reads it, without a chat template",
}
"""Further options, which are on or off."""


@dataclass(frozen=True)
class Answers:
    """What there is of the answers to a question, and the log probabilities of their tokens."""

    texts: tuple[str, ...] = ()
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()

    def joined(self, event: TextDelta) -> Answers:
        """With a further piece of one of them."""
        texts = [*self.texts, *("" for _ in range(event.answer + 1 - len(self.texts)))]
        texts[event.answer] += event.text
        return Answers(tuple(texts), (*self.logprobs, *((event.answer, one) for one in event.logprobs)))

    @property
    def counted(self) -> str:
        """How much there is."""
        characters = f"{sum(map(len, self.texts))} characters"
        return characters if len(self.texts) < 2 else f"{len(self.texts)} answers, {characters}"


@dataclass(frozen=True)
class Conversation:
    """What was said, as the model is told, and as the page shows it."""

    messages: tuple[Message, ...] = ()
    shown: tuple[dict[str, Any], ...] = ()

    def asked(self, text: str, pictures: list[bytes], files: list[str]) -> Conversation:
        """With a question about pictures."""
        content: list[Any] = [*pictures, text] if text else list(pictures)
        shown = [*({"path": file} for file in files), *([text] if text else [])]
        rows = tuple({"role": "user", "content": one} for one in shown)
        return Conversation((*self.messages, Message("user", content)), (*self.shown, *rows))

    def answered(self, answers: Answers) -> Conversation:
        """With what there is of the answers. The conversation goes on from the first one."""
        several = len(answers.texts) > 1
        shown = tuple(
            {"role": "assistant", "content": text} | ({"metadata": {"title": f"Answer {number}"}} if several else {})
            for number, text in enumerate(answers.texts, start=1)
        )
        return Conversation(
            (*self.messages, Message("assistant", next(iter(answers.texts), ""))), (*self.shown, *shown)
        )


def grammar_of(form: str, text: str) -> Grammar | None:
    """The form of an answer. Raises InvalidInput."""
    if form in ("", "json") and text.strip():
        raise InvalidInput("grammar", "has a text that this form does not need: choose a schema or an expression")
    if form == "json":
        return Grammar.json()
    if form == "schema":
        return Grammar.schema(text)
    return Grammar.regex(text) if form else None


def request_of(now: Conversation, options: Mapping[str, Any]) -> ChatRequest:
    """The request for an answer. Raises InvalidInput."""
    system = [Message("system", options["system"])] if options.get("system") else []
    given = OPTIONS.read(options) | {name: True for name in SWITCHES if options.get(name)}
    given["grammar"] = grammar_of(options.get("form") or "", options.get("grammar") or "")
    given["scripts"] = scripts_of(options.get("scripts") or (), options.get("script_settings") or ())
    return chat_request([*system, *now.messages], (), given)
