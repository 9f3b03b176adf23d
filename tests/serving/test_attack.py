"""What one client sends may not hurt another, nor the stopping: attacks from a process of their own on a server in
another.

The figures of the issue on a real server:

    enginecast serve bundles/shapes-diffusion bundles/shapes-vlm --address 127.0.0.1:50051 &
    python -m tests.serving.test_attack measure 127.0.0.1:50051 $! shapes-diffusion shapes-vlm
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from serving.enginecast_pb import chat_pb2, image_pb2, model_pb2
from tests.fakes import toys
from tests.fakes.toys import process

SERVICES = {"image": "ImageService/Generate", "chat": "ChatService/Chat"}
METHODS = {
    "/enginecast.v1.ImageService/Generate": image_pb2.GenerateRequest,
    "/enginecast.v1.ChatService/Chat": chat_pb2.ChatRequest,
    "/enginecast.v1.ModelService/GetModel": model_pb2.GetModelRequest,
    "/enginecast.v1.ModelService/ListModels": model_pb2.ListModelsRequest,
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest,
}
GOOD_CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
}


# --- the attacks, each a function of the server's address


def channel(address: str) -> grpc.Channel:
    """A connection of its own: channels alike share one."""
    return grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)])


def call(
    address: str, method: str, message: Any, timeout: float = 30, on: grpc.Channel | None = None
) -> grpc.RpcError | None:
    """Send one request and read all of the answer; the error that it ended with."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    opened = on or channel(address)
    try:
        for _ in opened.unary_stream(method, None, None)(data, timeout=timeout):
            pass
    except grpc.RpcError as error:
        return error
    finally:
        if on is None:
            opened.close()
    return None


def conversation(*parts: chat_pb2.Part, **fields: Any) -> chat_pb2.ChatRequest:
    turn = chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=parts)
    return chat_pb2.ChatRequest(**{"model": TALK, "max_tokens": 2, "messages": [turn], **fields})  # type: ignore[arg-type]


def bomb(edge: int = 8000) -> bytes:
    file = io.BytesIO()
    Image.new("1", (edge, edge)).save(file, "png")
    return file.getvalue()


GENERATE, CHAT, GET = list(METHODS)[:3]
DRAW, TALK = toys.DRAW, toys.TALK


def long_prompts(address: str) -> None:
    text = "circle " * 150_000
    for _ in range(5):
        assert refused(call(address, GENERATE, image_pb2.GenerateRequest(model=DRAW, prompt=text))) == "prompt"
        assert refused(call(address, CHAT, conversation(chat_pb2.Part(text=text)))) == "messages"
    longest = conversation(chat_pb2.Part(text="é" * 399_000))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: call(address, CHAT, longest), range(4)))
        list(
            pool.map(
                lambda _: call(address, GENERATE, image_pb2.GenerateRequest(model=DRAW, prompt="é" * 9_999)), range(20)
            )
        )


def long_names(address: str) -> None:
    name = "draw" * 1_000_000
    for method, message in (
        (GENERATE, image_pb2.GenerateRequest(model=name)),
        (GENERATE, image_pb2.GenerateRequest(model=DRAW, sampler=name)),
        (CHAT, conversation(chat_pb2.Part(text="x"), model=name)),
        (GET, model_pb2.GetModelRequest(name=name)),
        ("/enginecast.v1.ModelService/LoadModel", model_pb2.LoadModelRequest(name=DRAW, target=name)),
        ("/enginecast.v1.ModelService/UnloadModel", model_pb2.UnloadModelRequest(name=name)),
        ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service=name)),
    ):
        for _ in range(3):
            error = call(address, method, message)
            assert (
                error is not None
                and error.code() in GOOD_CODES - {grpc.StatusCode.OK}
                and len(error.details() or "") < 2000
            )


def long_stops(address: str) -> None:
    part = chat_pb2.Part(text="x")
    assert refused(call(address, CHAT, conversation(part, stop=["a" * 3_000_000]))) == "stop"
    assert refused(call(address, CHAT, conversation(part, stop=["a"] * 1000))) == "stop"
    assert call(address, CHAT, conversation(part, stop=["a" * 500] * 16, max_tokens=200)) is None


def bombs(address: str) -> None:
    assert (
        refused(call(address, CHAT, conversation(*[chat_pb2.Part(image=bomb())] * 6))) == "messages[0].parts[0].image"
    )
    picture = chat_pb2.Part(image=bomb(6300))
    assert refused(call(address, CHAT, conversation(*[picture] * 7))) == "messages"
    with ThreadPoolExecutor(3) as pool:  # within the limits, from three clients at once
        assert set(pool.map(lambda _: call(address, CHAT, conversation(picture, picture), timeout=120), range(3))) == {
            None
        }


