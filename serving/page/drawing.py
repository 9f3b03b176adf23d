"""What is filled in on the page, as a request for pictures, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from runtime.diffusion.defaults import ImageAbilities, ImageDefaults
from runtime.diffusion.infotext import Infotext
from runtime.diffusion.solver import samplers
from runtime.errors import InvalidInput
from runtime.grid.axes import Axis
from runtime.grid.plan import NAMES, GridPlan
from runtime.tasks.image import FILLS, ImageRequest
from runtime.values import named, real
from runtime.values import whole as whole_number
from runtime.vision.enlarging import UPSCALERS
from serving.cli.drawing import Canvas, Conditions, Refining
from serving.cli.enlarging import Enlarging
from serving.cli.plain import Plain
from serving.dialects.python.grid import resumable
from serving.dialects.python.requests import Control, Style, image_request
from serving.enginecast_pb import model_pb2
from serving.page.options import Options
from serving.page.pictures import fields_of
from serving.page.scripting import scripts_of

SLOTS: Final = 4
"""Pictures of controls that the page has room for, and of styles."""
PREVIEWS: Final = 8
"""Previews of one picture, about."""
REST: Final = Options(
    Plain,
    ("negative_prompt", "sampler", "guidance_scale", "eta", "width", "height", "steps", "seed", "prompt_weights"),
)
"""Further plain values of a picture."""
SIZES: Final = Options(Conditions)
LARGER: Final = Options(Enlarging, choices={"hires_upscaler": tuple(UPSCALERS), "hires_sampler": samplers()})
FILL: Final = Options(
    Canvas, ("image", "strength", "mask", "mask_blur", "keep_unmasked", "extend"), {"mask_fill": tuple(FILLS)}
)
"""What is painted begins with."""
SLIDERS: Final = ("steps", "guidance_scale", "strength")
"""Values that are never empty: those of the model at first."""
EDGES: Final = ("left", "top", "right", "bottom")

Values = Mapping[str, Any]
"""What is filled in, by the names of the parts of the page."""


def abilities(model: model_pb2.Model | None) -> ImageAbilities | None:
    """What a model can, None if that is not known."""
    return None if model is None else ImageAbilities.of(json_format.MessageToDict(model.abilities))


def request_of(values: Values) -> ImageRequest:
    """The request for what is filled in. Raises InvalidInput and NotFound."""
    options: dict[str, Any] = {name: values.get(name) or None for name in ("negative_prompt", "sampler")}
    options |= {name: number(name, values.get(name)) for name in ("guidance_scale", "eta")}
    options |= {name: whole(name, values.get(name)) for name in ("width", "height", "steps", "seed", "images")}
    options |= {name: value for name, value in Plain(**REST.read(values)).given().items() if name in REST.names}
    options |= Enlarging(**LARGER.read(values)).given() | FILL.read(values)
    conditions = Conditions(**SIZES.read(values))
    options |= conditions.sizes()
    options["denoising_end"] = Refining(
        values.get("refiner") or None, number("refine_from", values.get("refine_from"))
    ).handover()
    if not values.get("refiner"):
        options |= conditions.scores()
    options["prompt_weights"] = bool(values.get("prompt_weights"))
    options |= _first_picture(values)
    options["loras"] = loras_of(values.get("loras") or ())
    options["styles"] = [
        Style(str(name), Path(picture), float(scale)) for name, picture, scale in _filled(values, "styles")
    ]
    options["controls"] = [
        Control(str(name), Path(picture), float(scale), float(start), float(end))
        for name, picture, scale, start, end in _filled(values, "controls")
    ]
    options["guess_mode"] = bool(values.get("guess_mode"))
    options["scripts"] = scripts_of(values.get("scripts") or (), values.get("script_settings") or ())
    if values.get("previews"):
        options["preview_every"] = max(1, round((options["steps"] or 2 * PREVIEWS) / PREVIEWS))
    return image_request(str(values.get("prompt") or ""), options)


def recalled(text: str, usual: ImageDefaults) -> dict[str, Any]:
    """What is filled in to draw a picture with this text of parameters, as far as it says, by the names of parts. What
    it does not say is the model's: `usual`, or empty. Raises InvalidInput.
    """
    fields, values = dict(fields_of(text)), Infotext.parse(text).values
    hires = fields.pop("hires", None)
    fields |= {} if hires is None else {f"hires_{name}": value for name, value in asdict(hires).items()}
    fields |= {"refiner": values.get("Refiner"), "refine_from": values.get("Refiner switch at")}
    texts = (
        "negative_prompt", "sampler", "width", "height", "seed", "refiner", "refine_from", *REST.names, *SIZES.names,
        *LARGER.names,
    )  # fmt: skip
    found = {"eta": 0, "mask_blur": 0, "loras": {}} | {name: getattr(usual, name) for name in SLIDERS} | fields
    return found | {name: _shown(fields.get(name)) for name in texts}


def _shown(value: Any) -> str:
    """A value as it is filled in."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else f"{value:.15g}" if isinstance(value, float) else str(value)


