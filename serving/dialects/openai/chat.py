"""POST /v1/chat/completions: answers, and their chunks (https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from runtime.language.calls import ToolCall
from runtime.language.logprobs import TokenLogprob
from runtime.pipeline import Event
from runtime.tasks.chat import Finished, TextDelta, ToolCalled
from serving.dialects.http.fetching import Fetcher, Hosts
from serving.dialects.http.running import Begun, Lines, Stream, begun, collected, run
from serving.dialects.http.words import events_in_words, in_words
from serving.dialects.openai import errors, sse
from serving.dialects.openai.calling import call_json
from serving.dialects.openai.conversation import chat_request
from serving.dialects.openai.fields import Completion
from serving.dialects.openai.shared import identity
from serving.host.models import ModelHost

WORDS: Final = {"parts": "content", "answers": "n", "grammar": "response_format", "logprobs": "top_logprobs"}
"""The clients' names of fields, by ours."""
CALLED: Final = "tool_calls"
"""Why an answer ends that calls a function."""


def add(routes: APIRouter, host: ModelHost, hosts: Hosts) -> None:
    """Add the endpoint for a host; `hosts` are those that pictures may be fetched from."""

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: Completion) -> Response:
        words = WORDS if body.max_completion_tokens is None else WORDS | {"max_tokens": "max_completion_tokens"}
        with in_words(words):
            async with Fetcher(hosts) as fetcher:
                request = await chat_request(body, fetcher)
        events = events_in_words(run(host, body.model, request), words)
        answer = Answer(body.model, bool(body.stream_options and body.stream_options.include_usage))
        if body.stream:
            return Stream(await begun(events), answer.chunks, errors.failure, sse.MEDIA)
        return JSONResponse(answer.completion(await collected(events)))


class Answer:
    """The answer of a model, whole or in chunks, of which the last has the `usage`, if that is wanted."""

    def __init__(self, model: str, usage: bool = False) -> None:
        self._head = {**identity("chatcmpl"), "model": model, "service_tier": "default"}
        self._usage = usage

    def completion(self, events: Iterable[Event]) -> Mapping[str, Any]:
        """The whole answer."""
        deltas: dict[int, list[TextDelta]] = {}
        calls: dict[int, ToolCall] = {}
        ends: list[Finished] = []
        for event in events:
            match event:
                case TextDelta():
                    deltas.setdefault(event.answer, []).append(event)
                case ToolCalled(call, answer):
                    calls[answer] = call
                case Finished():
                    ends.append(event)
        ordered = sorted(ends, key=lambda end: end.answer)
        choices = [_choice(end, deltas.get(end.answer, ()), calls.get(end.answer)) for end in ordered]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": _usage(ends)}

    async def chunks(self, events: Begun) -> Lines:
        """The answer in server-sent events."""
        ends: list[Finished] = []
        begun: set[int] = set()
        called: set[int] = set()
        async for event in events:
            match event:
                case TextDelta(text, answer, logprobs=logprobs):
                    yield self._chunk(answer, self._role(answer, begun) | {"content": text}, logprobs=logprobs)
                case ToolCalled(call, answer):
                    called.add(answer)
                    yield self._chunk(
                        answer, self._role(answer, begun) | {"tool_calls": [{"index": 0, **call_json(call)}]}
                    )
                case Finished(reason, answer=answer):
                    ends.append(event)
                    yield self._chunk(answer, self._role(answer, begun), CALLED if answer in called else reason)
        if self._usage:
            yield self._event([], _usage(ends))
        yield sse.DONE

    def _role(self, answer: int, begun: set[int]) -> dict[str, Any]:
        """What the first chunk of an answer has besides."""
        new = answer not in begun
        begun.add(answer)
        return {"role": "assistant", "content": "", "refusal": None} if new else {}

    def _chunk(
        self,
        answer: int,
        delta: Mapping[str, Any],
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> str:
        choice = {"index": answer, "delta": delta, "finish_reason": reason, "logprobs": _logprobs(logprobs)}
        return self._event([choice])

    def _event(self, choices: list[Any], usage: Mapping[str, Any] | None = None) -> str:
        counted = {"usage": usage} if self._usage else {}
        return sse.event({**self._head, "object": "chat.completion.chunk", "choices": choices, **counted})


def _choice(end: Finished, deltas: Sequence[TextDelta], call: ToolCall | None) -> Mapping[str, Any]:
    text = "".join(delta.text for delta in deltas)
    calls = {} if call is None else {"tool_calls": [call_json(call)]}
    return {
        "index": end.answer,
        "message": {"role": "assistant", "content": text if text or call is None else None, "refusal": None, **calls},
        "finish_reason": end.reason if call is None else CALLED,
        "logprobs": _logprobs([one for delta in deltas for one in delta.logprobs]),
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> Mapping[str, Any] | None:
    """The log probabilities of tokens, None where there are none."""
    listed = [{**_logprob(token), "top_logprobs": [_logprob(other) for other in token.top]} for token in tokens]
    return {"content": listed, "refusal": None} if listed else None


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.piece), "logprob": token.logprob}


def _usage(ends: list[Finished]) -> dict[str, Any]:
    """What was counted: the tokens of the prompt, which all answers share, and those of every answer."""
    prompt, answers = ends[0].prompt_tokens, sum(end.completion_tokens for end in ends)
    accepted = sum(end.accepted_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": ends[0].reused_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(end.guessed_tokens for end in ends) - accepted,
        },
    }
