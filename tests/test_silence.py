"""A process that builds, draws and answers sends nothing, and leaves nothing behind but its output and its
own cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys

talks = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else ""
        if host not in ("", "127.0.0.1", "::1", "localhost"):
            talks.append(f"{event} {arguments[1]}")
    elif event == "socket.getaddrinfo" and arguments[0] not in (None, "", "127.0.0.1", "::1", "localhost"):
        talks.append(f"{event} {arguments[0]}")

sys.addaudithook(watch)

import itertools, json, struct, subprocess
from pathlib import Path
from serving.cli.commands import app  # the first import of ours

if os.environ.get("ALONE"):  # a network of its own has a loopback device that is down
    import fcntl, socket
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14s", b"lo", 1, b""))  # SIOCSIFFLAGS, IFF_UP

def counters():
    lines = [line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    six = dict(line.split() for line in Path("/proc/self/net/snmp6").read_text().splitlines())
    return {"OutNoRoutes": int(dict(zip(*lines))["OutNoRoutes"]), "Ip6OutNoRoutes": int(six["Ip6OutNoRoutes"])}

def run(*arguments):
    try:
        app(arguments, prog_name="enginecast")
    except SystemExit as ended:
        assert not ended.code, arguments

draw, talk = sys.argv[1:]
before = counters()
run("build", talk, "--output", "out/talk", "--name", "talk")
command = [sys.executable, "-m", "serving.cli.commands", "serve", draw, "out/talk", "--address", "127.0.0.1:0"]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as server:
    lines = iter(server.stdout.readline, "")
    address = next(line.split()[-1] for line in lines if "listening on" in line)
    ready = list(itertools.islice((line for line in lines if " is ready on " in line or " cannot be " in line), 2))
    assert all(" is ready on " in line for line in ready), ready
    there = "--address", address, "--model"
    run("generate", *there, Path(draw).name, "--prompt", "a red circle", "--steps", "2", "--out", "out/picture.png")
    run("chat", *there, "talk", "--image", "out/picture.png", "--prompt", "what is it?", "--max-tokens", "2")
    server.terminate()
run("chat", "--bundle", "out/talk", "--prompt", "what is it?", "--max-tokens", "2")
# whoever imports them besides is kept silent, too
import nncf, openvino.tools.ovc, onnxruntime, huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
assert "openvino_telemetry" not in {name for name, module in sys.modules.items() if module is not None}
after = counters()
lost = {name: after[name] - count for name, count in before.items()} if os.environ.get("ALONE") else {}
print(json.dumps({"talks": talks, "lost": lost}))
"""


def own_network() -> list[str]:
    """A command that gives a process a network of its own without any device but the loopback one, where that is
    allowed.
    """
    command = [shutil.which("unshare") or "unshare", "--map-root-user", "--net"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, timeout=30).returncode == 0
    except OSError:
        allowed = False
    return command if allowed else []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches files and sockets as Linux shows them")
def test_nothing_is_sent_and_nothing_is_left_elsewhere(tiny_vlm: Path, diffusion_bundle: Path, tmp_path: Path) -> None:
    own = own_network()
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "LANG")}
    folders = {
        "HOME": "home",
        "XDG_CACHE_HOME": "caches",
        "XDG_CONFIG_HOME": "config",
        "XDG_DATA_HOME": "data",
        "TMPDIR": "tmp",
    }
    for folder in folders.values():
        (tmp_path / folder).mkdir()
    environment = (
        kept | {name: str(tmp_path / folder) for name, folder in folders.items()} | ({"ALONE": "1"} if own else {})
    )
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "ORT_DISABLE_TELEMETRY": "0"}  # which would send
    command = [*own, sys.executable, "-c", PROGRAM, str(diffusion_bundle), str(tiny_vlm)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "picture.png").is_file()
    places = {
        path.relative_to(tmp_path).parts[:2]
        for path in tmp_path.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }
    assert {place for place in places if place[0] != "out"} == {
        (folder,) for folder in folders.values() if folder != "caches"
    } | {("caches", "enginecast")}
    found = json.loads(ended.stdout.splitlines()[-1])
    assert not found["talks"]
    assert not any(found["lost"].values()), "something tried to reach another machine"


def test_a_blocked_package_is_not_there_and_a_choice_of_ours_is_kept() -> None:
    program = (
        "import os, runtime; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
        "import openvino_telemetry"
    )
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "0", "TORCHINDUCTOR_CACHE_DIR": "/elsewhere"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["1", "/elsewhere"] and "ModuleNotFoundError" in ended.stderr


@pytest.mark.parametrize("package", ["enginecast", "export", "runtime", "serving", "calibration", "profiles"])
def test_every_package_is_silent_from_its_first_import(package: str) -> None:
    program = f"import {package}, os, sys; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["1", "False"], ended.stderr
