"""What a request says of a second pass, which draws a picture again at a larger size ("hires fix" of Automatic1111's
web UI; its processing.py, StableDiffusionProcessingTxt2Img).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from runtime import limits
from runtime.errors import InvalidInput, did_you_mean
from runtime.vision.enlarging import UPSCALERS

Size = tuple[int, int]
"""Height and width, in pixels."""
PROMPTS: Final = ("prompt", "negative_prompt")
"""The fields with texts of what to draw, of both passes."""
DOUBLE: Final = 2.0
"""How many times larger the second picture is, unless a request says it."""


@dataclass(frozen=True)
class Hires:
    """A second pass over a drawn picture, `scale` times as high and as wide, by default 2. Instead of a scale, `width`
    and `height` in pixels; of one of both, the other follows from the picture's shape, and of both, what the enlarged
    picture has beyond them is cut off at both sides.

    `upscaler` is one of `runtime.vision.enlarging.UPSCALERS`: how the latents, or the pixels, are enlarged.
    `strength`, 0 to 1, is how much is drawn anew, by default the model's for image to image. `steps` are taken in that
    share of a schedule, by default as many as in the first pass. `prompt`, `negative_prompt` and `sampler` are those of
    the first pass where they are None.

    Raises InvalidInput naming the field.
    """

    scale: float | None = None
    width: int | None = None
    height: int | None = None
    upscaler: str = "latent"
    steps: int | None = None
    strength: float | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    sampler: str | None = None

    def __post_init__(self) -> None:
        for field in PROMPTS:
            limits.PROMPT.length(f"hires.{field}", getattr(self, field) or "")
        limits.NAME.length("hires.sampler", self.sampler or "")
        for field, limit in (
            ("scale", limits.HIRES_SCALE),
            ("width", limits.EDGE),
            ("height", limits.EDGE),
            ("steps", limits.STEPS),
            ("strength", limits.STRENGTH),
        ):
            if (value := getattr(self, field)) is not None:
                limit.number(f"hires.{field}", value)
        if self.upscaler not in UPSCALERS:
            raise InvalidInput(
                "hires.upscaler", f"'{self.upscaler:.64}' is not known: {did_you_mean(self.upscaler, UPSCALERS)}"
            )
        if self.scale is not None and self.shaped:
            raise InvalidInput("hires.scale", "comes with a width or height: give one of both")

    @property
    def times(self) -> float:
        """How many times larger the picture becomes, where no width or height is given."""
        return DOUBLE if self.scale is None else self.scale

    @property
    def shaped(self) -> bool:
        """Whether a width or a height is given, instead of a scale."""
        return self.width is not None or self.height is not None

    def sizes(self, first: Size, multiple: int) -> tuple[Size, Size]:
        """The size of the second picture, and the size that covers it in the shape of the `first` picture. Lengths that
        follow from others are rounded down to a multiple.
        """
        height, width = first
        if self.width is not None and self.height is not None:
            factor = max(self.width / width, self.height / height)
            return (self.height, self.width), (round(height * factor), round(width * factor))
        if self.width is not None:
            size = _rounded(self.width * height // width, multiple), self.width
        elif self.height is not None:
            size = self.height, _rounded(self.height * width // height, multiple)
        else:
            size = _rounded(int(height * self.times), multiple), _rounded(int(width * self.times), multiple)
        return size, size


def _rounded(length: int, multiple: int) -> int:
    return length - length % multiple
