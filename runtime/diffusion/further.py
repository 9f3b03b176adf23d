"""What the parameters of a picture say of a second pass and of changed noise, by the names of Automatic1111's web UI
(its processing.py, StableDiffusionProcessingTxt2Img.init and create_infotext).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from runtime.diffusion.emphasis import escaped
from runtime.diffusion.hires import Hires
from runtime.diffusion.labels import UPSCALERS, named, shown, upscaler
from runtime.errors import InvalidInput, quoted
from runtime.tasks.image import ImageRequest

SIZE: Final = re.compile(r"(\d{1,9})x(\d{1,9})")
SCALE, RESIZE, WAY, SAMPLER = "Hires upscale", "Hires resize", "Hires upscaler", "Hires sampler"
STRENGTH: Final = "Denoising strength"
FROM: Final = "Seed resize from"
TEXTS: Final = {"Hires prompt": "prompt", "Hires negative prompt": "negative_prompt"}


def values_of(request: ImageRequest) -> dict[str, str | float | None]:
    """The values of a request by name, None for what it has not."""
    height, width = request.noise_size or (0, 0)
    found: dict[str, str | float | None] = {
        "Variation seed": request.variation_seed if request.variation_strength else None,
        "Variation seed strength": request.variation_strength or None,
        FROM: f"{width}x{height}" if request.noise_size else None,
    }
    return found | (_second(request.hires, request.prompt_weights) if request.hires is not None else {})


def plain(prompt: str, weighted: bool) -> str:
    """A prompt as the web UI reads it, which always reads weights: brackets of one without them are escaped."""
    return prompt if weighted else escaped(prompt)


def _second(hires: Hires, weighted: bool) -> dict[str, str | float | None]:
    label, schedule = shown(hires.sampler) if hires.sampler else (None, None)
    return {
        STRENGTH: hires.strength,
        SCALE: None if hires.shaped else hires.times,
        RESIZE: f"{hires.width or 0}x{hires.height or 0}" if hires.shaped else None,
        "Hires steps": hires.steps,
        WAY: UPSCALERS[hires.upscaler],
        SAMPLER: label,
        "Hires schedule type": schedule,
        **{
            name: None if (prompt := getattr(hires, field)) is None else plain(prompt, weighted)
            for name, field in TEXTS.items()
        },
    }


def fields_of(values: Mapping[str, str], number: Callable[[str, type[int] | type[float]], Any]) -> dict[str, Any]:
    """The fields of a request for values; `number` reads the value of a name. Raises InvalidInput naming `infotext`."""
    found: dict[str, Any] = {}
    if values.keys() >= {"Variation seed", "Variation seed strength"}:
        found["variation_seed"] = number("Variation seed", int)
        found["variation_strength"] = number("Variation seed strength", float)
    if FROM in values:
        width, height = _lengths(FROM, values[FROM])
        found["noise_size"] = height, width
    if SCALE in values or RESIZE in values:
        found["hires"] = Hires(**_hires(values, number))
    return found


def _hires(values: Mapping[str, str], number: Callable[[str, type[int] | type[float]], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {field: values[name] for name, field in TEXTS.items() if name in values}
    if RESIZE in values:
        width, height = _lengths(RESIZE, values[RESIZE])
        found |= {"width": width or None, "height": height or None}
    else:
        found["scale"] = number(SCALE, float)
    if "Hires steps" in values:
        found["steps"] = number("Hires steps", int) or None
    if STRENGTH in values:
        found["strength"] = number(STRENGTH, float)
    if WAY in values:
        found["upscaler"] = upscaler(values[WAY])
    if SAMPLER in values:
        found["sampler"] = named(values[SAMPLER], values.get("Hires schedule type", ""))
    return found


def _lengths(name: str, text: str) -> tuple[int, int]:
    if (found := SIZE.fullmatch(text)) is None:
        raise InvalidInput("infotext", f"has {quoted(text)} as {name}, expected a size such as 512x512")
    return int(found[1]), int(found[2])
