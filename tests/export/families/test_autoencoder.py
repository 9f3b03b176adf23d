"""The tiny autoencoder, as the checkpoint's own and added in place of it: the pictures are diffusers'."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from runtime.diffusion.variation import random_stream
from runtime.engine import targets
from runtime.errors import InvalidInput, UnsupportedModel
from runtime.pipeline import drive
from runtime.placing.loading import load_model
from runtime.tasks.image import ImageReady, ImageRequest

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # torch tensors inside diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
REQUEST = ImageRequest("a red circle", steps=3, guidance_scale=3.0, seed=4)


def tiny(**fields: Any) -> Any:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    model: Any = diffusers.AutoencoderTiny(**blocks, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1), **fields)
    last = model.decoder.layers[-1]  # of random weights it gives nearly black pictures
    torch.nn.init.constant_(last.bias, 0.5)
    last.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "taesd"
    tiny().half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_diffusion: Path, taesd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with the tiny autoencoder, for every usable target."""
    usable = tuple(name for name, engine in targets().items() if engine.available().usable)
    output = tmp_path_factory.mktemp("bundles") / "taesd"
    build(Options(str(tiny_diffusion), output, usable, additions=(Addition("vae", taesd),)))
    return output


def opened(source: Path, *additions: Addition) -> Build:
    return Build.open(Options(str(source), source.parent / "bundle", additions=additions))


def test_an_added_autoencoder_makes_the_pictures(tiny_diffusion: Path, taesd: Path, bundle: Path, target: str) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_diffusion, vae=diffusers.AutoencoderTiny.from_pretrained(taesd), dtype=torch.float32
    )
    pipe.check_inputs = lambda *_, **__: None  # it demands multiples of 8 pixels whatever the VAE's factor
    noise = random_stream(4).standard_normal((1, 4, 8, 8), np.float32)
    wanted = pipe(
        REQUEST.prompt, num_inference_steps=3, guidance_scale=3.0, latents=torch.from_numpy(noise), output_type="np"
    ).images[0]
    with closing(load_model(bundle, target)) as model:
        (ready,) = (event for event in drive(model.pipeline(REQUEST), model.engines) if isinstance(event, ImageReady))
        assert [(one.kind, one.name) for one in model.bundle.manifest.source.additions] == [("vae", "taesd")]
    differ = np.abs(np.round(wanted * 255) - ready.image.astype(float))
    assert wanted.std() > 0.05 and differ.max() <= 1 and (differ > 0).mean() < 0.02


def test_one_of_the_checkpoint_s_own_is_the_same(tiny_diffusion: Path, taesd: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(tiny_diffusion, tmp_path / "own", ignore=shutil.ignore_patterns("vae")))
    shutil.copytree(taesd, own / "vae")
    index = json.loads((own / "model_index.json").read_bytes()) | {"vae": ["diffusers", "AutoencoderTiny"]}
    (own / "model_index.json").write_text(json.dumps(index))
    mine, added = opened(own), opened(tiny_diffusion, Addition("vae", taesd))
    assert mine.family.config(mine.source) == added.family.config(added.source)
    model = diffusers.AutoencoderTiny.from_pretrained(taesd)
    for state in (mine, added):
        decoder = next(part for part in state.parts if part.name == "vae_decoder")
        wanted = model.state_dict()
        for name, ref in state.weights(decoder).items():
            np.testing.assert_array_equal(ref.array(), wanted[name].half().numpy())
        latents = torch.randn(1, 4, 4, 4)
        decoder.components[0].model.load_state_dict(wanted, assign=True)
        with torch.no_grad():
            torch.testing.assert_close(decoder.module(latents)[0], model.decode(latents).sample)


def test_the_encoder_gives_the_latents_of_diffusers(tiny_diffusion: Path, taesd: Path) -> None:
    from export.architecture.autoencoder import VaeEncoder

    model, picture = tiny(), torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(VaeEncoder(model)(picture)[0], model.encode(picture).latents)


def test_an_autoencoder_that_does_not_fit_is_refused(tiny_diffusion: Path, taesd: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="vae: is given 2 times, and a model has one"):
        opened(tiny_diffusion, Addition("vae", taesd), Addition("vae", taesd, "other"))
    tiny(latent_channels=8).save_pretrained(tmp_path / "eight")
    with pytest.raises(UnsupportedModel, match=r"in_channels 4 \(expected 8\)"):
        opened(tiny_diffusion, Addition("vae", tmp_path / "eight"))
    with pytest.raises(UnsupportedModel, match=r"is of the class UNet2DConditionModel, expected AutoencoderKL or Auto"):
        opened(tiny_diffusion, Addition("vae", tiny_diffusion / "unet"))
