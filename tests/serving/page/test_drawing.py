"""What is filled in on the page, as a request."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.diffusion.defaults import ImageDefaults
from runtime.diffusion.hires import Hires
from runtime.diffusion.infotext import infotext
from runtime.errors import InvalidInput
from runtime.tasks.image import ImageRequest
from serving.enginecast_pb import model_pb2
from serving.page.drawing import REST, SIZES, abilities, loras_of, painted, plan_of, recalled, request_of, scores_of

RED = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
CLEAR = Image.new("RGBA", (32, 16), (0, 0, 0, 0))


def canvas(*painted: Any) -> dict[str, Any]:
    return {"background": RED, "layers": list(painted), "composite": RED}


def brushed() -> Any:
    layer = CLEAR.copy()
    layer.paste((255, 255, 255, 255), (8, 4, 16, 8))
    return layer


def test_nothing_is_the_models_own() -> None:
    made = request_of({"prompt": "a", "width": "", "seed": " ", "images": "", "eta": 0, "sampler": ""})
    plain = ImageRequest("a")
    for field in ("width", "height", "steps", "guidance_scale", "sampler", "seed", "images", "image", "preview_every"):
        assert getattr(made, field) == getattr(plain, field), field


def test_every_field_arrives(tmp_path: Path) -> None:
    RED.convert("RGB").save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    made = request_of(
        {
            "prompt": "a", "negative_prompt": "b", "width": "64", "height": "32", "steps": 20, "guidance_scale": 2.5,
            "sampler": "euler", "eta": 0.5, "seed": str(2**62 + 1), "images": "2", "prompt_weights": True,
            "previews": True, "loras": [["pixel", "0.5"], ["other", 0]], "guess_mode": True,
            "styles": [["photo", picture, 0.4], ["none", None, 1]],
            "controls": [["canny", picture, 0.3, 0.1, 0.9], [None, None, 1, 0, 1]],
            "scripts": ["styles"], "script_settings": [["styles:names", "ink", ""]],
        }
    )  # fmt: skip
    assert (made.prompt, made.negative_prompt, made.width, made.height, made.steps) == ("a", "b", 64, 32, 20)
    assert (made.guidance_scale, made.sampler, made.eta, made.seed, made.images) == (2.5, "euler", 0.5, 2**62 + 1, 2)
    assert made.prompt_weights
    assert made.guess_mode
    assert made.preview_every == 2
    assert made.loras == {"pixel": 0.5}
    assert made.scripts == {"styles": {"names": "ink"}}
    assert [(one.name, one.scale) for one in made.styles] == [("photo", 0.4)]
    assert [(one.name, one.scale, one.start, one.end) for one in made.controls] == [("canny", 0.3, 0.1, 0.9)]


def taken(name: str, text: str) -> bool:
    """Whether a field takes a value."""
    try:
        request_of({"prompt": "a", "variation_seed": "3", "variation_strength": "0.5", name: text})
    except InvalidInput:
        return False
    return True


def test_the_page_has_every_field_of_a_picture(tmp_path: Path) -> None:
    RED.convert("RGB").save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    plain = {name: next(filter(partial(taken, name), ("0.5", "3", "64,32"))) for name in REST.names}
    given = {
        **plain, "prompt": "a", "negative_prompt": "b", "width": "64", "height": "32", "steps": 20, "seed": "1",
        "guidance_scale": 2.5, "sampler": "euler", "eta": 0.5, "images": "2", "prompt_weights": True, "previews": True,
        "loras": [["pixel", 0.5]], "guess_mode": True, "styles": [["photo", picture, 0.4]],
        "controls": [["canny", picture, 0.3, 0.1, 0.9]], "scripts": ["styles"], "guidance_end": "0.9",
        **dict.fromkeys(SIZES.names, "64,32"), "aesthetic_score": "5", "negative_aesthetic_score": "1",
    }  # fmt: skip
    drawn_on = {"canvas": canvas(brushed()), "left": "8", "keeps_shape": True, "strength": 0.4, "mask_blur": 2}
    drawn_on["mask_fill"] = "noise"
    parts = (drawn_on | {"keep_unmasked": False}, {"refiner": "other"}, {"hires_scale": "2", "hires_steps": "3"})
    made = [request_of(given | more) for more in parts]
    usual = ImageRequest("")
    alone = ("latents", "denoising_start")  # of what another request has drawn
    for name in (field.name for field in fields(ImageRequest) if field.name not in alone):
        assert any(repr(getattr(one, name)) != repr(getattr(usual, name)) for one in made), name
    assert (made[0].original_size, made[0].aesthetic_score) == ((64, 32), 5)
    assert made[0].keep_unmasked is False
    assert (made[1].denoising_end, made[1].aesthetic_score) == (0.8, None)
    assert (made[2].hires.scale, made[2].hires.steps, made[2].noise_size) == (2, 3, (64, 32))
    assert scores_of(given) == {"aesthetic_score": 5, "negative_aesthetic_score": 1}
    assert request_of({"prompt": "a", "refiner": "other", "refine_from": "0.6"}).denoising_end == 0.6


def test_a_first_picture_and_what_is_painted_on_it() -> None:
    plain = request_of({"prompt": "a", "canvas": canvas(CLEAR), "strength": 0.4})
    assert plain.image is not None
    assert (plain.mask, plain.strength, plain.mask_blur, plain.extend) == (None, 0.4, None, None)
    part = request_of({"prompt": "a", "canvas": canvas(CLEAR, brushed()), "strength": 0.4, "mask_blur": 3})
    assert isinstance(part.mask, np.ndarray)
    assert (part.strength, part.mask_blur) == (None, 3)
    assert (part.mask[..., 0] == 255).sum() == 8 * 4
    assert part.mask[4, 8, 0] == 255
    assert part.mask[3, 8, 0] == 0
    kept = request_of({"prompt": "a", "canvas": canvas(brushed()), "strength": 0.4, "keeps_shape": True})
    assert kept.strength == 0.4
    wider = request_of({"prompt": "a", "canvas": canvas(), "left": "8", "bottom": "16", "strength": 0.4})
    assert (wider.extend, wider.strength) == ((8, 0, 0, 16), None)
    empty = {"background": CLEAR, "layers": [CLEAR], "composite": CLEAR}
    assert request_of({"prompt": "a", "canvas": empty}).image is None


def test_nothing_painted_is_no_mask() -> None:
    assert painted([]) is None
    assert painted([CLEAR]) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"width": "wide"}, "width: is 'wide', expected a whole number"),
        ({"width": "1.5"}, "width: is '1.5', expected a whole number"),
        ({"seed": "nan"}, "seed: is 'nan', expected a whole number"),
        ({"seed": "-1"}, "seed: is -1, expected 0 to"),
        ({"images": "65"}, "images: is 65, expected 1 to 64"),
        ({"left": "x", "canvas": canvas()}, "extend: is 'x', expected a whole number"),
        ({"canvas": {"background": None, "layers": [brushed()]}}, "mask: is painted on nothing"),
        ({"styles": [["", "a.png", 1]]}, "styles: have a picture without a name"),
        ({"original_size": "1"}, "original_size: is '1', expected two lengths"),
        ({"aesthetic_score": "high"}, "aesthetic_score: is 'high', expected a number"),
        ({"guidance_start": "x"}, "guidance_start: is 'x', expected a number"),
        ({"loras": [["pixel", "much"]]}, "loras: 'pixel' has the scale 'much'"),
        ({"refine_from": "0.5"}, "refine_from: says where a refiner goes on: give a refiner"),
        ({"top": "8"}, "extend: is of a first picture: give one"),
        ({"keeps_shape": True}, "keeps_shape: is of a first picture"),
        ({"mask_blur": 3}, "mask_blur: is of a first picture"),
        ({"keep_unmasked": False}, "keep_unmasked: is of a first picture"),
        ({"mask_fill": "noise"}, "mask_fill: is of a part of a picture"),
        ({"canvas": canvas(CLEAR), "keeps_shape": True}, "keeps_shape: is of a part of a picture"),
        ({"canvas": canvas(CLEAR), "mask_blur": 3}, "mask_blur: is of a part of a picture"),
        ({"canvas": canvas(CLEAR), "keep_unmasked": False}, "keep_unmasked: is of a part of a picture"),
        ({"guess_mode": True}, "guess_mode: is of controls"),
    ],
)
def test_mistakes_name_the_field(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as error:
        request_of({"prompt": "a", **values})
    assert str(error.value).startswith(said)


def test_parameters_are_filled_in_whole() -> None:
    """What was drawn is what is drawn again, whatever was filled in before."""
    usual = ImageDefaults(steps=6, guidance_scale=2.0, sampler="ddim", strength=0.5)
    request = ImageRequest(
        "a", negative_prompt="b", width=64, height=32, steps=9, guidance_scale=3.0, guidance_start=0.25, eta=0.5,
        guidance_end=0.75, forecast="every 3 after 2", sampler="euler_karras", seed=5, variation_seed=2**62 + 1,
        variation_strength=0.25, noise_size=(16, 24), loras={"pixel": 0.5}, prompt_weights=True,
        hires=Hires(1.5, upscaler="lanczos", steps=4, strength=0.7, prompt="c", negative_prompt="d", sampler="ddim"),
    )  # fmt: skip
    refined, by = replace(request, hires=None, denoising_end=0.7), {"Refiner": "fine", "Refiner switch at": "0.7"}
    for wanted, size, facts in ((request, (48, 96), {}), (refined, (32, 64), by)):
        values = recalled(infotext(wanted, 5, size, facts), usual)
        again = request_of(values | {"loras": [*values["loras"].items()]})
        assert values["refiner"] == facts.get("Refiner", "")
        for field in fields(ImageRequest):
            assert getattr(again, field.name) == getattr(wanted, field.name), field.name
    sized = Hires(width=96, upscaler="latent")
    values = recalled(infotext(replace(request, hires=sized), 5, (48, 96)), usual)
    assert request_of(values | {"loras": []}).hires == sized
    less = values | recalled("a\nSeed: 5, Size: 64x32, Model: x", usual)
    plain = request_of(less | {"loras": []})
    wanted = ImageRequest("a", width=64, height=32, steps=6, guidance_scale=2.0, seed=5, prompt_weights=True)
    for field in fields(ImageRequest):
        assert getattr(plain, field.name) == getattr(wanted, field.name), field.name
    assert (less["strength"], less["mask_blur"], less["refiner"]) == (0.5, 0, "")


def test_a_grid_has_a_seed_of_its_own_that_stays() -> None:
    values = {"prompt": "a", "axes": [("steps", "10-30:10"), ("", ""), ("loras.pixel", "0,1")]}
    plan, again = (plan_of(values, request_of(values)) for _ in range(2))
    assert plan is not None
    assert again is not None
    assert plan.shape == (3, 1, 2)
    assert plan.request.seed == again.request.seed is not None
    assert [cell.loras for cell in plan.cells][::3] == [{"pixel": 0.0}, {"pixel": 1.0}]
    assert plan_of({"axes": [("", "")] * 3}, request_of({"prompt": "a"})) is None


def test_mistakes_in_a_grid_name_the_axis() -> None:
    for axes, said in (
        ([("", "1,2")], "x: has values without a field"),
        ([("", ""), ("steps", "a")], "y: has a value of steps that is 'a', expected a whole number"),
        ([("steps", "1"), ("steps", "2")], "x: has the field steps of another axis"),
    ):
        with pytest.raises(InvalidInput, match=": has ") as error:
            plan_of({"axes": axes}, request_of({"prompt": "a"}))
        assert str(error.value).startswith(said)
    values = {"axes": [("steps", "1")], "refiner": "other", "prompt": "a"}
    with pytest.raises(InvalidInput, match="refiner: has no place in a grid"):
        plan_of(values, request_of(values))
    with pytest.raises(InvalidInput, match="each cell of a grid is one picture"):
        plan_of({"axes": [("steps", "1")]}, request_of({"prompt": "a", "images": "2"}))


def test_loras_without_a_scale_are_left_out() -> None:
    assert loras_of([["a", 1], ["b", 0], ["c", ""], ["d", None]]) == {"a": 1.0}


def test_a_model_that_says_nothing() -> None:
    assert abilities(None) is None
    assert abilities(model_pb2.Model(name="draw")) is None
