"""What requests to a model may ask for, as clients are told before it is loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path

from google.protobuf import json_format

from enginecast.testing.server import bundle
from runtime.bundle.manifest import MANIFEST, Bundle
from runtime.diffusion.defaults import ImageAbilities, ImageDefaults
from runtime.diffusion.solver import samplers
from serving.dialects.grpc.messages import model
from serving.host.models import ModelHost
from serving.host.offers import Offer
from tests.runtime.pipelines.test_diffusion import CONFIG

RESIDUALS = [[4, 1]]


def drawing(folder: Path, **config: object) -> Bundle:
    """A bundle with the settings of a diffusion model, and a LoRA."""
    plain = bundle(folder, "draw")
    manifest = plain.manifest.model_copy(update={"pipeline": "diffusion", "config": {**CONFIG, **config}})
    (plain.root / MANIFEST).write_text(manifest.model_dump_json())
    (plain.root / "adapters").mkdir()
    (plain.root / "adapters" / "pixel.safetensors").touch()
    return Bundle(plain.root)


def test_a_drawing_model_says_what_it_can(tmp_path: Path) -> None:
    vae = CONFIG["vae"] | {"encoder": True}
    opened = drawing(tmp_path, vae=vae, controls={"names": ["canny"], "residuals": RESIDUALS})

    async def told() -> ImageAbilities:
        host = ModelHost([opened], lambda bundle, target: None)  # type: ignore[arg-type,return-value]
        message = model(host.status("draw"))
        await host.close(0)
        return ImageAbilities.model_validate(json_format.MessageToDict(message.abilities))

    assert asyncio.run(told()) == ImageAbilities(
        min_edge=8,
        max_edge=64,
        default_edge=16,
        edge_multiple=4,
        defaults=ImageDefaults(steps=4, guidance_scale=3.0, sampler="ddim"),
        samplers=samplers(),
        image=True,
        controls=("canny",),
        loras=("pixel",),
    )


def test_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    assert Offer.of(bundle(tmp_path, "fake").root).abilities == {}
    assert Offer.of(tmp_path / "none").abilities == {}
    assert Offer.of(drawing(tmp_path / "wrong", sizes={}).root).abilities == {}
