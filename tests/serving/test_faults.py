"""Faults beside the server: engines that fail, no memory, a full disk, a clock that jumps, a server that is killed,
connections that nobody uses. Slow readers are in test_server.py and test_attack.py, certificates in test_tls.py.
"""

from __future__ import annotations

import io
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image

from enginecast import Client
from runtime.errors import DeadlineExceeded, EnginecastError, EngineError, ResourceExhausted, Unavailable
from serving.host.offers import Limits
from serving.security.audit import Audit
from tests.fakes.serving import FakeServer, request, until
from tests.fakes.toys import DRAW, TALK, process

FULL = Path("/dev/full")


@pytest.fixture
def parallel(tmp_path: Path) -> Iterator[FakeServer]:
    """A server that runs two requests at once."""
    server = FakeServer(tmp_path, Limits(slots=2, max_queue=4, grace_seconds=5), ready=True)
    yield server
    server.end()


@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        (EngineError("unet on fake failed"), EngineError, grpc.StatusCode.INTERNAL),
        (MemoryError("cannot allocate 3 GiB"), ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ZeroDivisionError("a secret"), EnginecastError, grpc.StatusCode.INTERNAL),
    ],
)
def test_an_engine_that_fails_in_the_middle(
    parallel: FakeServer, failure: Exception, kind: type[EnginecastError], code: grpc.StatusCode
) -> None:
    """All requests that run on it end with a clear status; those of another model go on, and later ones are served."""
    parallel.draw.hold()
    parallel.models["talk"].hold()
    with Client(parallel.address, "draw") as client, Client(parallel.address, "talk") as other:
        drawing, talking = client.generate_stream("x", steps=4), other.chat_stream("x")
        ended: list[str] = []
        thread = threading.Thread(target=lambda: ended.append(talking.result().text))
        thread.start()
        parallel.draw.let(2)
        for event in drawing:
            if getattr(event, "step", 0) == 2:
                break
        parallel.draw.failure = failure
        parallel.draw.let(1)
        with pytest.raises(kind) as caught:
            drawing.result()
        assert type(caught.value) is kind
        text = str(caught.value)
        assert "secret" not in text and "GiB" not in text and "Traceback" not in text
        assert kind is not EnginecastError or code.name in text
        parallel.models["talk"].release()
        thread.join(10)
        assert ended == ["a red círcle"]
    until(lambda: parallel.busy() == 0)
    assert parallel.alive()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="memory of another process is bounded on Linux only")
