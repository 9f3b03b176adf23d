"""The services over HTTP, with curl, as a browser's fetch() sends requests, and with connectrpc's own client."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connectrpc.client import ConnectClientSync
from connectrpc.code import Code
from connectrpc.compat import google_protobuf_codecs
from connectrpc.errors import ConnectError
from connectrpc.protocol import ProtocolType
from google.protobuf.json_format import MessageToDict

from runtime.errors import InvalidInput, Unavailable
from serving.cli.start import others
from serving.dialects.connect.application import endpoints
from serving.dialects.http import pages
from serving.dialects.http.application import application
from serving.dialects.http.pages import check_origin
from serving.dialects.http.server import HttpServer
from serving.enginecast_pb import image_pb2, model_pb2
from serving.host.observing import Record
from serving.security import tokens
from serving.security.gate import Gate
from serving.security.protection import OPEN, Security
from serving.security.scopes import Scope
from serving.settings import Settings
from tests.fakes.certificates import Authority
from tests.fakes.serving import Ended, FakeModel, FakeServer, request, until

EXAMPLE = Path(__file__).parents[4] / "examples" / "web" / "connect.mjs"
PAGE = "https://studio.example"
GENERATE = "/enginecast.v1.ImageService/Generate"
CHAT = "/enginecast.v1.ChatService/Chat"
LIST, GET = "/enginecast.v1.ModelService/ListModels", "/enginecast.v1.ModelService/GetModel"
JSON, STREAM = "application/json", "application/connect+json"
WEB = "application/grpc-web+proto"
ASK = {"model": "talk", "messages": [{"role": "ROLE_USER", "parts": [{"text": "what is it?"}]}]}


def serve(fake: FakeServer, address: str = "127.0.0.1:0", security: Security = OPEN) -> HttpServer:
    """An HTTP server beside the fake one."""

    async def start() -> HttpServer:
        app = application(fake.host, Settings(), security.gate)
        server = HttpServer(app, address, [PAGE], ["gpu-box"], security)
        await server.start()
        return server

    return fake.do(start())


ENDED = Ended()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeServer, HttpServer]]:
    """One server for all tests: to stop it takes a fifth of a second."""
    with FakeServer(tmp_path_factory.mktemp("bundles"), ready=True, observers=[ENDED]) as fake:
        server = serve(fake)
        yield fake, server
        fake.do(server.stop())


@pytest.fixture
def warm(both: tuple[FakeServer, HttpServer]) -> FakeServer:
    """The fake server, as it was at first."""
    fake, _ = both
    fake.draw.release()
    fake.draw.failure, fake.draw.picture, fake.draw.engine.calls = None, FakeModel.picture, []
    return fake


@pytest.fixture
def port(both: tuple[FakeServer, HttpServer], warm: FakeServer) -> int:
    """The HTTP port beside it."""
    return both[1].port


@pytest.fixture
def records(warm: FakeServer) -> list[Record]:
    """Every call that ended in this test."""
    ENDED.records.clear()
    return ENDED.records


def post(port: int, path: str, body: bytes, kind: str = JSON, method: str = "POST", **headers: str) -> Any:
    """A response with its body as `data`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    sent = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, body, sent)
    response: Any = connection.getresponse()
    response.data = response.read()
    connection.close()
    return response


def call(port: int, path: str, message: Any, **headers: str) -> Any:
    """The JSON of a method with one response."""
    return json.loads(post(port, path, json.dumps(message).encode(), **headers).data)


