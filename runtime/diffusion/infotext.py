"""The parameters of a drawn picture as text, as Automatic1111's web UI writes them into its files and reads them back
(its modules processing.py, create_infotext, and infotext_utils.py, parse_generation_parameters):

    a red circle <lora:soft:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: Euler, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x512, Model: shapes

A PNG file has the text in its chunk "parameters", other files in the comment of their EXIF data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from runtime import limits
from runtime.diffusion.defaults import ImageDefaults
from runtime.diffusion.further import SIZE, fields_of, plain, values_of
from runtime.diffusion.hires import Hires
from runtime.diffusion.labels import named, shown
from runtime.errors import InvalidInput, quoted
from runtime.tasks.image import ImageReady, ImageRequest

KEY: Final = "parameters"
"""The keyword of the text in a PNG file."""
NEGATIVE: Final = "Negative prompt:"
VALUE: Final = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A name and a value, which is JSON where it holds a comma, a colon or a line break."""
LEAST: Final = 3
"""A last line with fewer values is part of the prompt."""
TAG: Final = re.compile(r"<(\w+):([^<>]*)>")
FORECAST: Final = "Forecast"
MULTIPLE: Final = 64
"""Lengths of pictures that every model draws are multiples of this, in pixels."""
NUMBERS: Final[Mapping[str, tuple[str, type[int] | type[float]]]] = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance_scale", float),
    "Guidance start": ("guidance_start", float),
    "Guidance end": ("guidance_end", float),
    "Seed": ("seed", int),
    "Denoising strength": ("strength", float),
    "Mask blur": ("mask_blur", float),
    "Eta": ("eta", float),
}
"""The field of a request that each value is, and what it is read as."""


@dataclass(frozen=True)
class Infotext:
    """The parameters of a picture: its prompts, and other values by name."""

    prompt: str
    negative_prompt: str = ""
    values: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        negative = f"\n{NEGATIVE} {self.negative_prompt}" if self.negative_prompt else ""
        values = ", ".join(f"{name}: {_quoted(value)}" for name, value in self.values.items())
        return f"{self.prompt}{negative}\n{values}".strip()

    @classmethod
    def parse(cls, text: str) -> Infotext:
        """Read a text. What is none is a prompt."""
        *lines, last = text.strip().split("\n")
        found = dict(_values(last))
        if len(found) < LEAST:
            lines, found = [*lines, last], {}
        start = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
        prompt, negative = ("\n".join(line.strip() for line in part).strip() for part in (lines[:start], lines[start:]))
        return cls(prompt, negative.removeprefix(NEGATIVE).strip(), found)

    def fields(self) -> dict[str, Any]:
        """The fields of an `ImageRequest` that draws such a picture; `strength` and `mask_blur` need a picture besides.

        Values that are none of these fields, such as the model's name, are left to the caller. Raises InvalidInput
        naming `infotext`.
        """
        prompt, loras = without_tags(self.prompt)
        found: dict[str, Any] = {"prompt": prompt, "negative_prompt": self.negative_prompt, "prompt_weights": True}
        if loras:
            found["loras"] = loras
        for name, (key, kind) in NUMBERS.items():
            if name in self.values:
                found[key] = _number(name, self.values[name], kind)
        if FORECAST in self.values:
            found["forecast"] = self.values[FORECAST]
        if "Sampler" in self.values:
            found["sampler"] = named(self.values["Sampler"], self.values.get("Schedule type", ""))
        if (size := self.values.get("Size")) is not None:
            if (lengths := SIZE.fullmatch(size)) is None:
                raise InvalidInput("infotext", f"has the size {quoted(size)}, expected one such as 512x512")
            found["width"], found["height"] = (_number("Size", length, int) for length in lengths.groups())
        found |= fields_of(self.values, lambda name, kind: _number(name, self.values[name], kind))
        if "hires" in found:
            found.pop("strength", None)  # that of the second pass
        return found


