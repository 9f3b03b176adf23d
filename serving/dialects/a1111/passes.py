"""Second passes ("hires fix") and changed noise as the web UI's clients ask for them (its processing.py,
StableDiffusionProcessingTxt2Img, and rng.py).
"""

from __future__ import annotations

import secrets
from typing import Any, Final

from runtime.diffusion.hires import Hires
from runtime.diffusion.labels import named, upscaler
from runtime.errors import InvalidInput
from serving.dialects.a1111.fields import Drawing, TextToImage
from serving.dialects.a1111.words import later_words

SEEDS: Final = 1 << 32
"""Seeds that are chosen at random are below."""
USUAL_STRENGTH: Final = 0.75
USUAL_UPSCALER: Final = "Latent"
SAME: Final = frozenset({"", "use same sampler", "use same scheduler"})


def chosen_seed(given: int | None) -> int:
    """The seed that a client names, one at random for -1."""
    return secrets.randbelow(SEEDS) if given is None or given == -1 else given


def noise_of(message: Drawing, varied: bool) -> dict[str, Any]:
    """The fields of a request that change the noise of its seed. `varied` is whether a script sets the variation."""
    found: dict[str, Any] = {}
    if message.subseed_strength or varied:
        found = {
            "variation_seed": chosen_seed(message.subseed),
            "variation_strength": message.subseed_strength or 0.0,
        }
    height, width = message.seed_resize_from_h or 0, message.seed_resize_from_w or 0
    return found | ({"noise_size": (height, width)} if height > 0 and width > 0 else {})


def second_pass(message: Drawing) -> dict[str, Any]:
    """The fields of a request for a second pass, none without enable_hr. Raises InvalidInput."""
    if not isinstance(message, TextToImage) or not message.enable_hr:
        return {}
    strength = USUAL_STRENGTH if message.denoising_strength is None else message.denoising_strength
    later: dict[str, Any] = {
        "upscaler": upscaler(message.hr_upscaler or USUAL_UPSCALER),
        "steps": message.hr_second_pass_steps or None,
        "strength": strength,
        **later_words(message),
        "sampler": _sampler(message),
    }
    first_width, first_height = message.firstphase_width or 0, message.firstphase_height or 0
    if first_width or first_height:
        hires = Hires(width=message.width, height=message.height, **later)
        return {"width": first_width or None, "height": first_height or None, "hires": hires}
    width, height = message.hr_resize_x or None, message.hr_resize_y or None
    return {"hires": Hires(None if width or height else message.hr_scale, width, height, **later)}


def _sampler(message: TextToImage) -> str | None:
    label, schedule = message.hr_sampler_name or "", message.hr_scheduler or ""
    same, same_schedule = label.casefold() in SAME, schedule.casefold() in SAME
    if same and same_schedule:
        return None
    label = (message.sampler_name or "") if same else label
    schedule = (message.scheduler or "") if same_schedule else schedule
    if not label:
        raise InvalidInput("hr_scheduler", "comes without a sampler: send sampler_name or hr_sampler_name, too")
    return named(label, schedule)
