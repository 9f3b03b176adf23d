"""Answers to conversations: the request, what it leaves open, and the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

from pydantic import Field

from runtime import limits
from runtime.bundle.manifest import Frozen
from runtime.errors import InvalidInput, did_you_mean
from runtime.language.calls import ToolCall
from runtime.language.grammar import Grammar
from runtime.language.logprobs import TokenLogprob
from runtime.language.overflow import OVERFLOWS, Overflow
from runtime.language.sampling import Beams, EarlyStopping, Rules, Sampling
from runtime.language.templates import check_unicode
from runtime.language.text import Message
from runtime.language.tools import Toolbox
from runtime.pipeline import Event
from runtime.task import Request, Task
from runtime.vision.images import Picture, PictureFile, file_bytes, file_pixels


class ChatDefaults(Frozen):
    """What a request leaves open, as the model's generation_config.json has it. `temperature` 0 is greedy.

    `max_length`, where it is not 0, bounds prompt and answer together, and stands for `max_tokens`. `stop` ends answers
    besides the strings of a request; `rules` hold for every answer. With several `beams`, answers are searched; see
    `Beams` for how. `answers` is how many a request gets.
    """

    max_tokens: int = Field(default=256, ge=1)
    max_length: int = Field(default=0, ge=0)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    rules: Rules = Rules()
    beams: int = Field(default=1, ge=1, le=limits.BEAMS.most)
    length_penalty: float = Field(default=1.0, ge=limits.LENGTH_PENALTY.least, le=limits.LENGTH_PENALTY.most)
    early_stopping: EarlyStopping = False
    renormalize: bool = False
    answers: int = Field(default=1, ge=1, le=limits.ANSWERS.most)

    def longest(self, prompt: int) -> int:
        """The most tokens of an answer to a prompt of so many, where the request does not say."""
        return max(self.max_length - prompt, 1) if self.max_length else self.max_tokens


GUESSED: Final = 4
"""Tokens that are guessed at a time where a request has a prediction and does not say: see
docs/decisions/0043-guesses-are-verified.md.
"""
NUMBERS: Final = {
    "max_tokens": limits.MAX_TOKENS,
    "seed": limits.SEED,
    "beams": limits.BEAMS,
    "answers": limits.ANSWERS,
    "min_p": limits.MIN_P,
    "logprobs": limits.LOGPROBS,
    "lookup_tokens": limits.LOOKUP,
    "picture_tokens": limits.PICTURE_TOKENS,
    "draft_tokens": limits.DRAFT,
}
"""The limits of a request's numbers that depend on nothing else."""


