"""The scripts of a request: the web UI's X/Y/Z plot, its styles and wildcards, and other scripts that are installed."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from runtime import limits
from runtime.diffusion.labels import named, upscaler
from runtime.errors import InvalidInput, did_you_mean, quoted
from runtime.grid.axes import LONGEST
from runtime.grid.plan import NAMES, GridPlan
from runtime.script import Folders
from runtime.scripting import Listed, Scripts
from runtime.scripts.styles import read_styles
from runtime.scripts.wildcards import WILDCARD
from runtime.tasks.image import ImageRequest
from serving.dialects.a1111.fields import Drawing, ImageToImage, TextToImage

GRID, STYLES, WILDCARDS = "xyz_grid", "styles", "wildcards"
PLOT: Final = "X/Y/Z plot"
NOTHING: Final = "Nothing"
AXES: Final[Mapping[str, str]] = {
    "Seed": "seed",
    "Steps": "steps",
    "CFG Scale": "guidance_scale",
    "Prompt S/R": "prompt_sr",
    "Sampler": "sampler",
    "Denoising": "strength",
    "Eta": "eta",
    "Var. seed": "variation_seed",
    "Var. strength": "variation_strength",
    "Hires steps": "hires.steps",
    "Hires sampler": "hires.sampler",
    "Hires upscaler": "hires.upscaler",
}
"""The fields of the plot's axes, by the web UI's labels."""
TEXTS: Final = frozenset({"Prompt S/R", "Sampler", "Hires sampler", "Hires upscaler"})
"""Axes whose values are texts; those of others are numbers."""
FIRST: Final = (NOTHING, "Seed", "Var. seed", "Var. strength", "Steps")
NUMBERED: Final = {
    False: (*FIRST, "Hires steps", "CFG Scale", "Prompt S/R", "Prompt order", "Sampler"),
    True: (*FIRST, "CFG Scale", "Image CFG Scale", "Prompt S/R", "Prompt order", "Sampler"),
}
"""The labels that numbers stand for, of img2img where True: those whose number is the same in all versions."""
PARTS: Final[tuple[tuple[str, Any], ...]] = (("type", 0), ("values", ""), ("values list", []))
ARGUMENTS: Final[tuple[tuple[str, Any], ...]] = (
    *((f"{axis} {part}", usual) for axis in "XYZ" for part, usual in PARTS),
    ("Draw legend", True), ("Include lone images", False), ("Include sub grids", False), ("Keep -1 for seeds", False),
)  # fmt: skip
"""The plot's arguments with the values that are usual there. Those behind them follow from how many there are."""
OLD: Final = (("Margin size", 0),)
NEW: Final = (*((f"Vary seeds for {axis}", False) for axis in "XYZ"), *OLD, ("Use text inputs", True))
FREE: Final = frozenset({"Include lone images", "Use text inputs"})
"""Arguments that may have other values than the usual ones; the axes, too."""
STEPPED: Final = re.compile(r"(-?\d+(?:\.\d+)?)\s*-\s*(-?\d+(?:\.\d+)?)\s*\(\s*([+-]?\d+(?:\.\d+)?)\s*\)")
COUNTED: Final = re.compile(r"(-?\d+(?:\.\d+)?)\s*-\s*(-?\d+(?:\.\d+)?)\s*\[\s*(\d+)\s*\]")

Chosen = dict[str, Mapping[str, Any]]
"""Arguments by the name of the script."""


def chosen(message: Drawing, scripts: Scripts) -> tuple[Chosen, dict[str, str]]:
    """The scripts of a request, the outermost first, and what the parameters of its pictures say of them."""
    found, facts = _selected(message, scripts)
    if message.styles:
        found[STYLES] = {"names": message.styles}
    later = (message.hr_prompt, message.hr_negative_prompt) if isinstance(message, TextToImage) else ()
    texts = [text for text in (message.prompt, message.negative_prompt, *later) if text]
    if scripts.folders.wildcards is not None and (message.styles or any(map(WILDCARD.search, texts))):
        found[WILDCARDS] = {}
    return found, facts


def varies(scripts: Chosen) -> bool:
    """Whether a plot sets the seed or the strength of a variation."""
    return any(axis["field"].startswith("variation_") for name, axis in scripts.get(GRID, {}).items() if name in NAMES)


def cell_of(request: ImageRequest, index: int) -> ImageRequest | None:
    """What picture `index` of a request with the plot was drawn by. None for the page of all cells, which is the first,
    and for other requests.
    """
    if GRID not in request.scripts or not index:
        return None
    given = request.scripts[GRID]
    axes = {name: (given[name]["field"], given[name]["values"]) for name in NAMES if name in given}
    return GridPlan.of(request, axes).cells[index - 1]


def selectable(scripts: Scripts) -> list[Listed]:
    """The installed scripts that a request may name by script_name, besides the plot."""
    own = (GRID, STYLES, WILDCARDS)
    return [
        one
        for one in scripts.listed()
        if one.name not in own and ImageRequest.task in (one.tasks or (ImageRequest.task,))
    ]


def argument(label: str, value: Any, choices: Sequence[str] | None = None) -> dict[str, Any]:
    """An argument as the web UI lists it."""
    return {"label": label, "value": value, "minimum": None, "maximum": None, "step": None, "choices": choices}


def plot_info(of_picture: bool) -> list[dict[str, Any]]:
    """The arguments of the plot. What an axis may be is sent by its number in the list, or by its name."""
    kinds = list(NUMBERED[of_picture])
    return [argument(name, usual, kinds if name.endswith("type") else None) for name, usual in (*ARGUMENTS, *NEW)]


