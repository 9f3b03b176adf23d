"""Values of an axis, as texts and as lists, and the requests that they make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from runtime.diffusion.hires import Hires
from runtime.errors import InvalidInput
from runtime.grid.axes import Axis
from runtime.tasks.image import ImageRequest

REQUEST = ImageRequest("a red circle", negative_prompt="red ground", loras={"ink": 1.0})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("steps=10,20", (10, 20)),
        ("steps=1-4", (1, 2, 3, 4)),
        ("steps=10-50:20, 99", (10, 30, 50, 99)),
        ("steps=4-1", (4, 3, 2, 1)),
        ("steps=10-1:-4", (10, 6, 2)),
        ("guidance_scale=0-1:0.25", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("guidance_scale=0.1-0.3:0.1", (0.1, 0.2, 0.3)),
        ("sampler=euler, ddim", ("euler", "ddim")),
        ('prompt="a circle, red",a box', ("a circle, red", "a box")),
        ("prompt_sr=red,blue", ("red", "blue")),
        ("guess_mode=true,no", (True, False)),
        ('forecast=none,every 3 after 2,"1-3,6"', ("none", "every 3 after 2", "1-3,6")),
        ("original_size=64x32,16x16", ((64, 32), (16, 16))),
        ("loras.ink=0-1:0.5", (0.0, 0.5, 1.0)),
        ("hires.steps=1,2", (1, 2)),
        ("seed=9223372036854775806", (2**63 - 2,)),
    ],
)
def test_values_of_a_text(text: str, values: tuple[Any, ...]) -> None:
    axis = Axis.parse("x", text)
    assert axis.values == values and [type(one) for one in axis.values] == [type(one) for one in values]
    assert Axis.of("x", axis.field, axis.text()).values == values, "the text of an axis is read as the same axis"
    assert Axis.of("x", axis.field, list(values)).values == values, "a list of values is the same as their text"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "x: is 'steps', expected FIELD=VALUES such as steps=10,20"),
        ("stps=1", r"x: 'stps' cannot be on an axis: did you mean 'steps'\?"),
        ("images=1,2", "x: 'images' cannot be on an axis"),
        ("image=a.png", "x: 'image' cannot be on an axis"),
        ("scripts=a", "x: 'scripts' cannot be on an axis"),
        ("loras.=1", "x: 'loras.' cannot be on an axis"),
        (
            "loras=1",
            "x: has a value of loras that is '1', expected scales by name; loras.NAME is the scale of one LoRA",
        ),
        ("steps=1.5", "x: has a value of steps that is '1.5', expected a whole number"),
        ("steps=", "x: has a value of steps that is '', expected a whole number"),
        ("steps=True", "x: has a value of steps that is 'True', expected a whole number"),
        ("guidance_scale=nan", "x: has a value of guidance_scale that is 'nan', expected a number"),
        ("guidance_scale=1e999", "expected a number"),
        ("guess_mode=maybe", "x: has a value of guess_mode that is 'maybe', expected on or off"),
        ("original_size=64", "expected 2 lengths in pixels such as 64x64"),
        ("sampler=", "x: has no values of sampler"),
        ("steps=1-1000", "x: has 1,000 cells, expected at most 100"),
        ("steps=1-99999999999999999999:1", "expected at most 100"),
        (f"steps=1-{'9' * 5000}", "expected at most 60 characters"),
        ("steps=1-5:-1", r"x: has the range 1-5:-1, whose step does not lead from 1 to 5"),
        ("steps=1-5:0", "whose step does not lead"),
    ],
)
def test_what_is_no_axis(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        Axis.parse("x", text)
    assert caught.value.field == "x" and len(str(caught.value)) < 900


@pytest.mark.parametrize(("field", "values"), [("steps", [True]), ("steps", [1.5]), ("sampler", [3]), ("steps", [])])
def test_values_of_a_wrong_type(field: str, values: list[Any]) -> None:
    with pytest.raises(InvalidInput, match="x: has "):
        Axis.of("x", field, values)


def test_requests_along_an_axis() -> None:
    steps, search = Axis.parse("x", "steps=3"), Axis.parse("y", "prompt_sr=red,blue")
    lora = Axis.parse("z", "loras.wax=0.5")
    assert steps.changed("x", REQUEST, 3).steps == 3
    found = search.changed("y", REQUEST, "blue")
    assert (found.prompt, found.negative_prompt) == ("a blue circle", "blue ground")
    assert lora.changed("z", REQUEST, 0.5).loras == {"ink": 1.0, "wax": 0.5} and REQUEST.loras == {"ink": 1.0}
    with pytest.raises(InvalidInput, match="y: searches for 'red', which neither prompt nor negative_prompt has"):
        search.changed("y", ImageRequest("a box"), "blue")
    with pytest.raises(InvalidInput, match="steps: is 0, expected 1 to 1000"):
        steps.changed("x", REQUEST, 0)


def test_labels() -> None:
    assert Axis.parse("x", "steps=10,20").labels() == ("steps: 10", "steps: 20")
    assert Axis.parse("x", "guidance_scale=7.5").labels() == ("guidance_scale: 7.5",)
    assert Axis.parse("x", "sampler=euler").labels() == ("euler",)
    assert Axis.of("x", "loras", [{"ink": 0.5}, {}]).labels() == ("loras: ink 0.5", "loras: ")


def test_a_field_of_the_second_pass() -> None:
    axis = Axis.parse("x", "hires.upscaler=latent,lanczos")
    assert axis.changed("x", REQUEST, "lanczos").hires == Hires(upscaler="lanczos")
    again = replace(REQUEST, hires=Hires(1.5))
    assert axis.changed("x", again, "lanczos").hires == Hires(1.5, upscaler="lanczos")
