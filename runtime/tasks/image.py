"""Pictures from a prompt: the request, its defaults, and the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from runtime import limits
from runtime.bundle.manifest import Frozen
from runtime.bundle.signature import Array
from runtime.errors import InvalidInput, SourceError
from runtime.pipeline import Event
from runtime.task import Request, Task
from runtime.vision.images import Picture, PictureFile, check_picture

DEFAULTS: Final = "enginecast.json"
"""File of a checkpoint's folder with the defaults of its model, which the published layouts have no place for."""


class ImageDefaults(Frozen):
    """Defaults of a request. `sampler` None is the one that the model was published with."""

    steps: int = Field(default=25, ge=1, le=limits.STEPS.most)
    guidance_scale: float = Field(default=7.5, ge=0, le=limits.GUIDANCE.most)
    sampler: str | None = None

    @classmethod
    def read(cls, folder: Path, usual: ImageDefaults | None = None) -> ImageDefaults:
        """Those of the file `enginecast.json` of a checkpoint's folder, where there is one, else the family's usual.
        Raises SourceError.
        """
        file, usual = folder / DEFAULTS, usual or cls()
        if not file.is_file():
            return usual
        try:
            own = cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
            raise SourceError(
                f"{file} gives no defaults that can be used: {reasons}. It may hold {', '.join(cls.model_fields)}"
            ) from None
        return usual.model_copy(update=own.model_dump(exclude_unset=True))


@dataclass(frozen=True, eq=False)
class Control:
    """A picture that a control network of the bundle follows, by the network's name: what the network was trained on,
    such as white edges on black. It is a file, or uint8 RGB [height, width, 3], and is resized to what is drawn.

    `scale` is how much of it counts. It counts in the steps between `start` and `end`, shares of all steps, 0 to 1.
    """

    name: str
    image: Picture | PictureFile
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        limits.NAME.length("controls", self.name)
        limits.CONTROL_SCALE.number("controls", self.scale)
        for share in (self.start, self.end):
            limits.CONTROL_SHARE.number("controls", share)
        if self.start >= self.end:
            raise InvalidInput(
                "controls",
                f"'{self.name}' is from {self.start:g} to {self.end:g}, expected a start below the end",
            )
        if isinstance(self.image, np.ndarray):
            check_picture(self.image, "controls")

    @property
    def nbytes(self) -> int:
        """Bytes of its file."""
        return len(self.image.data) if isinstance(self.image, PictureFile) else 0


@dataclass(frozen=True, eq=False)
class ImageRequest(Request):
    """Pictures to draw. None is the model's default. Raises InvalidInput naming the field where no model could
    accept it.

    `width` and `height` are in pixels. `negative_prompt` steers away, and counts only with a `guidance_scale` above 1
    (Ho and Salimans 2022, arXiv 2207.12598) of a model that does not receive the scale itself, as one distilled does.
    `eta` 0 to 1 is the noise that ddim and tcd add. Picture i of `images` is drawn from `seed` + i; without a seed one
    is chosen, and `ImageReady` says which. `preview_every` n > 0 adds a preview to every nth step's `Progress`, at the
    cost of one run of the VAE decoder each. `latents` float32 [images, channels, height, width] replace the standard
    normal starting noise.

    `original_size` and `target_size` (height, width) and `crop_top_left` (top, left), in pixels, are conditions of a
    model with added conditions: the size of a picture before it was scaled, where it was cropped, and the size that it
    is to look like. None is the size of the drawn picture, without a crop.

    `controls` are for control networks that the bundle was built with, each at most once; their effects add up.

    `prompt_weights` reads both prompts as Automatic1111's web UI does: "(word:1.3)" is a weight, and a prompt may be
    longer than the text encoder reads at once (`runtime.diffusion.emphasis`).
    """

    task: ClassVar[str] = "image"
    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    eta: float = 0.0
    seed: int | None = None
    images: int = 1
    preview_every: int = 0
    latents: NDArray[np.float32] | None = None
    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    controls: tuple[Control, ...] = ()
    prompt_weights: bool = False

    def __post_init__(self) -> None:
        for field in ("prompt", "negative_prompt"):
            limits.PROMPT.length(field, getattr(self, field))
        limits.NAME.length("sampler", self.sampler or "")
        limits.IMAGES.number("images", self.images)
        limits.PREVIEW_EVERY.number("preview_every", self.preview_every)
        limits.CONTROLS.length("controls", self.controls)
        limits.ETA.number("eta", self.eta)
        for field, limit in (
            ("steps", limits.STEPS),
            ("guidance_scale", limits.GUIDANCE),
            ("width", limits.EDGE),
            ("height", limits.EDGE),
        ):
            if (value := getattr(self, field)) is not None:
                limit.number(field, value)
        if self.seed is not None and not 0 <= self.seed <= limits.IMAGE_SEED.most + 1 - self.images:
            raise InvalidInput("seed", f"is {self.seed}, expected 0 to 2^63 - images")
        for field, pair in self.stated_sizes.items():
            if len(pair) != 2 or not all(0 <= length <= limits.EDGE.most for length in pair):
                raise InvalidInput(field, f"is {pair}, expected two lengths in pixels, 0 to {limits.EDGE.most}")

    @property
    def nbytes(self) -> int:
        return sum(control.nbytes for control in self.controls)

    @property
    def stated_sizes(self) -> dict[str, tuple[int, int]]:
        """The sizes that the request states, by their fields: only a model with added conditions takes them."""
        named = {
            "original_size": self.original_size,
            "crop_top_left": self.crop_top_left,
            "target_size": self.target_size,
        }
        return {name: pair for name, pair in named.items() if pair is not None}


@dataclass(frozen=True)
class ImageReady(Event):
    """A finished picture: uint8 RGB [height, width, 3], number `index` of the request, drawn with `seed`."""

    output: ClassVar[bool] = True
    image: Array
    index: int
    seed: int

    @property
    def nbytes(self) -> int:
        return int(self.image.nbytes)


TASK: Final = Task(ImageRequest, verb="generate")
