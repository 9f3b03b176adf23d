"""Chats of the package openai, unchanged."""

from __future__ import annotations

import asyncio
import base64
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from runtime.errors import EngineError, ResourceExhausted
from runtime.language.grammar import Grammar
from runtime.tasks.chat import ChatRequest
from runtime.vision.images import PictureFile, encode_image
from serving.dialects.http.fetching import Fetcher
from serving.dialects.http.server import HttpServer
from serving.security import tokens
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.scopes import Scope
from serving.settings import Settings
from tests.fakes.proofs import proves
from tests.fakes.serving import FakeServer, until
from tests.fakes.web import send, serve

CHAT = "POST /v1/chat/completions"
TEXT = "a red círcle"
ASKED: Any = [{"role": "user", "content": "what is it?"}]


def picture(fake: FakeServer) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode_image(fake.draw.picture)).decode()}"


@pytest.fixture
def asked(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> list[ChatRequest]:
    """The requests that reach the model."""
    model, found = fake.models["talk"], list[ChatRequest]()
    answer = model.pipeline

    def noted(request: Any) -> Any:
        found.append(request)
        return answer(request)

    monkeypatch.setattr(model, "pipeline", noted)
    return found


@proves(CHAT, "model", "messages", "messages[].role", "messages[].content", "messages[].content[].type")
@proves(CHAT, "messages[].content[].text", "messages[].content[].image_url", "messages[].content[].image_url.url")
def test_a_conversation_with_a_picture(client: openai.OpenAI, fake: FakeServer, asked: list[ChatRequest]) -> None:
    answer = client.chat.completions.create(
        model="talk",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "text", "text": "is this?"}]},
            {"role": "assistant", "content": "a circle"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture(fake), "detail": "low"}},
                    {"type": "text", "text": "and this?"},
                ],
            },
        ],
    )
    assert answer.choices[0].message.content == TEXT and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop" and answer.model == "talk"
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer._request_id
    (request,) = asked
    assert [turn.role for turn in request.messages] == ["system", "user", "assistant", "user"]
    assert request.messages[1].content == ("what", "is this?")
    shown, text = request.messages[3].content
    assert isinstance(shown, PictureFile) and shown.size == (16, 8) and text == "and this?"


@proves(CHAT, "temperature", "top_p", "seed", "max_tokens", "stop", "n", "top_k", "repetition_penalty", "beams")
@proves(CHAT, "picture_tokens")
def test_settings_reach_the_model(client: openai.OpenAI, asked: list[ChatRequest]) -> None:
    client.chat.completions.create(
        model="talk",
        messages=ASKED,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        max_tokens=2,
        stop=["x", "y"],
        n=2,
        user="me",
        store=False,
        tools=[],
        metadata={"a": "b"},
        extra_body={"top_k": 3, "repetition_penalty": 1.5, "beams": 1, "picture_tokens": 144},
    )
    (request,) = asked
    assert (request.temperature, request.top_p, request.seed, request.max_tokens) == (0.5, 0.9, 7, 2)
    assert (request.stop, request.answers, request.top_k, request.repetition_penalty) == (("x", "y"), 2, 3, 1.5)
    assert (request.beams, request.picture_tokens) == (1, 144)


@proves(CHAT, "frequency_penalty", "presence_penalty", "min_p", "response_format", "response_format.type")
@proves(CHAT, "response_format.json_schema", "response_format.json_schema.schema")
def test_forms_of_answers_reach_the_model(client: openai.OpenAI, asked: list[ChatRequest]) -> None:
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}}
    forms: list[Any] = [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}},
    ]
    for form in forms:
        client.chat.completions.create(
            model="talk",
            messages=ASKED,
            response_format=form,
            frequency_penalty=0.5,
            presence_penalty=-1,
            extra_body={"min_p": 0.1},
        )
    assert [request.grammar for request in asked] == [None, Grammar.json(), Grammar.schema(schema)]
    request = asked[0]
    assert (request.frequency_penalty, request.presence_penalty, request.min_p) == (0.5, -1, 0.1)


