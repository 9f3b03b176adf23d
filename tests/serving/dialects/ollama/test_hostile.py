"""What no client of Ollama sends: each is refused with a clear error, and the server goes on."""

from __future__ import annotations

import base64
import json
import threading
from typing import Any

import pytest
from ollama import Client

from runtime import limits
from tests.fakes.serving import until
from tests.fakes.web import send
from tests.serving.dialects.ollama.conftest import Served

QUESTION = [{"role": "user", "content": "x"}]
CALLS = ("chat", "generate", "embed", "embeddings", "show", "pull", "copy", "create")


def deep(levels: int) -> Any:
    inner: Any = {}
    for _ in range(levels):
        inner = {"a": inner}
    return inner


BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{'model': 'talk'}",
    "no object": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "no UTF-8": b'{"model": "\xff"}',
    "a lone surrogate": b'{"model": "talk", "prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "a surrogate as key": b'{"model": "talk", "\\ud800": 1}',
    "not a number": b'{"model": "talk", "keep_alive": NaN, "prompt": "x"}',
    "infinite": b'{"model": "talk", "options": {"temperature": Infinity}, "prompt": "x"}',
    "a huge number": b'{"model": "talk", "options": {"seed": ' + b"9" * 4000 + b'}, "prompt": "x"}',
    "too many digits": b'{"model": "talk", "options": {"seed": ' + b"9" * 5000 + b'}, "prompt": "x"}',
    "deep lists": b'{"model": "talk", "format": ' + b"[" * 100_000,
    "a deep schema": json.dumps({"model": "talk", "messages": QUESTION, "prompt": "x", "format": deep(90)}).encode(),
    "a deeper schema": json.dumps({"model": "talk", "messages": QUESTION, "prompt": "x", "format": deep(450)}).encode(),
    "many values": b'{"model": "talk", "format": {"enum": [' + b"1," * 500_000 + b"1]}}",
    "many pictures": json.dumps({"model": "talk", "prompt": "x", "images": ["eA=="] * 1000}).encode(),
    "a control character": b'{"model": "a\\u0000b", "name": "a\\u0000b"}',
    "a path": b'{"model": "../../etc/passwd"}',
    "a long name": json.dumps({"model": "x" * 100_000}).encode(),
}


@pytest.mark.parametrize("what", BODIES)
def test_bodies(served: Served, what: str) -> None:
    for call in CALLS:
        response, content = send(served.server, f"/api/{call}", BODIES[what])
        assert 400 <= response.status < 500, (call, response.status, content)
        assert list(content) == ["error"] and 0 < len(content["error"]) <= limits.ERROR_TEXT.most
        assert "Traceback" not in content["error"] and "/work" not in content["error"]
    assert served.requests == [] and served.client.generate("talk", "x").response == "a red círcle"


@pytest.mark.parametrize("depth", [*range(900, 1000, 7), 971, 972, 974, 976, 5000])
def test_lists_as_deep_as_the_stack(served: Served, depth: int) -> None:
    body = b'{"model": "talk", "prompt": "x", "format": {"enum": %s1%s}}' % (b"[" * depth, b"]" * depth)
    response, content = send(served.server, "/api/generate", body)
    assert response.status == 400 and list(content) == ["error"], depth


@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "images[0]: is no PNG"),
        (b"GIF89a" + b"\xff" * 20, "images[0]: "),
        (b"<svg/>", "images[0]: is no PNG"),
    ],
)
def test_pictures(served: Served, picture: bytes, why: str) -> None:
    for model in ("talk", "draw"):
        body = {"model": model, "prompt": "x", "images": [base64.b64encode(picture).decode()]}
        status, content = served.post("/api/generate", body)
        assert status == 400 and content["error"].startswith(why)


def test_many_streams_of_which_a_third_is_left(own: Served) -> None:
    counts: list[int] = []

    def follow(number: int) -> None:
        with Client(own.url) as client:
            pieces = client.generate("talk", "x", stream=True)
            if number % 3 == 0:
                next(pieces)
                pieces.close()
            else:
                counts.append(len(list(pieces)))

    own.client.generate("talk", "")
    threads = [threading.Thread(target=follow, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [4] * 16
    until(lambda: own.fake.busy("talk") == 0)
    assert own.client.generate("talk", "x").response == "a red círcle"
