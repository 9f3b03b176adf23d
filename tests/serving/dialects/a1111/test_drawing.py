"""Drawing as clients of the web UI ask for it: their fields as requests, their answers, what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from webuiapi import ControlNetUnit

from runtime import limits
from runtime.diffusion.infotext import KEY
from runtime.vision.images import decoded
from serving.dialects.a1111.fields import TextToImage
from tests.fakes.proofs import proves
from tests.serving.dialects.a1111.conftest import DRAW, SHADES, Studio, b64


@proves("POST /sdapi/v1/txt2img", "prompt", "negative_prompt", "seed", "sampler_name", "scheduler", "n_iter", "steps")
def test_the_client_library_draws(studio: Studio) -> None:
    result = studio.api.txt2img(
        prompt="a (red:1.2) circle <lora:soft:0.5>", negative_prompt="blue", seed=7, sampler_name="DPM++ 2M", steps=3,
        width=64, height=32, n_iter=2, batch_size=2, cfg_scale=5,
    )  # fmt: skip
    first, second = studio.requests
    assert (first.prompt, first.negative_prompt, first.loras) == ("a (red:1.2) circle", "blue", {"soft": 0.5})
    assert (first.sampler, first.steps, first.guidance_scale, first.width, first.height) == (
        "dpmpp_2m_karras", 3, 5.0, 64, 32,
    )  # fmt: skip
    assert (first.images, first.seed, second.seed, first.prompt_weights) == (2, 7, 9, True)
    assert len(result.images) == 4 and np.array_equal(np.asarray(result.image), studio.fake.draw.picture)
    assert result.info["all_seeds"] == [7, 8, 9, 10] and result.info["sd_model_name"] == "draw"
    assert [image.info[KEY] for image in result.images] == result.info["infotexts"]
    assert result.info["infotexts"][1].startswith(
        "a (red:1.2) circle <lora:soft:0.5>\nNegative prompt: blue\nSteps: 3, Sampler: DPM++ 2M, Schedule type: "
        "Automatic, CFG scale: 5, Seed: 8, Size: 16x8, Model: draw, Version: enginecast"
    )
    assert result.parameters["prompt"] == "a (red:1.2) circle <lora:soft:0.5>" and result.parameters["n_iter"] == 2


@pytest.mark.parametrize("path", DRAW)
@proves("POST /sdapi/v1/txt2img", "cfg_scale", "width", "height", "eta", "batch_size", "sampler_index")
@proves("POST /sdapi/v1/img2img", "cfg_scale", "width", "height", "eta", "batch_size", "sampler_index")
@proves("POST /sdapi/v1/img2img", "prompt", "negative_prompt", "seed", "sampler_name", "scheduler", "n_iter", "steps")
def test_fields_become_a_request(studio: Studio, path: str) -> None:
    found = studio.draw(
        path, prompt="a", negative_prompt="b", seed=5, sampler_index="DDIM", eta=0.5, batch_size=2, n_iter=1, steps=2,
        cfg_scale=3, width=24, height=16,
    )  # fmt: skip
    values = {name: getattr(found, name) for name in ("prompt", "negative_prompt", "seed", "sampler", "eta", "images")}
    assert values == {"prompt": "a", "negative_prompt": "b", "seed": 5, "sampler": "ddim", "eta": 0.5, "images": 2}
    assert (found.steps, found.guidance_scale, found.width, found.height) == (2, 3.0, 24, 16)
    named = studio.draw(path, sampler_name="Euler", scheduler="karras", sampler_index="DDIM", eta=1)
    assert (named.sampler, named.eta) == ("euler_karras", 0.0)
    open_ = studio.draw(path, steps=None)
    assert (open_.sampler, open_.steps, open_.guidance_scale, open_.width) == (None, None, None, None)
    assert studio.draw(path, seed=-1).seed != open_.seed


@pytest.mark.parametrize("path", DRAW)
@proves("POST /sdapi/v1/txt2img", "send_images", "disable_extra_networks", "force_task_id")
@proves("POST /sdapi/v1/img2img", "send_images", "disable_extra_networks", "force_task_id")
def test_fields_of_the_answer(studio: Studio, path: str) -> None:
    body = {"init_images": [b64(SHADES)]} if "img2img" in path else {}
    status, content = studio.post(path, {**body, "send_images": False, "steps": 1, "force_task_id": "mine"})
    assert status == 200 and content["images"] == [] and len(json.loads(content["info"])["infotexts"]) == 1
    assert studio.api.custom_get("sdapi/v1/progress?id_task=mine")["progress"] == 1
    assert studio.draw(path, prompt="<lora:x>", disable_extra_networks=True).prompt == "<lora:x>"


@pytest.mark.parametrize("path", DRAW)
@proves("POST /sdapi/v1/txt2img", "override_settings", "override_settings.sd_model_checkpoint")
@proves("POST /sdapi/v1/img2img", "override_settings", "override_settings.sd_model_checkpoint")
@proves("POST /sdapi/v1/txt2img", "override_settings.show_progress_every_n_steps")
@proves("POST /sdapi/v1/img2img", "override_settings.show_progress_every_n_steps")
@proves("POST /sdapi/v1/txt2img", "override_settings.live_previews_enable", "override_settings.enable_pnginfo")
@proves("POST /sdapi/v1/img2img", "override_settings.live_previews_enable", "override_settings.enable_pnginfo")
def test_settings_of_one_request(studio: Studio, path: str) -> None:
    assert studio.draw(path).preview_every == 10
    every = {"sd_model_checkpoint": "draw", "show_progress_every_n_steps": 3, "CLIP_stop_at_last_layers": 1}
    assert studio.draw(path, override_settings=every).preview_every == 3
    assert studio.draw(path, override_settings={"show_progress_every_n_steps": -1}).preview_every == 0
    assert studio.draw(path, override_settings={"live_previews_enable": False}).preview_every == 0
    assert studio.draw(path, override_settings=None).preview_every == 10
    why = studio.refused(path, override_settings={"sd_model_checkpoint": "drew"})
    assert why == "sd_model_checkpoint: 'drew' is not known: did you mean 'draw'? (known: draw)"
    plain = studio.api.txt2img(steps=1, override_settings={"enable_pnginfo": False})
    assert KEY not in plain.image.info and plain.info["infotexts"]


@pytest.mark.parametrize("path", DRAW)
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts", "alwayson_scripts.controlnet", "alwayson_scripts.controlnet.args")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts", "alwayson_scripts.controlnet", "alwayson_scripts.controlnet.args")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].enabled")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].enabled")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].model")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].model")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].image")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].image")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].image.image")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].image.image")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].input_image")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].input_image")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].weight")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].weight")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].guidance_start")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].guidance_start")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].guidance_end")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].guidance_end")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].resize_mode")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].resize_mode")
def test_control_networks(studio: Studio, path: str) -> None:
    shown = b64(SHADES)
    units: list[dict[str, Any]] = [
        {"model": "edges [0123abcd]", "image": shown, "weight": 0.5, "guidance_start": 0.1, "guidance_end": 0.6},
        {"model": "depth", "input_image": shown, "module": "none", "resize_mode": "Just Resize"},
        {"model": "pose", "image": {"image": shown, "mask": None}, "resize_mode": 2},
        {"model": "off", "enabled": False},
    ]
    found = studio.draw(path, width=32, height=32, alwayson_scripts={"ControlNet": {"args": units}}).controls
    assert [(one.name, one.scale, one.start, one.end) for one in found] == [
        ("edges", 0.5, 0.1, 0.6), ("depth", 1.0, 0.0, 1.0), ("pose", 1.0, 0.0, 1.0),
    ]  # fmt: skip
    cropped, stretched, padded = (decoded(one.image) for one in found)
    assert np.array_equal(cropped, SHADES[:, 8:40]) and np.array_equal(stretched, SHADES)
    assert padded.shape == (48, 48, 3) and np.array_equal(padded[8:40], SHADES)
    assert (padded[:8] == SHADES[0]).all() and (padded[40:] == SHADES[-1]).all()
    bare = {"alwayson_scripts": {"controlnet": {"args": [{"model": "edges"}]}}}
    if "img2img" in path:
        assert np.array_equal(decoded(studio.draw(path, **bare).controls[0].image), SHADES)
    else:
        assert "args[0].image: is missing" in studio.refused(path, **bare)


@pytest.mark.parametrize("path", DRAW)
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].control_mode")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].control_mode")
@proves("POST /sdapi/v1/txt2img", "alwayson_scripts.controlnet.args[].guessmode")
@proves("POST /sdapi/v1/img2img", "alwayson_scripts.controlnet.args[].guessmode")
def test_controls_count_more(studio: Studio, path: str) -> None:
    def args(*modes: dict[str, Any]) -> Any:
        units = [{"model": f"m{i}", "image": b64(SHADES), **mode} for i, mode in enumerate(modes)]
        return {"alwayson_scripts": {"ControlNet": {"args": units}}}

    for mode in ({"control_mode": 2}, {"control_mode": "ControlNet is more important"}, {"guessmode": True}):
        assert studio.draw(path, **args(mode, mode)).guess_mode
    assert not studio.draw(
        path, **args({"control_mode": "Balanced"}, {"control_mode": 0, "guessmode": False})
    ).guess_mode
    mixed = studio.refused(path, **args({}, {"control_mode": 2}))
    assert mixed.startswith("alwayson_scripts.ControlNet.args.control_mode: is one for all controls here")


def test_control_networks_of_the_client_library(studio: Studio) -> None:
    from PIL import Image

    unit = ControlNetUnit(image=Image.fromarray(SHADES), model="edges", weight=0.7)
    # The library writes the units into its own default of `alwayson_scripts`, and would send them with every later
    # call of the process: it gets one of ours.
    studio.api.txt2img(prompt="a", steps=1, width=48, height=32, controlnet_units=[unit], alwayson_scripts={})
    (control,) = studio.requests[-1].controls
    assert (control.name, control.scale) == ("edges", 0.7) and np.array_equal(decoded(control.image), SHADES)


REFUSED = [
    ({"restore_faces": True}, "restore_faces: there is no model for faces"),
    ({"tiling": True}, "tiling: "),
    ({"s_churn": 0.5}, "s_churn: "),
    ({"save_images": True}, "save_images: the server keeps no pictures"),
    ({"script_name": "x"}, "script_name: 'x' is no script here"),
    ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "alwayson_scripts.adetailer: is not known here"),
    (
        {"override_settings": {"CLIP_stop_at_last_layers": 2}},
        "override_settings.CLIP_stop_at_last_layers: a bundle has",
    ),
    ({"override_settings": {"outdir_samples": "/"}}, "override_settings.outdir_samples: is not known here"),
    ({"override_settings_restore_afterwards": False}, "override_settings_restore_afterwards: "),
    ({"sampler_name": "Restart"}, "sampler_name: 'Restart' is not known"),
    ({"sampler_name": "Euler", "scheduler": "SGM Uniform"}, "scheduler: 'SGM Uniform' is not known"),
    ({"scheduler": "Karras"}, "scheduler: is 'Karras' without a sampler"),
    ({"sampler_name": "Euler a", "eta": 0.5}, "eta: is 0.5, and Euler a adds noise as published"),
    ({"sampler_index": 3}, "sampler_index: is 3"),
    ({"prompt": "a [red:blue:0.5] circle"}, "prompt: has '[red:blue:0.5]'"),
    ({"prompt": "a [red|blue] circle"}, "prompt: has '[red|blue]'"),
    ({"negative_prompt": "a AND b"}, "negative_prompt: has 'AND'"),
    ({"prompt": "<hypernet:x:1>"}, "prompt: <hypernet:x:1> is not known here"),
    ({"cfg_scale": 1e9}, "cfg_scale: is 1000000000.0, expected 0 to 50"),
    ({"batch_size": 0}, "batch_size: is 0, expected 1 to 64"),
    ({"n_iter": 9, "batch_size": 8}, "n_iter: is 72, expected 1 to 64"),
    ({"steps": 0}, "steps: is 0, expected 1 to 1000"),
    ({"seed": -2}, "seed: is -2"),
    ({"force_task_id": "x" * 65}, "force_task_id: string should have at most 64 characters"),
    (
        {"alwayson_scripts": {"ControlNet": {"args": [{"model": "a", "image": "?"}]}}},
        "alwayson_scripts.ControlNet.args[0",
    ),
    (
        {"alwayson_scripts": {"ControlNet": {"args": [{"model": "a", "control_mode": 1}]}}},
        "alwayson_scripts.ControlNet.args.control_mode: is one for all controls here",
    ),
    (
        {"alwayson_scripts": {"ControlNet": {"args": [{"model": "a", "control_mode": True}]}}},
        "alwayson_scripts.controlnet.args[0].control_mode: expected a number or a name, not true or false",
    ),
    ({"ghost": 1}, "ghost: is not known here: leave it out"),
]


def test_what_is_refused(studio: Studio) -> None:
    for fields, why in REFUSED:
        for path in DRAW:
            found = studio.refused(path, **fields)
            assert found.startswith(why), (fields, found)
    assert not studio.requests and studio.fake.alive()


HOSTILE: list[bytes] = [
    b"", b"{", b"[]", b"null", b'"x"', b"[" * 50_000, b'{"prompt": ' + b"[" * 50_000, b'{"prompt": 1}',
    b'{"steps": "3"}', b'{"steps": 1e400}', b'{"cfg_scale": NaN}', b'{"cfg_scale": Infinity}',
    b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b'{"seed": 99999999999999999999999999}',
    b'{"width": -1}', b'{"override_settings": []}', b'{"alwayson_scripts": [1]}', b'{"init_images": "x"}',
    b'{"init_images": []}', b'{"init_images": ["?"]}', b'{"init_images": ["AAAA"]}',
    b'{"init_images": ["data:image/png,x"]}', b'{"init_images": ["http://127.0.0.1/x.png"]}',
    b'{"init_images": ["/etc/passwd"]}', b'{"batch_size": true}', b'{"steps": ' + b"9" * 5000 + b"}",
    json.dumps({"prompt": "x" * (limits.PROMPT.most + 1), "init_images": [b64(SHADES)]}).encode(),
    json.dumps({"prompt": "[" * 9_000, "negative_prompt": "(" * 20_000, "init_images": [b64(SHADES)]}).encode(),
]  # fmt: skip


def test_hostile_bodies(studio: Studio) -> None:
    for body in HOSTILE:
        for path in DRAW:
            status, content = studio.post(path, body)
            assert 400 <= status < 500, (body[:60], status, content)
            assert content["error"] and len(content["detail"]) <= limits.ERROR_TEXT.most
    assert studio.fake.alive()


@pytest.mark.parametrize("name", ["override_settings", "alwayson_scripts"])
def test_null_is_documented_where_it_is_taken(name: str) -> None:
    assert {"type": "null"} in TextToImage.model_json_schema()["properties"][name]["anyOf"]