def unread(address: str) -> None:
    """A reader that does not read, of previews of every step. It reads nothing for a while, then leaves."""
    with channel(address) as opened:
        wanted = image_pb2.GenerateRequest(
            model=DRAW, prompt="x", steps=1000, images=4, preview_every=1, width=512, height=512
        )
        streams = [opened.unary_stream(GENERATE, None, None)(wanted.SerializeToString()) for _ in range(2)]
        time.sleep(WAIT)
        for stream in streams:
            stream.cancel()


def crowds(address: str) -> None:
    """Very many small things: empty parts, calls that idle, garbage."""
    empty = b"\x0a\x00"
    part = b"\x12\x00" * 1_000_000  # of a Message; `parts` is its field 2
    size = len(part)
    prefix = bytes([0x12]) + _varint(size)
    for data in (part, empty * 1_000_000, prefix + part, b"\xff" * 1_000_000, b"\x0a\x02\xff\xfe"):
        error = call(address, CHAT, data)
        assert error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    with channel(address) as opened:
        watch = opened.unary_stream("/grpc.health.v1.Health/Watch", None, None)
        reflect = opened.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", None, None)
        never = threading.Event()

        def silent() -> Iterator[bytes]:
            never.wait(WAIT)
            yield from ()

        streams = [watch(health_pb2.HealthCheckRequest(service=f"s{i}").SerializeToString()) for i in range(500)]
        streams += [reflect(silent()) for _ in range(20)]
        time.sleep(1)
        never.set()
        for stream in streams:
            stream.cancel()


def mutations(address: str) -> None:
    """400 requests whose fields hold what nobody expects, or whose bytes were altered. All end with a
    status of ours.
    """
    generator = random.Random(0)
    codes: dict[Any, int] = {}
    with channel(address) as opened:
        for _ in range(400):
            method, kind = generator.choice(list(METHODS.items()))
            message = kind()
            fill(message, generator)
            data = bytearray(message.SerializeToString())
            if generator.random() < 0.4 and data:
                for _ in range(generator.randint(1, 4)):
                    data[generator.randrange(len(data))] = generator.randrange(256)
            error = call(address, method, bytes(data), timeout=10, on=opened)
            code = grpc.StatusCode.OK if error is None else error.code()
            codes[code] = codes.get(code, 0) + 1
            assert code in GOOD_CODES, (method, bytes(data)[:200], error)
    print(codes)


def fill(message: Any, generator: random.Random) -> None:
    """Give a message random values, some of them plausible."""
    for field in message.DESCRIPTOR.fields:
        if generator.random() < 0.4:
            continue
        for _ in range(generator.choice([1, 1, 2, 5]) if field.is_repeated else 1):
            value = getattr(message, field.name)
            if field.message_type is None:
                drawn = scalar(field, generator)
                value.append(drawn) if field.is_repeated else setattr(message, field.name, drawn)
            elif field.message_type.GetOptions().map_entry:
                name, number = (scalar(field.message_type.fields_by_name[one], generator) for one in ("key", "value"))
                value[name] = number
            else:
                fill(value.add() if field.is_repeated else value, generator)


def scalar(field: Any, generator: random.Random) -> Any:
    """A value of a field that is no message."""
    if field.type == field.TYPE_STRING:
        plausible = ["", DRAW, TALK, "ddim", "<image>", "</s>", "/etc/passwd"]
        return generator.choice([*plausible, "x", "\0", "\x1b[31m", "a\u202eb", "\U000103ff" * 300])
    if field.type == field.TYPE_BYTES:
        return generator.choice([b"", b"\x89PNG", bomb(64), bomb(64)[:60]])
    if field.type == field.TYPE_DOUBLE:
        return generator.choice([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e308, 1e-320])
    if field.type == field.TYPE_ENUM:
        return generator.choice([0, 1, 2, 3, 99])
    return generator.choice([0, 1, 2, 3, 64, 1000, 2**31 - 1, 2**32 - 1])


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def refused(error: grpc.RpcError | None) -> str:
    """The field that INVALID_ARGUMENT names."""
    assert error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    return str(dict(error.trailing_metadata() or ())["enginecast-field"])


ATTACKS = {
    attack.__name__: attack for attack in (long_prompts, long_names, long_stops, bombs, unread, crowds, mutations)
}
WAIT = 2.0


# --- what others see of it


