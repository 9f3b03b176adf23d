"""The parameters of a picture as a text of its PNG file, as Automatic1111's web UI writes them under the key
"parameters": prompt, negative prompt, and a line of names and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from runtime.tasks.image import ImageRequest

KEY: Final = "parameters"
"""The keyword of the text in a PNG file."""
NAMES: Final = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "eta": "Eta",
    "strength": "Denoising strength",
    "mask_blur": "Mask blur",
}
"""The web UI's names of fields."""


def infotext(request: ImageRequest, seed: int, size: tuple[int, int], more: Mapping[str, str] | None = None) -> str:
    """The text of a picture of this `size` (height, width) that was drawn with `seed`, and `more` names with values.
    What the request leaves to the model is left out.
    """
    height, width = size
    stated: dict[str, Any] = {name: getattr(request, field) for field, name in NAMES.items()}
    facts = {name: _value(value) for name, value in stated.items() if value is not None}
    if not request.eta:
        del facts["Eta"]
    facts |= {"Seed": str(seed), "Size": f"{width}x{height}"}
    if request.loras:
        facts["LoRAs"] = ", ".join(f"{name}: {scale:g}" for name, scale in request.loras.items())
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in (facts | dict(more or {})).items())
    negative = [f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else []
    return "\n".join([request.prompt, *negative, line])


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(text: str) -> str:
    """The web UI writes values that have its separators as JSON strings."""
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n') else text