@proves(CHAT, "lookup_tokens", "draft_tokens", "prediction", "prediction.type", "prediction.content")
@proves(CHAT, "prediction.content[].type", "prediction.content[].text")
def test_predictions_reach_the_model(client: openai.OpenAI, asked: list[ChatRequest]) -> None:
    parts = [{"type": "text", "text": "a red "}, {"type": "text", "text": "circle"}]
    for content in ("a red circle", parts):
        prediction: Any = {"type": "content", "content": content}
        extra = {"lookup_tokens": 7, "draft_tokens": 3}
        found = client.chat.completions.create(model="talk", messages=ASKED, prediction=prediction, extra_body=extra)
    found_there = [(request.prediction, request.lookup_tokens, request.draft_tokens) for request in asked]
    assert found_there == [("a red circle", 7, 3)] * 2
    details = found.usage and found.usage.completion_tokens_details
    assert details and (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)
    with pytest.raises(openai.BadRequestError, match=r"prediction\.type"):
        client.chat.completions.create(model="talk", messages=ASKED, prediction={"type": "file"})  # type: ignore


@proves(CHAT, "logprobs", "top_logprobs")
def test_log_probabilities(client: openai.OpenAI, asked: list[ChatRequest]) -> None:
    wanted: Any = {"model": "talk", "messages": ASKED, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.chat.completions.create(**wanted).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [one.token for one in choice.logprobs.content] == ["a ", "red ", "círcle"]
    last = choice.logprobs.content[-1]
    assert bytes(last.bytes or ()) == "círcle".encode() and last.logprob == math.log(0.5)
    assert [one.token for one in last.top_logprobs] == ["a ", "red "]
    chunks = list(client.chat.completions.create(**wanted, stream=True))
    streamed = [
        one for chunk in chunks for one in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or ()
    ]
    assert streamed == choice.logprobs.content
    client.chat.completions.create(model="talk", messages=ASKED, logprobs=True)
    client.chat.completions.create(model="talk", messages=ASKED, logprobs=False)
    assert [request.logprobs for request in asked] == [2, 2, 0, None]


@proves(CHAT, "max_completion_tokens", "n", "stop")
def test_several_answers_and_lengths(client: openai.OpenAI, asked: list[ChatRequest]) -> None:
    answer = client.chat.completions.create(
        model="talk", messages=ASKED, n=2, max_completion_tokens=2, temperature=1, stop="z"
    )
    assert [choice.message.content for choice in answer.choices] == ["a red ", "a red "]
    assert [(choice.index, choice.finish_reason) for choice in answer.choices] == [(0, "length"), (1, "length")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 6, 13)
    assert asked[0].stop == ("z",)


@proves(CHAT, "stream", "stream_options", "stream_options.include_usage")
def test_streams(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="talk", messages=ASKED, stream=True))
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["a ", "red ", "círcle"]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage is None
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    options: Any = {"include_usage": True}
    *before, last = client.chat.completions.create(
        model="talk", messages=ASKED, n=2, temperature=1, stream=True, stream_options=options
    )
    assert not last.choices and last.usage is not None and last.usage.total_tokens == 13
    assert [chunk.choices[0].index for chunk in before] == [0] * 4 + [1] * 4
    assert before[4].choices[0].delta.role == "assistant"


@proves(CHAT, "stream")
def test_the_helper_for_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="talk", messages=ASKED) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        assert deltas == ["a ", "red ", "círcle"]
        whole: ChatCompletion = stream.get_final_completion()  # type: ignore[assignment]
    assert whole.choices[0].message.content == TEXT


@proves(CHAT, "stream")
async def test_async_clients(web: HttpServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{web.port}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="talk", messages=ASKED) for _ in range(4))
        )
        assert {answer.choices[0].message.content for answer in answers} == {TEXT}
        stream = await client.chat.completions.create(model="talk", messages=ASKED, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT


@proves(CHAT, "messages")
def test_an_answer_is_sent_back_as_it_came(client: openai.OpenAI, asked: list[ChatRequest]) -> None:
    answer = client.chat.completions.create(model="talk", messages=ASKED)
    before: Any = answer.choices[0].message.model_dump()
    again: Any = {"role": "user", "content": "sure?"}
    client.chat.completions.create(model="talk", messages=[*ASKED, before, again])
    assert asked[1].messages[1].content == (TEXT,)


def refused(client: openai.OpenAI, body: dict[str, Any]) -> Any:
    """The error of a request with these fields."""
    sent: Any = {"model": "talk", "messages": ASKED, **body}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**sent)
    return caught.value


