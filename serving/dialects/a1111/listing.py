"""What the web UI's clients list before they draw. What there is none of here is an empty list."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from fastapi import APIRouter

from runtime.diffusion.labels import AUTOMATIC, LABELS, SCHEDULES, UPSCALERS
from runtime.errors import MissingDependency
from runtime.placing.containers import allowance
from runtime.placing.devices import EXTRA, host_memory
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from runtime.vision.enlarging import LATENTS, PICTURES
from serving.dialects.a1111.choosing import SHORT, abilities, checkpoint, digest, models
from serving.dialects.a1111.clients import Client, Sender, Settings
from serving.dialects.a1111.drawing import PREVIEWS
from serving.dialects.a1111.fields import Options
from serving.dialects.a1111.scripts import PLOT, argument, plot_info, prompt_styles, selectable
from serving.host.models import ModelHost

EMPTY: Final = (
    "extensions", "face-restorers", "hypernetworks", "realesrgan-models", "sd-vae",
)  # fmt: skip
FIXED: Final[dict[str, Any]] = {
    **{f"/sdapi/v1/{name}": [] for name in EMPTY},
    "/sdapi/v1/samplers": [{"name": label, "aliases": [], "options": {}} for label in LABELS.values()],
    "/sdapi/v1/schedulers": [
        {"name": label.lower(), "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for label in (AUTOMATIC, *SCHEDULES.values())
    ],
    "/sdapi/v1/upscalers": [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": scale}
        for name, scale in (("None", 1.0), *((UPSCALERS[way], 4.0) for way in PICTURES))
    ],
    "/sdapi/v1/latent-upscale-modes": [{"name": UPSCALERS[way]} for way in LATENTS],
    "/sdapi/v1/embeddings": {"loaded": {}, "skipped": {}},
    "/sdapi/v1/cmd-flags": {"api": True},
    "/controlnet/module_list": {"module_list": ["none"]},
    "/controlnet/version": {"version": 2},
}
"""What is the same on every server."""
SCRIPT: Final = "controlnet"
USUAL: Final[dict[str, Any]] = {
    "show_progress_every_n_steps": PREVIEWS,
    "live_previews_enable": True,
    "enable_pnginfo": True,
    "samples_format": "png",
    "sd_vae": "Automatic",
    "CLIP_stop_at_last_layers": 1,
    "eta_noise_seed_delta": 0,
    "img2img_fix_steps": False,
    "return_grid": False,
}
"""The options of a client that has set none."""


def add(routes: APIRouter, host: ModelHost, settings: Settings) -> None:
    """Add the endpoints."""
    _models(routes, host)
    _names(routes, host, settings)
    for path, value in FIXED.items():
        routes.add_api_route(path, _fixed(value), methods=["GET"], name=path)

    @routes.get("/sdapi/v1/options")
    async def options(client: Sender) -> dict[str, Any]:
        own = settings.of(client)
        chosen = own.model_dump(exclude_none=True)
        return {"sd_model_checkpoint": _current(host, own)} | USUAL | chosen

    @routes.post("/sdapi/v1/options")
    async def change(message: Options, client: Sender) -> dict[str, Any]:
        if message.sd_model_checkpoint:
            checkpoint(host, message)
        settings.change(client, message)
        return {}

    @routes.post("/sdapi/v1/unload-checkpoint")
    async def unload(client: Sender) -> dict[str, Any]:
        await host.unload(checkpoint(host, settings.of(client)).name)
        return {}

    @routes.post("/sdapi/v1/reload-checkpoint")
    async def reload(client: Sender) -> dict[str, Any]:
        await host.load(checkpoint(host, settings.of(client)).name)
        return {}


def _fixed(value: Any) -> Callable[[], Awaitable[Any]]:
    async def endpoint() -> Any:
        return value

    return endpoint


def _current(host: ModelHost, options: Options) -> str | None:
    return checkpoint(host, options).name if models(host, ImageRequest.task) else None


def _models(routes: APIRouter, host: ModelHost) -> None:
    @routes.get("/sdapi/v1/sd-models")
    async def checkpoints() -> list[dict[str, Any]]:
        names = sorted(status.name for status in models(host, ImageRequest.task))
        return [
            {"title": name, "model_name": name, "filename": name, **_hashes(digest(host, name)), "config": None}
            for name in names
        ]

    @routes.post("/sdapi/v1/refresh-checkpoints")
    async def refresh() -> dict[str, Any]:
        return {}  # a folder of bundles is followed without being asked

    @routes.get("/sdapi/v1/vqa/models")
    async def answering() -> list[dict[str, Any]]:
        names = sorted(status.name for status in models(host, ChatRequest.task))
        return [{"name": name, "repo": name, "prompts": [], "capabilities": ["caption", "vqa"]} for name in names]

    @routes.get("/sdapi/v1/memory")
    async def memory() -> dict[str, Any]:
        total, free = host_memory(allowance())
        if total is None or free is None:
            raise MissingDependency("psutil", EXTRA)
        return {"ram": {"free": free, "used": total - free, "total": total}, "cuda": {"error": "unavailable"}}


def _hashes(digest: str | None) -> dict[str, str | None]:
    return {"hash": digest and digest[:SHORT], "sha256": digest}


def _names(routes: APIRouter, host: ModelHost, settings: Settings) -> None:
    def of_model(client: Client, kind: str) -> list[str]:
        """The names of a kind, such as LoRAs, that the client's model has."""
        known = models(host, ImageRequest.task)
        able = abilities(checkpoint(host, settings.of(client))) if known else None
        return list(getattr(able, kind)) if able else []

    @routes.get("/sdapi/v1/loras")
    async def loras(client: Sender) -> list[dict[str, Any]]:
        names = of_model(client, "loras")
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]

    @routes.get("/sdapi/v1/controlnets")
    async def controlnets(client: Sender) -> list[str]:
        return of_model(client, "controls")

    @routes.get("/controlnet/model_list")
    async def control_models(client: Sender) -> dict[str, list[str]]:
        return {"model_list": [*of_model(client, "controls"), *of_model(client, "styles")]}

    @routes.get("/sdapi/v1/prompt-styles")
    async def styles() -> list[dict[str, str]]:
        return await asyncio.to_thread(prompt_styles, host.scripts.folders)

    @routes.get("/sdapi/v1/scripts")
    async def scripts(client: Sender) -> dict[str, list[str]]:
        names = [PLOT.lower(), *(one.name for one in selectable(host.scripts))]
        names += [SCRIPT] if of_model(client, "controls") or of_model(client, "styles") else []
        return {"txt2img": names, "img2img": names}

    @routes.get("/sdapi/v1/script-info")
    async def script_info(client: Sender) -> list[dict[str, Any]]:
        controls = bool(of_model(client, "controls") or of_model(client, "styles"))
        return [one for of_picture in (False, True) for one in _scripts(host, controls, of_picture)]


def _scripts(host: ModelHost, controls: bool, of_picture: bool) -> Iterator[dict[str, Any]]:
    """What there is to say of each script of txt2img, or of img2img."""
    common = {"is_alwayson": False, "is_img2img": of_picture}
    yield {"name": PLOT.lower(), "args": plot_info(of_picture), **common}
    for script in selectable(host.scripts):
        known = (script.arguments or {}).get("properties", {})
        arguments = [argument(name, schema.get("default")) for name, schema in known.items()]
        yield {"name": script.name, "args": arguments, **common}
    if controls:
        yield {"name": SCRIPT, "args": [], **common, "is_alwayson": True}
