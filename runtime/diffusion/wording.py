"""Requests whose prompts a script changed, and what is told of it with their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from runtime.diffusion.hires import PROMPTS
from runtime.pipeline import Event, Pipeline, through
from runtime.tasks.image import ImageReady, ImageRequest


def drawn_from(pipeline: Pipeline, request: ImageRequest, parts: Sequence[ImageRequest]) -> Pipeline:
    """Wrap a pipeline that draws picture i from the prompts of `parts` [i] instead of those of `request`: what differs
    is told with the picture.
    """

    def told(event: Event) -> Iterator[Event]:
        if isinstance(event, ImageReady):
            part = parts[event.index]
            changed = {
                name: getattr(part, name)
                for name in PROMPTS
                if getattr(part, name) != getattr(request, name) and getattr(event, name) is None
            }
            event = replace(event, **changed)
        yield event

    return through(pipeline, told)


def reworded(
    request: ImageRequest, first: Callable[[str, str], str], second: Callable[[str, str], str]
) -> ImageRequest:
    """The request with what `first` makes of each prompt, and `second` of each one that the second pass has of its own,
    given the name of its field and its text.
    """
    found: dict[str, Any] = {name: first(name, getattr(request, name)) for name in PROMPTS}
    if (hires := request.hires) is not None:
        own = {name: text for name in PROMPTS if (text := getattr(hires, name)) is not None}
        later: dict[str, Any] = {name: second(f"hires.{name}", text) for name, text in own.items()}
        hires = replace(hires, **later)
    return replace(request, hires=hires, **found)
