"""Answers to conversations: /api/chat, and what /api/generate asks of models that answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Final

from starlette.responses import JSONResponse, Response

from runtime import limits
from runtime.language.calls import ToolCall
from runtime.language.logprobs import TokenLogprob
from runtime.language.text import Message as Turn
from runtime.language.tools import Toolbox
from runtime.pipeline import Event
from runtime.tasks.chat import ChatRequest, Finished, TextDelta, ToolCalled
from serving.dialects.http.pictures import files_of
from serving.dialects.http.running import run
from serving.dialects.http.tools import toolbox
from serving.dialects.http.words import in_words
from serving.dialects.ollama import names
from serving.dialects.ollama.fields import Answered, Chat, Message
from serving.dialects.ollama.options import ANSWERING, WORDS, given, grammar, likeliest
from serving.dialects.ollama.replies import LOAD, UNLOAD, Fields, Pieces, Reply, respond
from serving.host.job import Done
from serving.host.models import ModelHost
from serving.host.terms import Terms

ANSWER_WORDS: Final = {**WORDS, "parts": "content", "grammar": "format", "logprobs": "top_logprobs"}


async def chat(host: ModelHost, body: Chat) -> Response:
    """The answer to a conversation; without messages the model is loaded, or with a keep-alive of 0 unloaded."""
    reply = Reply(body.model, lambda text: {"message": {"role": "assistant", "content": text}})
    if not body.messages:
        return await kept(host, body, reply)
    with in_words(ANSWER_WORDS):
        tools = toolbox(body.tools)
    return await answer(host, body, await turns(body.messages), reply, tools=tools)


async def kept(host: ModelHost, body: Answered, reply: Reply) -> Response:
    """Load the model of a request that asks nothing, or unload it for a keep-alive of 0."""
    await host.keep(names.known(host, body.model), body.keep_alive)
    return JSONResponse(reply.nothing(UNLOAD if body.keep_alive == 0 else LOAD))


async def turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """The turns of a conversation. Raises InvalidInput naming the picture at fault."""
    limits.MESSAGES.length("messages", messages)
    limits.PICTURES.count("messages", sum(len(message.images or ()) for message in messages))
    return tuple(
        [
            replace(
                await turn(message.role, message.content, message.images, f"messages[{i}].images"),
                calls=tuple(ToolCall(one.function.name, one.function.arguments) for one in message.tool_calls or ()),
                tool=message.tool_name or "",
            )
            for i, message in enumerate(messages)
        ]
    )


async def turn(role: Any, text: str | None, images: Sequence[str] | None, field: str) -> Turn:
    """One turn: its pictures, named `field` in errors, then its text, as Ollama has them."""
    pictures = await files_of(images or (), field)
    return Turn(role, (*pictures, text) if text else pictures or ("",))


async def answer(
    host: ModelHost,
    body: Answered,
    messages: tuple[Turn, ...],
    reply: Reply,
    raw: bool = False,
    tools: Toolbox | None = None,
) -> Response:
    """The answer to a conversation, or to a raw prompt, with the options of a request."""
    options = given(body.options, ANSWERING, "answers")
    options["stop"] = tuple(options.get("stop", ()))
    with in_words(ANSWER_WORDS):
        request = ChatRequest(
            messages,
            answers=1,
            context_overflow="refuse" if body.truncate is False else "slide",
            grammar=grammar(body.format),
            logprobs=likeliest(body.logprobs, body.top_logprobs),
            raw=raw,
            tools=tools,
            **options,
        )
    events = run(host, names.known(host, body.model), request, Terms(body.keep_alive))

    async def pieces(found: AsyncIterator[Event]) -> Pieces:
        finished: Finished | None = None
        async for event in found:
            match event:
                case TextDelta(text):
                    yield reply.piece(text, _probabilities(event.logprobs))
                case ToolCalled(call):
                    yield reply.called(call)
                case Finished():
                    finished = event
                case Done():
                    yield reply.last(event, finished)

    return await respond(reply, reply.watched(events, ANSWER_WORDS), pieces, body.stream)


def _probabilities(tokens: Sequence[TokenLogprob]) -> list[Fields]:
    return [{**_token(one), "top_logprobs": [_token(other) for other in one.top]} for one in tokens]


def _token(one: TokenLogprob) -> Fields:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.piece)}