def memory(pid: int, peak: bool = False) -> int:
    """Resident memory of a process, or its peak since `forget_peak`, in bytes."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Watcher:
    """Another client, which checks the server's health every 50 ms. `slowest` is its longest wait in seconds."""

    def __init__(self, address: str) -> None:
        self.slowest = 0.0
        self.checks = 0
        self._stop = threading.Event()
        self._channel = channel(address)
        self._check = health_pb2_grpc.HealthStub(self._channel).Check
        self._check(health_pb2.HealthCheckRequest(), timeout=20)
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            began = time.perf_counter()
            self._check(health_pb2.HealthCheckRequest(), timeout=60)
            self.slowest = max(self.slowest, time.perf_counter() - began)
            self.checks += 1

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._channel.close()


def attack(name: str, address: str, pid: int, models: tuple[str, ...] = ()) -> tuple[float, int, str]:
    """Run an attack in a process of its own: the slowest health check of another client, the growth of the server, what
    it printed.
    """
    before = memory(pid)
    forget_peak(pid)
    with Watcher(address) as watcher:
        ended = subprocess.run(
            [sys.executable, "-m", "tests.serving.test_attack", "attack", name, address, *models],
            capture_output=True,
            text=True,
            timeout=250,
            cwd=toys.ROOT,
        )
        assert ended.returncode == 0, ended.stderr
    assert watcher.checks
    return watcher.slowest, memory(pid, peak=True) - before, ended.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str, Path]]:
    folder = tmp_path_factory.mktemp("toys")
    with process(folder, 5) as (started, address):
        yield started.pid, address, folder / "log"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux' /proc")
@pytest.mark.parametrize("name", ATTACKS)
def test_another_client_does_not_notice(server: tuple[int, str, Path], name: str) -> None:
    pid, address, log = server
    slowest, growth, _ = attack(name, address, pid)
    assert slowest < 2, f"a health check took {slowest:.2f} s"
    assert growth < 300 << 20, f"the server grew by {growth >> 20} MiB"
    assert call(address, GENERATE, image_pb2.GenerateRequest(model=DRAW, prompt="x", steps=1)) is None, "it still draws"
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("busy", ["drawing", "loading", "unloading"])
def test_sigterm_ends_the_process_within_its_grace(tmp_path: Path, busy: str) -> None:
    with (
        process(tmp_path, 1, *(["stuck"] if busy == "loading" else [])) as (started, address),
        channel(address) as opened,
    ):
        wanted = image_pb2.GenerateRequest(model=DRAW, prompt="x", steps=1000).SerializeToString()
        responses = opened.unary_stream(GENERATE, None, None)(wanted)
        next(responses)
        if busy == "unloading":
            unload = model_pb2.UnloadModelRequest(name=DRAW, grace_seconds=3600)
            opened.unary_unary("/enginecast.v1.ModelService/UnloadModel", None, None).future(unload.SerializeToString())
            time.sleep(0.3)
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in responses:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert started.wait(10) == 0
        assert time.monotonic() - began < 1 + 2 + 1, "a second more than is promised, for slow machines"


def measure(address: str, pid: int, models: tuple[str, str]) -> None:
    """Print the figures of every attack on a server of these models, then end it by SIGTERM while it draws."""
    small = chat_pb2.Part(image=bomb(64))
    assert (
        call(address, GENERATE, image_pb2.GenerateRequest(model=models[0], prompt="a circle", images=2, steps=3), 120)
        is None
    )
    assert call(address, CHAT, conversation(small, small, model=models[1], max_tokens=20), 120) is None
    start = memory(pid)
    print(f"start, after an ordinary request to each model: {start >> 20} MiB")
    for name in ATTACKS:
        slowest, _, printed = attack(name, address, pid, models)
        peak = memory(pid, peak=True) - start
        print(
            f"{name:14} slowest health check {slowest * 1000:5.0f} ms, peak memory {peak >> 20:+5d} MiB of the start "
            f"{printed.strip()}"
        )
    time.sleep(2)
    print(f"afterwards: {(memory(pid) - start) >> 20:+d} MiB of the start")
    with channel(address) as opened:
        wanted = image_pb2.GenerateRequest(model=models[0], prompt="a large red circle", steps=1000, images=4)
        responses = opened.unary_stream(GENERATE, None, None)(wanted.SerializeToString())
        next(responses)
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            time.sleep(0.02)
        print(f"SIGTERM while it draws: ended after {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "attack":
        name, address, *models = rest
        DRAW, TALK = models or (DRAW, TALK)
        ATTACKS[name](address)
    else:
        measure(rest[0], int(rest[1]), (rest[2], rest[3]))
