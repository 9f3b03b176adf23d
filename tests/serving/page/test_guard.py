"""What the page refuses: other sites, other paths, files and addresses that a client names."""

from __future__ import annotations

import http.client
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runtime import limits
from tests.serving.page.conftest import Served

API = "/ui/gradio_api"


def ask(served: Served, path: str, body: bytes | None = None, verb: str = "", **headers: str) -> tuple[int, bytes]:
    """The status and the body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(verb or ("GET" if body is None else "POST"), path, body, named)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def join(served: Served, *data: Any) -> tuple[int, str]:
    """Start an event of the page with what is filled in."""
    body = json.dumps({"data": data, "fn_index": 0, "session_hash": "abc"}).encode()
    status, text = ask(served, f"{API}/queue/join", body, content_type="application/json")
    return status, text.decode()


def upload(served: Served, data: bytes, name: str = "a.png") -> tuple[int, Any]:
    """Upload a file as the page does; its path on the server."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + data + b"\r\n--x--\r\n"
    status, text = ask(served, f"{API}/upload", body, content_type="multipart/form-data; boundary=x")
    return status, json.loads(text) if status == 200 else text


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    return file.getvalue()


def test_the_root_leads_to_the_page(served: Served) -> None:
    assert ask(served, "/")[0] == 307
    assert ask(served, "/ui")[0] == 307
    status, text = ask(served, "/ui/")
    assert status == 200
    assert b"enginecast" in text
    assert ask(served, "/other")[0] == 404


async def test_beside_other_applications_only_browsers_are_led_to_the_page(served: Served) -> None:
    reached: list[str] = []

    async def other(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(event: Any) -> None:
        pass

    both = served.application.before(other)
    html, plain = [(b"accept", b"text/html,*/*")], [(b"accept", b"*/*")]
    for path, headers in (("/", html), ("/", plain), ("/ui", plain), ("/uix", html), ("/api/tags", html)):
        await both({"type": "http", "method": "GET", "path": path, "headers": headers, "query_string": b""}, None, send)
    assert reached == ["/", "/uix", "/api/tags"]


@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_a_page_elsewhere_cannot_drive_it(served: Served, verb: str) -> None:
    path = f"{API}/queue/join" if verb == "POST" else f"{API}/info"
    body = b"{}" if verb == "POST" else None
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        status, text = ask(served, path, body, verb, **headers)
        assert status == 403, headers
        assert b"evil.example" in text or b"null" in text
    own = {"Origin": served.url, "content_type": "application/json"}
    assert ask(served, path, body, verb, **own)[0] != 403


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/proxy=https://x.hf.space/a", f"{API}/vibe-edit", f"{API}/run/predict", f"{API}/call/predict",
        f"{API}/api/predict", f"{API}/runs", f"{API}/dev/reload", f"{API}/openapi.json", f"{API}/deep_link",
        f"{API}/run-history/buckets", "/ui/monitoring", "/ui/login", f"{API}/process_recording", f"{API}/app_id",
        f"{API}/token", "/ui/gradio_api/mcp/sse",
    ],
)  # fmt: skip
def test_what_the_page_does_not_use_is_not_there(served: Served, path: str) -> None:
    assert ask(served, path)[0] == 404
    assert ask(served, path, b"{}")[0] == 404


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "http://127.0.0.1:1/a.png", "https://example.org/a.png", "../../etc/passwd", "a.png", "%00"]
)
def test_no_file_or_address_of_a_client_is_opened(served: Served, name: str) -> None:
    assert ask(served, f"{API}/file={name}")[0] == 404
    status, text = join(served, {"path": name, "meta": {"_type": "gradio.FileData"}})
    assert (status, "no such file" in text) == (404, True)
    status, _ = join(served, [{"image": {"path": name}, "caption": None}])
    assert status == 404


def test_an_uploaded_picture_is_taken_and_other_files_are_not(served: Served) -> None:
    status, (path,) = upload(served, png())
    assert status == 200
    assert Path(path).is_relative_to(served.application.folder)
    assert join(served, {"path": path})[0] == 200
    assert ask(served, f"{API}/file={path}") == (200, png())
    (text,) = upload(served, b"no picture", "a.txt")[1]
    status, said = join(served, {"path": text})
    assert status == 400
    assert "picture: is no PNG" in said


def test_a_link_out_of_the_folder_is_not_followed(served: Served) -> None:
    link = served.application.folder / "link.png"
    link.symlink_to("/etc/hostname")
    assert ask(served, f"{API}/file={link}")[0] == 404
    assert join(served, {"path": str(link)})[0] == 404
    link.unlink()


def test_a_picture_that_is_too_large_is_refused(served: Served) -> None:
    huge = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60_000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00" + b"\0" * 40
    (path,) = upload(served, huge)[1]
    status, said = join(served, {"path": path})
    assert status == 400
    assert said


def test_hostile_bodies(served: Served) -> None:
    for body in (
        b"{",
        b"[" * 100_000,
        b"\xff",
        b'{"data": ' + b"[" * 60 + b"]" * 60 + b"}",
        b'{"data": [{"path": 5}]}',
    ):
        status, text = ask(served, f"{API}/queue/join", body, content_type="application/json")
        assert status in (400, 404), body[:20]
        assert json.loads(text)["detail"]
    status, _ = ask(served, f"{API}/queue/join", b" " * (limits.MESSAGE.most + 1), content_type="application/json")
    assert status == 400
    assert ask(served, "/ui/")[0] == 200
