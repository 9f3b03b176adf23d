"""The choice of scripts of a tab, and the table of their settings."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Final

import gradio as gr

from serving.page.backend import Scripts
from serving.page.parts import Updates
from serving.page.scripting import COLUMNS, Known, broken, known, rows

LABEL: Final = "Scripts, the first one is the outermost"


class ScriptChoice:
    """A box with the scripts for requests of a task. It is not there where the server has none."""

    def __init__(self, task: str, name: str) -> None:
        self._task = task
        with gr.Accordion("Scripts", open=False, visible=False, elem_id=name) as self._box:
            self.chosen = gr.Dropdown(multiselect=True, label=LABEL, elem_id=f"{name}-chosen")
            self._said = gr.HTML(padding=False)
            self.table = gr.Dataframe(
                headers=list(COLUMNS), datatype="str", type="array", static_columns=[0, 2], interactive=True, wrap=True,
                label="Settings: what is empty is the script's own", buttons=[], visible=False,
                column_widths=[150, 130, 200], elem_id=f"{name}-settings",
            )  # fmt: skip
        self._known = gr.State(Known())

    @property
    def all(self) -> list[Any]:
        """What `listed` changes."""
        return [self._box, self.chosen, self._said, self._known]

    def wire(self) -> None:
        """Say what happens when scripts are chosen."""
        self.chosen.change(_settings, [self._known, self.chosen, self.table], self.table, show_progress="hidden")

    def listed(self, scripts: Scripts) -> Updates:
        """Offer the scripts of a server."""
        found = known(scripts, self._task)
        about = {one.name: one.summary for one in scripts}
        said = "".join(f"<p><b>{escape(name)}</b>: {escape(about[name])}</p>" for name in found)
        return {
            self._box: gr.update(visible=bool(found)),
            self.chosen: gr.update(choices=list(found)),
            self._said: said + f"<p>{escape(broken(scripts))}</p>",
            self._known: found,
        }


def _settings(settings: Known, names: Sequence[str] | None, before: Sequence[Sequence[Any]] | None) -> Any:
    found = rows(settings, names or (), before or ())
    return gr.update(value=found, visible=bool(found))
