"""Pictures drawn from pictures: the same as diffusers' pipelines draw, on real engines."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from runtime.bundle.signature import Array
from runtime.diffusion.canvas import normalized
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.solver import solvers
from runtime.diffusion.variation import random_stream
from runtime.engine import FakeEngine
from runtime.errors import InvalidInput
from runtime.pipeline import drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import load_model
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture, PictureFile
from tests.runtime.diffusion.reference import feed, reference
from tests.runtime.pipelines.test_diffusion import CONFIG, SAMPLE, modules_as_engines, psnr, tiny, tokenizer

__all__ = ["tokenizer"]

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning", "ignore::FutureWarning")
HEIGHT, WIDTH = 24, 16
NOISE = random_stream(3).standard_normal((1, 4, HEIGHT // 2, WIDTH // 2), np.float32)
SAMPLERS = ("ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m_karras", "dpmpp_2s", "heun", "unipc", "lcm")
USUAL = ("ddim", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_karras", "heun")
"""Those of the usual tests."""
TARGETS = ("onnxruntime", "openvino")
LEAST_DB = 40.0
MASK = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
MASK[6:18, 3:12] = 255
WITH_ENCODER = CONFIG | {"vae": CONFIG["vae"] | {"encoder": True}}


def photograph(height: int = HEIGHT, width: int = WIDTH) -> Picture:
    """A smooth picture with some noise."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(y / 5), np.cos(x / 4), np.sin((x + y) / 6)]
    noise = np.random.default_rng(1).normal(0, 12, (height, width, 3))
    return np.clip(np.stack(channels, axis=-1) * 100 + 128 + noise, 0, 255).astype(np.uint8)


def as_file(image: Image.Image, kind: str = "png", **options: Any) -> PictureFile:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return PictureFile.open(file.getvalue(), "image")


@cache
def tiny_pipe(tokenizer: Path) -> Any:
    """A random Stable Diffusion of a few thousand parameters."""
    return tiny(tokenizer)


@pytest.fixture
def pipe(tokenizer: Path) -> Any:
    return tiny_pipe(tokenizer)


@pytest.fixture
def pipeline(tokenizer: Path) -> DiffusionPipeline:
    return DiffusionPipeline(DiffusionConfig.parse(WITH_ENCODER), tokenizer)