@dataclass(frozen=True, eq=False)
class ChatRequest(Request):
    """A conversation to answer. What is None is the model's default; see `Sampling` for the meaning and range of the
    values.

    `max_tokens` bounds the answer; by default the model's default, or what the context leaves if that is less; with
    `fills_context` it is all that the context leaves. A `raw` request has one message, whose text is the prompt as the
    model reads it: no chat template writes around it, and it may hold special tokens, but those of pictures, which
    stand before it. With `tools`, an answer may be a call of a function, which comes as a `ToolCalled` in the place
    of its text; not with `grammar`, `logprobs` or several beams. `stop` ends the answer before the first of these
    strings. Equal seeds give equal answers on the same engine. `beams` above 1 searches for the likeliest answer of
    that many continued side by side, and needs temperature 0; see `Beams`. By default it is the model's, and 1 where
    a temperature, `grammar` or `logprobs` are given. Several `answers` are the likeliest of at least as many beams,
    or with a temperature drawn one by one, the n-th with the seed `seed` + n; of one beam without a temperature all
    are equal. With `context_overflow` "slide", a conversation that does not fit the context is answered without its
    oldest turns: system messages, turns with pictures and the last question stay. `min_p` leaves out tokens that are
    less likely than this share of the likeliest one's probability. Answers have the form that `grammar` says and end
    when they are complete; the length may cut them. With `logprobs`, each token of an answer comes with its log
    probability and with those of that many of the likeliest tokens. At most `lookup_tokens` of an answer's next
    tokens are guessed at a time from what prompt and answer repeat, and from `prediction`, a text that the answer
    repeats in great part, or at most `draft_tokens` by the draft that the bundle was built with. They are verified in
    one call of the decoder: the answer is the same, sooner where guesses are right. With 0, and by default where there
    is no prediction, nothing is guessed. The model reads at most `picture_tokens` positions of each picture, those
    that are least alike; 0 is all. Raises InvalidInput naming the field.
    """

    task: ClassVar[str] = "chat"
    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    beams: int | None = None
    length_penalty: float | None = None
    answers: int | None = None
    context_overflow: Overflow = "refuse"
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    grammar: Grammar | None = None
    logprobs: int | None = None
    fills_context: bool = False
    raw: bool = False
    lookup_tokens: int | None = None
    draft_tokens: int = 0
    prediction: str = ""
    tools: Toolbox | None = None
    picture_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidInput("messages", "is empty, expected at least one message of the user")
        limits.MESSAGES.length("messages", self.messages)
        limits.PARTS.count("messages", sum(len(message.content) for message in self.messages))
        limits.PICTURES.length("messages", self.images)
        limits.REQUEST_PIXELS.count("messages", file_pixels(self.images))
        limits.STOPS.length("stop", self.stop)
        for stop in self.stop:
            limits.STOP.length("stop", stop)
            if not stop:
                raise InvalidInput("stop", "holds an empty string, expected one character or more")
        limits.PREDICTION.length("prediction", self.prediction)
        check_unicode("prediction", self.prediction)
        for name, limit in NUMBERS.items():
            if (value := getattr(self, name)) is not None:
                limit.number(name, value)
        if self.context_overflow not in OVERFLOWS:
            raise InvalidInput(
                "context_overflow",
                f"'{self.context_overflow}' is not known: {did_you_mean(self.context_overflow, OVERFLOWS)}",
            )
        for i, message in enumerate(self.messages):
            message.check(f"messages[{i}]")
        limits.TEXT.count("messages", sum(message.characters for message in self.messages))
        self._check_switches()
        if self.messages[-1].role not in ("user", "tool"):
            raise InvalidInput(
                f"messages[{len(self.messages) - 1}].role",
                f"is '{self.messages[-1].role}', expected 'user' to answer to",
            )

    def _check_switches(self) -> None:
        if self.fills_context and self.max_tokens is not None:
            raise InvalidInput("fills_context", "and max_tokens exclude each other: send one of them")
        if self.raw and len(self.messages) > 1:
            raise InvalidInput("raw", f"is of one message, and there are {len(self.messages)}: write them into one")
        for name in ("grammar", "logprobs"):
            if self.tools is not None and getattr(self, name) is not None:
                raise InvalidInput(name, "does not go with tools: leave out one of them")
        if self.tools is not None and self.raw:
            raise InvalidInput("raw", "does not go with tools, which the chat template shows: leave out one of them")

    @property
    def images(self) -> list[Picture | PictureFile]:
        """Every picture of the conversation, in order."""
        return [image for message in self.messages for image in message.images]

    @property
    def nbytes(self) -> int:
        """What its picture files hold while the request waits."""
        return file_bytes(self.images)

    def sampling(self, defaults: ChatDefaults) -> Sampling:
        """How to choose tokens: this request's values over the model's."""
        return Sampling(
            temperature=self._temperature(defaults),
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            repetition_penalty=defaults.repetition_penalty
            if self.repetition_penalty is None
            else self.repetition_penalty,
            rules=self._rules(defaults.rules),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
        )

    def _rules(self, rules: Rules) -> Rules:
        """The model's rules with what the request changes. An end that a length forces is none of a grammar's."""
        changes = {} if self.min_p is None else {"min_p": self.min_p}
        if self.grammar is None and self.tools is None:
            return rules.model_copy(update=changes)
        if rules.forced_bos_token_id is not None:
            raise InvalidInput("grammar", "does not go with this model, which forces the first token of answers")
        return rules.model_copy(update={**changes, "forced_eos_token_id": ()})

    def search(self, defaults: ChatDefaults) -> Beams:
        """How many answers to continue side by side, and how to rank them. Raises InvalidInput."""
        temperature = self._temperature(defaults)
        alone = [name for name in ("grammar", "logprobs", "tools") if getattr(self, name) is not None]
        usual = 1 if temperature or alone else defaults.beams
        count = usual if self.beams is None else self.beams
        if count > 1 and alone:
            raise InvalidInput(alone[0], f"does not go with {count} beams: send beams 1, or leave it out")
        guessing = next((name for name in ("draft_tokens", "lookup_tokens") if getattr(self, name)), "prediction")
        if count > 1 and (self.guesses or self.draft_tokens):
            raise InvalidInput(guessing, f"does not go with {count} beams: send beams 1, or leave it out")
        if count > 1 and temperature:
            raise InvalidInput(
                "beams", f"is {count} and temperature {temperature}: beams are searched, not drawn; send temperature 0"
            )
        penalty = defaults.length_penalty if self.length_penalty is None else self.length_penalty
        return Beams(count, penalty, defaults.early_stopping, defaults.renormalize)

    def count(self, defaults: ChatDefaults) -> int:
        """How many answers to give. Raises InvalidInput for more than the several beams that are searched."""
        drawn, beams = self._temperature(defaults) > 0, self.search(defaults).count
        if self.answers is None:
            return defaults.answers if drawn else min(defaults.answers, beams)
        if self.answers > beams > 1:
            raise InvalidInput(
                "answers",
                f"is {self.answers}, and temperature 0 gives as many answers as beams, here {beams}: send more beams "
                f"({limits.BEAMS.most} at most), or a temperature",
            )
        return self.answers

    @property
    def guesses(self) -> int:
        """The most tokens that are looked up at a time."""
        if self.lookup_tokens is None:
            return GUESSED if self.prediction else 0
        return self.lookup_tokens

    def _temperature(self, defaults: ChatDefaults) -> float:
        return defaults.temperature if self.temperature is None else self.temperature


