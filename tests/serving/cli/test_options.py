"""Options of commands that send requests, from the command line over gRPC to the request that a model reads."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from runtime.diffusion.hires import Hires
from runtime.errors import EnginecastError
from runtime.task import Request
from serving.cli import commands as cli
from serving.cli.options import ModelOptions
from tests.fakes.serving import FakeAnswers, FakeModel, FakeServer

Row = tuple[tuple[str, ...], dict[str, object]]


def asked(text: str) -> dict[str, object]:
    """The message in which a command shows a picture and this text, as `plain` makes it."""
    return {"role": "user", "content": ["picture", text], "calls": (), "tool": ""}


HIRES: Final = asdict(Hires())
GENERATE: Final[list[Row]] = [
    (("--prompt", "a fox"), {"prompt": "a fox"}),
    (("--negative-prompt", "blue"), {"negative_prompt": "blue"}),
    (("--steps", "3"), {"steps": 3}),
    (("--seed", "9"), {"seed": 9}),
    (("--sampler", "ddim"), {"sampler": "ddim"}),
    (("--guidance-scale", "4.5"), {"guidance_scale": 4.5}),
    (("--guidance-start", "0.25", "--guidance-end", "0.75"), {"guidance_start": 0.25, "guidance_end": 0.75}),
    (("--forecast", "every 3 after 2"), {"forecast": "every 3 after 2"}),
    (("--eta", "0.25"), {"eta": 0.25}),
    (("--width", "24"), {"width": 24}),
    (("--height", "32"), {"height": 32}),
    (("--images", "2"), {"images": 2}),
    (("--prompt-weights",), {"prompt_weights": True}),
    (("--lora", "ink:0.5", "--lora", "wax"), {"loras": {"ink": 0.5, "wax": 1.0}}),
    (("--style", "face={picture}:0.5"), {"styles": [{"name": "face", "scale": 0.5, "image": "picture"}]}),
    (
        ("--control", "edges={picture}:0.5@0.25-0.75"),
        {"controls": [{"name": "edges", "scale": 0.5, "start": 0.25, "end": 0.75, "image": "picture"}]},
    ),
    (("--control", "edges={picture}", "--guess-mode"), {"guess_mode": True}),
    (("--original-size", "24,32"), {"original_size": (24, 32)}),
    (("--crop-top-left", "1,2"), {"crop_top_left": (1, 2)}),
    (("--target-size", "24,32"), {"target_size": (24, 32)}),
    (("--aesthetic-score", "7"), {"aesthetic_score": 7.0}),
    (("--negative-original-size", "24,32"), {"negative_original_size": (24, 32)}),
    (("--negative-crop-top-left", "1,2"), {"negative_crop_top_left": (1, 2)}),
    (("--negative-target-size", "24,32"), {"negative_target_size": (24, 32)}),
    (("--negative-aesthetic-score", "2"), {"negative_aesthetic_score": 2.0}),
    (("--refiner", "draw", "--aesthetic-score", "7"), {"aesthetic_score": 7.0, "denoising_start": 0.8}),
    (("--image", "{picture}"), {"image": "picture"}),
    (("--image", "{picture}", "--strength", "0.25"), {"strength": 0.25}),
    (("--image", "{picture}", "--mask", "{picture}"), {"mask": "picture"}),
    (("--image", "{picture}", "--mask", "{picture}", "--mask-blur", "2"), {"mask_blur": 2.0}),
    (("--image", "{picture}", "--mask", "{picture}", "--keep-unmasked"), {"keep_unmasked": True}),
    (("--image", "{picture}", "--mask", "{picture}", "--no-keep-unmasked"), {"keep_unmasked": False}),
    (("--image", "{picture}", "--mask", "{picture}", "--mask-fill", "noise"), {"mask_fill": "noise"}),
    (("--variation-seed", "9", "--variation-strength", "0.25"), {"variation_seed": 9, "variation_strength": 0.25}),
    (("--noise-size", "24,32"), {"noise_size": (24, 32)}),
    (("--hires-scale", "1.5", "--hires-upscaler", "lanczos"), {"hires": HIRES | {"scale": 1.5, "upscaler": "lanczos"}}),
    (("--hires-width", "64", "--hires-height", "48"), {"hires": HIRES | {"width": 64, "height": 48}}),
    (("--hires-steps", "3", "--hires-strength", "0.5"), {"hires": HIRES | {"steps": 3, "strength": 0.5}}),
    (
        ("--hires-prompt", "fox", "--hires-negative-prompt", ""),
        {"hires": HIRES | {"prompt": "fox", "negative_prompt": ""}},
    ),
    (("--hires-sampler", "euler"), {"hires": HIRES | {"sampler": "euler"}}),
    (("--image", "{picture}", "--extend", "1,2,3,4"), {"extend": (1, 2, 3, 4)}),
    (("--refiner", "draw"), {"denoising_start": 0.8, "denoising_end": None}),
    (("--refiner", "draw", "--refine-from", "0.5"), {"denoising_start": 0.5, "denoising_end": None}),
]
CHAT: Final[list[Row]] = [
    (("--max-tokens", "2"), {"max_tokens": 2}),
    (("--temperature", "0.5"), {"temperature": 0.5}),
    (("--top-k", "7"), {"top_k": 7}),
    (("--top-p", "0.5"), {"top_p": 0.5}),
    (("--repetition-penalty", "1.5"), {"repetition_penalty": 1.5}),
    (("--min-p", "0.05"), {"min_p": 0.05}),
    (("--frequency-penalty", "-0.5"), {"frequency_penalty": -0.5}),
    (("--presence-penalty", "0.5"), {"presence_penalty": 0.5}),
    (("--format", "json"), {"grammar": {"kind": "json_schema", "text": '{"type": "object"}'}}),
    (("--format", "{schema}"), {"grammar": {"kind": "json_schema", "text": '{"const": "é"}'}}),
    (("--regex", "a|b"), {"grammar": {"kind": "regex", "text": "a|b"}}),
    (("--logprobs", "2"), {"logprobs": 2}),
    (("--lookup-tokens", "3"), {"lookup_tokens": 3}),
    (("--draft-tokens", "3"), {"draft_tokens": 3}),
    (("--prediction", "a fox"), {"prediction": "a fox"}),
    (("--picture-tokens", "144"), {"picture_tokens": 144}),
    (("--seed", "9"), {"seed": 9}),
    (("--stop", "a", "--stop", "b"), {"stop": ("a", "b")}),
    (("--beams", "2"), {"beams": 2}),
    (("--length-penalty", "1.5"), {"length_penalty": 1.5}),
    (("--answers", "2"), {"answers": 2}),
    (("--context-overflow", "slide"), {"context_overflow": "slide"}),
    (("--image", "{picture}"), {"messages": [asked("what?")]}),
]
CAPTION: Final[list[Row]] = [
    (("--prompt", "a photo of"), {"messages": [asked("a photo of")]}),
    (("--output", "{out}.jsonl", "--recursive", "--retry-errors", "--prompt", "hm"), {"messages": [asked("hm")]}),
    *CHAT[:-1],
]
GRID: Final[list[Row]] = [
    *(row for row in GENERATE if not {"--refiner", "--images", "--eta"} & {*row[0]}),
    (("--eta", "0.25"), {"eta": 0.125}),
    (("--y", "sampler=euler"), {"sampler": "euler", "eta": 0.125}),
    (("--z", "steps=3"), {"steps": 3, "eta": 0.125}),
]
ROWS: Final = {"generate": GENERATE, "chat": CHAT, "caption": CAPTION, "grid": GRID}
ALWAYS: Final = {
    "generate": ("--model", "draw", "--prompt", "x", "--out", "{out}"),
    "chat": ("--model", "talk", "--prompt", "what?", "--pictures", "never"),
    "caption": ("--model", "talk", "{picture}"),
    "grid": ("--model", "draw", "--prompt", "x", "--out", "{out}", "--x", "eta=0.125"),
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the models of a fake server have read."""
    requests: list[Request] = []
    for model in (FakeModel, FakeAnswers):

        def pipeline(self: Any, request: Request, own: Any = model.pipeline) -> Any:
            requests.append(request)
            return own(self, request)

        monkeypatch.setattr(model, "pipeline", pipeline)
    return requests