@pytest.mark.parametrize(
    "body, field, why",
    [
        ({"extra_body": {"tmperature": 1}}, "tmperature", "is not known here: leave it out"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools", "has the name 'f g'"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "should be 'function'"),
        ({"tool_choice": "required"}, "tool_choice", "is of tools: send tools"),
        ({"functions": [{"name": "f"}]}, "functions", "functions are sent as tools here"),
        ({"modalities": ["text", "audio"]}, "modalities", "no sound"),
        ({"logit_bias": {"7": 1}}, "logit_bias", "single tokens are not weighted"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "do not think"),
        ({"store": True}, "store", "nothing is stored"),
        ({"service_tier": "priority"}, "service_tier", "all requests are served alike"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'developer', 'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is missing"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]},
            "messages[0].tool_call_id",
            "is that of no call before",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]},
            "messages[0].tool_call_id",
            "does not belong here",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "is no JSON object",
        ),
        (
            {"messages": [{"role": "user", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]},
            "messages[0].tool_calls",
            "does not belong in a message of the role user",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role", "expected 'user'"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0].name", "know no names"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "is empty"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a valid list"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].image_url",
            "does not belong",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0].type",
            "'text' or 'image_url'",
        ),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"n": 65, "temperature": 1}, "n", "expected 1 to 64"),
        ({"seed": -1}, "seed", "expected 0"),
        ({"max_tokens": 0}, "max_tokens", "expected 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "expected 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "differ"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"top_logprobs": 2}, "top_logprobs", "is of logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "expected 0 to 20"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "send both"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"x-guidance": {}}}}},
            "response_format",
            "not of JSON schema",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is of streams"),
        ({"model": "draw"}, "model", "draw"),
    ],
)
def test_what_is_refused_is_named(client: openai.OpenAI, body: dict[str, Any], field: str, why: str) -> None:
    error = refused(client, body)
    assert error.status_code == 400 and error.type == "invalid_request_error"
    assert error.param == field and why in error.message, error.message


@pytest.mark.parametrize(
    "url, why",
    [
        ("http://images.example/x.png", "is no data: and no https: URL"),
        ("https://images.example/x.png", "this server fetches none"),
        ("file:///etc/passwd", "is no data: and no https: URL"),
        ("/etc/passwd", "is no data: and no https: URL"),
        ("https://[::1", "is no URL"),
        ("https://" + "x" * 3000, "at most 2,000"),
        ("data:image/png;base64,????", "is no base64"),
        ("data:image/png,abc", "without base64"),
        ("data:image/png;base64,QUJD", "is no PNG"),
    ],
)
def test_pictures_that_are_none(client: openai.OpenAI, url: str, why: str) -> None:
    error = refused(
        client, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    )
    assert error.param == "messages[0].content[0].image_url.url" and why in error.message, error.message


