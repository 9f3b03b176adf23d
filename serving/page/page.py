"""The page: its tabs, and what they have to do with one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gradio as gr

from runtime.errors import EnginecastError
from serving.page import lines
from serving.page.backend import Models
from serving.page.parts import Page, Updates, visitor
from serving.page.pictures import KEPT_SECONDS
from serving.page.tabs.album import Album
from serving.page.tabs.draw import Draw
from serving.page.tabs.models import SECONDS, Overview
from serving.page.tabs.profiles import Profiles
from serving.page.tabs.talk import Talk

STYLE: Final = Path(__file__).with_name("style.css")
SCRIPT: Final = Path(__file__).with_name("viewer.js")
FONTS: Final = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "Helvetica Neue", "Arial", "sans-serif"]
MONO: Final = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
"""Fonts of the system: none is loaded."""
TURN: Final = "() => { document.body.classList.toggle('dark') }"
LEAVE: Final = '<form method="post" action="logout"><button>Log out</button></form>'
LOOK_SECONDS: Final = 3600
"""Between two looks for files that are too old."""


def theme() -> Any:
    """How the page looks. Light or dark is what the system of the viewer has."""
    return gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO, radius_size="md")


def blocks(page: Page) -> Any:
    """The page as Gradio's Blocks."""
    with gr.Blocks(
        title="enginecast", analytics_enabled=False, fill_width=True, delete_cache=(LOOK_SECONDS, KEPT_SECONDS)
    ) as made:
        with gr.Row(elem_id="head"):
            gr.HTML("<h1>enginecast</h1>")
            if page.closed:
                gr.HTML(LEAVE, elem_id="leave", padding=False)
            turn = gr.Button("Light or dark", size="sm", elem_id="turn", scale=0, min_width=120)
        problem = gr.HTML(elem_id="problem", visible=False)
        with gr.Tabs(selected="draw", elem_id="tabs") as tabs:
            with gr.Tab("Draw", id="draw"):
                draw = Draw(page)
            with gr.Tab("Talk", id="talk"):
                talk = Talk(page)
            with gr.Tab("Gallery", id="album"):
                album = Album()
            with gr.Tab("Models", id="models"):
                overview = Overview(page)
            with gr.Tab("Profiles", id="profiles"):
                profiles = Profiles(page.rows)
        turn.click(None, None, None, js=TURN)
        draw.wire(album.pictures)
        talk.wire()
        album.wire(tabs, draw, talk)
        overview.wire()
        made.load(
            _listed(page, draw, talk),
            None,
            [*draw.settings.scripts.all, *talk.scripts.all],
            show_progress="hidden",
        )
        profiles.wire()
        _refresh(made, page, problem, (draw, draw.settings.model), (talk, talk.model), (overview, overview.model))
    return made.queue(default_concurrency_limit=None, api_open=False, status_update_rate=1)


def _listed(page: Page, *tabs: Any) -> Any:
    """What looks for the scripts that there are, as the page opens."""

    async def listed(request: gr.Request) -> Updates:
        try:
            scripts = await page.backend.scripts(visitor(request))
        except EnginecastError:  # the line about the models says why
            return {}
        return {part: update for tab in tabs for part, update in tab.listed(scripts).items()}

    return listed


def _refresh(made: Any, page: Page, problem: Any, *shown: tuple[Any, Any]) -> None:
    """Look at the models now and then, as the page opens and while it is open."""
    choices = [choice for _, choice in shown]

    async def look(request: gr.Request, *chosen: str | None) -> Updates:
        try:
            models: Models = await page.backend.models(visitor(request))
        except EnginecastError as error:
            return {problem: gr.update(value=lines.failed(error), visible=True)}
        updates: Updates = {problem: gr.update(visible=False)}
        for (tab, _), name in zip(shown, chosen, strict=True):
            updates |= tab.offered(models, name)
        return updates

    outputs = [problem, *(part for tab, _ in shown for part in tab.offers)]
    made.load(look, choices, outputs, show_progress="hidden")
    gr.Timer(SECONDS).tick(look, choices, outputs, show_progress="hidden")

    async def left(request: gr.Request) -> None:
        await page.runs.stop(str(request.session_hash))

    made.unload(left)
