"""Comparison of models that draw: the same prompts from the same noise, then latents and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from calibration.observe.metrics import PEAK, gmsd, psnr_db, snr_db, ssim
from calibration.requests.task import task_requests
from calibration.requests.tasks.image import masked
from export.report.measured import ComparedByName, Floor, Measure, Measured
from export.report.pictures import GAIN, data_uri, difference, stored
from export.report.running import run
from export.task import FOLDER, SEED, Comparison, Effort, Pictures, SpeedEffort
from runtime.bundle.manifest import Bundle, Inside
from runtime.bundle.signature import Array
from runtime.diffusion.config import DiffusionConfig
from runtime.errors import BundleError
from runtime.pipeline import Call, Outputs, Pipeline
from runtime.placing.loading import LoadedModel
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture

PROMPTS: Final = (
    "a wooden sailing boat on a calm sea at dawn, photograph",
    "an old man playing chess in a park, oil painting",
    "a plate of pasta with basil, food photography",
    "a stone bridge over a river in autumn, watercolour",
    "a grey cat asleep on a stack of books",
    "a robot watering plants in a greenhouse, digital art",
    "a red tram in a snowy city street at night",
    "a desert road under a starry sky, long exposure",
    "ein Leuchtturm im Sturm",
    "a dog",
)
"""Prompts for any model, written for this package."""
TIMED: Final = "a large red circle at the top left on a white background"
SNR: Final = Measure(
    name="latents_snr_db",
    title="SNR of the final latents, median of all pictures",
    of="median SNR of the final latents",
    unit=" dB",
)


class PictureQuality(Measured):
    """One prompt drawn by both models from the same noise. Latents are the inputs of the VAE decoder.

    `gmsd` is None in files of versions that did not measure it.
    """

    prompt: str
    seed: int
    latents_snr_db: float
    psnr_db: float
    ssim: float
    gmsd: float | None = None
    reference: Inside
    quantized: Inside


def median(pictures: Sequence[PictureQuality], name: str) -> float:
    """The median of a figure of `PictureQuality`, which a single outlier does not change much."""
    return statistics.median(getattr(picture, name) for picture in pictures)


class ImageComparison(Comparison):
    """Models that draw a picture."""

    name = "image"
    stored = "pictures"
    result = PictureQuality
    noun = "picture"
    measure = SNR
    floors = (
        Floor(
            quant="int8",
            measure=SNR,
            least=15,
            reason="Noise in the UNet that left 19 dB or 16 dB cost shapes-diffusion one right picture at most.",
        ),
        Floor(
            quant="int4",
            measure=SNR,
            least=10,
            reason="Noise in the UNet that left 11 dB cost shapes-diffusion 1 of 11 right pictures, 7 dB 3 of 11.",
        ),
    )

    def wanted(self, effort: Effort) -> int:
        return effort.pictures

    def general(self) -> Iterator[ImageRequest]:
        return map(ImageRequest, PROMPTS)

    def comparing(self, request: ImageRequest, number: int, effort: Effort) -> ImageRequest:
        return replace(request, steps=effort.steps, seed=SEED + number)

    def compare(
        self,
        number: int,
        request: ImageRequest,
        quantized: LoadedModel,
        reference: LoadedModel,
        pictures: Pictures,
        compared: ComparedByName,
    ) -> PictureQuality:
        """Draw one request with both models, and keep the pictures."""
        (wanted, image), (got, other) = (_draw(model, request) for model in (reference, quantized))
        paths = [f"{FOLDER}/picture-{number}-{which}.png" for which in ("reference", "quantized")]
        pictures |= dict(zip(paths, (image, other), strict=True))
        return PictureQuality(
            prompt=request.prompt,
            seed=request.seed or 0,
            latents_snr_db=snr_db(wanted, got),
            psnr_db=psnr_db(image, other, PEAK),
            ssim=ssim(image, other),
            gmsd=gmsd(image, other),
            reference=paths[0],
            quantized=paths[1],
        )

    def figure(self, results: Sequence[PictureQuality]) -> float:
        return median(results, "latents_snr_db")

    def summary(self, results: Sequence[PictureQuality]) -> dict[str, float]:
        """Medians of the pictures."""
        names = (name for name in ("psnr_db", "ssim", "gmsd") if getattr(results[0], name) is not None)
        return {name: median(results, name) for name in names}

    def shown(self, bundle: Bundle, results: Sequence[PictureQuality]) -> dict[str, Any]:
        drawn = [(one, _three(bundle, one)) for one in results]
        return {"drawn": drawn, "over_pictures": partial(median, results), "gain": GAIN}

    def timed(self, model: LoadedModel, effort: SpeedEffort) -> tuple[Pipeline, str]:
        config = DiffusionConfig.parse(model.bundle.manifest.config)
        request = masked(config, ImageRequest(TIMED, steps=effort.steps, seed=0))
        return model.pipeline(request), f"picture, {effort.steps or 'its usual'} steps"


def _draw(model: LoadedModel, request: ImageRequest) -> tuple[Array, Picture]:
    """The final latents and the picture, with controls where the model has control networks and the seed is even."""
    latents: list[Array] = []

    def seen(call: Call, outputs: Outputs) -> Outputs:
        if call.submodel == "vae_decoder":
            latents.append(np.array(call.inputs["latents"]))
        return outputs

    fitted = task_requests()[request.task].fitted(model.bundle.manifest.config, request)
    picture = run(model, fitted, seen).one(ImageReady).image
    return latents[-1], picture


def _three(bundle: Bundle, one: PictureQuality) -> tuple[str, str, str]:
    """The reference's picture, the quantized one's and their amplified difference, as data URIs."""
    reference, quantized = stored(bundle, one.reference), stored(bundle, one.quantized)
    if reference.shape != quantized.shape:
        raise BundleError(
            f"{one.reference} and {one.quantized} of bundle {bundle.root} differ in size. Build the bundle again"
        )
    return data_uri(reference), data_uri(quantized), data_uri(difference(reference, quantized))


TASK: Final = ImageComparison()
