"""The tab that draws."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from time import monotonic
from typing import Any, Final

import gradio as gr

from runtime.diffusion.defaults import ImageAbilities, ImageDefaults
from runtime.errors import EnginecastError, InvalidInput
from serving.enginecast_pb import model_pb2
from serving.page import lines
from serving.page.backend import Models, Scripts, Visitor
from serving.page.drawing import Values, abilities, plan_of, recalled, request_of, scores_of
from serving.page.parts import Page, Updates, busy, larger, named, names_of, visitor
from serving.page.tabs.settings import Settings
from serving.page.work import GRID, Pictures, Step, Work

TAB: Final = "draw"
GAP: Final = 0.7
"""Seconds for which pictures are sent while others are drawn."""

Fit = Callable[[ImageAbilities | None, ImageAbilities | None], Updates]
"""What becomes of the page for what a model and its refiner can."""


class Draw:
    """The tab."""

    def __init__(self, page: Page) -> None:
        self._page = page
        with gr.Row(elem_id="draw-areas"):
            self.settings = Settings()
            self.start, self.halt, self.status = self.settings.start, self.settings.halt, self.settings.status
            with gr.Column(elem_id="draw-drawn"):
                self.preview = gr.Image(
                    label="Preview", format="jpeg", interactive=False, visible=False, elem_id="draw-preview",
                    buttons=["fullscreen"],
                )  # fmt: skip
                self.results = gr.Gallery(
                    label="Pictures", format="png", interactive=False, columns=2, object_fit="contain", preview=True,
                    elem_id="draw-results", buttons=["download", "fullscreen", larger("draw-results")],
                )  # fmt: skip
                with gr.Accordion("Parameters as text", open=False):
                    self.parameters = gr.Textbox(
                        label="Parameters", lines=4, buttons=["copy"], elem_id="draw-parameters",
                        info="Of the pictures above, as other programs write them. Paste some and use them.",
                    )  # fmt: skip
                    self.use = gr.Button("Use these parameters", elem_id="draw-use")

    def wire(self, album: Any) -> None:
        """Say what happens when something is clicked. Drawn pictures are added to the gallery `album`."""
        settings, self._album = self.settings, album
        drawn = self._drawn = gr.State()
        gr.on(
            [self.start.click, settings.prompt.submit], self._draw, settings.inputs,
            [self.start, self.halt, self.status, self.preview, self.results, drawn], show_progress="hidden",
            trigger_mode="once",
        ).then(
            self._show, [drawn, album], [self.results, self.parameters, album, drawn], show_progress="hidden",
        )  # fmt: skip
        self.halt.click(self._stop, None, None, show_progress="hidden")
        fitting = [*settings.all, self.status]
        for chosen, fit in zip(settings.models, (settings.fitting, settings.taken), strict=True):
            chosen.change(self._fitted(fit), settings.models, fitting, show_progress="hidden")
        settings.scripts.wire()
        self.use.click(self.recalled, [self.parameters, *self.recalling], fitting)

    @property
    def offers(self) -> list[Any]:
        """What `offered` changes."""
        return [self.settings.model, *self.settings.others(())]

    def offered(self, models: Models, model: str | None) -> Updates:
        """The choice of models."""
        return {
            self.settings.model: named(models, model_pb2.MODEL_KIND_DIFFUSION, model),
            **self.settings.others(names_of(models, model_pb2.MODEL_KIND_DIFFUSION)),
        }

    def listed(self, scripts: Scripts) -> Updates:
        """The choice of scripts."""
        return self.settings.scripts.listed(scripts)

    @property
    def recalling(self) -> list[Any]:
        """What `recalled` takes behind the text."""
        return [self.settings.loras, *self.settings.models]

    async def recalled(
        self, request: gr.Request, text: str, loras: Sequence[Sequence[Any]], *names: str | None
    ) -> Updates:
        """Fill in what a text of parameters says."""
        try:
            can, _ = await self._abilities(request, names)
            values = recalled(text, can.defaults if can else ImageDefaults())
            return self.settings.filled(values, loras) | {self.status: lines.line("parameters filled in")}
        except EnginecastError as error:
            return {self.status: lines.failed(error)}

    def _fitted(self, fit: Fit) -> Any:
        """What becomes of the page by `fit` when a model is chosen. Gradio gives requests to functions, not to partial
        ones.
        """

        async def fitted(request: gr.Request, *names: str | None) -> Updates:
            try:
                return fit(*await self._abilities(request, names))
            except EnginecastError as error:
                return {self.status: lines.failed(error)}

        return fitted

    async def _abilities(
        self, request: gr.Request, names: Sequence[str | None]
    ) -> tuple[ImageAbilities | None, ImageAbilities | None]:
        """What a model and its refiner can."""
        models = {model.name: model for model in await self._page.backend.models(visitor(request))}
        can, refiner = (abilities(models.get(name or "")) for name in names)
        return can, refiner

    async def _stop(self, request: gr.Request) -> None:
        await self._page.runs.stop(str(request.session_hash), TAB)

    async def _draw(self, request: gr.Request, *inputs: Any) -> AsyncGenerator[Updates, None]:
        last, pace = Updates(), Pace()
        yield busy(True, self.start, self.halt) | {self.status: lines.line("starting")}
        try:
            async with aclosing(self._steps(visitor(request), self.settings.values(inputs))) as steps:
                async for step in steps:
                    last |= self._shown(step)
                    pictures = pace.pictures(() if step.last else step.pictures or ())
                    yield self._shown(step) | (self._gallery(pictures) if pictures else {})
        except Exception as error:
            last[self.status] = lines.failed(error)
        await pace.rest()
        # all of it again: a browser may drop what came quickly
        yield last | busy(False, self.start, self.halt) | {self.preview: gr.update(visible=False)}

    async def _steps(self, drawing: Visitor, values: Values) -> AsyncGenerator[Step, None]:
        """What is drawn for what is filled in. Raises the errors of the requests."""
        wanted = await asyncio.to_thread(request_of, values)
        plan = plan_of(values, wanted)
        if not values["model"]:
            raise InvalidInput("model", "is missing: this server has none that draws")
        work = Work(self._page, drawing, TAB, values["model"])
        if values["refiner"]:
            made = work.refined(wanted, values["refiner"], scores_of(values))
        else:
            made = work.pictures(wanted) if plan is None else work.grid(plan)
        async with aclosing(made) as steps:
            async for step in steps:
                yield step

    def _shown(self, step: Step) -> Updates:
        shown = {} if step.preview is None else {self.preview: gr.update(value=step.preview, visible=True)}
        drawn = {} if step.pictures is None else {self._drawn: (step.pictures, step.text)}
        return {self.status: step.line} | shown | drawn

    def _gallery(self, pictures: Sequence[Any]) -> Updates:
        """Pictures that are drawn, the newest of them large."""
        return {self.results: gr.update(value=list(pictures), selected_index=len(pictures) - 1)}

    def _show(self, drawn: tuple[list[Any], str | None] | None, album: list[Any] | None) -> Updates:
        """Show all that was drawn, in one update."""
        if drawn is None:
            return {self._drawn: None}
        found, text = drawn
        whole = found[0][1] == GRID
        files = {file for file, _ in found}  # cells of a grid that went on are there already
        return {
            self.results: gr.update(value=found, selected_index=0 if whole else len(found) - 1),
            self.parameters: gr.update() if text is None else text,
            self._album: [*(found if whole else reversed(found)), *(one for one in album or [] if one[0] not in files)],
            self._drawn: None,
        }


class Pace:
    """Which pictures to show while others are drawn. Of updates that follow each other within milliseconds, Gradio's
    page drops some: it overwrites those that it has not shown yet. So pictures are sent with every update for a while,
    and no others meanwhile.
    """

    def __init__(self) -> None:
        self._last, self._sent = -math.inf, Pictures()

    def pictures(self, found: Sequence[tuple[str, str]]) -> Pictures:
        """What the next update has, where these are drawn by now; nothing if that was sent long enough."""
        if monotonic() - self._last < GAP:
            return self._sent
        self._sent = list(found)
        self._last = monotonic() if found else self._last
        return self._sent

    async def rest(self) -> None:
        """Wait until it is time."""
        await asyncio.sleep(max(0.0, self._last + GAP - monotonic()))
