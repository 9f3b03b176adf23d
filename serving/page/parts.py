"""What the tabs of the page have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from serving.enginecast_pb import model_pb2
from serving.page.backend import Backend, Models, Visitor
from serving.page.runs import Runs

Updates = dict[Any, Any]
"""What becomes of the parts of the page, by part."""


@dataclass(frozen=True)
class Page:
    """What every tab is made from. `folder` is where the page's pictures lie, `rows` are files of measured rows; a page
    is `closed` if one has to log in.
    """

    backend: Backend
    runs: Runs
    folder: Path
    rows: Sequence[Path]
    closed: bool = False


def visitor(request: gr.Request) -> Visitor:
    """Who sent a request of the page. The header is that of `serving.page.login`, not of a browser."""
    return Visitor(str(request.session_hash), request.headers.get("authorization", ""))


def optional(label: str, usual: str, name: str, info: str | None = None) -> Any:
    """A field for a value that may be left empty: then it is the usual one."""
    width = 90 if info is None else 180
    return gr.Textbox(label=label, placeholder=usual, elem_id=name, min_width=width, max_lines=1, info=info)


def names_of(models: Models, kind: model_pb2.ModelKind) -> list[str]:
    """The names of the models of a kind."""
    return [model.name for model in models if model.kind == kind]


def named(models: Models, kind: model_pb2.ModelKind, chosen: str | None) -> Any:
    """The choice of a model of a kind: the one that is chosen, else the first that is ready, else the first."""
    names = names_of(models, kind)
    ready = [model.name for model in models if model.kind == kind and model.state == model_pb2.MODEL_STATE_READY]
    value = chosen if chosen in names else next(iter([*ready, *names]), None)
    return gr.update(choices=names, value=value)


def larger(part: str) -> Any:
    """A button of a gallery that shows its chosen picture in the page's viewer (viewer.js)."""
    button = gr.Button("Zoom", size="sm", elem_id=f"{part}-zoom", render=False)
    button.click(None, None, None, js=f"() => enginecastLarger('#{part}')")
    return button


def busy(running: bool, start: Any, stop: Any) -> Updates:
    """The buttons that start and stop a request."""
    return {start: gr.update(interactive=not running), stop: gr.update(interactive=running)}
