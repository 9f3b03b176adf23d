"""The gallery: what was drawn on this page, and pictures of one's own, with the parameters in their files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import gradio as gr

from runtime.errors import EnginecastError
from serving.page import lines
from serving.page.parts import Updates, larger
from serving.page.pictures import parameters
from serving.page.tabs.draw import Draw
from serving.page.tabs.talk import Talk

EDITOR_SECONDS: Final = 1.0


class Album:
    """The tab."""

    def __init__(self) -> None:
        self.pictures = gr.Gallery(
            label="Pictures drawn here; drop PNG files to see their parameters", format="png", type="filepath",
            file_types=["image"], interactive=True, columns=4, fit_columns=False, object_fit="contain", height=420,
            elem_id="album-pictures", buttons=["download", "fullscreen", larger("album-pictures")],
            sources=["upload", "clipboard"],
        )  # fmt: skip
        self.status = gr.HTML(elem_id="album-status")
        self.text = gr.Textbox(
            label="Parameters of the chosen picture", lines=4, buttons=["copy"], elem_id="album-text", interactive=False
        )
        with gr.Row():
            self.draw = gr.Button("Draw with these parameters", elem_id="album-draw")
            self.begin = gr.Button("Begin with this picture", elem_id="album-begin")
            self.ask = gr.Button("Ask about this picture", elem_id="album-ask")
        self.chosen = gr.State("")

    def wire(self, tabs: Any, draw: Draw, talk: Talk) -> None:
        """Say what happens when something is clicked; `tabs` are those of the page."""
        chosen = [self.text, self.status, self.chosen]
        self.pictures.select(self._select, self.pictures, chosen, show_progress="hidden")
        self.pictures.upload(self._last, self.pictures, chosen, show_progress="hidden")
        self.draw.click(draw.recalled, [self.text, *draw.recalling], [*draw.settings.all, draw.status]).then(
            lambda: gr.update(selected="draw"), None, tabs
        )
        box, canvas = draw.settings.image_box, draw.settings.canvas
        self.begin.click(self._open, self.chosen, [box, self.status, tabs]).success(_begun, self.chosen, canvas)
        self.ask.click(self._ask, self.chosen, [talk.question, self.status, tabs])
        self._box, self._question, self._tabs = box, talk.question, tabs

    async def _select(self, pictures: list[tuple[str, str]] | None, chosen: gr.SelectData) -> Updates:
        return await self._show((pictures or [])[chosen.index][0])

    async def _last(self, pictures: list[tuple[str, str]] | None) -> Updates:
        return await self._show(pictures[-1][0]) if pictures else {}

    async def _show(self, path: str) -> Updates:
        try:
            found = await asyncio.to_thread(parameters, Path(path))
        except EnginecastError as error:
            return {self.text: "", self.status: lines.failed(error), self.chosen: path}
        return {self.text: found, self.status: "", self.chosen: path}

    def _open(self, path: str) -> Updates:
        """Open where a first picture is shown: it can be put there once it is seen."""
        return {self._box: gr.update(open=True), self._tabs: _tab("draw")} if path else self._none()

    def _ask(self, path: str) -> Updates:
        if not path:
            return self._none()
        return {self._question: {"text": "", "files": [path]}, self._tabs: _tab("talk")}

    def _none(self) -> Updates:
        return {self.status: lines.line("choose a picture above", "failed")}


async def _begun(path: str) -> Any:
    """The first picture, once the editor that shows it has set itself up in the browser."""
    await asyncio.sleep(EDITOR_SECONDS)
    return {"background": path, "layers": [], "composite": path} if path else gr.update()


def _tab(name: str) -> Any:
    return gr.update(selected=name)
