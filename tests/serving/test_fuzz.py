"""What nobody should send: messages made from descriptors, broken pictures, tensors whose shapes lie, noise instead of
calls. Every answer has a clear status, and the server serves afterwards. The parts marked `full` send more of the same.
"""

from __future__ import annotations

import http.client
import io
import random
import re
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.json_format import MessageToJson
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.dialects.grpc.connection import Connection
from serving.enginecast_pb import chat_pb2, embed_pb2, image_pb2, inference_pb2, job_pb2, model_pb2
from serving.security.gate import Gate
from serving.security.protection import Security
from tests.fakes import certificates
from tests.fakes.messages import altered, messages
from tests.fakes.serving import FakeServer
from tests.fakes.toys import DRAW, ROOT, TALK, process

FILES = (chat_pb2, embed_pb2, image_pb2, inference_pb2, job_pb2, model_pb2, health_pb2, reflection_pb2)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
ENDLESS = "/grpc.health.v1.Health/Watch"
UNLOADING = ("UnloadModel", "RepositoryModelUnload")
KNOWN = (DRAW, TALK, f"{DRAW}/unet", f"{DRAW}@1", "enginecast.v1.ImageService", "nobody")
CLEAR = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
}
UNCLEAR = re.compile(rf"Traceback|File \"|site-packages|\.py\b|{re.escape(str(ROOT))}|/tmp/")


def turn(role: int, **part: Any) -> chat_pb2.Message:
    return chat_pb2.Message(role=role, parts=[chat_pb2.Part(**part)])  # type: ignore[arg-type]


def bases() -> dict[str, list[Any]]:
    """Requests that are right."""
    shown = saved("PNG")
    turns = [turn(2, image=shown), turn(3, text="x"), turn(2, text="y")]
    drawing = image_pb2.GenerateRequest(model=DRAW, prompt="x", steps=2)
    more = image_pb2.GenerateRequest(
        model=DRAW, prompt="x", negative_prompt="y", steps=2, images=2, seed=1, guidance_scale=3, preview_every=1,
        width=64, height=64, sampler="ddim",
    )  # fmt: skip
    return {
        CHAT: [chat_pb2.ChatRequest(model=TALK, max_tokens=3, messages=turns[:count]) for count in (1, 3)],
        GENERATE: [drawing, more],
        INFER: [lie(random.Random(0), 0)],
    }


class Target:
    """A server of toys, and what it answered."""

    def __init__(self, address: str, log: Path) -> None:
        self.address, self.log = address, log
        self.channel = grpc.insecure_channel(
            address, [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        )

    def call(self, method: str, data: bytes, timeout: float = 3) -> grpc.StatusCode:
        """Send a request and read the whole answer. Its status, which must be a clear one."""
        found: Any = self.channel.stream_stream(method, None, None)(iter([data]), timeout=timeout)
        try:
            for _ in found:
                pass
        except grpc.RpcError:
            pass
        said = f"{found.code()}: {found.details()} {list(found.trailing_metadata() or ())}"
        allowed = CLEAR | ({grpc.StatusCode.UNAVAILABLE} if "is unload" in (found.details() or "") else set())
        assert found.code() in allowed and not UNCLEAR.search(said) and len(said) < 8192, (method, data[:300], said)
        code: grpc.StatusCode = found.code()
        return code

    def serves(self) -> None:
        """Everything is as it was."""
        for name in (DRAW, TALK):
            assert self.call(LOAD, model_pb2.LoadModelRequest(name=name).SerializeToString(), 10) is grpc.StatusCode.OK
        drawing = image_pb2.GenerateRequest(model=DRAW, prompt="x", steps=1)
        assert self.call(GENERATE, drawing.SerializeToString(), 10) is grpc.StatusCode.OK
        assert self.call(CHAT, question(text="x"), 10) is grpc.StatusCode.OK
        log = self.log.read_text()
        assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]


LOAD = "/enginecast.v1.ModelService/LoadModel"
GENERATE = "/enginecast.v1.ImageService/Generate"
CHAT = "/enginecast.v1.ChatService/Chat"
INFER = "/inference.GRPCInferenceService/ModelInfer"


