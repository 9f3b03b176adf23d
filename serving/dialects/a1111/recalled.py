"""The request field `infotext`: parameters of a picture, for fields that the client leaves out (the web UI's
modules/api/api.py, apply_infotext).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

from runtime import limits
from runtime.diffusion.further import FROM, RESIZE, SCALE, SIZE
from runtime.diffusion.infotext import Infotext
from runtime.errors import InvalidInput, quoted
from serving.dialects.a1111.fields import Drawing

M = TypeVar("M", bound=Drawing)
FIELDS: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "Steps": ("steps", int),
    "Sampler": ("sampler_name", str),
    "Schedule type": ("scheduler", str),
    "CFG scale": ("cfg_scale", float),
    "Seed": ("seed", int),
    "Eta": ("eta", float),
    "Denoising strength": ("denoising_strength", float),
    "Mask blur": ("mask_blur", float),
    "Variation seed": ("subseed", int),
    "Variation seed strength": ("subseed_strength", float),
    "Refiner": ("refiner_checkpoint", str),
    "Refiner switch at": ("refiner_switch_at", float),
    SCALE: ("hr_scale", float),
    "Hires steps": ("hr_second_pass_steps", int),
    "Hires upscaler": ("hr_upscaler", str),
    "Hires sampler": ("hr_sampler_name", str),
    "Hires schedule type": ("hr_scheduler", str),
    "Hires prompt": ("hr_prompt", str),
    "Hires negative prompt": ("hr_negative_prompt", str),
}
"""The field of each value, and what it is read as. Others, such as the name of the model, are left out."""
SIZES: Final[Mapping[str, tuple[str, str]]] = {
    "Size": ("width", "height"),
    FROM: ("seed_resize_from_w", "seed_resize_from_h"),
    RESIZE: ("hr_resize_x", "hr_resize_y"),
}
"""The fields of values that are sizes."""
LONGEST: Final = 60
"""Characters of a size."""


def with_infotext(message: M) -> M:
    """The message with the values of its infotext for fields that it leaves out. Raises InvalidInput."""
    if not message.infotext:
        return message
    limits.TEXT.length("infotext", message.infotext)
    read = Infotext.parse(message.infotext)
    found = {"prompt": read.prompt, "negative_prompt": read.negative_prompt, **dict(_fields(read.values))}
    known = type(message).model_fields.keys() - message.model_fields_set
    return message.model_copy(update={name: value for name, value in found.items() if name in known})


def _fields(values: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for name, (field, kind) in FIELDS.items():
        if name in values:
            try:
                yield field, kind(values[name])
            except ValueError:
                raise InvalidInput("infotext", f"has {quoted(values[name])} as {name}, expected a number") from None
    for name, fields in SIZES.items():
        if name in values:
            size = SIZE.fullmatch(values[name])
            if size is None or len(values[name]) > LONGEST:
                raise InvalidInput("infotext", f"has {quoted(values[name])} as {name}, expected a size such as 512x512")
            yield from zip(fields, map(int, size.groups()), strict=True)
    if SCALE in values or RESIZE in values:
        yield "enable_hr", True
