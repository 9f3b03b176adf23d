"""The messages of a chat, as clients of OpenAI send them, to those of `runtime.tasks.chat`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from runtime import limits
from runtime.errors import InvalidInput
from runtime.language.grammar import Grammar
from runtime.language.text import Message as Turn
from runtime.language.text import Part as Piece
from runtime.language.text import Role
from runtime.tasks.chat import ChatRequest
from runtime.vision.images import PictureFile
from serving.dialects.http.fetching import Fetcher
from serving.dialects.http.pictures import SCHEME, file_of
from serving.dialects.openai.calling import calls_of, names_of, tools_of
from serving.dialects.openai.fields import Completion, Message, Part, ResponseFormat

ROLES: Final[dict[str, Role]] = {"developer": "system"}
"""Those with another name here."""


async def chat_request(body: Completion, fetcher: Fetcher) -> ChatRequest:
    """The request in our terms. Raises InvalidInput."""
    longest = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(longest) > 1:
        raise InvalidInput("max_completion_tokens", "and max_tokens differ: send one of them")
    if body.stream_options is not None and not body.stream:
        raise InvalidInput("stream_options", "is of streams: send stream true, or leave it out")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidInput("top_logprobs", "is of logprobs: send logprobs true, or leave it out")
    return ChatRequest(
        await turns(body.messages, fetcher),
        max_tokens=next(iter(longest), None),
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        stop=tuple(body.stop or ()),
        beams=body.beams,
        answers=body.n,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        grammar=None if body.response_format is None else _grammar(body.response_format),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        lookup_tokens=body.lookup_tokens,
        picture_tokens=body.picture_tokens or 0,
        draft_tokens=body.draft_tokens or 0,
        prediction="" if body.prediction is None else "".join(one.text for one in body.prediction.content),
        tools=tools_of(body),
    )


def _grammar(form: ResponseFormat) -> Grammar | None:
    """The form of an answer, None for text."""
    if (form.type == "json_schema") != (form.json_schema is not None):
        raise InvalidInput("response_format.json_schema", "belongs to the type json_schema: send both, or neither")
    if form.json_schema is not None:
        return Grammar.schema(form.json_schema.schema_)
    return Grammar.json() if form.type == "json_object" else None


async def turns(messages: Sequence[Message], fetcher: Fetcher) -> tuple[Turn, ...]:
    """The turns of a conversation. Its pictures are opened, not decoded. Raises InvalidInput naming the part."""
    limits.MESSAGES.length("messages", messages)
    parts = [part for message in messages for part in message.content or ()]
    limits.PARTS.length("messages", parts)
    limits.PICTURES.length("messages", [part for part in parts if part.type == "image_url"])
    names = list(names_of(messages))
    return tuple([await _turn(one, f"messages[{i}]", fetcher, names[i]) for i, one in enumerate(messages)])


async def _turn(message: Message, field: str, fetcher: Fetcher, tool: str) -> Turn:
    calls = calls_of(message, field)
    if calls and message.role != "assistant":
        raise InvalidInput(f"{field}.tool_calls", f"does not belong in a message of the role {message.role}")
    if message.content is None and not calls:
        raise InvalidInput(f"{field}.content", "is missing: send a text, or a valid list of parts")
    pieces = [await _piece(part, f"{field}.content[{i}]", fetcher) for i, part in enumerate(message.content or ())]
    role: Any = message.role
    return Turn(ROLES.get(role, role), tuple(pieces) or (("",) if calls else ()), calls, tool)


async def _piece(part: Part, field: str, fetcher: Fetcher) -> Piece:
    for other, value in (("text", part.text), ("image_url", part.image_url)):
        if (other == part.type) != (value is not None):
            reason = "is missing" if value is None else "does not belong here"
            raise InvalidInput(f"{field}.{other}", f"{reason} in a part of type {part.type}")
    if part.image_url is None:
        return part.text or ""
    return await picture(part.image_url.url, f"{field}.image_url.url", fetcher)


async def picture(url: str, field: str, fetcher: Fetcher) -> PictureFile:
    """The picture of a data: or https: URL, opened, not decoded. Raises InvalidInput naming `field`."""
    if url[: len(SCHEME)].lower() == SCHEME:
        return await asyncio.to_thread(file_of, url, field)
    data = await fetcher.get(url, field)
    return await asyncio.to_thread(PictureFile.open, data, field)
