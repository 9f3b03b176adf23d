"""The JSON of answers: a line for each piece, the last one with counts and durations, or all of it in one."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any, Final

from starlette.responses import JSONResponse, Response

from runtime.errors import EnginecastError
from runtime.language.calls import ToolCall
from runtime.pipeline import Event
from runtime.tasks.chat import Finished
from serving.dialects.http.errors import message_of
from serving.dialects.http.running import Lines, Stream, begun, nanoseconds, now
from serving.dialects.http.words import events_in_words
from serving.host.job import Done

NDJSON: Final = "application/x-ndjson"
LOAD, UNLOAD, STOP = "load", "unload", "stop"
"""Why an answer is done, besides what `Finished` says."""

Fields = dict[str, Any]
Pieces = AsyncGenerator[Fields, None]


def line(fields: Mapping[str, Any]) -> str:
    """A line of a response."""
    return f"{json.dumps(fields, ensure_ascii=False)}\n"


def failure(error: EnginecastError) -> str:
    """The last line of a response that failed in the middle."""
    return line({"error": message_of(error)})


class Reply:
    """Makes the JSON of the answer of `model`, as the client called it. `text` is the place of a piece of text."""

    def __init__(self, model: str, text: Callable[[str], Fields]) -> None:
        self._model = model
        self._text = text
        self._texts: list[str] = []
        self._logprobs: list[Fields] = []
        self._calls: list[Fields] = []
        self._began = perf_counter()
        self._loaded = self._began

    async def watched(
        self, events: AsyncGenerator[Event, None], words: Mapping[str, str]
    ) -> AsyncGenerator[Event, None]:
        """The events of the request, whose errors name the client's fields."""
        first = True
        async with aclosing(events_in_words(events, words)) as found:
            async for event in found:
                if first:  # the model is loaded, and the request waits in its queue
                    self._loaded, first = perf_counter(), False
                yield event

    def piece(self, text: str, logprobs: Sequence[Fields] = (), **more: Any) -> Fields:
        """A piece of the answer, with the probabilities of its tokens if they were asked for."""
        self._texts.append(text)
        self._logprobs += logprobs
        shown = {"logprobs": logprobs} if logprobs else {}
        return {"model": self._model, "created_at": now(), **self._text(text), "done": False, **shown, **more}

    def called(self, call: ToolCall) -> Fields:
        """A call of a function, in a message without text."""
        self._calls.append({"function": {"name": call.name, "arguments": dict(call.arguments)}})
        return {"model": self._model, "created_at": now(), **self._message("", self._calls[-1:]), "done": False}

    def _message(self, text: str, calls: Sequence[Fields]) -> Fields:
        place = self._text(text)
        if calls:
            place["message"]["tool_calls"] = calls
        return place

    def last(self, done: Done, finished: Finished | None = None, **more: Any) -> Fields:
        """The end of the answer, with durations in nanoseconds."""
        first = done.run_seconds if done.first_output_seconds is None else done.first_output_seconds
        counts = {} if finished is None else {"prompt_eval_count": finished.prompt_tokens}
        counts |= {"prompt_eval_duration": nanoseconds(first)}
        counts |= {} if finished is None else {"eval_count": finished.completion_tokens}
        return {
            **self.piece("", **more),
            **self._ended(STOP if finished is None else finished.reason),
            "load_duration": nanoseconds(self._loaded - self._began),
            **counts,
            "eval_duration": nanoseconds(done.run_seconds - first),
        }

    def whole(self, pieces: list[Fields]) -> Fields:
        """All of the answer in one."""
        shown = {"logprobs": self._logprobs} if self._logprobs else {}
        return {**pieces[-1], **self._message("".join(self._texts), self._calls), **shown}

    def nothing(self, reason: str) -> Fields:
        """The answer to a request that only loads or unloads the model."""
        return {**self.piece(""), **self._ended(reason)}

    def _ended(self, reason: str) -> Fields:
        return {"done": True, "done_reason": reason, "total_duration": nanoseconds(perf_counter() - self._began)}


async def respond(
    reply: Reply,
    events: AsyncGenerator[Event, None],
    pieces: Callable[[AsyncIterator[Event]], Pieces],
    stream: bool | None,
) -> Response:
    """The response of a request: a line for each of its pieces, or with `stream` False all of it in one."""
    if stream is False:
        async with aclosing(events):
            return JSONResponse(reply.whole([piece async for piece in pieces(events)]))

    async def lines(found: AsyncIterator[Event]) -> Lines:
        async with aclosing(pieces(found)) as made:
            async for piece in made:
                yield line(piece)

    return Stream(await begun(events), lines, failure, NDJSON)
