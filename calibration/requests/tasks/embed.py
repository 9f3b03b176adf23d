"""Embedding: captions written for this package, and how requests are made of the user's texts and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Final

from calibration.requests.pictures import shown
from calibration.requests.task import TaskRequests
from runtime.errors import InvalidInput
from runtime.pipeline import Event
from runtime.tasks.embed import Embeddings, EmbedRequest, Scores
from runtime.vision.images import Picture

CAPTIONS: Final = (
    "a photo of a cat",
    "an astronaut in an orange suit smiles in front of a flag",
    "a cup of coffee on a saucer with a spoon",
    "dog",
    "a page of printed text",
    "the diagram of a machine, with labels",
    "ein Foto von einer Kirche",
    "three coloured shapes on a white background",
    "a close-up of red and white blood cells under a microscope, taken for a medical textbook",
    "two people walk along a beach at sunset",
    "a plot with two lines and a legend",
    "une fusée sur son pas de tir",
)
"""Short ones, labels, long ones, other languages."""
EACH: Final = 3
"""Texts of a request."""


class EmbedRequests(TaskRequests):
    """Requests with a picture and a few texts. Every second one lets a network read both, which models without such a
    network refuse: those are not counted.
    """

    name = "embed"
    calls = EACH
    brief_calls = 1

    def general(self, seed: int) -> Iterator[EmbedRequest]:
        """A photograph with captions, then a drawn picture, each also matched with its captions, and so on."""
        for i in count(8 * seed):
            texts = tuple(CAPTIONS[(EACH * i + j) % len(CAPTIONS)] for j in range(EACH))
            picture = shown(i)
            yield EmbedRequest(texts, (picture,))
            yield EmbedRequest(texts, (picture,), "itm")

    def calibrating(self, request: EmbedRequest, number: int, seed: int) -> EmbedRequest:
        return request

    def brief(self, request: EmbedRequest, number: int) -> EmbedRequest:
        return EmbedRequest(request.texts[:1], request.images, request.match)

    def of_prompt(self, text: str, number: int) -> EmbedRequest:
        return EmbedRequest((text,), (shown(number),))

    def of_picture(self, picture: Picture, caption: Callable[[], str], number: int) -> tuple[EmbedRequest, None]:
        return EmbedRequest((CAPTIONS[number % len(CAPTIONS)],), (picture,)), None

    def of_question(self, picture: Picture, question: str) -> EmbedRequest:
        raise AssertionError("check_questions refuses them")

    def check_questions(self) -> None:
        raise InvalidInput("questions", "are for models that chat, and this one embeds: give it --prompts or --images")

    def result(self, events: Iterable[Event]) -> Embeddings | Scores:
        (found,) = (event for event in events if isinstance(event, Embeddings | Scores))
        return found


TASK: Final = EmbedRequests()