def test_a_picture_without_memory(tmp_path: Path) -> None:
    """The process gets no more memory from the system than 30 MiB; decoding the picture takes 160."""
    file = io.BytesIO()
    Image.new("1", (6300, 6300)).save(file, "png")
    with process(tmp_path, 5) as (server, address), Client(address, TALK, timeout=20, attempts=1) as client:
        assert client.chat("x", [file.getvalue()], max_tokens=2).text
        status = Path(f"/proc/{server.pid}/status").read_text()
        size = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmSize"))
        resource.prlimit(server.pid, resource.RLIMIT_AS, (size + (30 << 20), resource.RLIM_INFINITY))
        with pytest.raises(ResourceExhausted, match="not enough memory for this request"):
            client.chat("x", [file.getvalue()], max_tokens=2)
        resource.prlimit(server.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert client.chat("x", [file.getvalue()], max_tokens=2).text


def test_a_server_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    """Requests that ran end with UNAVAILABLE; the same clients are served when the server is there again."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with process(tmp_path / "first", 5) as (server, address):
        clients = [Client(address, DRAW, attempts=1), Client(address, TALK, attempts=1)]
        drawing = clients[0].generate_stream("x", steps=1000)
        while "Progress" not in type(next(drawing)).__name__:
            pass
        server.kill()
        server.wait()
        began = time.monotonic()
        with pytest.raises(Unavailable, match="no server answers there, or it went away"):
            drawing.result()
        with pytest.raises(Unavailable):
            clients[1].chat("x")
        assert time.monotonic() - began < 5
    with process(tmp_path / "second", 5, address=address):
        retrying = Client(address, DRAW)
        assert retrying.generate("x", steps=1).image.shape == (64, 64, 3)
        until(lambda: _answers(clients[1]))
        for client in (*clients, retrying):
            client.close()


def _answers(client: Client) -> bool:
    try:
        return bool(client.chat("x", max_tokens=2).text)
    except Unavailable:
        return False


@pytest.mark.full
def test_a_client_tries_again_while_the_server_starts_anew(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with Client(address, DRAW, attempts=5, backoff=1) as client:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(client.generate("x", steps=1).image.shape))
        thread.start()
        time.sleep(0.5)
        with process(tmp_path, 5, address=address):
            thread.join(30)
    assert found == [(64, 64, 3)]


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
class TestAFullDisk:
    def test_of_the_audit_log(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """What the audit log cannot hold is in the log; the call is made."""
        with FakeServer(tmp_path, observers=[Audit(FULL)]) as server:
            server.client.load("draw")
            assert list(server.client.generate(request(steps=2)))[-1].HasField("done")
        assert "the audit log cannot be written" in caplog.text and "LoadModel" in caplog.text

    @pytest.mark.full
    def test_of_the_log(self, tmp_path: Path) -> None:
        with process(tmp_path, 1, log_file=FULL) as (server, address), Client(address, DRAW) as client:
            assert client.generate("x", steps=1).image.shape == (64, 64, 3)
            with pytest.raises(EnginecastError):
                client.generate("x", steps=0)
            server.terminate()
            assert server.wait(10) == 0

    @pytest.mark.full
    def test_where_nothing_can_be_written(self, vlm_bundle: Path, tmp_path: Path, monkeypatch: Any) -> None:
        """No file can grow: what is measured once and kept is measured anew each time."""
        monkeypatch.delenv("ENGINECAST_CHOICES", raising=False)
        monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path))
        command = [sys.executable, "-m", "serving.cli.commands", "serve", f"talk={vlm_bundle}", "--warm-up"]
        with subprocess.Popen(
            [*command, "--address", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        ) as server:  # fmt: skip
            assert server.stdout is not None and server.stderr is not None
            address = server.stdout.readline().split()[-1]
            assert "is ready" in server.stdout.readline()
            with Client(address, "talk", timeout=60) as client:
                assert client.chat("what color is it?", max_tokens=4).text
            server.terminate()
            said = server.stderr.read()
            assert server.wait(30) == 0 and "Traceback" not in said


JUMP = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) { return access(getenv("JUMPED"), F_OK) ? 0 : atol(getenv("JUMP")); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *kept) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (kept) *kept = exact.tv_sec;
    return exact.tv_sec;
}
"""
"""A library that moves the clock of a process by JUMP seconds as soon as the file JUMPED is there."""


@pytest.fixture(scope="module")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jump")
    (folder / "jump.c").write_text(JUMP)
    library = folder / "jump.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "jump.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="there is no C compiler for Linux")
@pytest.mark.full
@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps(jumping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    """Deadlines and times are measured with the clock that never jumps, those of a running request too."""
    for name, value in {"LD_PRELOAD": jumping, "JUMP": years * 365 * 86_400, "JUMPED": tmp_path / "jumped"}.items():
        monkeypatch.setenv(name, str(value))
    with process(tmp_path, 5) as (_, address), Client(address, DRAW, timeout=20, attempts=1) as client:
        drawing = client.generate_stream("x", steps=50)
        while "Progress" not in type(next(drawing)).__name__:
            pass
        (tmp_path / "jumped").touch()
        done = drawing.result().done
        assert 0 <= done.queue_seconds < 10 and 0 <= done.run_seconds < 10
        assert 0 <= client.generate("x", steps=1).done.run_seconds < 5
        client.timeout = 0.5
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.generate("x", steps=1000)
        assert 0.4 < time.monotonic() - began < 3
        client.timeout = 20
        until(lambda: not any(model.running for model in client.models()))


def test_connections_that_nobody_uses(tmp_path: Path) -> None:
    """Hundreds of clients that connect and send nothing, or half of a call, hold up nobody; their files are freed when
    they are gone.
    """
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    with process(tmp_path, 5) as (server, address), Client(address, DRAW) as client:
        assert client.generate("x", steps=1)
        before = open_files(server.pid)
        host, _, port = address.rpartition(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(300)]
        for number, connection in enumerate(idle):
            connection.sendall([b"", preface[:20], preface + b"\0\0\x20\1\4\0\0\0\1"][number % 3])
        began = time.monotonic()
        assert client.generate("x", steps=1).image.shape == (64, 64, 3)
        assert time.monotonic() - began < 2
        for connection in idle:
            connection.close()
        until(lambda: open_files(server.pid) <= before + 2)


def open_files(pid: int) -> int:
    """How many files a process has open."""
    folder = Path(f"/proc/{pid}/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0