def question(**part: Any) -> bytes:
    return chat_pb2.ChatRequest(model=TALK, max_tokens=2, messages=[turn(2, **part)]).SerializeToString()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("toys")
    with process(folder, 5) as (started, address):
        found = Target(address, folder / "log")
        yield found
        found.channel.close()
        assert started.poll() is None, "the server has ended"


# --- messages made from descriptors


def requests(method: str, files: Sequence[bytes]) -> st.SearchStrategy[Any]:
    """Requests of a method, some of which are nearly right. What others need meanwhile is not unloaded."""
    known = ["nobody", f"{DRAW}@1"] if method.endswith(UNLOADING) else KNOWN
    some = messages(METHODS[method].input_type, known, files)
    for base in bases().get(method, ()):
        some |= altered(base, known, files)
    return some


def always(examples: int) -> settings:
    """The same examples at each run."""
    checks = list(HealthCheck)
    return settings(max_examples=examples, database=None, derandomize=True, suppress_health_check=checks)


def fuzz(target: Target, method: str, examples: int) -> None:
    seconds = 0.1 if method == ENDLESS else 1.0

    @always(examples)
    @given(requests(method, [picture() for picture in PICTURES.values()][:8]))
    def send(message: Any) -> None:
        target.call(method, message.SerializeToString(), seconds)

    send()


def test_messages(target: Target) -> None:
    for method in METHODS:
        fuzz(target, method, 2 if method == ENDLESS else 6)
    target.serves()


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_many_messages(target: Target, method: str) -> None:
    fuzz(target, method, 30 if method == ENDLESS else 500)
    target.serves()


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_messages_as_json(method: str, tmp_path: Path) -> None:
    """The same over HTTP, as JSON of which some is broken."""
    pytest.importorskip("connectrpc")
    from serving.dialects.connect.application import Application, endpoints
    from serving.dialects.http.server import HttpServer

    with FakeServer(tmp_path, ready=True) as fake:
        if method not in endpoints(fake.host):
            pytest.skip("it is served over gRPC only")
        server = HttpServer(Application(fake.host, Gate()), "127.0.0.1:0", [], [])
        fake.do(server.start())
        generator = random.Random(0)

        @always(200)
        @given(requests(method, [saved("PNG"), b""]))
        def send(message: Any) -> None:
            text = MessageToJson(message)
            if generator.random() < 0.3:
                at = generator.randrange(len(text))
                text = text[:at] + generator.choice(["", "{", "]", '"', "\\ud800", "1e999", "null"]) + text[at + 1 :]
            code, said = post(server.port, method, text.encode())
            assert code < 500 and not re.search('"(unknown|internal)"', said) and not UNCLEAR.search(said), (text, said)

        try:
            send()
            assert list(fake.client.generate(image_pb2.GenerateRequest(model=DRAW, prompt="x")))[-1].HasField("done")
        finally:
            fake.do(server.stop())


def post(port: int, method: str, data: bytes) -> tuple[int, str]:
    """Send JSON to a method over HTTP: the status and the body of the answer."""
    streams = method in (CHAT, GENERATE, "/enginecast.v1.EmbedService/Embed")
    body = struct.pack(">BI", 0, len(data)) + data if streams else data
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    kind = "application/connect+json" if streams else "application/json"
    connection.request("POST", method, body, {"content-type": kind, "connect-timeout-ms": "1000"})
    answer = connection.getresponse()
    said = answer.read().decode("latin-1")
    connection.close()
    return answer.status, said


# --- pictures


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (16, 16), random.Random(0).randbytes(16 * 16 * 3)).save(file, kind, **options)
    return file.getvalue()


def frames() -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("P", (64, 64), number % 255) for number in range(500)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def circular_tiff() -> bytes:
    """A directory whose next one is itself."""
    return b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 256, 3, 1, 16) + struct.pack("<I", 8)


def icon() -> bytes:
    """A picture of huge claims inside an icon."""
    inner = png(60_000, 60_000)
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


