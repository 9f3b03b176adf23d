"""What is filled in to draw a picture: the parts of the tab that draws, and which of them a model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import gradio as gr

from runtime import limits
from runtime.diffusion.defaults import ImageAbilities
from runtime.diffusion.solver import samplers
from runtime.grid.plan import NAMES
from runtime.tasks.image import ImageRequest
from serving.page.drawing import EDGES, FILL, REST, SLOTS, Values
from serving.page.parts import Updates, optional
from serving.page.tabs import extras
from serving.page.tabs.scripts import ScriptChoice

SLOT: Final[Mapping[str, Sequence[str]]] = {
    "styles": ("name", "picture", "scale"),
    "controls": ("name", "picture", "scale", "start", "end"),
}
"""The parts of a picture of each kind."""
TABLE: Final = "Scales: 0 leaves one out, 1 is as it was trained"


class Settings:
    """The parts, and their values by name. `inputs` are all that a request is made of, `all` also has the boxes around
    them.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}
        self._boxes: dict[str, Any] = {}
        with gr.Column(elem_id="draw-first"):
            self.model = self._add("model", gr.Dropdown(label="Model", elem_id="draw-model", filterable=False))
            self.prompt = self._add(
                "prompt", gr.Textbox(label="Prompt", lines=2, placeholder="What to draw", elem_id="draw-prompt")
            )
            self._add("negative_prompt", gr.Textbox(label="Negative prompt", placeholder="What not to draw"))
            with gr.Row():
                self.start = gr.Button("Draw", variant="primary", elem_id="draw-start", min_width=90)
                self.halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="draw-stop", min_width=90)
            self.status = gr.HTML(elem_id="draw-status")
        with gr.Column(elem_id="draw-rest"):
            self._numbers()
            self._first_picture()
            with self._box("loras", "LoRA files"):
                table = gr.Dataframe(
                    headers=["name", "scale"], datatype=["str", "number"], type="array", static_columns=[0],
                    interactive=True, label=TABLE, buttons=[], elem_id="draw-loras",
                )  # fmt: skip
                self.loras = self._add("loras", table)
            self._slots("styles", "Style pictures")
            self._slots("controls", "Controls")
            with self._box("conditions", "Sizes and scores (Stable Diffusion XL)"):
                extras.conditions(self._add)
            extras.larger(self._add)
            with self._box("refiner", "Refiner"):
                extras.refiner(self._add)
            extras.axes(self._add)
            self.scripts = ScriptChoice(ImageRequest.task, "draw-scripts")
            self._add("scripts", self.scripts.chosen)
            self._add("script_settings", self.scripts.table)

    @property
    def inputs(self) -> list[Any]:
        return list(self._parts.values())

    @property
    def image_box(self) -> Any:
        """The box of the first picture."""
        return self._boxes["image"]

    @property
    def models(self) -> list[Any]:
        """The choices of the model and the refiner."""
        return [self.model, self._parts["refiner"]]

    @property
    def all(self) -> list[Any]:
        return [*self._parts.values(), *self._boxes.values()]

    def values(self, inputs: Sequence[Any]) -> Values:
        """The values of `inputs` by name; those of styles and controls are together, one for each picture."""
        found = dict(zip(self._parts, inputs, strict=True))
        slots = {
            kind: [[found.pop(f"{kind}.{number}.{part}") for part in parts] for number in range(SLOTS)]
            for kind, parts in SLOT.items()
        }
        axes = [(found.pop(f"{name}.field"), found.pop(f"{name}.values")) for name in NAMES]
        return found | slots | {"axes": axes}

    def fitting(self, can: ImageAbilities | None, refiner: ImageAbilities | None = None) -> Updates:
        """Show what a model has, and its usual values. Of a model that does not say, all but what needs its names."""
        image = can is None or can.image
        updates: dict[str, Any] = {"image": gr.update(visible=image, open=bool(can and can.masked))}
        updates |= self._names("styles", () if can is None else can.styles)
        updates |= self._names("controls", () if can is None else can.controls)
        loras = () if can is None else can.loras
        updates |= {"loras.box": gr.update(visible=bool(loras)), "loras": [[name, 0] for name in loras]}
        updates |= extras.fitting(loras, can, refiner)
        if not image:
            updates |= {"canvas": None, "keeps_shape": False, "mask_blur": 0, "keep_unmasked": True}
            updates |= dict.fromkeys((*EDGES, *FILL.names), "")
        if can is not None:
            updates |= self._usual(can)
        return self._updates(updates)

    def filled(self, values: Values, loras: Sequence[Sequence[Any]]) -> Updates:
        """Fill in values of parts (`serving.page.drawing.recalled`), beside the rows of LoRA files. The model,
        pictures, scripts and the axes of a grid stay.
        """
        scales = values["loras"]
        rows = {str(name): scales.get(str(name), 0) for name, _ in loras} | dict(scales)
        shown = {"refiner.box": gr.update(visible=True)} if values["refiner"] else {}
        return self._updates({**values, **shown, "loras": [[name, scale] for name, scale in rows.items()]})

    def taken(self, can: ImageAbilities | None, refiner: ImageAbilities | None) -> Updates:
        """Show the conditions that a model takes, and the scores of its refiner."""
        return self._updates(extras.taken(can, refiner))

    def others(self, models: Sequence[str]) -> Updates:
        """Offer a refiner where there are several models that draw."""
        choices = [("none", ""), *((name, name) for name in models)]
        several = len(models) > 1
        return self._updates({"refiner": gr.update(choices=choices), "refiner.box": gr.update(visible=several)})

    def _updates(self, updates: Mapping[str, Any]) -> Updates:
        return {(self._boxes if name in self._boxes else self._parts)[name]: one for name, one in updates.items()}

    def _usual(self, can: ImageAbilities) -> dict[str, Any]:
        sizes = gr.update(placeholder=str(can.default_edge), value="", info=_range(can))
        own = f"the model's own ({can.defaults.sampler})", ""
        return {
            "steps": can.defaults.steps,
            "guidance_scale": can.defaults.guidance_scale,
            "strength": can.defaults.strength,
            "sampler": gr.update(choices=[own, *can.samplers], value=""),
            "width": sizes,
            "height": sizes,
        }

    def _names(self, kind: str, names: Sequence[str]) -> dict[str, Any]:
        """Show a slot for each name of a bundle's styles or controls."""
        updates: dict[str, Any] = {f"{kind}.box": gr.update(visible=bool(names))}
        for number in range(SLOTS):
            shown = number < len(names)
            updates[f"{kind}.{number}"] = gr.update(visible=shown)
            updates[f"{kind}.{number}.name"] = gr.update(choices=list(names), value=names[number] if shown else None)
            if not shown:
                updates[f"{kind}.{number}.picture"] = None
        return updates

    def _add(self, name: str, part: Any) -> Any:
        self._parts[name] = part
        return part

    def _box(self, name: str, title: str, visible: bool = False) -> Any:
        box = gr.Accordion(title, open=False, visible=visible)
        self._boxes[name if visible else f"{name}.box"] = box
        return box

    def _slider(self, name: str, limit: limits.Limit, value: float, step: float, label: str, most: int = 0) -> None:
        self._add(name, gr.Slider(limit.least or 0, most or limit.most, value, step=step, label=label))

    def _number(self, name: str, label: str, usual: str) -> None:
        self._add(name, optional(label, usual, f"draw-{name}"))

    def _numbers(self) -> None:
        with gr.Row():
            self._slider("steps", limits.STEPS, 25, 1, "Steps", 150)
            self._slider("guidance_scale", limits.GUIDANCE, 7.5, 0.1, "Guidance", 30)
        with gr.Row():
            self._number("width", "Width", "usual")
            self._number("height", "Height", "usual")
        with gr.Row():
            self._number("seed", "Seed", "random")
            self._number("images", "Pictures", "1")
        with gr.Accordion("Sampler and more", open=False):
            with gr.Row():
                choices = [("the model's own", ""), *samplers()]
                self._add("sampler", gr.Dropdown(choices, value="", label="Sampler", elem_id="draw-sampler"))
                self._slider("eta", limits.ETA, 0, 0.05, "Noise of ddim and tcd (eta)")
            with gr.Row():
                self._add("prompt_weights", gr.Checkbox(label="Weights in prompts, as in (word:1.3)"))
                self._add("previews", gr.Checkbox(True, label="Show pictures while they are drawn"))
            with gr.Row():
                for name in REST.names:
                    self._add(name, REST.part(name, "draw", "the model's own"))

    def _first_picture(self) -> None:
        with self._box("image", "First picture", visible=True):
            editor = gr.ImageEditor(
                type="pil", format="png", label="Paint on it what is to be drawn anew: without paint, all of it is",
                sources=["upload", "clipboard"], transforms=(), elem_id="draw-canvas", layers=False, buttons=[],
                brush=gr.Brush(default_size=24, colors=["#ffffff"], color_mode="fixed"),
            )  # fmt: skip
            self.canvas = self._add("canvas", editor)
            self._slider("strength", limits.STRENGTH, 0.8, 0.05, "Strength: how much is drawn anew")
            with gr.Row():
                self._add("keeps_shape", gr.Checkbox(label="What is painted begins with what is there"))
                self._slider("mask_blur", limits.MASK_BLUR, 0, 1, "Soft border, pixels", 64)
            self._add("keep_unmasked", gr.Checkbox(True, label="What is not painted stays as it is, bit for bit"))
            for name in FILL.names:
                self._add(name, FILL.part(name, "draw", "original"))
            with gr.Row():
                for edge in EDGES:
                    self._number(edge, f"Add {edge}", "0")

    def _slots(self, kind: str, title: str) -> None:
        """Pictures with a name and numbers. How many are shown is a matter of the model."""
        with self._box(kind, title):
            for number in range(SLOTS):
                with gr.Row(visible=False) as place:
                    self._boxes[f"{kind}.{number}"] = place
                    for part in SLOT[kind]:
                        self._add(f"{kind}.{number}.{part}", _part(part, f"draw-{kind}-{number}"))
            if kind == "controls":
                self._add("guess_mode", gr.Checkbox(label="Follow them without a prompt (guess mode)"))


def _range(can: ImageAbilities) -> str:
    return f"{can.min_edge} to {can.max_edge}, in steps of {can.edge_multiple}"


def _part(name: str, slot: str) -> Any:
    """A part of a slot."""
    own = f"{slot}-{name}"
    if name == "name":
        return gr.Dropdown(label="Name", filterable=False, min_width=120, elem_id=own)
    if name == "picture":
        return gr.Image(
            type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"], height=160, buttons=[],
            elem_id=own,
        )  # fmt: skip
    most, value = (limits.CONTROL_SCALE.most, 1.0) if name == "scale" else (1, 1.0 if name == "end" else 0.0)
    label = {"scale": "Scale", "start": "From (share of steps)", "end": "To"}[name]
    return gr.Number(value, label=label, minimum=0, maximum=most, step=0.05, min_width=90, elem_id=own)