def prompt_styles(folders: Folders) -> list[dict[str, str]]:
    """The styles that requests may name."""
    known = read_styles(folders.styles) if folders.styles else {}
    return [{"name": name, "prompt": prompt, "negative_prompt": negative} for name, (prompt, negative) in known.items()]


def _selected(message: Drawing, scripts: Scripts) -> tuple[Chosen, dict[str, str]]:
    """The script of script_name."""
    name, given = message.script_name or "None", message.script_args or []
    if name.casefold() == PLOT.casefold():
        return _plot(given, message)
    if name == "None":
        return {}, {}
    known = {one.name: one for one in selectable(scripts)}
    if name not in known:
        raise InvalidInput("script_name", f"{quoted(name)} is no script here: {did_you_mean(name, [PLOT, *known])}")
    names = list((known[name].arguments or {}).get("properties", {}))
    if len(given) > len(names):
        raise InvalidInput("script_args", f"has {len(given)} values, and {name} has {len(names)} arguments")
    return {name: dict(zip(names, given, strict=False))}, {}


def _plot(given: Sequence[Any], message: Drawing) -> tuple[Chosen, dict[str, str]]:
    """The arguments of the plot, and what its picture says of itself."""
    names = [*ARGUMENTS, *(NEW if len(given) > len(ARGUMENTS) + len(OLD) else OLD)]
    if len(given) > len(names):
        raise InvalidInput("script_args", f"has {len(given)} values, expected at most {len(names)}")
    values = dict(names) | {name: value for (name, _), value in zip(names, given, strict=False)}
    for name, usual in names[3 * len(PARTS) :]:
        if values[name] != usual and name not in FREE:
            raise InvalidInput("script_args", f"has {values[name]!r:.40} as '{name}', expected {usual!r}")
    arguments: dict[str, Any] = {"cells": values["Include lone images"]}
    facts = {"Script": PLOT}
    for axis in "XYZ":
        label = _label(values[f"{axis} type"], isinstance(message, ImageToImage))
        if label != NOTHING:
            _check_second(label, message)
            shown = _values(label, values[f"{axis} values"], values[f"{axis} values list"])
            arguments[axis.lower()] = {"field": AXES[label], "values": _read(label, shown, message.scheduler or "")}
            facts |= {f"{axis} Type": label, f"{axis} Values": ",".join(map(str, shown))}
    return {GRID: arguments}, facts


def _check_second(label: str, message: Drawing) -> None:
    if label.startswith("Hires") and not getattr(message, "enable_hr", False):
        raise InvalidInput("script_args", f"has the axis {label}, which is of a second pass: send enable_hr")


def _label(given: Any, of_picture: bool) -> str:
    """The label of an axis, by its number or its name."""
    numbered = NUMBERED[of_picture]
    if isinstance(given, int) and not isinstance(given, bool):
        if not 0 <= given < len(numbered):
            raise InvalidInput(
                "script_args", f"has an axis of type {given}, whose meaning differs among versions: send its name"
            )
        given = numbered[given]
    if given in (NOTHING, None, ""):
        return NOTHING
    if given not in AXES:
        raise InvalidInput("script_args", f"has an axis {given!r:.60}, expected {', '.join([NOTHING, *AXES])}")
    return str(given)


def _values(label: str, text: Any, listed: Any) -> list[Any]:
    """The values of an axis: those of the list, or of the text, with the ranges 1-5, 1-5 (+2) and 1-5 [3]."""
    if isinstance(listed, list) and listed:
        return listed
    if not isinstance(text, str) or not text.strip():
        raise InvalidInput("script_args", f"has no values of {label}, expected a text such as 10,20")
    limits.PROMPT.length("script_args", text)
    parts = [part.strip() for part in next(csv.reader([text], skipinitialspace=True), [])]
    if label in TEXTS:
        return parts
    whole = AXES[label].endswith(("seed", "steps"))
    return [value for part in parts for value in _ranged(part, whole)]


def _ranged(part: str, whole: bool) -> list[str]:
    if len(part) > LONGEST:
        raise InvalidInput("script_args", f"has {quoted(part)}, expected a number or range of {LONGEST} characters")
    if found := STEPPED.fullmatch(part):
        first, last, step = (float(one) for one in found.groups())
        count = int((last - first) / step + 1e-9) + 1 if step else 0
        return _numbers(lambda i: first + i * step, count, whole)
    if found := COUNTED.fullmatch(part):
        first, last, count = float(found[1]), float(found[2]), int(found[3])
        return _numbers(lambda i: first + i * (last - first) / max(1, count - 1), count, whole)
    if found := re.fullmatch(r"(-?\d+)\s*-\s*(-?\d+)", part):
        first, last = int(found[1]), int(found[2])
        return _numbers(lambda i: first + i * (1 if last >= first else -1), abs(last - first) + 1, whole)
    return [part]


def _numbers(number: Callable[[int], float], count: int, whole: bool) -> list[str]:
    limits.GRID_CELLS.count("script_args", count)
    if count < 1:
        raise InvalidInput("script_args", "has a range whose step does not lead from its first number to its last")
    return [str(int(number(i))) if whole else f"{number(i):.10g}" for i in range(count)]


def _read(label: str, values: list[Any], schedule: str) -> list[Any]:
    """The values as fields of a request have them."""
    if label in ("Sampler", "Hires sampler"):
        return [named(str(value), schedule) for value in values]
    return [upscaler(str(value)) for value in values] if label == "Hires upscaler" else values
