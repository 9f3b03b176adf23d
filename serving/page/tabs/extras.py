"""Further boxes of the tab that draws: the axes of a grid, the conditions of Stable Diffusion XL, a refiner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import gradio as gr

from runtime.diffusion.defaults import ImageAbilities
from runtime.grid.axes import LORA, fields
from runtime.grid.plan import NAMES
from serving.cli.drawing import REFINED_FROM
from serving.page.drawing import LARGER, SIZES
from serving.page.parts import optional

GRID: Final = "A picture for each combination of values, on one page: columns (X), rows (Y) and blocks (Z)."
SHOWN: Final = {"x": "10,20,40 or 10-50:10", "y": "euler,ddim", "z": "red,blue replaces red (prompt_sr)"}
"""Examples of values."""
ALL: Final = SIZES.names
SCORES: Final = tuple(name for name in ALL if name.endswith("score"))
REFINER: Final = "A second model that goes on with what the first one drew, as that of Stable Diffusion XL does."

Add = Callable[[str, Any], Any]
"""Adds a part by its name."""


def axes(add: Add) -> None:
    """The axes of a grid."""
    with gr.Accordion("Grid (X/Y/Z)", open=False, elem_id="draw-grid"):
        gr.Markdown(GRID)
        for name in NAMES:
            with gr.Row(equal_height=True):
                field = gr.Dropdown(
                    _fields(()), value="", label=name.upper(), elem_id=f"draw-{name}-field", min_width=150, scale=2
                )
                values = gr.Textbox(
                    label="Values", placeholder=SHOWN[name], elem_id=f"draw-{name}-values", min_width=160, scale=3
                )
                add(f"{name}.field", field)
                add(f"{name}.values", values)


def conditions(add: Add) -> None:
    """The sizes and scores that some models take."""
    with gr.Row():
        for name in SIZES.names:
            add(name, SIZES.part(name, "draw", "usual"))


def larger(add: Add) -> None:
    """A second pass at a larger size."""
    with gr.Accordion("Second pass, larger", open=False), gr.Row():
        for name in LARGER.names:
            add(name, LARGER.part(name, "draw", "usual"))


def refiner(add: Add) -> None:
    """Another model, and where it goes on."""
    gr.Markdown(REFINER)
    with gr.Row(equal_height=True):
        add("refiner", gr.Dropdown([("none", "")], value="", label="Model", allow_custom_value=True,
            elem_id="draw-refiner", min_width=120))  # fmt: skip
        add("refine_from", optional("From (share of the schedule)", f"{REFINED_FROM:g}", "draw-refine_from"))


def fitting(loras: Sequence[str], can: ImageAbilities | None, refiner: ImageAbilities | None) -> dict[str, Any]:
    """What becomes of these parts for a model with these LoRA files, and a refiner."""
    return {f"{name}.field": gr.update(choices=_fields(loras)) for name in NAMES} | taken(can, refiner)


def taken(can: ImageAbilities | None, refiner: ImageAbilities | None) -> dict[str, Any]:
    """The conditions of a model, and the scores that its refiner takes."""
    names = {*(can.conditions if can else ()), *(name for name in SCORES if refiner and name in refiner.conditions)}
    updates = {name: gr.update(visible=True) if name in names else gr.update(visible=False, value="") for name in ALL}
    return {"conditions.box": gr.update(visible=bool(names)), **updates}


def _fields(loras: Sequence[str]) -> list[tuple[str, str]]:
    """What may be on an axis, with the LoRA files of a model."""
    names = [name for name in fields() if f"{name}." != LORA]
    return [("nothing", ""), *((name, name) for name in [*names, *(f"{LORA}{name}" for name in loras)])]