def infotext(
    request: ImageRequest,
    seed: int,
    size: tuple[int, int],
    more: Mapping[str, str] | None = None,
    defaults: ImageDefaults | None = None,
    prompt: str | None = None,
) -> str:
    """The text of a picture of this `size` (height, width) that was drawn with `seed`, and `more` names with values.
    Of several pictures, the request is that of one (`ImageRequest.single`). `prompt` is the prompt with its tags, where
    the request was made from one. What the request leaves to the model is taken from its `defaults`, and left out
    without them.
    """
    usual = None if defaults is None or request.image is None or request.masked else defaults.strength
    sampler = request.sampler or (defaults.sampler if defaults else None)
    label, schedule = shown(sampler) if sampler else (None, None)
    stated = {
        "Steps": defaults.steps if defaults and request.steps is None else request.steps,
        "Sampler": label,
        "Schedule type": schedule,
        "CFG scale": defaults.guidance_scale if defaults and request.guidance_scale is None else request.guidance_scale,
        "Guidance start": request.guidance_start,
        "Guidance end": request.guidance_end,
        FORECAST: request.forecast,
        "Eta": request.eta or None,
        "Denoising strength": usual if request.strength is None else request.strength,
        "Mask blur": request.mask_blur,
        "Seed": seed,
        "Size": _size(request, size),
    } | {name: value for name, value in values_of(request).items() if value is not None}
    values = {name: _text(value) for name, value in stated.items() if value is not None} | dict(more or {})
    negative = plain(request.negative_prompt, request.prompt_weights)
    return str(Infotext(_prompt(request) if prompt is None else prompt, negative, values))


def told(request: ImageRequest, ready: ImageReady, more: Mapping[str, str] | None = None) -> str:
    """The text of a picture that was drawn, with the prompts that scripts made of the request's."""
    height, width = ready.image.shape[:2]
    return infotext(as_drawn(request.single(ready.index), ready), ready.seed, (height, width), more)


def as_drawn(request: ImageRequest, ready: ImageReady) -> ImageRequest:
    """The request with the prompts that scripts made of its own."""
    prompt, negative = ready.prompt, ready.negative_prompt
    return replace(
        request,
        prompt=request.prompt if prompt is None else prompt,
        negative_prompt=request.negative_prompt if negative is None else negative,
    )


def _size(request: ImageRequest, drawn: tuple[int, int]) -> str | None:
    """The size of a drawn picture, of two passes in the first one, as far as it follows from the request."""
    (height, width), hires = drawn, request.hires
    if hires is not None:
        height, width = request.height or _first(height, hires), request.width or _first(width, hires)
    return f"{width}x{height}" if width and height else None


def _first(length: int, hires: Hires) -> int:
    """The length in the first pass of one in the second pass; 0 where it does not follow, as the second one may have
    been rounded down. It was not where the scale is whole, nor where the result is a multiple of what any model's
    lengths are multiples of: no other length then gives it.
    """
    first = length / hires.times
    known = not hires.shaped and first.is_integer() and (hires.times.is_integer() or first % MULTIPLE == 0)
    return int(first) if known else 0


def without_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """A prompt without the tags of its LoRAs, such as <lora:soft:0.8>, and their scales; a name alone has the scale 1.

    Raises InvalidInput naming `prompt` for other tags, and for a LoRA that is named twice.
    """
    loras: dict[str, float] = {}
    for kind, content in TAG.findall(prompt):
        name, *scales = content.split(":")
        if kind != "lora" or len(scales) > 1 or not name:
            raise InvalidInput(
                "prompt", f"<{kind}:{content}> is not known here, expected tags such as <lora:name:0.8>: leave it out"
            )
        if name in loras:
            raise InvalidInput("prompt", f"has the LoRA {quoted(name)} twice: give it once, with one scale")
        loras[name] = _scale(name, scales)
    return TAG.sub("", prompt).strip(), loras


def _scale(name: str, scales: list[str]) -> float:
    try:
        scale = float(scales[0]) if scales else 1.0
    except ValueError:
        raise InvalidInput("prompt", f"<lora:{name}:{scales[0]}> has no number as its scale") from None
    limits.LORA_SCALE.number("prompt", scale)
    return scale


def _prompt(request: ImageRequest) -> str:
    """The prompt of a request with tags for its LoRAs."""
    tags = [f"<lora:{name}:{_text(scale)}>" for name, scale in request.loras.items()]
    return " ".join([plain(request.prompt, request.prompt_weights), *tags]).strip()


def _text(value: float | str) -> str:
    """A value as it stands in the text: 7.0 is "7"."""
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _number(name: str, value: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(value)
    except ValueError:
        raise InvalidInput("infotext", f"has {quoted(value)} as {name}, expected a number") from None


def _values(line: str) -> Iterator[tuple[str, str]]:
    """The values of a line by name. Takes time in proportion to its length, whatever it holds."""
    place = 0
    while place < len(line):
        if (found := VALUE.match(line, place)) is not None:
            yield found[1], _unquoted(found[2])
            place = found.end()
        else:
            place = line.find(",", place) + 1 or len(line)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            found = str(json.loads(value))
            found.encode()
        except ValueError:  # no JSON, or half a surrogate pair
            return value
        return found
    return value
