"""Pictures of the package openai, unchanged."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from runtime.errors import EngineError
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture, PictureFile, decode_image, encode_image
from serving.dialects.http.server import HttpServer
from tests.fakes.proofs import proves
from tests.fakes.serving import FakeServer, until
from tests.fakes.web import send

DRAW = "POST /v1/images/generations"
EDIT = "POST /v1/images/edits"


@pytest.fixture
def asked(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> list[ImageRequest]:
    """The requests that reach the model."""
    found, draw = list[ImageRequest](), fake.draw.pipeline

    def noted(request: Any) -> Any:
        found.append(request)
        return draw(request)

    monkeypatch.setattr(fake.draw, "pipeline", noted)
    return found


def pixels(text: str | None) -> Picture:
    return decode_image(base64.b64decode(text or ""))


@proves(DRAW, "model", "prompt", "n", "size", "seed", "steps", "guidance_scale", "sampler", "negative_prompt")
def test_pictures_with_settings(client: openai.OpenAI, fake: FakeServer, asked: list[ImageRequest]) -> None:
    found = client.images.generate(
        model="draw",
        prompt="a circle",
        n=2,
        size="512x256",
        quality="auto",
        response_format="b64_json",
        user="me",
        extra_body={"steps": 3, "guidance_scale": 2.5, "sampler": "ddim", "seed": 7, "negative_prompt": "a square"},
    )
    assert found.data is not None and found.size == "16x8" and found.output_format == "png"
    assert [one.seed for one in found.data] == [7, 8]  # type: ignore[attr-defined]
    for one in found.data:
        np.testing.assert_array_equal(pixels(one.b64_json), fake.draw.picture)
    (request,) = asked
    assert (request.prompt, request.negative_prompt, request.images) == ("a circle", "a square", 2)
    assert (request.width, request.height, request.steps, request.guidance_scale) == (512, 256, 3, 2.5)
    assert (request.sampler, request.seed, request.preview_every) == ("ddim", 7, 0)


@proves(DRAW, "size")
def test_what_is_left_open_is_the_models(client: openai.OpenAI, asked: list[ImageRequest]) -> None:
    client.images.generate(model="draw", prompt="x", size="auto")
    request = asked[0]
    assert (request.width, request.height, request.steps, request.seed, request.images) == (None, None, None, None, 1)


@proves(DRAW, "output_format", "output_compression")
def test_formats(client: openai.OpenAI) -> None:
    sizes = {}
    for form, quality in (("png", None), ("jpeg", 100), ("jpeg", 1), ("webp", 50), ("webp", None)):
        sent: Any = (
            {"output_format": form} if quality is None else {"output_format": form, "output_compression": quality}
        )
        (one,) = client.images.generate(model="draw", prompt="x", **sent).data or ()
        data = base64.b64decode(one.b64_json or "")
        assert Image.open(io.BytesIO(data)).format == form.upper()
        sizes[form, quality] = len(data)
    assert sizes["jpeg", 1] < sizes["jpeg", 100]


@proves(DRAW, "stream", "partial_images")
def test_streams_with_previews(client: openai.OpenAI, fake: FakeServer) -> None:
    events = list(
        client.images.generate(
            model="draw", prompt="x", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 3}
        )
    )
    previews = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in previews] == [0, 1]
    done = [event for event in events if event.type == "image_generation.completed"]
    assert [(event.index, event.seed) for event in done] == [(0, 3)]  # type: ignore[attr-defined]
    for event in (*previews, *done):
        np.testing.assert_array_equal(pixels(event.b64_json), fake.draw.picture)
        assert (event.size, event.output_format, event.background, event.quality) == ("16x8", "png", "opaque", "auto")
    assert done[0].usage.total_tokens == 0
    both = list(client.images.generate(model="draw", prompt="x", n=2, stream=True))
    assert [(event.type, event.index) for event in both] == [  # type: ignore[union-attr]
        ("image_generation.completed", 0),
        ("image_generation.completed", 1),
    ]


def transparent(left: int) -> bytes:
    """A mask of 16x8 pixels whose left columns are transparent."""
    alpha = np.full((8, 16), 255, np.uint8)
    alpha[:, :left] = 0
    alpha[:, left] = 1
    file = io.BytesIO()
    Image.fromarray(np.dstack([np.zeros((8, 16, 3), np.uint8), alpha])).save(file, "png")
    return file.getvalue()


@proves(EDIT, "model", "prompt", "image", "mask", "strength", "n", "size", "seed", "steps", "guidance_scale")
@proves(EDIT, "sampler", "negative_prompt", "output_format", "output_compression")
def test_edits_with_a_mask(client: openai.OpenAI, fake: FakeServer, asked: list[ImageRequest]) -> None:
    """Only what is fully transparent is drawn anew."""
    given = encode_image(fake.draw.picture)
    found = client.images.edit(
        model="draw",
        prompt="a circle",
        image=("x.png", given),
        mask=("m.png", transparent(3)),
        n=2,
        size="auto",
        output_format="jpeg",
        output_compression=90,
        extra_body={
            "strength": 0.5,
            "seed": 7,
            "steps": 3,
            "guidance_scale": 2.5,
            "sampler": "ddim",
            "negative_prompt": "a square",
        },
    )
    assert found.data is not None and len(found.data) == 2
    assert Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json or ""))).format == "JPEG"
    (request,) = asked
    assert isinstance(request.image, PictureFile) and request.image.data == given
    assert isinstance(request.mask, np.ndarray)
    expected = np.zeros((8, 16, 3), np.uint8)
    expected[:, :3] = 255
    np.testing.assert_array_equal(request.mask, expected)
    assert (request.strength, request.seed, request.images, request.steps) == (0.5, 7, 2, 3)
    assert (request.guidance_scale, request.sampler, request.negative_prompt) == (2.5, "ddim", "a square")
    assert (request.width, request.prompt) == (None, "a circle")


@proves(EDIT, "image[]", "stream", "partial_images")
def test_edits_of_a_list_stream(client: openai.OpenAI, fake: FakeServer, asked: list[ImageRequest]) -> None:
    events = list(
        client.images.edit(
            model="draw",
            prompt="x",
            image=[encode_image(fake.draw.picture)],
            stream=True,
            partial_images=1,
            extra_body={"steps": 8, "strength": 0.5},
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert asked[0].preview_every == 2 and asked[0].mask is None


@proves(EDIT, "image[]")
def test_further_pictures_are_followed(
    client: openai.OpenAI, fake: FakeServer, asked: list[ImageRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the image adapters of the model, in their order."""
    offer = fake.host.catalog.find("draw").offer
    monkeypatch.setitem(offer.__dict__, "abilities", {"styles": ("look", "faces")})
    files = [encode_image(np.full((8, 16, 3), value, np.uint8)) for value in (1, 2, 3, 4)]
    client.images.edit(model="draw", prompt="x", image=files[:3])
    (request,) = asked
    assert isinstance(request.image, PictureFile) and request.image.data == files[0]
    followed = [(style.name, style.image) for style in request.styles]
    assert [(name, image.data) for name, image in followed if isinstance(image, PictureFile)] == [
        ("look", files[1]),
        ("faces", files[2]),
    ]
    with pytest.raises(openai.BadRequestError, match=r"is 4 pictures: .* has 2 image adapters, .* send 3 at most"):
        client.images.edit(model="draw", prompt="x", image=files)