def engines_of(pipe: Any) -> dict[str, FakeEngine]:
    """The torch modules of a pipeline behind the engine contract, the VAE's encoder included."""

    def encode(inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            return {"latents": pipe.vae.encode(torch.from_numpy(inputs["image"])).latent_dist.mode().numpy()}

    return modules_as_engines(pipe) | {"vae_encoder": FakeEngine(encode)}


def drawn(pipeline: Any, engines: Any, request: ImageRequest) -> Picture:
    (ready,) = (one for one in drive(pipeline(request), engines) if isinstance(one, ImageReady))
    return np.asarray(ready.image, np.uint8)


def library(pipe: Any, request: ImageRequest, patch: pytest.MonkeyPatch, **more: Any) -> Picture:
    """What a pipeline of diffusers draws from the same picture and noise. Its VAE encodes to the mean, as ours."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    assert request.latents is not None
    name, module = str(request.sampler), type(pipe).__module__
    pipe.scheduler = reference(name, dict(pipe.scheduler.config))
    stream = random_stream(request.seed or 0)
    stream.standard_normal(request.latents.shape, np.float32)  # the starting noise, which the request replaces
    feed(name, lambda: torch.from_numpy(stream.standard_normal(request.latents.shape, np.float32)), patch)
    patch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(request.latents))
    patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe.set_progress_bar_config(disable=True)
    given = {"image": Image.fromarray(request.image), "strength": request.strength} | more  # type: ignore[arg-type]
    found = pipe(
        request.prompt, negative_prompt=request.negative_prompt, num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale, output_type="np", **given,
    )  # fmt: skip
    return np.asarray((found.images[0] * 255).round(), np.uint8)


def as_kind(kind: str, pipe: Any) -> Any:
    """The same modules in another pipeline of diffusers."""
    return getattr(diffusers, kind)(**pipe.components, requires_safety_checker=False)


def request_of(sampler: str, **more: Any) -> ImageRequest:
    return ImageRequest(
        "a red ab", "blue", steps=7, guidance_scale=3.0, sampler=sampler, seed=3, latents=NOISE, image=photograph(),
        **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=() if name in USUAL else pytest.mark.full) for name in SAMPLERS]
)
def test_image_to_image_as_in_diffusers(
    pipe: Any, pipeline: DiffusionPipeline, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(sampler, strength=0.6)
    expected = library(as_kind("StableDiffusionImg2ImgPipeline", pipe), request, monkeypatch)
    assert expected.std() > 10 and psnr(drawn(pipeline, engines_of(pipe), request), expected) >= LEAST_DB


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("target", TARGETS)
def test_the_sample_draws_from_a_picture_as_in_diffusers(
    diffusion_bundle: Path, target: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(SAMPLE, dtype=torch.float32)
    noise = random_stream(1).standard_normal((1, 8, 8, 8), np.float32)
    request = replace(request_of("euler", strength=strength), image=photograph(128, 128), latents=noise)
    expected = library(theirs, request, monkeypatch)
    model = load_model(diffusion_bundle, target)
    assert expected.std() > 3 and psnr(drawn(model.pipeline, model.engines, request), expected) >= LEAST_DB
    model.close()


def test_no_strength_gives_the_picture_as_the_autoencoder_renders_it(pipe: Any, pipeline: DiffusionPipeline) -> None:
    engines = engines_of(pipe)
    request = request_of("ddim", strength=0.0)
    picture = drawn(pipeline, engines, request)
    with torch.no_grad():
        pixels = torch.from_numpy(photograph().astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        again = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample[0].permute(1, 2, 0).numpy()
    assert not engines["unet"].calls
    assert np.abs(picture - ((again / 2 + 0.5).clip(0, 1) * 255).round()).max() <= 1


def test_the_size_is_the_picture_s_own_rounded_down_or_the_requested_one(pipeline: DiffusionPipeline) -> None:
    """The whole picture is resized, nothing is cropped."""
    config, image = pipeline.config, photograph(26, 19)
    assert config.size_of(ImageRequest("ab", image=image)) == (24, 16)
    assert config.size_of(ImageRequest("ab", image=image, width=32)) == (24, 32)
    original = config.original_of(ImageRequest("ab", image=image))
    assert original is not None
    wanted = Image.fromarray(image).resize((16, 24), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(original.pixels(), np.asarray(wanted))


@pytest.mark.parametrize("edge", [7, 68])
def test_a_picture_that_cannot_be_drawn_at_its_size_is_refused(pipeline: DiffusionPipeline, edge: int) -> None:
    with pytest.raises(InvalidInput, match=f"has an edge of {edge} pixels, expected 8 to 64: give width and height"):
        pipeline(ImageRequest("ab", image=photograph(edge, edge)))
    pipeline(ImageRequest("ab", image=photograph(edge, edge), width=16, height=16)).close()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def test_pictures_of_every_kind_are_read_as_they_look(pipeline: DiffusionPipeline) -> None:
    """Rotated by EXIF, with transparency, CMYK, 16-bit grey, animated."""
    upright = Image.fromarray(photograph())
    see_through = upright.convert("RGBA")
    see_through.putalpha(Image.new("L", upright.size, 0))
    grey = Image.fromarray(np.full((HEIGHT, WIDTH), 0x8080, np.uint16))
    kinds = {
        "rotated": (as_file(upright.transpose(Image.Transpose.ROTATE_90), exif=exif(6)), upright),
        "transparent": (as_file(see_through), Image.new("RGB", upright.size, "white")),
        "cmyk": (as_file(upright.convert("CMYK"), "tiff"), upright.convert("CMYK").convert("RGB")),
        "sixteen": (as_file(grey), Image.new("RGB", upright.size, (128, 128, 128))),
        "animated": (as_file(upright, "png", save_all=True, append_images=[Image.new("RGB", upright.size)]), upright),
    }
    for kind, (file, expected) in kinds.items():
        original = pipeline.config.original_of(ImageRequest("ab", image=file))
        assert original is not None
        np.testing.assert_array_equal(original.pixels(), np.asarray(expected), kind)


def test_a_damaged_picture_is_named(pipeline: DiffusionPipeline, pipe: Any) -> None:
    whole = as_file(Image.fromarray(photograph()))
    damaged = PictureFile.open(whole.data[: len(whole.data) // 2], "image")
    with pytest.raises(InvalidInput, match=r"^image: is a damaged picture"):
        drawn(pipeline, engines_of(pipe), ImageRequest("ab", image=damaged, seed=0))


def test_a_bundle_without_the_encoder_says_what_to_do(tokenizer: Path) -> None:
    """Such as those that were built before."""
    older = DiffusionPipeline(DiffusionConfig.parse(CONFIG), tokenizer)
    with pytest.raises(InvalidInput, match=r"^image: needs the encoder of the VAE.*: build it again"):
        older(request_of("ddim"))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("strength", {"strength": 1.5}),
        ("strength", {"strength": math.nan}),
        ("strength", {"strength": 0.1, "steps": 5}),
        ("strength", {"strength": 0.5, "image": None}),
        ("image", {"image": np.zeros((8, 8), np.uint8)}),
        ("mask", {"mask": np.zeros((8, 9, 3), np.uint8)}),
        ("mask", {"mask": MASK, "image": None}),
        ("mask", {"mask": MASK.astype(np.float32)}),
        ("mask_blur", {"mask_blur": 1.0}),
        ("mask_blur", {"mask_blur": -1.0, "mask": MASK}),
        ("keep_unmasked", {"keep_unmasked": False}),
        ("extend", {"extend": (0, 0, 0, 0)}),
        ("extend", {"extend": (8, 0, 0, -8)}),
        ("extend", {"extend": (60_000, 60_000, 0, 0), "width": 16, "height": 16}),
        ("extend", {"extend": (8, 8, 8, 8), "image": None}),
        ("image", {"extend": (64, 0, 0, 0)}),
        ("image", {"image": np.zeros((8, 8, 3), np.float32)}),
    ],
)
def test_bad_requests_name_the_field(pipeline: DiffusionPipeline, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        pipeline(ImageRequest(**({"prompt": "ab", "image": photograph()} | change)))
    assert caught.value.field == field


def test_a_large_picture_is_encoded_in_tiles(pipe: Any, pipeline: DiffusionPipeline) -> None:
    def encoded() -> Array:
        part = pipeline.encoder(normalized(photograph(64, 64)))
        call = next(part)
        with pytest.raises(StopIteration) as end:
            while True:
                call = part.send(engines["vae_encoder"].run(call.inputs))  # type: ignore[union-attr]
        return np.asarray(end.value.value)

    engines = engines_of(pipe)
    whole = encoded()
    assert pipeline.keep_within({"vae_encoder": 3 * 4 * 40 * 40}) == [
        "pictures of more than about 40x40 pixels are encoded in tiles"
    ]
    tiled = encoded()
    shapes = [call["image"].shape for call in engines["vae_encoder"].calls]
    assert shapes[0] == (1, 3, 64, 64) and len(shapes) > 2 and all(shape[2] * shape[3] <= 1600 for shape in shapes[1:])
    assert np.abs(tiled - whole).mean() < 0.2 * whole.std()


# Inpainting


@cache
def inpainting_pipe(tokenizer: Path) -> Any:
    """The same with a UNet for inpainting."""
    pipe = tiny_pipe(tokenizer)
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        **{key: value for key, value in pipe.unet.config.items() if key[0] != "_"} | {"in_channels": 9}
    )
    return type(pipe)(**{**pipe.components, "unet": unet}, requires_safety_checker=False)


def inpainted(pipe: Any, request: ImageRequest, patch: pytest.MonkeyPatch) -> Picture:
    """What diffusers draws; `request.mask` may have edges between 0 and 1, which it rounds."""
    assert request.image is not None and request.mask is not None
    theirs = as_kind("StableDiffusionInpaintPipeline", pipe)
    mask = Image.fromarray(request.mask).convert("L")  # type: ignore[arg-type]
    return library(theirs, request, patch, mask_image=mask, height=HEIGHT, width=WIDTH)


UNLIKE = {"kdpm2", "kdpm2_ancestral", "dpmpp_sde"}
"""At the middle of a step, diffusers puts what is kept back with the noise of the step's end."""


@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=() if name in USUAL else pytest.mark.full) for name in solvers()]
)
def test_inpainting_with_a_plain_unet_as_in_diffusers(
    pipe: Any, pipeline: DiffusionPipeline, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(sampler, strength=1.0, mask=MASK, keep_unmasked=False)
    expected = inpainted(pipe, request, monkeypatch)
    figure = psnr(drawn(pipeline, engines_of(pipe), request), expected)
    assert expected.std() > 10 and figure >= LEAST_DB - 10 * (sampler in UNLIKE)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_with_a_unet_for_it_as_in_diffusers(
    tokenizer: Path, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = inpainting_pipe(tokenizer)
    pipeline = DiffusionPipeline(DiffusionConfig.parse(WITH_ENCODER | {"inpainting": True}), tokenizer)
    request = request_of("euler", strength=strength, mask=MASK, keep_unmasked=False)
    expected = inpainted(pipe, request, monkeypatch)
    assert expected.std() > 10 and psnr(drawn(pipeline, engines_of(pipe), request), expected) >= LEAST_DB


def test_inpainting_with_less_strength_as_in_diffusers(
    pipe: Any, pipeline: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("dpmpp_2m", strength=0.6, mask=MASK, keep_unmasked=False)
    assert psnr(drawn(pipeline, engines_of(pipe), request), inpainted(pipe, request, monkeypatch)) >= LEAST_DB


@pytest.mark.parametrize("blur", [None, 1.5])
def test_what_is_not_drawn_comes_back_bit_for_bit(pipe: Any, pipeline: DiffusionPipeline, blur: float | None) -> None:
    request = request_of("ddim", mask=MASK, mask_blur=blur)
    kept, rendered = (
        drawn(pipeline, engines_of(pipe), replace(request, keep_unmasked=keep)).astype(int) for keep in (None, False)
    )
    shares = np.asarray(Image.fromarray(MASK).convert("L").filter(ImageFilter.GaussianBlur(blur or 0)), int)
    outside, inside, border = shares == 0, shares == 255, (shares > 0) & (shares < 255)
    np.testing.assert_array_equal(kept[outside], photograph()[outside])
    np.testing.assert_array_equal(kept[inside], rendered[inside])
    assert outside.any() and inside.any() and border.any() == bool(blur)
    assert (rendered[outside] != photograph()[outside]).any() and (rendered[inside] != photograph()[inside]).any()
    mixed = (photograph()[border] * (255 - shares[border][:, None]) + rendered[border] * shares[border][:, None]) / 255
    assert np.abs(kept[border] - mixed).max(initial=0) <= 0.51


def test_new_edges_repeat_the_pixels_beside_them_and_are_drawn(pipe: Any, pipeline: DiffusionPipeline) -> None:
    small = photograph(16, 12)
    request = replace(request_of("ddim"), image=small, extend=(4, 8, 0, 0))
    original = pipeline.config.original_of(request)
    assert original is not None and original.size == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(original.pixels(), np.pad(small, ((8, 0), (4, 0), (0, 0)), mode="edge"))
    shares = original.shares()
    assert shares is not None and not shares[8:, 4:].any() and (shares[:8] == 1).all() and (shares[:, :4] == 1).all()
    picture = drawn(pipeline, engines_of(pipe), request)
    np.testing.assert_array_equal(picture[8:, 4:], small)
    assert (picture != original.pixels()).any()


def test_a_mask_and_new_edges_are_both_drawn(pipeline: DiffusionPipeline) -> None:
    mask = np.zeros((16, 12, 3), np.uint8)
    mask[:4] = 255
    original = pipeline.config.original_of(ImageRequest("ab", image=photograph(16, 12), mask=mask, extend=(4, 8, 0, 0)))
    assert original is not None and (shares := original.shares()) is not None
    assert (shares[:12] == 1).all() and (shares[:, :4] == 1).all() and not shares[12:, 4:].any()


def test_masks_are_resized_with_their_picture(pipeline: DiffusionPipeline) -> None:
    original = pipeline.config.original_of(ImageRequest("ab", image=photograph(), mask=MASK, width=32, height=48))
    assert original is not None and (shares := original.shares()) is not None
    assert shares.shape == (48, 32) and shares[24, 14] == 1 and shares[4, 4] == 0


def test_a_model_for_inpainting_needs_a_mask(tokenizer: Path) -> None:
    pipeline = DiffusionPipeline(DiffusionConfig.parse(WITH_ENCODER | {"inpainting": True}), tokenizer)
    for request in (ImageRequest("ab"), ImageRequest("ab", image=photograph())):
        with pytest.raises(InvalidInput, match=r"^mask: is missing.*give image and mask"):
            pipeline(request)