def envelope(data: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BI", flags, len(data)) + data


def envelopes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Flags and content of each message of a stream."""
    while data:
        flags, size = struct.unpack(">BI", data[:5])
        yield flags, data[5 : 5 + size]
        data = data[5 + size :]


def stream(port: int, path: str, message: Any, **headers: str) -> list[Any]:
    """The JSON messages of a stream, and its end."""
    response = post(port, path, envelope(json.dumps(message).encode()), STREAM, **headers)
    assert response.status == 200
    return [json.loads(content) for _, content in envelopes(response.data)]


class TestJson:
    def test_one_response(self, port: int, warm: FakeServer) -> None:
        models = call(port, LIST, {})["models"]
        expected = [MessageToDict(model) for model in warm.client.models()]
        for model in (*models, *expected):
            model.pop("idleSeconds")
        assert models == expected
        assert [model["state"] for model in models] == ["MODEL_STATE_READY"] * 2

    def test_load_and_unload(self, port: int, warm: FakeServer) -> None:
        unloaded = call(port, "/enginecast.v1.ModelService/UnloadModel", {"name": "draw", "grace_seconds": 1})
        assert unloaded["model"]["state"] == "MODEL_STATE_UNLOADED"
        loaded = call(port, "/enginecast.v1.ModelService/LoadModel", {"name": "draw"})
        assert loaded["model"]["state"] == "MODEL_STATE_READY"

    def test_health(self, port: int) -> None:
        assert call(port, "/grpc.health.v1.Health/Check", {}) == {"status": "SERVING"}

    def test_a_stream(self, port: int) -> None:
        *answer, done, end = stream(port, CHAT, ASK)
        assert "".join(one["delta"]["text"] for one in answer if "delta" in one) == "a red círcle"
        assert done["done"]["completionTokens"] == 3 and end == {}

    def test_pictures_equal_those_over_grpc(self, port: int, warm: FakeServer) -> None:
        shown = stream(port, GENERATE, {"model": "draw", "prompt": "a circle", "steps": 2, "images": 2})
        drawn = list(warm.client.generate(request(steps=2, images=2)))
        pictures = [base64.b64decode(one["image"]["png"]) for one in shown if "image" in one]
        assert pictures == [one.image.png for one in drawn if one.HasField("image")]

    def test_responses_arrive_while_it_runs(self, port: int, warm: FakeServer) -> None:
        warm.draw.hold()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = envelope(json.dumps({"model": "draw", "prompt": "x", "steps": 2}).encode())
        connection.request("POST", GENERATE, body, {"content-type": STREAM})
        response = connection.getresponse()
        _, size = struct.unpack(">BI", response.read(5))
        assert json.loads(response.read(size))["queued"].keys() == {"id"}, "it starts at once"
        warm.draw.let(1)
        _, size = struct.unpack(">BI", response.read(5))
        assert json.loads(response.read(size))["progress"]["step"] == 1
        warm.draw.release()
        assert "done" in json.loads(list(envelopes(response.read()))[-2][1])
        connection.close()

    def test_curl(self, port: int) -> None:
        address = f"http://127.0.0.1:{port}{LIST}"
        command = ["curl", "--silent", "--header", f"Content-Type: {JSON}", "--data", "{}", address]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except FileNotFoundError:
            pytest.skip("curl is not installed")
        assert [model["name"] for model in json.loads(ended.stdout)["models"]] == ["draw", "talk"]


ALL = """
console.log((await call(server, "ModelService/ListModels", {})).models.map((model) => model.name).join(" "));
for await (const one of stream(server, "ImageService/Generate", { model: "draw", prompt: "x", steps: 2 }))
  console.log(Object.keys(one)[0], one.image ? one.image.png.length > 50 : "");
await call(server, "ModelService/GetModel", { name: "drow" }).catch((error) => console.log(error.message));
try {
  for await (const one of stream(server, "ImageService/Generate", { model: "drow", prompt: "x" })) console.log(one);
} catch (error) {
  console.log(error.message);
}
"""
LEAVE = """
for await (const one of stream(server, "ImageService/Generate", { model: "draw", prompt: "x", steps: 1000 }))
  if (one.progress) break;
"""


class TestFetch:
    """The example for web pages, run by Node, which has the same fetch()."""

    def run(self, port: int, script: str) -> list[str]:
        """The lines that a script prints."""
        node = shutil.which("node")
        if node is None:
            pytest.skip("node is not installed")
        script = f'import {{ call, stream }} from "{EXAMPLE.as_uri()}";\nconst server = process.argv[1];\n{script}'
        command = [node, "--input-type=module", "--eval", script, f"http://127.0.0.1:{port}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.splitlines()

    def test_responses_and_errors(self, port: int) -> None:
        names, *events, missing, refused = self.run(port, ALL)
        assert (names, events) == ("draw talk", ["queued ", "progress ", "progress ", "image true", "done "])
        assert missing == refused and missing.startswith("not_found: model 'drow' is not served here: did you mean")

    def test_leaving_the_loop_stops_the_work(self, port: int, warm: FakeServer) -> None:
        warm.draw.hold()
        warm.draw.let(1)
        self.run(port, LEAVE)
        until(warm.leaving)
        warm.draw.release()
        until(lambda: warm.busy() == 0)
        assert warm.draw.calls < 10


class TestClient:
    """connectrpc's own client, which compresses its requests."""

    @pytest.mark.parametrize("protocol", [ProtocolType.CONNECT, ProtocolType.GRPC_WEB])
    @pytest.mark.parametrize("codec", google_protobuf_codecs(), ids=["proto", "json"])
    def test_all_kinds(self, port: int, warm: FakeServer, protocol: ProtocolType, codec: Any) -> None:
        methods = endpoints(warm.host)
        with ConnectClientSync(f"http://127.0.0.1:{port}", codec=codec, protocol=protocol) as client:
            listed = client.execute_unary(request=model_pb2.ListModelsRequest(), method=methods[LIST].method)
            assert [model.name for model in listed.models] == ["draw", "talk"]
            drawn = client.execute_server_stream(request=request(steps=1, seed=7), method=methods[GENERATE].method)
            assert [one.image.seed for one in drawn if one.HasField("image")] == [7]
            with pytest.raises(ConnectError, match="did you mean 'draw'") as caught:
                list(client.execute_server_stream(request=request(model="drow"), method=methods[GENERATE].method))
            assert caught.value.code is Code.NOT_FOUND


class TestTokens:
    @pytest.fixture
    def closed(self, warm: FakeServer, tmp_path: Path) -> Iterator[tuple[int, str]]:
        """The port of a server that needs tokens, and a token for requests to models."""
        file = tmp_path / "tokens.toml"
        secret = tokens.new(file, "alice", frozenset({Scope.INFER}), None, 1)
        server = serve(warm, security=Security(gate=Gate(file)))
        yield server.port, f"Bearer {secret}"
        warm.do(server.stop())

    def test_a_token(self, closed: tuple[int, str], records: list[Record]) -> None:
        port, token = closed
        assert "done" in stream(port, CHAT, ASK, authorization=token)[-2]
        assert records[0].client == "alice" and records[0].peer.startswith("127.0.0.1:")
        assert call(port, "/grpc.health.v1.Health/Check", {}) == {"status": "SERVING"}

    def test_calls_that_are_refused(self, closed: tuple[int, str], warm: FakeServer, records: list[Record]) -> None:
        port, token = closed
        response = post(port, LIST, b"not read", authorization="Bearer other")
        assert response.status == 401 and json.loads(response.data)["code"] == "unauthenticated"
        response = post(port, "/enginecast.v1.ModelService/LoadModel", b'{"name": "draw"}', authorization=token)
        assert response.status == 403 and json.loads(response.data)["code"] == "permission_denied"
        (end,) = stream(port, CHAT, ASK)
        assert end["error"]["code"] == "unauthenticated"
        assert [one.code for one in records] == ["UNAUTHENTICATED", "PERMISSION_DENIED", "UNAUTHENTICATED"]

    def test_one_call_at_once(self, closed: tuple[int, str], warm: FakeServer) -> None:
        port, token = closed
        warm.draw.hold()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = envelope(json.dumps({"model": "draw", "prompt": "x"}).encode())
        connection.request("POST", GENERATE, body, {"content-type": STREAM, "authorization": token})
        connection.getresponse()
        response = post(port, LIST, b"{}", authorization=token)
        assert response.status == 429
        kinds = [one["type"] for one in json.loads(response.data)["details"]]
        assert kinds == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]
        connection.close()
        warm.draw.release()
        until(lambda: warm.busy() == 0)
        assert post(port, LIST, b"{}", authorization=token).status == 200