@pytest.mark.parametrize(
    "sent, field, why",
    [
        ({"size": "big"}, "size", "is no size, expected auto"),
        ({"size": "0x512"}, "size", "is no size, expected auto"),
        ({"size": "70000x70000"}, "size", "expected 0 to 65536"),
        ({"n": 65}, "n", "expected 1 to 64"),
        ({"n": 0}, "n", "expected 1 to 64"),
        ({"n": True}, "n", "valid integer"),
        ({"response_format": "url"}, "response_format", "not kept for download: send b64_json"),
        ({"quality": "high"}, "quality", "send steps instead"),
        ({"style": "vivid"}, "style", "write it into the prompt"),
        ({"background": "transparent"}, "background", "are opaque"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, "output_compression", "is of jpeg and webp"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "expected 0 to 100"),
        ({"partial_images": 1}, "partial_images", "is of streams"),
        ({"partial_images": 4, "stream": True}, "partial_images", "expected 0 to 3"),
        ({"prompt": "x" * 10_001}, "prompt", "at most 10,000"),
        ({"prompt": "\ud800"}, "prompt", "half a surrogate pair"),
        ({"steps": 1001}, "steps", "expected 1 to 1000"),
        ({"strength": 0.5}, "strength", "is not known here"),
        ({"model": "talk"}, "model", "talk"),
    ],
)
def test_what_is_refused_is_named(web: HttpServer, sent: dict[str, Any], field: str, why: str) -> None:
    response, content = send(web, "/v1/images/generations", {"model": "draw", "prompt": "x", **sent})
    assert response.status == 400 and content["error"]["param"] == field, content
    assert why in content["error"]["message"], content


def form(*parts: tuple[str, bytes, bool]) -> tuple[bytes, str]:
    """A form of names, contents and whether each is a file; and its content type."""
    lines = []
    for name, content, is_file in parts:
        file = '; filename="x.png"\r\ncontent-type: image/png' if is_file else ""
        head = f'--edge\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'
        lines.append(head.encode() + content + b"\r\n")
    return b"".join(lines) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


PICTURE = encode_image(np.full((8, 16, 3), 9, np.uint8))
BASE = (("model", b"draw", False), ("prompt", b"x", False))
IMAGE = ("image", PICTURE, True)


