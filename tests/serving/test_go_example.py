"""The Go example against a real server, built once per machine outside the repository.

It is built with the libraries of the system's packages (Debian: golang-google-grpc-dev, golang-google-protobuf-dev), as
no others can be had without a network.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from tests.fakes.guarded import guarded
from tests.fakes.serving import FakeServer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "go"
LIBRARIES = Path("/usr/share/gocode")
TOOLS = ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")


@pytest.fixture(scope="module")
def client() -> Path:
    """The program, in a folder named by the hash of its sources."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or not (LIBRARIES / "src/google.golang.org/grpc").is_dir():
        pytest.skip(f"{', '.join(missing) or 'the library grpc of Go'} is not installed")
    sources = [EXAMPLE / "client.go", *sorted((ROOT / "proto/enginecast/v1").glob("*.proto"))]
    mark = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"enginecast-go-{os.getuid()}-{mark}"
    package, program = folder / "src/enginecast", folder / "client"
    if not program.exists():
        package.mkdir(parents=True, exist_ok=True)
        text = (EXAMPLE / "client.go").read_text().replace("-I../../proto", f"-I{ROOT / 'proto'}")
        (package / "client.go").write_text(text)
        environment = {**os.environ, "GO111MODULE": "off", "GOPATH": f"{folder}:{LIBRARIES}", "GOFLAGS": ""}
        for command in (["go", "generate"], ["go", "build", "-o", str(program), "."]):
            subprocess.run(command, cwd=package, env=environment, check=True, timeout=240)
    return program


def run(client: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(client), "-address", address, "-draw", "draw", "-ask", "talk", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_draws_and_asks(client: Path, warm: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    done = run(client, warm.address, "-steps", "3", "-out", str(out))
    assert (done.returncode, done.stdout) == (0, f"{out}\na red círcle\n"), done.stderr
    assert "step 3 of 3" in done.stderr
    with Image.open(out) as picture:
        assert picture.size == (16, 8)


def test_mistakes(client: Path, warm: FakeServer, tmp_path: Path) -> None:
    unknown = run(client, warm.address, "-draw", "drow")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("client: NotFound: model 'drow' is not served here: did you mean 'draw'?")
    nowhere = run(client, warm.address, "-out", str(tmp_path / "missing" / "x.png"))
    assert nowhere.returncode == 1 and "no such file or directory" in nowhere.stderr
    assert re.match("client: Unavailable: ", run(client, "127.0.0.1:1").stderr)


def test_with_tls_and_a_token(client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded(tmp_path) as (server, ca, token):
        arguments = ("-steps", "1", "-out", str(tmp_path / "picture.png"))
        monkeypatch.setenv("ENGINECAST_TOKEN", token)
        done = run(client, server.address, *arguments, "-ca", str(ca))
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'picture.png'}\na red círcle\n"), done.stderr
        assert "a token is sent with TLS only" in run(client, server.address, *arguments).stderr
        monkeypatch.setenv("ENGINECAST_TOKEN", "ec_x")
        refused = run(client, server.address, *arguments, "-ca", str(ca))
        assert refused.returncode == 1 and "Unauthenticated: the token is not known here" in refused.stderr
