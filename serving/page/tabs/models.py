"""The tab of the models: their states, loading and unloading."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any, Final

import gradio as gr

from serving.enginecast_pb import model_pb2
from serving.page import lines
from serving.page.backend import Models
from serving.page.parts import Page, Updates, visitor

SECONDS: Final = 2
"""Between two looks at the models."""
KINDS: Final = {
    model_pb2.MODEL_KIND_DIFFUSION: "draws",
    model_pb2.MODEL_KIND_CHAT: "talks",
    model_pb2.MODEL_KIND_EMBED: "embeds",
}
COLUMNS: Final = ("model", "state", "task", "numbers", "runs on", "requests", "memory")


class Overview:
    """The tab."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.table = gr.HTML(elem_id="models-table")
        with gr.Row():
            self.model = gr.Dropdown(label="Model", elem_id="models-model", filterable=False)
            self.load = gr.Button("Load", elem_id="models-load")
            self.unload = gr.Button("Unload", elem_id="models-unload")
        self.status = gr.HTML(elem_id="models-status")

    def wire(self) -> None:
        """Say what happens when something is clicked."""
        for button, work, verb in (
            (self.load, self._page.backend.load, "loading"),
            (self.unload, self._page.backend.unload, "unloading"),
        ):
            button.click(partial(_beginning, verb), self.model, self.status, show_progress="hidden").then(
                self._changing(work), self.model, [self.status, self.table], show_progress="hidden"
            )

    @property
    def offers(self) -> list[Any]:
        """What `offered` changes."""
        return [self.table, self.model]

    def offered(self, models: Models, model: str | None) -> Updates:
        """The states, and the choice of models."""
        names = [one.name for one in models]
        chosen = gr.update(choices=names, value=model if model in names else next(iter(names), None))
        return {self.table: table(models), self.model: chosen}

    def _changing(self, work: Any) -> Any:
        """What changes the state of a model, and shows it. Gradio gives requests to functions, not to partial ones."""

        async def change(request: gr.Request, name: str | None) -> Updates:
            who = visitor(request)
            try:
                await work(name or "", who)
                return {self.status: "", self.table: table(await self._page.backend.models(who))}
            except Exception as error:
                return {self.status: lines.failed(error)}

        return change


def _beginning(verb: str, name: str | None) -> str:
    return lines.line(f"{verb} {name}")


def table(models: Models) -> str:
    """The models and their states as a table."""
    heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(model))}</tr>" for model in models)
    notes = "".join(
        lines.line(f"{model.name}: {text}")
        for model in models
        for text in (*model.notes, model.error, _loading(model))
        if text
    )
    return f'<div class="wide"><table class="states"><tr>{heads}</tr>{rows}</table></div>{notes}'


def _loading(model: model_pb2.Model) -> str:
    names = ", ".join(model.loading_submodels)
    return f"takes requests while it still loads {names}" if names else ""


def _cells(model: model_pb2.Model) -> list[str]:
    state = model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower()
    memory = sum(model.memory_bytes.values())
    return [
        f"<b>{escape(model.name)}</b>",
        f'<span class="state {state}">{state}</span>',
        KINDS.get(model.kind, "unknown"),
        escape(model.quant),
        escape(model.device),
        f"{model.running} running, {model.queued} waiting",
        f"{memory / 2**20:,.0f} MiB" if memory else "",
    ]