def plain(value: object) -> object:
    """Parts of a request as dicts and lists, pictures as the word "picture"."""
    if isinstance(value, np.ndarray) or type(value).__name__ == "PictureFile":
        return "picture"
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list) and not all(isinstance(one, int | str) for one in value):
        return [plain(one) for one in value]
    return value


@pytest.mark.parametrize(("command", "given", "expected"), [(name, *row) for name in ROWS for row in ROWS[name]])
def test_an_option_is_in_the_request(
    command: str, given: tuple[str, ...], expected: dict[str, object], warm: FakeServer, seen: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (16, 8)).save(tmp_path / "p.png")
    (tmp_path / "s.json").write_text('{"const": "é"}', "utf-8")
    places = {"picture": tmp_path / "p.png", "out": tmp_path / "out.png", "schema": tmp_path / "s.json"}
    arguments = [one.format(**places) for one in (*ALWAYS[command], *given)]
    ended = CliRunner().invoke(cli.app, [command, "--address", warm.address, *arguments])
    assert ended.exit_code == 0, (ended.output, ended.exception)
    assert {name: plain(getattr(seen[-1], name)) for name in expected} == expected


def test_every_option_has_a_row() -> None:
    app: Any = typer.main.get_command(cli.app)
    everywhere = {"--" + field.name.replace("_", "-") for field in fields(ModelOptions)}
    for command, rows in ROWS.items():
        tried = {one for given, _ in rows for one in given} | set(ALWAYS[command]) | everywhere
        options = {one for each in app.commands[command].params for one in each.opts if one.startswith("--")}
        assert options <= tried, command


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (("--format", "json", "--regex", "a"), 2, "regex: does not go with --format"),
        (("--format", "{missing}"), 3, "schema .*missing.json cannot be read: No such file"),
        (("--format", "{picture}"), 2, "format: .*p.png is no text in UTF-8"),
        (("--format", "{broken}"), 2, "grammar: is no JSON schema: it cannot be read as JSON"),
        (("--regex", "a" * 65_537), 2, "grammar: has 65,537 characters"),
        (("--logprobs", "21"), 2, "logprobs: is 21"),
    ],
)
def test_a_form_that_cannot_be_read_is_an_error(
    given: tuple[str, ...], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (16, 8), "red").save(tmp_path / "p.png")
    (tmp_path / "broken.json").write_text("{")
    places = {name: tmp_path / f"{name}.json" for name in ("missing", "broken")} | {"picture": tmp_path / "p.png"}
    arguments = ["--model", "talk", "--prompt", "x", *(one.format(**places) for one in given)]
    ended = CliRunner().invoke(cli.app, ["chat", "--address", "127.0.0.1:1", *arguments])
    assert isinstance(ended.exception, EnginecastError) and ended.exception.exit_code == code
    assert re.search(message, str(ended.exception))


def test_log_probabilities_are_shown_apart_from_the_answer(warm: FakeServer) -> None:
    arguments = ["--model", "talk", "--prompt", "what?", "--logprobs", "1"]
    ended = CliRunner().invoke(cli.app, ["chat", "--address", warm.address, *arguments])
    assert ended.stdout == "a red círcle\n"
    assert re.findall(r"'(\w+) ?' (\S+) of 'a ' (\S+)", ended.stderr) == [
        (word, "-0.693", "-0.693") for word in ("a", "red", "círcle")
    ]