@pytest.mark.parametrize(
    "parts, field, why",
    [
        (BASE, "image", "is 0 pictures"),
        ((*BASE, IMAGE, ("image[]", PICTURE, True)), "image", "is 2 pictures"),
        ((*BASE, ("image[]", PICTURE, True), ("image[]", PICTURE, True)), "image", "is 2 pictures"),
        ((*BASE, IMAGE, IMAGE), "image", "is 2 times in the form"),
        ((*BASE, ("prompt", b"y", False), IMAGE), "prompt", "is 2 times in the form"),
        ((*BASE, ("image", b"no picture", True)), "image", "is no PNG"),
        ((*BASE, ("image", b"no file", False)), "image", "UploadFile"),
        ((*BASE, IMAGE, ("mask", PICTURE, True)), "mask", "is nowhere fully transparent"),
        ((*BASE, IMAGE, ("mask", transparent(3)[:55], True)), "mask", "damaged"),
        ((*BASE, IMAGE, ("n", b"two", False)), "n", "valid integer"),
        ((*BASE, IMAGE, ("strength", b"nan", False)), "strength", "finite number"),
        ((*BASE, IMAGE, ("strength", b"2", False)), "strength", "expected 0 to 1"),
        ((*BASE, IMAGE, ("what", b"x", False)), "what", "is not known here"),
        ((*BASE, IMAGE, ("input_fidelity", b"high", False)), "input_fidelity", "send strength"),
        ((*BASE, *[IMAGE] * 21), "body", "too many files"),
        ((*BASE, *[("n", b"1", False)] * 101), "body", "too many fields"),
        ((("model", b"draw", False), ("prompt", b"x" * 70_000, False), IMAGE), "body", "exceeded maximum size"),
    ],
)
def test_forms_that_are_refused(web: HttpServer, parts: Any, field: str, why: str) -> None:
    body, kind = form(*parts)
    response, content = send(web, "/v1/images/edits", body, content_type=kind)
    assert response.status == 400 and content["error"]["param"] == field, content
    assert why in content["error"]["message"], content


@pytest.mark.parametrize(
    "body, kind",
    [
        (b"", "multipart/form-data"),
        (b"x" * 1000, "multipart/form-data; boundary=edge"),
        (b"--edge\r\n" * 10_000, "multipart/form-data; boundary=edge"),
        (b"--edge\r\ncontent-disposition: form-data\r\n\r\nx\r\n--edge--\r\n", "multipart/form-data; boundary=edge"),
        (b"--edge\r\n" + b"a: b\r\n" * 50_000, "multipart/form-data; boundary=edge"),
        (form(*BASE, IMAGE)[0][:-20], "multipart/form-data; boundary=edge"),
        (form(*BASE, IMAGE)[0], "multipart/form-data; boundary=" + "x" * 5000),
        (b'{"model": "draw"}', "application/json"),
        (b"model=draw&prompt=%ff", "application/x-www-form-urlencoded"),
        (b"a=b&" * 10_000, "application/x-www-form-urlencoded"),
    ],
)
def test_hostile_forms(web: HttpServer, fake: FakeServer, body: bytes, kind: str) -> None:
    response, content = send(web, "/v1/images/edits", body, content_type=kind)
    assert response.status == 400 and content["error"]["message"], content
    assert fake.alive()


def test_a_stream_that_fails_and_one_that_is_left(client: openai.OpenAI, fake: FakeServer) -> None:
    fake.draw.hold()
    fake.draw.let(2)
    sent: Any = {"model": "draw", "prompt": "x", "stream": True, "partial_images": 3, "extra_body": {"steps": 4}}
    stream = iter(client.images.generate(**sent))
    next(stream), next(stream)
    fake.draw.failure = EngineError("the engine gave up")
    fake.draw.let(1)
    with pytest.raises(openai.APIError, match="gave up"):
        next(stream)
    fake.draw.failure = None
    fake.draw.let(1)
    left = client.images.generate(**sent)
    next(iter(left))
    left.close()
    until(lambda: fake.busy() == 0 or fake.leaving())
    assert fake.alive()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_of_the_page(web: HttpServer, tmp_path: Path) -> None:
    (tmp_path / "circle.png").write_bytes(PICTURE)
    page = (Path(__file__).parents[4] / "docs" / "clients.md").read_text()
    section = page[page.index("## OpenAI") : page.index("<!-- fields of openai -->")]
    commands = re.findall(r"^ {4}(curl (?:.*\\\n)*.*)$", section, re.MULTILINE)
    assert len(commands) == 3
    answers = []
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        named = {"shapes-vlm": "talk", "shapes-diffusion": "draw", "127.0.0.1:11434": f"127.0.0.1:{web.port}"}
        for name, other in named.items():
            words = [word.replace(name, other) for word in words]
        done = subprocess.run([words[0], "-sS", "-f", *words[1:]], cwd=tmp_path, capture_output=True, timeout=20)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout.decode())
    models, stream, edited = answers
    assert [model["id"] for model in json.loads(models)["data"]] == ["draw", "match", "talk"]
    assert stream.endswith("data: [DONE]\n\n") and "círcle" in stream
    assert pixels(json.loads(edited)["data"][0]["b64_json"]).shape == (8, 16, 3)
