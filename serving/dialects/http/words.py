"""Errors in the words of a dialect: with its clients' names of fields in place of those of `runtime.tasks`."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager

from runtime.errors import InvalidInput
from runtime.pipeline import Event


@contextmanager
def in_words(names: Mapping[str, str], parts: bool = True) -> Iterator[None]:
    """Errors of the block name the clients' fields: `names` has them by ours; with `parts`, also of parts of a field,
    such as "parts" in "messages[0].parts[1]".
    """
    try:
        yield
    except InvalidInput as error:
        pattern = r"\w+" if parts else ".+"
        field = re.sub(pattern, lambda found: names.get(found[0], found[0]), error.field)
        raise type(error)(field, error.reason) from error


async def events_in_words(events: AsyncGenerator[Event, None], names: Mapping[str, str]) -> AsyncGenerator[Event, None]:
    """The events of a request, whose errors name the clients' fields."""
    async with aclosing(events):
        with in_words(names):
            async for event in events:
                yield event