class TestRecords:
    def test_a_call_is_recorded_with_the_id_of_the_client(self, port: int, records: list[Record]) -> None:
        response = post(port, GET, b'{"name": "draw"}', x_request_id="mine")
        assert response.headers["x-request-id"] == "mine"
        stream(port, CHAT, ASK)
        post(port, GET, b'{"name": "drow"}')
        post(port, GET, b"{")
        assert [(one.method, one.model, one.code, one.error) for one in records] == [
            ("enginecast.v1.ModelService/GetModel", "", "OK", ""),
            ("enginecast.v1.ChatService/Chat", "talk", "OK", ""),
            ("enginecast.v1.ModelService/GetModel", "", "NOT_FOUND", "NotFound"),
            ("enginecast.v1.ModelService/GetModel", "", "INVALID_ARGUMENT", "InvalidInput"),
        ]
        assert records[0].id == "mine" and len({one.id for one in records}) == 4
        assert all(one.client.startswith("127.0.0.1:") for one in records)

    def test_a_client_that_leaves(self, port: int, warm: FakeServer, records: list[Record]) -> None:
        warm.draw.hold()
        stream(port, GENERATE, {"model": "draw", "prompt": "x"}, connect_timeout_ms="50")
        warm.draw.release()
        until(lambda: bool(records))
        assert records[0].code == "DEADLINE_EXCEEDED"

    def test_an_id_that_is_too_long(self, port: int) -> None:
        assert post(port, LIST, b"{}", x_request_id="x" * 1000).status == 400


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "message", "status", "code", "text"),
        [
            ("ModelService/GetModel", {"name": "drow"}, 404, "not_found", "did you mean 'draw'"),
            ("ModelService/GetModel", {"nam": "draw"}, 400, "invalid_argument", "nam"),
            ("ModelService/GetModel", {"name": "x" * 201}, 404, "not_found", "201 characters"),
            ("ModelService/LoadModel", {"name": "draw", "target": "cud"}, 400, "invalid_argument", "did you mean"),
        ],
    )
    def test_of_one_response(self, port: int, path: str, message: Any, status: int, code: str, text: str) -> None:
        response = post(port, f"/enginecast.v1.{path}", json.dumps(message).encode())
        error = json.loads(response.data)
        assert (response.status, error["code"]) == (status, code) and text in error["message"]

    def test_of_a_stream(self, port: int) -> None:
        (end,) = stream(port, GENERATE, {"model": "draw", "prompt": "x", "steps": 0})
        assert end["error"]["code"] == "invalid_argument" and end["error"]["message"].startswith("steps: is 0")
        assert end["metadata"] == {"enginecast-error": ["InvalidInput"], "enginecast-field": ["steps"]}

    def test_of_a_bug_has_no_traceback(self, port: int, warm: FakeServer) -> None:
        warm.draw.failure = ValueError("a secret")
        *_, end = stream(port, GENERATE, {"model": "draw", "prompt": "x"})
        assert end["error"] == {"code": "internal", "message": "the server failed unexpectedly: its log says why"}

    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b"[" * 9_000,
            b"\xff\xfe{}",
            b'{"name": 5}',
            b'{"name": ' + b"1" * 100_000 + b"}",
            b"[" + b"{}," * 10_000 + b"{}]",
            b'{"name": "a", "name": "b"}',
        ],
    )
    def test_bytes_that_are_no_message(self, port: int, body: bytes) -> None:
        response = post(port, GET, body)
        error = json.loads(response.data)
        assert (response.status, error["code"]) == (400, "invalid_argument") and len(error["message"]) < 1000

    def test_many_commas_in_a_text_are_no_values(self, port: int) -> None:
        prompt = {"model": "draw", "prompt": ',"{[' * 2000, "steps": 1}
        assert "done" in stream(port, GENERATE, prompt)[-2]

    def test_messages_above_the_limit(self, port: int) -> None:
        response = post(port, LIST, b" " * (20 << 20) + b"{}")
        assert json.loads(response.data)["code"] == "resource_exhausted"

    def test_a_stream_of_other_than_one_message(self, port: int) -> None:
        one = envelope(json.dumps({"model": "draw", "prompt": "x"}).encode())
        claimed = struct.pack(">BI", 0, 2**32 - 1) + b"{}"
        for body, code in (
            (b"", "unimplemented"),
            (one * 2, "unimplemented"),
            (claimed, "resource_exhausted"),
            (one[:-1], "invalid_argument"),
        ):
            response = post(port, GENERATE, body, STREAM)
            ((_, end),) = envelopes(response.data)
            assert json.loads(end)["error"]["code"] == code

    def test_compressed_messages(self, port: int) -> None:
        squeezed = gzip.compress(b'{"name": "draw"}')
        found = post(port, GET, squeezed, content_encoding="gzip")
        assert json.loads(found.data)["model"]["name"] == "draw"
        found = post(port, GET, squeezed, content_encoding="br")
        assert json.loads(found.data)["code"] == "unimplemented"

    @pytest.mark.parametrize(
        ("data", "code"),
        [
            (gzip.compress(b" " * (21 << 20)), "resource_exhausted"),
            (gzip.compress(b"{}") * 2, "invalid_argument"),
            (gzip.compress(b"{}")[:-4], "invalid_argument"),
            (b"{}", "invalid_argument"),
        ],
        ids=["bomb", "pieces", "cut", "other"],
    )
    def test_compressed_messages_that_are_refused(self, port: int, data: bytes, code: str) -> None:
        response = post(port, GET, data, content_encoding="gzip")
        assert json.loads(response.data)["code"] == code

    def test_headers_that_are_no_text(self, port: int) -> None:
        response = post(port, LIST, b"{}", x_request_id="é")  # sent as Latin-1
        assert (response.status, json.loads(response.data)["code"]) == (400, "invalid_argument")

    def test_other_paths_methods_and_protocols(self, port: int) -> None:
        assert post(port, "/nothing", b"").status == 404
        assert post(port, LIST, b"", method="GET").status == 405
        assert post(port, LIST, b"{}", "text/plain").status == 415
        assert post(port, GENERATE, b"", "application/grpc").status == 415

    def test_a_deadline(self, port: int, warm: FakeServer) -> None:
        warm.draw.hold()
        *_, end = stream(port, GENERATE, {"model": "draw", "prompt": "x"}, connect_timeout_ms="100")
        assert end["error"]["code"] == "deadline_exceeded"
        warm.draw.release()
        until(lambda: warm.busy() == 0)

    def test_leaving_frees_the_model(self, port: int, warm: FakeServer) -> None:
        warm.draw.hold()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = envelope(json.dumps({"model": "draw", "prompt": "x", "steps": 500}).encode())
        connection.request("POST", GENERATE, body, {"content-type": STREAM})
        connection.getresponse().read(5)
        connection.close()
        until(warm.leaving)
        warm.draw.release()
        until(lambda: warm.busy() == 0)
        assert warm.draw.calls < 10

    def test_a_request_that_does_not_arrive(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pages, "ARRIVAL_SECONDS", 0.2)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as half:
            head = f"POST {LIST} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {JSON}\r\n"
            half.sendall(f"{head}content-length: 9\r\n\r\n{{".encode())
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += half.recv(4096)
            assert b" 504 " in answer and b"deadline_exceeded" in answer

    def test_a_client_that_reads_nothing(self, port: int, warm: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pages, "UNREAD_SECONDS", 0.3)
        warm.draw.picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = envelope(json.dumps({"model": "draw", "prompt": "x", "steps": 1, "images": 64}).encode())
            head = f"POST {GENERATE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {STREAM}\r\n"
            deaf.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: warm.busy() == 1)
            until(lambda: warm.busy() == 0)


