"""Answering: general questions, written for this package, about the pictures of `calibration.requests.pictures`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, Final

from calibration.requests.pictures import shown
from calibration.requests.task import TaskRequests
from runtime.language.text import Message
from runtime.pipeline import Event
from runtime.tasks.chat import ChatRequest, TextDelta
from runtime.vision.images import Picture

MAX_TOKENS: Final = 24
BRIEF_TOKENS: Final = 2
DRAFTED: Final = 2
"""Guesses of a draft at a time while calibrating."""
QUESTIONS: Final = (
    "Describe the picture.",
    "How many things are there, and what are they?",
    "What does the text in the picture say?",
    "What color is the background?",
    "Is there a person in the picture? Answer yes or no.",
    "Describe everything that can be seen, from left to right, in several sentences.",
    "Was ist auf dem Bild zu sehen?",
    "What is the largest thing in the picture?",
    "Where was this picture taken, and how can one tell?",
    "¿Qué colores predominan en la imagen?",
    "What might happen next?",
    "Give the picture a short title.",
    "Is this a photograph or a drawing?",
    "Décris cette image en une phrase.",
    "Explain step by step what the picture is for and who might use it.",
    "这张图片里有什么?",
)
"""Describing, counting, reading, colours, yes or no, long answers, other languages. The user's pictures without
questions get them in turn.
"""


def question(picture: Picture, text: str) -> ChatRequest:
    """A question about a picture, uint8 RGB [height, width, 3], answered greedily."""
    return ChatRequest((Message("user", (picture, text)),), temperature=0.0, beams=1)


class ChatRequests(TaskRequests):
    """Requests that ask about a picture."""

    name = "chat"
    calls = MAX_TOKENS / 2
    brief_calls = BRIEF_TOKENS

    def general(self, seed: int) -> Iterator[ChatRequest]:
        """A question about a photograph, the next one about a drawn page, plot or figure, and so on."""
        for i in count(8 * seed):
            yield question(shown(i), QUESTIONS[(i + i // len(QUESTIONS)) % len(QUESTIONS)])

    def calibrating(self, request: ChatRequest, number: int, seed: int) -> ChatRequest:
        return replace(request, max_tokens=MAX_TOKENS, seed=seed)

    def brief(self, request: ChatRequest, number: int) -> ChatRequest:
        return replace(request, max_tokens=BRIEF_TOKENS)

    def fitted(self, config: Mapping[str, Any], request: ChatRequest) -> ChatRequest:
        """With guesses of the draft where there is one, and long enough that there are some."""
        longest = request.max_tokens and max(request.max_tokens, 1 + DRAFTED)
        return replace(request, draft_tokens=DRAFTED, max_tokens=longest) if config.get("draft") else request

    def of_prompt(self, text: str, number: int) -> ChatRequest:
        return question(shown(number), text)

    def of_picture(self, picture: Picture, caption: Callable[[], str], number: int) -> tuple[ChatRequest, None]:
        return question(picture, QUESTIONS[number % len(QUESTIONS)]), None

    def of_question(self, picture: Picture, text: str) -> ChatRequest:
        return question(picture, text)

    def result(self, events: Iterable[Event]) -> str:
        """The whole answer, of several the first."""
        return "".join(event.text for event in events if isinstance(event, TextDelta) and not event.answer)


TASK: Final = ChatRequests()
