"""What clients of the web UI list and set."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from webuiapi import WebUIApi

from runtime.diffusion.defaults import ImageAbilities, ImageDefaults
from runtime.diffusion.labels import LABELS
from runtime.placing import devices
from tests.fakes.proofs import proves
from tests.fakes.web import send
from tests.serving.dialects.a1111.conftest import DRAW, SHADES, Studio, b64

ABLE = ImageAbilities(
    min_edge=8, max_edge=64, default_edge=32, edge_multiple=8, defaults=ImageDefaults(steps=9, sampler="euler"),
    controls=("edges",), styles=("look",), loras=("soft",),
)  # fmt: skip


@pytest.fixture
def able(studio: Studio) -> Any:
    """The model says what it draws, as bundles do."""
    offer = studio.fake.host.catalog.find("draw").offer
    offer.__dict__["abilities"] = ABLE.model_dump(mode="json")
    yield
    offer.__dict__["abilities"] = {}


@proves("GET /sdapi/v1/sd-models")
@proves("GET /sdapi/v1/samplers")
@proves("GET /sdapi/v1/schedulers")
@proves("GET /sdapi/v1/upscalers")
@proves("GET /sdapi/v1/latent-upscale-modes")
@proves("GET /sdapi/v1/memory")
@proves("GET /sdapi/v1/cmd-flags")
@proves("GET /sdapi/v1/embeddings")
@proves("GET /controlnet/version")
@proves("GET /controlnet/module_list")
@proves("POST /sdapi/v1/refresh-checkpoints")
def test_lists_of_the_client_library(studio: Studio) -> None:
    api = studio.api
    assert api.util_get_model_names() == ["draw"] and api.get_sd_models()[0]["model_name"] == "draw"
    assert api.util_get_sampler_names() == sorted(LABELS.values())
    assert {"automatic", "karras", "uniform"} <= set(api.util_get_scheduler_names())
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos", "Nearest"]
    modes = [one["name"] for one in api.get_latent_upscale_modes()]
    assert modes[0] == "Latent" and "Latent (nearest-exact)" in modes
    memory = api.get_memory()["ram"]
    assert 0 < memory["used"] < memory["total"] == memory["free"] + memory["used"]
    assert api.get_cmd_flags() == {"api": True} and api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.controlnet_version() == 2 and api.controlnet_module_list() == ["none"]
    assert api.refresh_checkpoints() == {}


def test_hashes_are_those_of_bundles(studio: Studio) -> None:
    (model,) = studio.api.get_sd_models()
    bundle = studio.fake.host.catalog.find("draw").offer.bundle
    assert bundle is not None and model["sha256"] == hashlib.sha256(bundle.content).hexdigest()
    assert model["hash"] == model["sha256"][:10]
    named = studio.api.txt2img(steps=1, override_settings={"sd_model_checkpoint": f"draw [{model['hash']}]"})
    assert named.info["sd_model_hash"] == model["hash"]


def test_memory_of_a_system_that_does_not_say_it(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_host_memory", lambda: (None, None))
    status, content = send(studio.server, "/sdapi/v1/memory", verb="GET")
    assert status.status >= 400 and "enginecast[devices]" in content["detail"]


@proves("GET /sdapi/v1/extensions")
@proves("GET /sdapi/v1/face-restorers")
@proves("GET /sdapi/v1/hypernetworks")
@proves("GET /sdapi/v1/realesrgan-models")
@proves("GET /sdapi/v1/sd-vae")
def test_what_there_is_none_of(studio: Studio) -> None:
    api = studio.api
    assert api.custom_get("sdapi/v1/extensions") == []
    for call in (
        api.get_face_restorers, api.get_hypernetworks, api.get_realesrgan_models, api.get_sd_vae,
    ):  # fmt: skip
        assert call() == []


@proves("GET /sdapi/v1/loras")
@proves("GET /sdapi/v1/controlnets")
@proves("GET /controlnet/model_list")
@proves("GET /sdapi/v1/scripts")
@proves("GET /sdapi/v1/script-info")
def test_names_of_a_model(studio: Studio, able: Any) -> None:
    api = studio.api
    assert [one["name"] for one in api.get_loras()] == ["soft"]
    assert api.custom_get("sdapi/v1/controlnets") == ["edges"]
    assert api.controlnet_model_list() == ["edges", "look"]
    names = ["x/y/z plot", "controlnet"]
    assert api.get_scripts() == {"txt2img": names, "img2img": names}
    assert [one["is_alwayson"] for one in api.custom_get("sdapi/v1/script-info")] == [False, True] * 2
    result = api.txt2img(prompt="a", sampler_name="", sampler_index="", steps=2)
    assert "Sampler: Euler, Schedule type: Automatic" in result.info["infotexts"][0]


def test_image_adapters_are_units_of_controlnet(studio: Studio, able: Any) -> None:
    units = [{"model": name, "image": b64(SHADES), "weight": 0.5} for name in ("edges", "look")]
    found = studio.draw(DRAW[0], alwayson_scripts={"ControlNet": {"args": units}})
    assert [(one.name, one.scale) for one in found.controls] == [("edges", 0.5)]
    assert [(one.name, one.scale) for one in found.styles] == [("look", 0.5)]
    late = [{**units[1], "guidance_start": 0.5}]
    why = studio.refused(DRAW[0], alwayson_scripts={"ControlNet": {"args": late}})
    assert why.startswith("alwayson_scripts.ControlNet.args[0]: look is an image adapter")


def test_names_of_a_model_that_has_none(studio: Studio) -> None:
    api = studio.api
    assert api.get_loras() == [] == api.custom_get("sdapi/v1/controlnets")
    assert api.get_scripts()["txt2img"] == ["x/y/z plot"]


@proves("GET /sdapi/v1/options")
@proves("POST /sdapi/v1/options", "sd_model_checkpoint", "show_progress_every_n_steps", "live_previews_enable")
@proves("POST /sdapi/v1/options", "enable_pnginfo", "samples_format", "jpeg_quality")
def test_options_are_of_one_client(studio: Studio) -> None:
    api = studio.api
    assert api.util_get_current_model() == "draw"
    api.util_set_model("dra")
    assert api.set_options({"show_progress_every_n_steps": 2, "enable_pnginfo": False, "samples_format": "png"}) == {}
    assert api.set_options({"live_previews_enable": True}) == {}
    found = api.get_options()
    assert (found["show_progress_every_n_steps"], found["enable_pnginfo"]) == (2, False)
    assert found["CLIP_stop_at_last_layers"] == 1
    assert WebUIApi(port=studio.server.port).get_options()["show_progress_every_n_steps"] == 10
    assert not api.txt2img(prompt="a", steps=1).image.info and studio.requests[-1].preview_every == 2
    assert api.set_options({"samples_format": "webp", "jpeg_quality": 50}) == {}
    assert api.txt2img(prompt="a", steps=1).image.format == "WEBP" and studio.requests[-1].preview_every == 2
    status, content = studio.post("/sdapi/v1/options", {"enable_pnginfo": False})
    assert status == 400 and content["detail"].startswith("options: are kept for each client, and this one sent no")
    for options, why in (
        ({"outdir_samples": "x"}, "outdir_samples: is not known here"),
        ({"samples_format": "avif"}, "samples_format: "),
        ({"webp_lossless": True}, "webp_lossless: files in WebP have a quality"),
        ({"sd_model_checkpoint": "none"}, "sd_model_checkpoint: 'none' is not known"),
        ({"sd_vae": "x"}, "sd_vae: a bundle has one VAE"),
    ):
        assert api.set_options(options)["detail"].startswith(why)


@proves("POST /sdapi/v1/unload-checkpoint")
@proves("POST /sdapi/v1/reload-checkpoint")
def test_a_model_is_unloaded_and_loaded(studio: Studio) -> None:
    assert studio.post("/sdapi/v1/unload-checkpoint") == (200, {}) and studio.fake.draw.closed
    assert studio.post("/sdapi/v1/txt2img", {"steps": 1})[0] == 503
    assert studio.post("/sdapi/v1/reload-checkpoint") == (200, {}) and not studio.fake.draw.closed
    assert studio.fake.alive()


def test_a_server_that_draws_nothing(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio.fake.host, "statuses", list)
    assert studio.api.get_options()["sd_model_checkpoint"] is None and studio.api.get_sd_models() == []
    assert send(studio.server, "/sdapi/v1/loras", verb="GET")[1] == []
    status, content = studio.post("/sdapi/v1/txt2img", {})
    assert status == 400 and "this server has no model with the task image" in content["detail"]