class TestPages:
    def test_a_page_that_is_not_allowed(self, port: int, warm: FakeServer) -> None:
        for origin in ("https://evil.example", "null", "http://studio.example", f"{PAGE}:8443", "http://localhost"):
            response = post(port, LIST, b"{}", origin=origin)
            assert response.status == 403 and "may not call this server" in json.loads(response.data)["message"]
            assert post(port, GENERATE, b"", origin=origin, method="OPTIONS").status == 403
            assert response.headers["access-control-allow-origin"] is None
        assert not warm.draw.calls

    def test_a_page_that_is_allowed(self, port: int) -> None:
        asked = post(port, LIST, b"", origin=PAGE, method="OPTIONS", access_control_request_method="POST")
        assert asked.status == 204 and asked.headers["access-control-allow-origin"] == PAGE
        assert "connect-timeout-ms" in asked.headers["access-control-allow-headers"]
        assert asked.headers["access-control-allow-headers"].endswith(", *")
        answered = post(port, LIST, b"{}", origin=PAGE)
        assert answered.status == 200 and answered.headers["access-control-allow-origin"] == PAGE
        assert "Origin" in answered.headers.get_all("vary")
        assert "enginecast-error" in answered.headers["access-control-expose-headers"]

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:80", "10.0.0.7", "gpu-box:9"])
    def test_names_of_this_server(self, port: int, host: str) -> None:
        assert post(port, LIST, b"{}", host=host).status == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "a b"]
    )
    def test_a_name_that_was_resolved_to_this_machine(self, port: int, host: str) -> None:
        response = post(port, LIST, b"{}", host=host)
        assert response.status == 403 and "is not known as" in json.loads(response.data)["message"]

    @pytest.mark.parametrize(
        "origin", ["*", "null", "studio.example", "https://studio.example/", "file:///a", "https://"]
    )
    def test_what_is_no_origin(self, origin: str) -> None:
        with pytest.raises(InvalidInput, match="http_origins"):
            check_origin(origin)