@proves(CHAT, "messages[].content[].image_url.url")
def test_pictures_of_listed_hosts(fake: FakeServer, asked: list[ChatRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    async def get(self: Fetcher, url: str, field: str) -> bytes:
        self._hosts.place(url, field)
        return encode_image(fake.draw.picture)

    monkeypatch.setattr(Fetcher, "get", get)
    web = serve(fake, settings=Settings(fetch_hosts=["images.example"]))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{web.port}/v1", api_key="none", max_retries=0) as client:
        for host, why in (("images.example", ""), ("other.example", "does not fetch from")):
            shown: Any = [{"type": "image_url", "image_url": {"url": f"https://{host}/x.png"}}]
            with pytest.raises(openai.BadRequestError, match=why) if why else nullcontext():
                client.chat.completions.create(model="talk", messages=[{"role": "user", "content": shown}])
    fake.do(web.stop())
    (request,) = asked
    assert [image.size for image in request.images if isinstance(image, PictureFile)] == [(16, 8)]


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="talc", messages=ASKED)
    assert caught.value.code == "model_not_found" and "did you mean 'talk'" in caught.value.message


def test_an_error_in_the_middle_of_a_stream(client: openai.OpenAI, fake: FakeServer) -> None:
    model = fake.models["talk"]
    model.hold()
    model.let(2)
    texts = []
    with pytest.raises(openai.APIError, match="gave up") as caught:
        for chunk in client.chat.completions.create(model="talk", messages=ASKED, stream=True):
            texts.append(chunk.choices[0].delta.content)
            if len(texts) == 2:
                model.failure = EngineError("the engine gave up")
                model.let(1)
    assert texts == ["a ", "red "] and caught.value.type == "server_error"


def test_leaving_a_stream_stops_the_work(client: openai.OpenAI, fake: FakeServer) -> None:
    model = fake.models["talk"]
    model.hold()
    model.let(1)
    stream = client.chat.completions.create(model="talk", messages=ASKED, stream=True)
    assert next(iter(stream)).choices[0].delta.content == "a "
    stream.close()
    until(lambda: all(run.job.stopped_by is not None for run in fake.host.catalog.find("talk").runs))
    model.let(1)
    until(lambda: fake.busy("talk") == 0)
    assert model.calls <= 2


def test_a_full_queue_is_tried_again(web: HttpServer, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits as long as Retry-After says."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{web.port}/v1", api_key="none", max_retries=2)
    answer, tries = fake.models["talk"].pipeline, []

    def full(request: Any) -> Any:
        tries.append(request)
        if len(tries) == 1:
            raise ResourceExhausted("no place", 0.5)
        return answer(request)

    monkeypatch.setattr(fake.models["talk"], "pipeline", full)
    assert client.chat.completions.create(model="talk", messages=ASKED).choices[0].message.content == TEXT
    assert len(tries) == 2
    tries.clear()
    with pytest.raises(openai.RateLimitError) as caught:
        client.with_options(max_retries=0).chat.completions.create(model="talk", messages=ASKED)
    assert caught.value.response.headers["retry-after"] == "1"
    client.close()


def test_raw_errors(web: HttpServer) -> None:
    response, content = send(web, "/v1/chat/completions", b"{")
    assert response.status == 400 and content["error"]["param"] == "body"
    response, content = send(web, "/v1/chat/completions", b'{"model":"talk","messages":[' + b"{}," * 11_000)
    assert response.status == 400 and "more than 10,000 values" in content["error"]["message"]
    response, content = send(web, "/v1/nothing")
    assert response.status == 404
    assert content["error"] == {
        "message": "there is nothing at /v1/nothing: check the address",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


BIG = "9" * 5000
DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "more, field",
    [
        ('"temperature": NaN', "temperature"),
        ('"temperature": 1e999', "temperature"),
        ('"temperature": -Infinity', "temperature"),
        (f'"temperature": {"9" * 400}', "temperature"),
        (f'"seed": {BIG}', "body"),
        (f'"seed": {"9" * 400}', "seed"),
        (f'"stop": {DEEP}', "body"),
        ('"stop": {"a": 1}', "stop"),
        ('"stop": ""', "stop"),
        ('"stream": "yes"', "stream"),
        ('"n": 1.5', "n"),
        ('"n": true', "n"),
        ('"messages": {"role": "user"}', "messages"),
        ('"messages": [{"role": "user", "content": "\\ud800"}]', "messages[0].content[0].text"),
        ('"model": "\\udc00"', "model"),
        (f'"model": "{BIG}"', None),
        ('"model": null', "model"),
        ('"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}', None),
    ],
)
def test_hostile_texts(web: HttpServer, fake: FakeServer, more: str, field: str | None) -> None:
    body = '{"model": "talk", "messages": [{"role": "user", "content": "x"}], ' + more + "}"
    response, content = send(web, "/v1/chat/completions", body.encode())
    if field is not None:
        assert response.status == 400 and content["error"]["param"] == field, content
    assert response.status < 500 and len(response.headers.as_string()) < 2000
    assert send(web, "/v1/models", verb="GET")[0].status == 200


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"model": "talk"', b"\x00" * 1000])
def test_bodies_that_are_no_requests(web: HttpServer, body: bytes) -> None:
    for path in ("chat/completions", "embeddings", "images/generations"):
        response, content = send(web, f"/v1/{path}", body)
        assert response.status == 400 and content["error"]["param"] == "body", content


def test_tokens_are_api_keys(fake: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    infer, metrics = (tokens.new(file, scope.value, {scope}, None, None) for scope in (Scope.INFER, Scope.METRICS))
    web = serve(fake, Security(gate=Gate(file)))

    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{web.port}/v1", api_key=key, max_retries=0)

    with client(infer) as allowed, client(metrics) as reader, client("ec_x") as stranger:
        assert allowed.chat.completions.create(model="talk", messages=ASKED).choices[0].message.content == TEXT
        assert allowed.images.generate(model="draw", prompt="x").data
        assert allowed.embeddings.create(model="match", input="x").data
        assert len(list(reader.models.list())) == 3 and reader.models.retrieve("talk")
        with pytest.raises(openai.PermissionDeniedError) as denied:
            reader.chat.completions.create(model="talk", messages=ASKED)
        assert denied.value.type == "permission_error"
        with pytest.raises(openai.AuthenticationError) as unknown:
            stranger.models.list()
        assert unknown.value.code == "invalid_api_key" and unknown.value.type == "authentication_error"
    fake.do(web.stop())