@dataclass(frozen=True)
class TextDelta(Event):
    """Newly decoded text of answer number `answer`: whole characters only. The first one comes with the first token,
    whose text may be empty. `tokens` counts the tokens chosen since the last one, 0 where that is unknown. `logprobs`,
    where they were asked for, are those of the tokens that the text begins with or in: all of an answer's join up to
    the bytes of its text, of which a stop string may cut the last.
    """

    output: ClassVar[bool] = True
    text: str
    answer: int = 0
    tokens: int = field(default=0, compare=False)
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def counts(self) -> Mapping[str, int]:
        return {"output_tokens": self.tokens}


GUESSES: Final = ("guessed_tokens", "accepted_tokens")
"""Counts of each answer that are left out where they are 0."""


@dataclass(frozen=True)
class ToolCalled(Event):
    """Answer number `answer` calls a function, in the place of a text or behind it. `tokens` is as of `TextDelta`."""

    output: ClassVar[bool] = True
    call: ToolCall
    answer: int = 0
    tokens: int = field(default=0, compare=False)

    @property
    def counts(self) -> Mapping[str, int]:
        return {"output_tokens": self.tokens}


@dataclass(frozen=True)
class Finished(Event):
    """Answer number `answer` is complete. `reason` is "stop" (end token, stop string, or the grammar is complete) or
    "length" (max tokens).
    `left_out` is how many messages the conversation lost to fit the context. `reused_tokens` of the prompt were not
    computed again: they began a conversation that the model had read before. Of `guessed_tokens`, looked up or drafted,
    `accepted_tokens` were right and spared a call of the decoder each.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    left_out: int = 0
    answer: int = 0
    reused_tokens: int = field(default=0, compare=False)
    guessed_tokens: int = field(default=0, compare=False)
    accepted_tokens: int = field(default=0, compare=False)

    @property
    def counts(self) -> Mapping[str, int]:
        found = {name: count for name in GUESSES if (count := getattr(self, name))}
        if self.answer:
            return found
        reused = {"reused_tokens": self.reused_tokens} if self.reused_tokens else {}
        return {"prompt_tokens": self.prompt_tokens, **reused, **found}


TASK: Final = Task(ChatRequest, verb="chat")