class TestGrpcWeb:
    def test_a_stream(self, port: int, warm: FakeServer) -> None:
        response = post(port, GENERATE, envelope(request(steps=2, seed=3).SerializeToString()), WEB, x_grpc_web="1")
        *messages, (flags, trailers) = envelopes(response.data)
        assert flags == 0x80 and b"grpc-status: 0" in trailers
        kinds = [image_pb2.GenerateResponse.FromString(data).WhichOneof("event") for _, data in messages]
        assert kinds == ["queued", "progress", "progress", "image", "done"]

    def test_an_error(self, port: int) -> None:
        response = post(port, GENERATE, envelope(request(steps=0).SerializeToString()), WEB)
        ((_, trailers),) = envelopes(response.data)
        assert b"grpc-status: 3" in trailers and b"enginecast-field: steps" in trailers

    def test_one_response(self, port: int) -> None:
        response = post(port, LIST, envelope(b""), WEB)
        (_, data), _ = envelopes(response.data)
        assert [model.name for model in model_pb2.ListModelsResponse.FromString(data).models] == ["draw", "talk"]

    def test_too_many_fields(self, port: int) -> None:
        response = post(port, GENERATE, envelope(b"\x0a\x00" * 20_000), WEB)
        ((_, trailers),) = envelopes(response.data)
        assert b"grpc-status: 3" in trailers and b"fields" in trailers


