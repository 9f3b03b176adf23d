"""Conversations and answers as messages, and back."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.errors import InvalidInput
from runtime.language.grammar import Grammar
from runtime.language.logprobs import TokenLogprob
from runtime.language.text import Message
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from serving.dialects.grpc.tasks.chat import ChatStream, chat_events, chat_message, chat_request
from serving.enginecast_pb import chat_pb2
from serving.host.job import Done

QUESTION = (Message("user", ("what is it?",)),)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context_overflow": "slide"},
        {"min_p": 0.25, "frequency_penalty": -1.5, "presence_penalty": 2.0, "logprobs": 0, "grammar": Grammar.json()},
        {"fills_context": True, "raw": True},
        {"lookup_tokens": 4, "prediction": "a red circle", "picture_tokens": 144},
        {"lookup_tokens": 4, "prediction": "a red circle", "draft_tokens": 3},
        {"logprobs": 20, "grammar": Grammar.regex("a|b")},
        {"beams": 3, "length_penalty": -0.5, "temperature": 0.0, "answers": 2},
        {"max_tokens": 5, "top_k": 4, "top_p": 0.5, "repetition_penalty": 1.25, "seed": 7, "stop": ("a", "b")},
    ],
)
def test_requests_come_back_as_they_were(options: dict[str, Any]) -> None:
    request = ChatRequest(QUESTION, **options)
    again = chat_request(chat_pb2.ChatRequest.FromString(chat_message("talk", request).SerializeToString()))
    assert [(one.role, one.content) for one in again.messages] == [(one.role, one.content) for one in QUESTION]
    assert vars(again) | {"messages": QUESTION} == vars(request)


def test_an_empty_grammar_is_refused() -> None:
    message = chat_message("talk", ChatRequest(QUESTION))
    message.grammar.SetInParent()
    with pytest.raises(InvalidInput, match="grammar: is empty, expected json_schema or regex"):
        chat_request(message)


def test_an_unknown_overflow_is_refused() -> None:
    message = chat_message("talk", ChatRequest(QUESTION))
    message.context_overflow = 7  # type: ignore[assignment]
    with pytest.raises(InvalidInput, match="context_overflow: is 7"):
        chat_request(message)


def test_what_was_left_out_and_reused_arrives() -> None:
    stream, finished = ChatStream(), Finished("length", 9, 3, left_out=4, reused_tokens=5)
    assert stream.response(finished) is None
    done = stream.response(Done(0.0, 1.0, 0.5, ()))
    assert done is not None
    received = next(chat_events(iter([done])))
    assert isinstance(received, Finished)
    assert received == finished and received.reused_tokens == 5


def test_answers_arrive_one_by_one() -> None:
    likely = (TokenLogprob(7, b"a", -0.5, (TokenLogprob(8, b"\xc3", -0.25), TokenLogprob(7, b"a", -0.5))),)
    sent = [
        TextDelta("a", logprobs=likely), Finished("length", 9, 3), TextDelta("b", 1), TextDelta("c", 1),
        Finished("stop", 9, 4, answer=1, guessed_tokens=6, accepted_tokens=2),
    ]  # fmt: skip
    stream, done = ChatStream(), Done(0.0, 1.0, 0.5, ())
    responses = [response for event in (*sent, done) if (response := stream.response(event)) is not None]
    found = list(chat_events(iter(responses)))
    assert found[:3] == [event for event in sent if isinstance(event, TextDelta)]
    assert found[3:5] == [event for event in sent if isinstance(event, Finished)]
    assert isinstance(found[4], Finished) and (found[4].guessed_tokens, found[4].accepted_tokens) == (6, 2)
    assert (responses[-1].done.reason, responses[-1].done.completion_tokens) == (chat_pb2.FINISH_REASON_LENGTH, 3)
