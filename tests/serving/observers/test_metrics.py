"""Metrics as Prometheus scrapes them, parsed by its own client library."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.errors import EngineError, InvalidInput, Unavailable
from serving.observers.metrics import MOST, Metrics
from serving.security import tokens
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.scopes import Scope
from tests.fakes.certificates import Authority
from tests.fakes.serving import FakeServer, request, until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Watched(FakeServer):
    """A server with metrics at `url`."""

    def __init__(self, folder: Path) -> None:
        self.metrics = Metrics()
        super().__init__(folder, observers=[self.metrics], ready=True)
        self._serving = self.metrics.served("127.0.0.1:0")
        self.url = f"http://127.0.0.1:{self._serving.__enter__()}/metrics"

    def end(self) -> None:
        self._serving.__exit__(None, None, None)
        super().end()

    def samples(self) -> Samples:
        """What is scraped, by name and labels."""
        with urllib.request.urlopen(self.url, timeout=10) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """One value."""
        return self.samples().get((name, frozenset(labels.items())))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Watched]:
    with Watched(tmp_path) as server:
        yield server


def test_requests_are_counted_by_code(server: Watched) -> None:
    server.alive()
    server.draw.failure = EngineError("lost")
    with pytest.raises(EngineError):
        list(server.client.generate(request(steps=1)))
    labels = {"method": "enginecast.v1.ImageService/Generate", "model": "draw"}
    until(lambda: server.value("enginecast_requests_total", **labels, code="INTERNAL") == 1)
    assert server.value("enginecast_requests_total", **labels, code="OK") == 1
    assert server.value("enginecast_request_seconds_count", model="draw") == 2
    assert server.value("enginecast_first_output_seconds_count", model="draw") == 1
    assert server.value("enginecast_queue_seconds_count", model="draw") == 2


def test_what_was_made_is_counted(server: Watched) -> None:
    server.alive()
    server.draw.failure = None
    list(server.client.generate(request(steps=3)))
    assert server.value("enginecast_steps_total", model="draw") == 5
    assert server.value("enginecast_pictures_total", model="draw") == 2
    assert server.value("enginecast_pictures_total", model="talk") is None
    assert server.value("enginecast_step_seconds_count", model="draw", submodel="denoiser") == 5
    assert server.value("enginecast_batch_size_sum", model="draw", submodel="denoiser") == 5


def test_what_runs_and_waits_is_shown_while_it_does(server: Watched) -> None:
    server.draw.hold()
    streams = [server.client.generate(request(steps=1)) for _ in range(3)]
    until(lambda: server.busy() == 3)
    running = server.value("enginecast_requests_running", model="draw")
    assert running and running + (server.value("enginecast_requests_waiting", model="draw") or 0) == 3
    server.draw.release()
    for stream in streams:
        list(stream)
    until(lambda: server.value("enginecast_requests_running", model="draw") == 0)


def test_states_of_models_are_shown(server: Watched) -> None:
    assert server.value("enginecast_model_state", model="draw", state="ready") == 1
    server.client.unload("draw")
    assert server.value("enginecast_model_state", model="draw", state="ready") == 0
    assert server.value("enginecast_model_state", model="draw", state="unloaded") == 1


def test_memory_of_models_is_shown(server: Watched) -> None:
    next(iter(server.host.catalog)).memory = {"cpu": 1 << 20, "cuda:0": 1 << 30}
    assert server.value("enginecast_model_memory_bytes", model="draw", device="cuda:0") == 1 << 30
    assert server.value("enginecast_model_memory_bytes", model="talk", device="cuda:0") is None


def test_runs_of_engines_have_their_time_and_size(server: Watched) -> None:
    server.metrics.ran("talk", "decoder", calls=8, seconds=0.04)
    server.metrics.ran("talk", "decoder", calls=1, seconds=0.02)
    labels = {"model": "talk", "submodel": "decoder"}
    assert server.value("enginecast_step_seconds_sum", **labels) == pytest.approx(0.06)
    assert server.value("enginecast_batch_size_sum", **labels) == 9
    assert server.value("enginecast_batch_size_bucket", **labels, le="4.0") == 1


def test_no_label_has_a_value_of_a_client(server: Watched) -> None:
    for name in ("none", "xyzzy"):
        with pytest.raises(Exception, match="not served"):
            list(server.client.generate(request(model=name, prompt="xyzzy")))
    until(lambda: any("NOT_FOUND" in dict(labels).values() for _, labels in server.samples()))
    values = {value for _, labels in server.samples() for _, value in labels}
    assert "xyzzy" not in values and "none" not in values and not any("127.0.0.1" in value for value in values)


def test_memory_of_the_process_is_shown(server: Watched) -> None:
    memory = server.value("process_resident_memory_bytes")
    assert memory is not None and memory > 1 << 20


def test_a_used_port_is_said(server: Watched) -> None:
    with pytest.raises(Unavailable, match="metrics cannot be served on"), Metrics().served(server.url[7:-8]):
        pass


def test_other_addresses_than_loopback_need_tls() -> None:
    with pytest.raises(InvalidInput, match="can be reached from other machines"), Metrics().served("0.0.0.0:0"):
        pass


def test_a_server_with_tls_has_metrics_with_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with Metrics().served("127.0.0.1:0", Security(authority.issue("server"))) as port:
        trusted = ssl.create_default_context(cafile=authority.path)
        with urllib.request.urlopen(f"https://localhost:{port}/metrics", timeout=10, context=trusted) as response:
            assert b"process_cpu_seconds_total" in response.read()
        with pytest.raises(OSError):
            urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10)


def test_a_stuck_loop_does_not_hang_a_scrape_for_ever(server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.observers.metrics.PATIENCE", 0.1)

    async def sleep() -> None:
        import time

        time.sleep(0.5)

    stuck = asyncio.run_coroutine_threadsafe(sleep(), server._loop)
    with pytest.raises(OSError):
        server.samples()
    stuck.result(5)
    assert server.value("enginecast_model_state", model="draw", state="ready") == 1


def test_a_server_with_tokens_has_metrics_for_the_scope(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    scraper, chatter = (
        tokens.new(file, name, frozenset({scope}), None, None)
        for name, scope in (("prometheus", Scope.METRICS), ("chatter", Scope.INFER))
    )
    with Metrics().served("127.0.0.1:0", Security(gate=Gate(file))) as port:

        def status(**headers: str) -> int:
            wanted = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
            try:
                with urllib.request.urlopen(wanted, timeout=10) as response:
                    return int(response.status)
            except HTTPError as error:
                with error:
                    assert scraper not in error.read().decode()
                    return error.code

        found = [status(Authorization=f"Bearer {secret}") for secret in (scraper, chatter, "x" * 43)]
        assert found == [200, 403, 401] and status() == 401


def test_ipv6(server: Watched) -> None:
    with server.metrics.served("[::1]:0") as port, urllib.request.urlopen(f"http://[::1]:{port}/", timeout=10) as found:
        assert found.status == 200


def test_connections_that_say_nothing_do_not_pile_up(server: Watched) -> None:
    """Those above the limit are closed, and room is there again when the others have left."""
    address = ("127.0.0.1", int(server.url.split(":")[2].partition("/")[0]))
    silent = [socket.create_connection(address, timeout=10) for _ in range(MOST)]
    until(lambda: sum("process_request_thread" in thread.name for thread in threading.enumerate()) >= MOST)
    with socket.create_connection(address, timeout=10) as further:
        assert further.recv(1) == b"", "it was closed"
    for connection in silent:
        connection.close()
    until(lambda: not any("process_request_thread" in thread.name for thread in threading.enumerate()))
    assert server.value("enginecast_model_state", model="draw", state="ready") == 1
