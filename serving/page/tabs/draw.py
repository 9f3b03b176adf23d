"""The tab that draws."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final

import gradio as gr

from runtime.errors import EnginecastError, InvalidInput
from runtime.pipeline import Progress
from runtime.tasks.image import ImageReady, ImageRequest
from serving.enginecast_pb import model_pb2
from serving.host.job import Done, Queued
from serving.page import lines
from serving.page.backend import Models
from serving.page.drawing import abilities, request_of
from serving.page.parts import Page, Updates, busy, named
from serving.page.pictures import fields_of, saved
from serving.page.tabs.settings import Settings

TAB: Final = "draw"


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
                    elem_id="draw-results", buttons=["download", "fullscreen"],
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
            [self.start, self.halt, self.status, self.preview, drawn], show_progress="hidden", trigger_mode="once",
        ).then(
            self._show, [drawn, album], [self.results, self.parameters, album, drawn], show_progress="hidden",
        )  # fmt: skip
        self.halt.click(self._stop, None, None, show_progress="hidden")
        settings.model.change(self._fitting, settings.model, [*settings.all, self.status], show_progress="hidden")
        self.use.click(self.recalled, [self.parameters, settings.loras], [*settings.all, self.status])

    def offered(self, models: Models, model: str | None) -> Updates:
        """The choice of models."""
        return {self.settings.model: named(models, model_pb2.MODEL_KIND_DIFFUSION, model)}

    def recalled(self, text: str, loras: Sequence[Sequence[Any]]) -> Updates:
        """Fill in what a text of parameters says."""
        try:
            return self.settings.filled(fields_of(text), loras) | {self.status: lines.line("parameters filled in")}
        except EnginecastError as error:
            return {self.status: lines.failed(error)}

    async def _fitting(self, name: str | None) -> Updates:
        try:
            models = await self._page.backend.models()
        except EnginecastError as error:
            return {self.status: lines.failed(error)}
        return self.settings.fitting(abilities(next((model for model in models if model.name == name), None)))

    async def _stop(self, request: gr.Request) -> None:
        await self._page.runs.stop(str(request.session_hash), TAB)

    async def _draw(self, request: gr.Request, *inputs: Any) -> AsyncGenerator[Updates, None]:
        values, last = self.settings.values(inputs), Updates()
        yield busy(True, self.start, self.halt) | {self.status: lines.line("starting")}
        try:
            wanted = await asyncio.to_thread(request_of, values)
            async for update in self._followed(str(request.session_hash), values["model"], wanted):
                last |= update
                yield update
        except Exception as error:
            last[self.status] = lines.failed(error)
        # all of it again: a browser may drop what came quickly
        yield last | busy(False, self.start, self.halt) | {self.preview: gr.update(visible=False)}

    async def _followed(self, session: str, model: str | None, wanted: ImageRequest) -> AsyncGenerator[Updates, None]:
        """Run a request: what to show after each event. Raises its errors."""
        found = list[tuple[str, str]]()
        if not model:
            raise InvalidInput("model", "is missing: this server has none that draws")
        async with aclosing(self._page.runs.events(session, TAB, model, wanted)) as events:
            async for event in events:
                match event:
                    case Queued():
                        yield {self.status: lines.queued(event)}
                    case Progress():
                        yield self._progress(event)
                    case ImageReady():
                        path, text = await asyncio.to_thread(saved, self._page.folder, wanted, event, model)
                        found.append((str(path), f"seed {event.seed}"))
                        yield {self._drawn: (list(found), text)}
                    case Done():
                        made = "a picture" if len(found) == 1 else f"{len(found)} pictures"
                        yield {self.status: lines.done(event, made)}

    def _progress(self, event: Progress) -> Updates:
        shown = {} if event.preview is None else {self.preview: gr.update(value=event.preview, visible=True)}
        return {self.status: lines.progress(event)} | shown

    def _show(self, drawn: tuple[list[Any], str] | None, album: list[Any] | None) -> Updates:
        """Show what was drawn. It comes at once: of updates that follow each other, a browser drops some pictures."""
        if drawn is None:
            return {self._drawn: None}
        found, text = drawn
        return {
            self.results: gr.update(value=found, selected_index=len(found) - 1),
            self.parameters: text,
            self._album: [*reversed(found), *(album or [])],
            self._drawn: None,
        }