def request_over(context: ssl.SSLContext, port: int) -> int:
    """The HTTP status of a call with TLS."""
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    try:
        connection.request("POST", LIST, b"{}", {"content-type": JSON})
        return connection.getresponse().status
    finally:
        connection.close()


class TestServer:
    def test_a_port_in_use(self, port: int, warm: FakeServer) -> None:
        with pytest.raises(Unavailable, match="--http"):
            serve(warm, f"127.0.0.1:{port}")

    def test_tls_with_a_certificate_that_changes(self, warm: FakeServer, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        files = authority.issue("server")
        context = ssl.create_default_context(cafile=str(authority.path))

        def serial() -> object:
            with (
                socket.create_connection(("localhost", server.port), timeout=20) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as secure,
            ):
                return (secure.getpeercert() or {})["serialNumber"]

        server = serve(warm, "127.0.0.1:0", Security(files))
        assert request_over(context, server.port) == 200
        first = serial()
        authority.issue("server")
        second = serial()
        files.cert.write_text("nothing")  # the former one stays in use
        assert first != second == serial()
        warm.do(server.stop())

    def test_clients_with_a_certificate(self, warm: FakeServer, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        server = serve(warm, "127.0.0.1:0", Security(replace(authority.issue("server"), client_ca=authority.path)))
        context = ssl.create_default_context(cafile=str(authority.path))
        with pytest.raises((ssl.SSLError, OSError)):
            request_over(context, server.port)
        own = authority.issue("client")
        context.load_cert_chain(own.cert, own.key)
        assert request_over(context, server.port) == 200
        warm.do(server.stop())

    def test_other_addresses_need_tls(self, warm: FakeServer) -> None:
        with pytest.raises(InvalidInput, match="there is no TLS"):
            serve(warm, "0.0.0.0:0")

    async def test_settings(self, warm: FakeServer) -> None:
        with pytest.raises(InvalidInput, match=r"^http_hosts: is of no effect without --http"):
            others(warm.host, Settings(http_hosts=["gpu-box"]), OPEN)
        assert others(warm.host, Settings(), OPEN) == []
        (server,) = others(warm.host, Settings(http="127.0.0.1:0", http_origins=[PAGE]), OPEN)
        line = await server.start()
        assert line.startswith("HTTP on http://127.0.0.1:")
        await server.stop()

    def test_it_stops_while_connections_are_open(self, warm: FakeServer) -> None:
        server = serve(warm)
        with socket.create_connection(("127.0.0.1", server.port)) as idle:
            post(server.port, LIST, b"{}")
            began = time.monotonic()
            warm.do(server.stop())
            assert time.monotonic() - began < 1 and idle.recv(1) == b""
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), timeout=1)
