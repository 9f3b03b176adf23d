"""Options of requests as fields of the page. Their kinds, their ranges and what they are for are declared once, with
the commands (`serving/cli/plain.py`, `drawing.py`, `answering.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import gradio as gr

from serving.cli.repl.settings import Setting, settings_of
from serving.page.parts import optional

SWITCH: Final = ("on", "off")


class Options:
    """The options of a dataclass, but for those that the page has in another form. `choices` are values by name."""

    def __init__(
        self, group: type[Any], without: Collection[str] = (), choices: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._settings: dict[str, Setting] = {
            name: setting for name, setting in settings_of(group).items() if name not in without
        }
        self._choices = choices or {}

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in the order of their declaration."""
        return tuple(self._settings)

    def part(self, name: str, prefix: str, usual: str) -> Any:
        """The field of an option; what is left empty is `usual`."""
        setting = self._settings[name]
        label, info = name.replace("_", " ").capitalize(), (setting.option.help or "").replace("--", "")
        choices = self._choices.get(name) or (SWITCH if setting.kind is bool else ())
        if choices:
            named = [(usual, ""), *((one, one) for one in choices)]
            return gr.Dropdown(named, value="", label=label, info=info, elem_id=f"{prefix}-{name}", min_width=180)
        return optional(label, setting.option.metavar or usual, f"{prefix}-{name}", info)

    def read(self, filled: Mapping[str, Any]) -> dict[str, Any]:
        """The values of those that are filled in. Raises InvalidInput that names the option."""
        given = {name: str(filled.get(name) or "").strip() for name in self._settings}
        return {name: self._settings[name].read(name, text) for name, text in given.items() if text}
