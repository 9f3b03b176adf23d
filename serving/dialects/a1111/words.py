"""Prompts as the web UI's clients write them: the LoRAs that they name, and what is refused in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from runtime import limits
from runtime.diffusion.infotext import without_tags
from runtime.errors import InvalidInput
from serving.dialects.a1111.fields import Drawing, TextToImage

EDITING: Final = re.compile(r"(?<!\\)\[[^\[\]]*(?::\s*[+-]?[\d.]+\s*\]|\|[^\[\]]*\])")
"""Prompt editing and alternating words."""
AND: Final = re.compile(r"\bAND\b")


def words(message: Drawing) -> dict[str, Any]:
    """The prompts, and the LoRAs that are named in the first. Raises InvalidInput."""
    limits.PROMPT.length("prompt", message.prompt)
    _check({"prompt": message.prompt, "negative_prompt": message.negative_prompt})
    prompt, loras = (message.prompt, {}) if message.disable_extra_networks else without_tags(message.prompt)
    return {"prompt": prompt, "negative_prompt": message.negative_prompt, "loras": loras}


def later_words(message: TextToImage) -> dict[str, Any]:
    """The prompts of the second pass, None where they are those of the first. Its LoRAs are those of the first. Raises
    InvalidInput.
    """
    prompt, negative = message.hr_prompt or None, message.hr_negative_prompt or None
    limits.PROMPT.length("hr_prompt", prompt or "")
    _check({"hr_prompt": prompt or "", "hr_negative_prompt": negative or ""})
    if prompt is not None and not message.disable_extra_networks:
        (_, loras), (prompt, later) = without_tags(message.prompt), without_tags(prompt)
        if loras != later:
            raise InvalidInput(
                "hr_prompt", "names other LoRAs than prompt: both passes have the same, so name them in both"
            )
    return {"prompt": prompt, "negative_prompt": negative}


def _check(prompts: Mapping[str, str]) -> None:
    """Raise InvalidInput for what the web UI reads as more than words, by the names of the fields."""
    for name, text in prompts.items():
        if found := EDITING.search(text) or AND.search(text):
            raise InvalidInput(
                name, f"has '{found[0][:40]}', and prompts do not change between steps here, nor are they mixed "
                "(AND): leave it out, or write \\[ for a bracket"
            )  # fmt: skip