PICTURES: dict[str, Callable[[], bytes]] = {
    "good": lambda: saved("PNG"),
    "empty": lambda: b"",
    "huge claims": lambda: png(2**31 - 1, 2**31 - 1),
    "no rows": lambda: png(0, 0),
    "long": lambda: png(1_000_000, 1),
    "bomb": lambda: png(8000, 8000, b"\0" * (8000 * 1001), 1, 0),
    "too little data": lambda: png(100, 100, b"\0" * 50),
    "text": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) run\n",
    "wrong magic": lambda: b"\xff\xd8\xff" + saved("PNG"),
    "frames": frames,
    "circular": circular_tiff,
    "icon": icon,
    "zip": lambda: b"PK\3\4" + saved("PNG"),
    "twice": lambda: saved("PNG") * 2,
}
KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "ICO", "TGA", "PPM")


def broken(generator: random.Random) -> bytes:
    """A picture file that was cut, altered, or joined with another."""
    whole = bytearray(saved(generator.choice(KINDS)))
    for _ in range(generator.randint(0, 3)):
        at = generator.randrange(min(len(whole), generator.choice([16, 64, len(whole)])))
        whole[at] = generator.choice([0, 255, 127, 128, generator.randrange(256)])
    cut = whole[: generator.randrange(len(whole) + 1)] if generator.random() < 0.4 else whole
    return bytes(cut + saved(generator.choice(KINDS))[: generator.choice([0, 0, 10, 1000])])


def show(target: Target, picture: bytes) -> None:
    """Send a picture in a question and as what is drawn on."""
    assert target.call(CHAT, question(image=picture), 20) in CLEAR
    drawing = image_pb2.GenerateRequest(model=DRAW, prompt="x", steps=1, image=picture)
    assert target.call(GENERATE, drawing.SerializeToString(), 20) in CLEAR


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(target: Target, name: str) -> None:
    show(target, PICTURES[name]())
    assert target.call(CHAT, question(image=PICTURES["good"]()), 20) is grpc.StatusCode.OK


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.full)])
def test_broken_pictures(target: Target, count: int) -> None:
    generator = random.Random(count)
    for _ in range(count):
        show(target, broken(generator))
    target.serves()


# --- tensors


def lie(generator: random.Random, most: int = 3) -> inference_pb2.ModelInferRequest:
    """A call of the denoiser of which something is not true."""
    request = inference_pb2.ModelInferRequest(model_name=f"{DRAW}/unet")
    right = {"sample": ("FP32", [1, 4, 8, 8]), "timestep": ("INT64", [1]), "encoder_hidden_states": ("FP32", [1, 8, 8])}
    for name, (datatype, shape) in right.items():
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        count, width = 1, 8 if datatype == "INT64" else 4
        for length in shape:
            count *= length
        if datatype == "FP32" and generator.random() < 0.5:
            tensor.contents.fp32_contents.extend([0.5] * count)
        else:
            request.raw_input_contents.append(bytes(count * width))
    for _ in range(generator.randint(0, most)):
        _falsify(request, generator)
    return request


def _falsify(request: inference_pb2.ModelInferRequest, generator: random.Random) -> None:
    tensor = generator.choice(request.inputs) if request.inputs else request.inputs.add(name="sample")
    lengths = [-1, 0, 1, 2, 3, 7, 64, 65, 10**6, 2**31, 2**62, 2**63 - 1, -(2**63)]
    what = generator.randrange(9)
    if what == 0:
        del tensor.shape[:]
        tensor.shape.extend(generator.choice(lengths) for _ in range(generator.choice([0, 1, 4, 4, 9, 100])))
    elif what == 1:
        tensor.datatype = generator.choice(["FP64", "BYTES", "", "fp32", "INT8", "BOOL", "FP16", "UINT64", "x" * 1000])
    elif what == 2:
        tensor.name = generator.choice(["", "sample", "timestep", "x" * 100_000, "\0"])
    elif what == 3:
        request.raw_input_contents.append(bytes(generator.choice([0, 1, 3, 1024, 1_000_000])))
    elif what == 4:
        del request.raw_input_contents[:]
    elif what == 5:
        tensor.contents.int64_contents.extend([2**63 - 1] * generator.choice([1, 8, 1000]))
    elif what == 6:
        tensor.contents.bytes_contents.extend([b"x"] * 9)
        tensor.contents.fp32_contents.extend([float("nan")] * 3)
    elif what == 7:
        request.inputs.add().CopyFrom(tensor)
    else:
        request.outputs.add(name=generator.choice(["noise_pred", "", "weights"]))


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.full)])
def test_tensors_whose_shapes_lie(target: Target, count: int) -> None:
    generator = random.Random(count)
    found = {target.call(INFER, lie(generator).SerializeToString()) for _ in range(count)}
    assert found >= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    target.serves()


