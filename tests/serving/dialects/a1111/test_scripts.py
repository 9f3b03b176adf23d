"""Scripts of the web UI: its X/Y/Z plot, styles, wildcards; and others that are installed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.diffusion.infotext import Infotext
from runtime.errors import InvalidInput
from runtime.script import Folders
from runtime.scripting import Scripts
from runtime.vision.images import encode_image
from serving.dialects.a1111.fields import ImageToImage, TextToImage
from serving.dialects.a1111.scripts import GRID, chosen
from tests.fakes.proofs import proves
from tests.fakes.scripts import OWN, package
from tests.serving.dialects.a1111.conftest import DRAW, SHADES, Studio, b64

PLOT = "X/Y/Z Plot"


@pytest.fixture
def folders(studio: Studio, tmp_path: Path) -> Iterator[Path]:
    """The server has styles and wildcards."""
    (tmp_path / "styles.csv").write_text('name,prompt,negative_prompt\nink,"{prompt}, ink",colour\nplain,,\n')
    (tmp_path / "colour.txt").write_text("red\nblue\n")
    before = studio.fake.host.scripts
    studio.fake.host.scripts = Scripts(Folders(tmp_path, tmp_path / "styles.csv"))
    yield tmp_path
    studio.fake.host.scripts = before


def arguments(x: Any, y: Any = (0, "", []), z: Any = (0, "", []), *more: Any) -> list[Any]:
    return [*x, *y, *z, *more]


@proves("POST /sdapi/v1/txt2img", "script_name", "script_args")
def test_the_plot_of_the_client_library(studio: Studio) -> None:
    args = arguments(
        (4, "1-3 (+2)", ""), (9, "", ["Euler a", "DPM++ 2M"]), (7, "red, blue", ""), True, True, False, False, 0
    )
    result = studio.api.txt2img(prompt="a red circle", seed=5, script_name=PLOT, script_args=args, width=16, height=8)
    cells = [(one.prompt, one.sampler, one.steps, one.seed) for one in studio.requests[:8]]  # checked, then drawn
    assert cells == [
        (f"a {colour} circle", sampler, steps, 5)
        for colour in ("red", "blue")
        for sampler in ("euler_ancestral", "dpmpp_2m_karras")
        for steps in (1, 3)
    ]
    page, *pictures = result.images
    assert len(pictures) == 8 and page.width > 4 * 16 and page.height > 2 * 8
    assert all(np.array_equal(np.asarray(one), studio.fake.draw.picture) for one in pictures)
    assert result.info["index_of_first_image"] == 1
    values = Infotext.parse(page.info["parameters"]).values
    assert (values["Script"], values["X Type"], values["X Values"]) == ("X/Y/Z plot", "Steps", "1,3")
    assert (values["Y Values"], values["Z Type"]) == ("Euler a,DPM++ 2M", "Prompt S/R")
    last = Infotext.parse(pictures[-1].info["parameters"])
    assert last.prompt == "a blue circle" and "Script" not in last.values
    assert (last.values["Steps"], last.values["Sampler"], last.values["Seed"]) == ("3", "DPM++ 2M", "5")
    assert result.info["all_prompts"] == ["a red circle"] * 5 + ["a blue circle"] * 4
    alone = studio.api.txt2img(prompt="a", script_name=PLOT, script_args=arguments(("CFG Scale", "3, 5", None)))
    assert len(alone.images) == 1 and [one.guidance_scale for one in studio.requests[-2:]] == [3, 5]


@proves("POST /sdapi/v1/img2img", "script_name", "script_args")
def test_a_plot_from_a_picture(studio: Studio) -> None:
    body = {"init_images": [b64(SHADES)], "steps": 1, "seed": 1, "script_name": PLOT}
    status, content = studio.post(DRAW[1], {**body, "script_args": arguments(("Denoising", "0.2-0.6 [3]", []))})
    assert status == 200 and [one.strength for one in studio.requests[:3]] == [0.2, 0.4, 0.6]
    args = arguments((5, "3", []))  # the fifth of img2img is another one than of txt2img
    assert studio.post(DRAW[1], {**body, "script_args": args})[0] == 200 and studio.requests[-1].guidance_scale == 3
    masked = {**body, "mask": b64(np.full_like(SHADES, 255)), "script_args": args}
    assert studio.post(DRAW[1], masked)[1]["detail"].startswith("script_name: X/Y/Z plot draws whole pictures")
    assert json.loads(content["info"])["index_of_first_image"] == 0


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        (("Seed", "1-4", []), ["1", "2", "3", "4"]),
        (("Seed", "4-2", []), ["4", "3", "2"]),
        (("Steps", "10-50 (+20), 7", []), ["10", "30", "50", "7"]),
        (("CFG Scale", "1-2 (+0.25)", []), ["1", "1.25", "1.5", "1.75", "2"]),
        (("CFG Scale", "5-1 [3]", []), ["5", "3", "1"]),
        (("Eta", "", ["0", "1"]), ["0", "1"]),
        (("Prompt S/R", 'a, "b, c"', []), ["a", "b, c"]),
    ],
)
def test_values_of_an_axis(axis: Any, values: list[str]) -> None:
    found, _ = chosen(TextToImage(script_name=PLOT, script_args=arguments(axis)), Scripts())
    assert found[GRID]["x"]["values"] == values


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (arguments(("Steps", "", [])), "has no values of Steps"),
        (arguments((11, "1", [])), "has an axis of type 11, whose meaning differs among versions"),
        (arguments(("Prompt order", "a", [])), "has an axis 'Prompt order', expected Nothing, Seed"),
        (arguments(("Clip skip", "1", [])), "has an axis 'Clip skip', expected"),
        (arguments((True, "1", [])), "has an axis True"),
        (arguments(("Steps", "1-9 (-1)", [])), "has a range whose step does not lead"),
        (arguments(("Steps", "1-1000", [])), "has 1,000 cells, expected at most 100"),
        (arguments(("Steps", "1-2 (+0)", [])), "has a range whose step does not lead"),
        (arguments(("Steps", "1", []), (0, "", []), (0, "", []), False), "has False as 'Draw legend', expected True"),
        (arguments(("Steps", "1", []), (0, "", []), (0, "", []), True, True, True), "has True as 'Include sub grids'"),
        *((arguments(("Steps", f"1-{'9' * 500}{end}", [])), "has '1-999") for end in ("", " (+1)", " [3]")),
        ([0] * 19, "has 19 values, expected at most 18"),
    ],
)
def test_plots_that_are_refused(args: list[Any], why: str) -> None:
    for message in (
        TextToImage(script_name=PLOT, script_args=args),
        ImageToImage(init_images=["x"], script_name=PLOT, script_args=args),
    ):
        with pytest.raises(InvalidInput) as raised:
            chosen(message, Scripts())
        assert raised.value.field == "script_args" and raised.value.reason.startswith(why)


def test_mistakes_inside_a_plot(studio: Studio) -> None:
    for fields, why in (
        (
            {"script_args": arguments(("Steps", "x", []))},
            "script_args: has a value of steps that is 'x', expected a whole",
        ),
        ({"script_args": arguments(("Sampler", "Restart", []))}, "sampler_name: 'Restart' is not known"),
        ({"script_args": []}, "script_args: is missing: a grid has one axis at least"),
        ({"script_args": arguments(("Steps", "1,2", [])), "batch_size": 2}, "batch_size: is 2: each cell of a grid"),
    ):
        assert studio.refused(DRAW[0], script_name=PLOT, **fields).startswith(why)
    assert studio.refused(DRAW[0], script_name="x/y plot").startswith("script_name: 'x/y plot' is no script here")


@pytest.mark.parametrize("path", DRAW)
@proves("GET /sdapi/v1/prompt-styles")
@proves("POST /sdapi/v1/txt2img", "styles")
@proves("POST /sdapi/v1/img2img", "styles")
def test_styles_and_wildcards(studio: Studio, folders: Path, path: str) -> None:
    assert studio.api.get_prompt_styles() == [
        {"name": "ink", "prompt": "{prompt}, ink", "negative_prompt": "colour"},
        {"name": "plain", "prompt": "", "negative_prompt": ""},
    ]
    picture = {"init_images": [b64(SHADES)]} if "img2img" in path else {}
    body = {**picture, "prompt": "a __colour__ circle", "styles": ["ink"], "steps": 1, "seed": 1}
    status, content = studio.post(path, body)
    assert status == 200, content
    drawn = studio.requests[-1]
    assert drawn.prompt in ("a red circle, ink", "a blue circle, ink") and drawn.negative_prompt == "colour"
    info = json.loads(content["info"])
    assert info["all_prompts"] == [drawn.prompt] and info["prompt"] == body["prompt"] and info["styles"] == ["ink"]
    assert info["infotexts"][0].startswith(f"{drawn.prompt}\nNegative prompt: colour\nSteps: 1")
    shown = Image.open(io.BytesIO(base64.b64decode(content["images"][0])))
    assert shown.info["parameters"] == info["infotexts"][0]
    assert studio.refused(path, styles=["ing"]).startswith("styles: 'ing' is no style: did you mean 'ink'?")


def test_a_server_without_styles_and_wildcards(studio: Studio) -> None:
    assert studio.api.get_prompt_styles() == []
    assert studio.draw(DRAW[0], prompt="a __colour__ circle").prompt == "a __colour__ circle"
    assert studio.refused(DRAW[0], styles=["ink"]).startswith("styles: needs a file of styles")


@proves("GET /sdapi/v1/scripts")
@proves("GET /sdapi/v1/script-info")
def test_installed_scripts(studio: Studio) -> None:
    assert studio.api.get_scripts()["txt2img"] == ["x/y/z plot"]
    plot, of_picture = studio.api.custom_get("sdapi/v1/script-info")
    labels = [one["label"] for one in plot["args"]]
    assert plot["name"] == "x/y/z plot" and not plot["is_img2img"] and of_picture["is_img2img"]
    assert labels[:4] == ["X type", "X values", "X values list", "Y type"] and len(labels) == 18
    assert plot["args"][0]["choices"][4] == "Steps" and of_picture["args"][0]["choices"][5] == "CFG Scale"


def test_a_script_of_a_package(studio: Studio, tmp_path: Path) -> None:
    """Its arguments come in their order."""
    with package(tmp_path, {"marks": OWN["marks"]}):
        assert "marks" in studio.api.get_scripts()["txt2img"]
        info = next(one for one in studio.api.custom_get("sdapi/v1/script-info") if one["name"] == "marks")
        assert [one["label"] for one in info["args"]] == ["word", "times"] and info["args"][1]["value"] == 1
        found = studio.draw(DRAW[0], prompt="a", script_name="marks", script_args=["red", 2])
        assert found.prompt != "a" and "red" in found.prompt
        assert studio.refused(DRAW[0], script_name="marks", script_args=[1, 2, 3]).startswith(
            "script_args: has 3 values"
        )
        assert studio.refused(DRAW[0], script_name="marks", script_args=["x", "y"]).startswith("scripts.marks.times: ")


def test_hostile_styles(studio: Studio, folders: Path) -> None:
    (folders / "styles.csv").write_bytes(b"\xff\xfe")
    assert studio.refused(DRAW[0], styles=["ink"]).startswith("styles: the file of styles cannot be read")
    assert encode_image(SHADES) and studio.fake.alive()
