"""What the values of requests of Ollama's clients stand for: durations, formats, options of answers and of pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import PydanticCustomError

from runtime import limits
from runtime.errors import InvalidInput
from runtime.language.grammar import Grammar
from serving.host.offers import ENDLESS

if TYPE_CHECKING:
    from serving.dialects.ollama.fields import AnswerOptions

UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{0,9})?)(ns|us|µs|ms|s|m|h)", re.ASCII)
"""A part of a duration as Go writes it, such as the two of "1h30m"."""
NO_DURATION: Final = "is no duration, expected one such as 5m, 1h30m, 0 or -1"
JSON: Final = "json"

SEED: Final = "seed"
ANSWERING: Final = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "frequency_penalty", "presence_penalty")},
    "repeat_penalty": "repetition_penalty",
    "num_predict": "max_tokens",
    "stop": "stop",
}
"""Options of models that answer, and their names in a `ChatRequest`."""
LONGEST: Final = ANSWERING["num_predict"]
DRAWING: Final = {name: name for name in ("negative_prompt", "guidance_scale", "sampler", "strength")}
"""Options of models that draw, and their names in an `ImageRequest`."""
WORDS: Final = {ours: f"options.{theirs}" for theirs, ours in (ANSWERING | DRAWING | {SEED: SEED}).items()}
"""The names of options in errors, by those in our requests."""


def seconds(value: Any) -> float:
    """The seconds of a keep-alive: a number, or a duration such as "5m" or "1h30m"; a negative one is endless."""
    if isinstance(value, str):
        value = _parsed(value.strip())
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("keep_alive", NO_DURATION)
    if value < 0:
        return ENDLESS
    try:
        limits.KEEP_ALIVE.number("keep_alive", value)
    except InvalidInput as error:
        raise PydanticCustomError("keep_alive", "{why}", {"why": error.reason}) from None
    return float(value)


def _parsed(text: str) -> float:
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", digits, re.ASCII):
        return sign * float(digits)
    found = DURATION.findall(digits)
    if not digits or "".join(map("".join, found)) != digits:
        raise PydanticCustomError("keep_alive", NO_DURATION)
    return sign * math.fsum(float(number) * UNITS[unit] for number, unit in found)


def grammar(value: str | Mapping[str, Any] | None) -> Grammar | None:
    """The form of answers: any JSON object for "json", a value of a JSON schema; an empty text is none. Raises
    InvalidInput.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str) and value != JSON:
        raise InvalidInput("format", f"is '{value[:20]}', expected '{JSON}' or a JSON schema")
    return Grammar.json() if isinstance(value, str) else Grammar.schema(value)


def likeliest(logprobs: bool | None, top: int | None) -> int | None:
    """How many of the likeliest tokens come with each one, None for no probabilities. Raises InvalidInput."""
    if logprobs:
        return top or 0
    if top:
        raise InvalidInput("top_logprobs", f"is {top} without logprobs: send logprobs true")
    return None


def given(options: AnswerOptions | None, names: Mapping[str, str], what: str) -> dict[str, Any]:
    """The options that were sent, by their names in our requests: those of `names`, and the seed, which may be negative
    for any. Less than one token to predict is as many as the context leaves, as -1 and -2 are in Ollama. Raises
    InvalidInput for one of another task than the model's, which `what` is.
    """
    sent = {} if options is None else options.model_dump(include={*ANSWERING, *DRAWING, SEED}, exclude_none=True)
    seed = sent.pop(SEED, None)
    for name in sent.keys() - names.keys():
        raise InvalidInput(f"options.{name}", f"is of no use to a model that {what}: leave it out")
    found = {names[name]: value for name, value in sent.items()}
    if found.get(LONGEST, 1) < 1:
        found = {name: value for name, value in found.items() if name != LONGEST} | {"fills_context": True}
    return found if seed is None or seed < 0 else {**found, SEED: seed}