def scores_of(values: Values) -> dict[str, Any]:
    """The scores that a refiner takes. Raises InvalidInput."""
    return Conditions(**SIZES.read(values)).scores()


def plan_of(values: Values, request: ImageRequest) -> GridPlan | None:
    """The grid that is filled in, None if no axis is. Without a seed it has one that follows from the rest, so that a
    grid that was stopped goes on. Raises InvalidInput.
    """
    axes = {}
    for name, (field, text) in zip(NAMES, values.get("axes") or (), strict=False):
        if text and not field:
            raise InvalidInput(name, "has values without a field: choose one")
        if field:
            axes[name] = Axis.of(name, str(field), str(text or ""))
    if axes and values.get("refiner"):
        raise InvalidInput("refiner", "has no place in a grid, whose cells are of one model: leave one of both out")
    return GridPlan(resumable(request), axes) if axes else None


def whole(name: str, value: Any) -> int | None:
    """A whole number, None where there is none. Raises InvalidInput that names the field."""
    return None if _empty(value) else named(name, whole_number, value)


def number(name: str, value: Any) -> float | None:
    """A number, None where there is none. Raises InvalidInput that names the field."""
    return None if _empty(value) else named(name, real, value)


def _empty(value: Any) -> bool:
    return value is None or not str(value).strip()


def loras_of(rows: Iterable[Sequence[Any]]) -> dict[str, float]:
    """The scales of LoRA files, from a table whose rows have a name and a scale; 0 is none."""
    found = {}
    for name, scale in rows:
        try:
            found[str(name)] = float(scale or 0)
        except ValueError:
            raise InvalidInput("loras", f"'{name}' has the scale '{scale}', expected a number") from None
    return {name: scale for name, scale in found.items() if scale}


def painted(layers: Iterable[Any]) -> NDArray[np.uint8] | None:
    """The mask of what was painted on a picture, uint8 [height, width]: 255 where a layer is not transparent. None if
    nothing was painted.
    """
    alphas = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in layers]
    if not any(alpha.any() for alpha in alphas):
        return None
    return np.where(np.maximum.reduce(alphas) > 0, np.uint8(255), np.uint8(0))


def _filled(values: Values, kind: str) -> Iterable[Sequence[Any]]:
    """The slots of a kind that have a picture: its name, its picture, and numbers."""
    for slot in values.get(kind, ()):
        name, picture, *_ = slot
        if picture and not name:
            raise InvalidInput(kind, "have a picture without a name: choose one")
        if picture:
            yield slot


def _first_picture(values: Values) -> dict[str, Any]:
    """The options of a request that begins with a picture."""
    drawn = values.get("canvas") or {}
    background, mask = drawn.get("background"), painted(drawn.get("layers") or ())
    edges = tuple(whole("extend", values.get(edge)) or 0 for edge in EDGES)
    if background is None or not np.asarray(background.convert("RGBA"))[..., 3].any():
        if mask is not None:
            raise InvalidInput("mask", "is painted on nothing: give a first picture, or clear it")
        _check_no_picture(values, edges)
        return {}
    is_part, keeps_shape = mask is not None or any(edges), bool(values.get("keeps_shape"))
    if keeps_shape and not is_part:
        raise InvalidInput("keeps_shape", "is of a part of a picture: paint one, add an edge, or leave it out")
    return {
        "image": background.convert("RGB"),
        "extend": edges if any(edges) else None,
        "strength": values.get("strength") if keeps_shape or not is_part else None,
        "mask": mask,
        "mask_blur": values.get("mask_blur") or None,
        "keep_unmasked": None if values.get("keep_unmasked", True) else False,
    }


def _check_no_picture(values: Values, edges: Sequence[int]) -> None:
    """Raise InvalidInput for what is filled in about a first picture, where there is none. How much of it is drawn anew
    always has a value, and counts for none.
    """
    stated = {
        "extend": any(edges),
        "keeps_shape": values.get("keeps_shape"),
        "mask_blur": values.get("mask_blur"),
        "keep_unmasked": not values.get("keep_unmasked", True),
    }
    for name in (name for name, given in stated.items() if given):
        raise InvalidInput(name, "is of a first picture: give one, or leave it as it was")
