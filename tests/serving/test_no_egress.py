"""Nothing that serves tries to reach another machine.

The server and its clients run in a network namespace that has loopback and no route. There the kernel counts every
attempt to send elsewhere, whatever library makes it, name servers included.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import fcntl, json, os, signal, socket, struct, subprocess, sys, urllib.request
from pathlib import Path

resolver, *bundles = sys.argv[1:]
subprocess.run(["mount", "--bind", resolver, "/etc/resolv.conf"], check=True)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # loopback up: SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x41))


def unroutable():
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    sixth = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return int(dict(zip(*lines))["OutNoRoutes"]) + int(sixth["Ip6OutNoRoutes"])


def attempt(call):
    before = unroutable()
    try:
        call()
    except OSError:
        pass
    return unroutable() - before


seen = {
    "connection": attempt(lambda: socket.create_connection(("192.0.2.1", 443), 1)),
    "datagram": attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b"", ("2001:db8::1", 53))),
    "name": attempt(lambda: socket.getaddrinfo("telemetry.example.com", 443)),
}
before = unroutable()
command = [sys.executable, "-m", "serving.cli.commands", "serve", *bundles, "--address", "127.0.0.1:0"]
server = subprocess.Popen([*command, "--http", "127.0.0.1:0", "--page"], stdout=subprocess.PIPE, text=True)
lines = [server.stdout.readline() for _ in range(3 + len(bundles))]
page, address = (line.split()[-1] for line in lines[:2])
parts = [urllib.request.urlopen(page + part, timeout=20).status for part in ("", "config", "theme.css")]

import enginecast

with enginecast.Client(address) as client:
    draw, talk = (model.name for model in client.models())
with enginecast.Client(address, draw) as client:
    picture = client.generate("a large red circle", steps=2, seed=1).image
with enginecast.Client(address, talk) as client:
    answer = client.chat("what color is the circle?", images=[picture], max_tokens=4)
server.send_signal(signal.SIGTERM)
ended = server.wait(30)
print(json.dumps({"seen": seen, "left": unroutable() - before, "lines": lines, "ended": ended, "parts": parts,
    "size": picture.shape, "tokens": sum(one.completion_tokens for one in answer.choices)}))
"""


@pytest.fixture(scope="module")
def served(diffusion_bundle: Path, vlm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without a route says after both samples were served."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare")
    isolated = [unshare, "--map-root-user", "--net", "--mount"]
    allowed = subprocess.run([*isolated, "true"], capture_output=True, text=True, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"this machine allows no network namespaces: {allowed.stderr.strip()}")
    resolver = tmp_path_factory.mktemp("resolver") / "resolv.conf"
    resolver.write_text("nameserver 192.0.2.53\noptions timeout:1 attempts:1\n")
    command = [*isolated, sys.executable, "-c", PROGRAM, str(resolver), str(diffusion_bundle), str(vlm_bundle)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def test_attempts_are_counted(served: dict[str, Any]) -> None:
    assert all(served["seen"].values()), served["seen"]


def test_serving_makes_none(served: dict[str, Any]) -> None:
    assert served["left"] == 0


def test_requests_were_answered(served: dict[str, Any]) -> None:
    assert min(served["size"][:2]) >= 64 and served["tokens"] >= 1 and served["ended"] == 0
    assert all(" is ready on " in line for line in served["lines"][3:])
    assert served["parts"] == [200] * 3
