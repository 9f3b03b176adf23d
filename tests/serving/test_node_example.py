"""The Node example against a real server. Its packages are installed once per machine, outside the repository."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.fakes.guarded import guarded
from tests.fakes.npm import installed
from tests.fakes.serving import FakeServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder with the example's node_modules."""
    return installed((EXAMPLE / "package.json").read_bytes())


def run(packages: Path, server: FakeServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["node", str(EXAMPLE / "client.mjs"), "--address", server.address, "--ask", "talk", *arguments]
    return subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=60, check=False)


def test_draws_and_asks(packages: Path, warm: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    done = run(packages, warm, "--draw", "draw", "--steps", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\na red círcle\n"
    assert "step 3 of 3" in done.stderr
    with Image.open(out) as picture:
        assert picture.size == (16, 8)


def test_a_refused_call(packages: Path, warm: FakeServer) -> None:
    done = run(packages, warm, "--draw", "drow")
    assert (done.returncode, done.stdout) == (1, "")
    assert "NOT_FOUND: model 'drow' is not served here: did you mean 'draw'?" in done.stderr


def test_with_tls_and_a_token(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded(tmp_path) as (server, ca, token):
        arguments = ("--draw", "draw", "--steps", "1", "--out", str(tmp_path / "picture.png"))
        monkeypatch.setenv("ENGINECAST_TOKEN", token)
        done = run(packages, server, *arguments, "--ca", str(ca))
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'picture.png'}\na red círcle\n"), done.stderr
        assert "is sent with TLS only" in run(packages, server, *arguments).stderr
        monkeypatch.setenv("ENGINECAST_TOKEN", "ec_x")
        refused = run(packages, server, *arguments, "--ca", str(ca))
        assert refused.returncode == 1 and "UNAUTHENTICATED: the token is not known here" in refused.stderr


def test_help(packages: Path, warm: FakeServer) -> None:
    done = run(packages, warm, "--help")
    assert (
        (done.returncode, done.stderr) == (0, "")
        and "--question" in done.stdout
        and "(default: picture.png)" in done.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--nonsense", "1"), 2, "Unknown option '--nonsense': --help lists the options"),
        (("--steps", "many"), 2, "--steps is 'many', expected a number of 1 or more"),
        (("--draw", "draw", "--out", "/nowhere/x.png"), 1, "ENOENT"),
        (("--draw", "draw", "--address", "127.0.0.1:1"), 1, "UNAVAILABLE"),
    ],
)
def test_mistakes(packages: Path, warm: FakeServer, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(packages, warm, *arguments)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (code, "") and last.startswith("client.mjs: ") and message in last
    assert "    at " not in done.stderr, "no stack trace"


def test_without_its_packages(tmp_path: Path) -> None:
    command = ["node", str(EXAMPLE / "client.mjs")]
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "client.mjs: cannot load @grpc/grpc-js (MODULE_NOT_FOUND): run `npm install` in this folder\n"