# --- noise

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(payload) if length is None else length)[1:] + bytes([kind, flags]) + struct.pack(
        ">I", stream
    ) + payload  # fmt: skip


def headers(path: bytes) -> bytes:
    """A block of headers, none of them compressed."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"),
              (b"te", b"trailers"), (b"content-type", b"application/grpc")]  # fmt: skip
    return b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)


def noises(generator: random.Random) -> Iterator[bytes]:
    """What is sent on one connection each."""
    opened = PREFACE + SETTINGS + frame(1, 4, 1, headers(CHAT.encode()))
    yield b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + generator.randbytes(500)  # the beginning of TLS
    yield PREFACE
    yield opened + frame(0, 1, 1, b"\0\xff\xff\xff\xff")  # a message of 4 GiB
    yield opened + frame(0, 1, 1, b"\1\0\0\0\4abcd")  # compressed, by nothing
    yield opened + frame(0, 1, 1, b"\0\0\0\0\4\xff\xff\xff\xff")  # no protobuf
    yield opened + frame(0, 0, 1, b"\0\0", 16384)  # cut
    yield opened + frame(3, 0, 1, struct.pack(">I", 8)) * 500  # reset, again and again
    yield opened + frame(8, 0, 0, struct.pack(">I", 2**31 - 1)) * 3  # windows that overflow
    yield (
        PREFACE
        + SETTINGS
        + b"".join(
            frame(1, 5, number, headers(CHAT.encode())) + frame(3, 0, number, b"\0\0\0\x08")
            for number in range(1, 2001, 2)
        )
    )  # streams that are opened and reset at once
    yield PREFACE + SETTINGS + frame(1, 0, 1, headers(b"/x")) + frame(9, 0, 1, b"\0\1a\1b" * 2000) * 20
    while True:
        yield generator.choice([b"", PREFACE, PREFACE + SETTINGS, opened]) + b"".join(
            frame(
                generator.randrange(12), generator.randrange(256), generator.choice([0, 1, 2, 3, 2**31 - 1]),
                generator.randbytes(generator.choice([0, 4, 8, 100])), generator.choice([None, None, 2**24 - 1]),
            )
            for _ in range(generator.randint(0, 6))
        ) + generator.randbytes(generator.choice([0, 0, 50]))  # fmt: skip


def shout(address: str, noise: bytes) -> bytes:
    """Send it, and read for a moment what is answered."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        connection.settimeout(0.02)
        try:
            connection.sendall(noise)
            return connection.recv(65536)
        except OSError:
            return b""


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.full)])
def test_noise_instead_of_calls(target: Target, count: int) -> None:
    sent = noises(random.Random(count))
    answers = [shout(target.address, next(sent)) for _ in range(count)]
    assert not any(UNCLEAR.search(answer.decode("latin-1")) for answer in answers)
    target.serves()


def test_noise_instead_of_tls(tmp_path: Path) -> None:
    """A port with TLS gets calls without it, and noise."""
    authority = certificates.Authority(tmp_path)
    security = Security(authority.issue("server"))
    sent = noises(random.Random(0))
    with FakeServer(tmp_path / "bundles", security=security, connection=Connection(ca=authority.path)) as server:
        for _ in range(30):
            assert b"grpc" not in shout(server.address, next(sent))
        server.load_all()
        assert list(server.client.generate(image_pb2.GenerateRequest(model=DRAW, prompt="x")))[-1].HasField("done")
