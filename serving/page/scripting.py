"""Scripts of requests: their settings as the rows of a table, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from serving.cli.scripting import parse_scripts
from serving.page.backend import Scripts

Row = list[str]
"""A setting as "SCRIPT:SETTING", its value, and what it is."""
Known = dict[str, list[Row]]
"""The settings of each script, without values."""
COLUMNS: Final = ("setting", "value", "what it is")


def known(scripts: Scripts, task: str) -> Known:
    """The scripts that requests of a task may name. Those that cannot be used are left out."""
    return {
        one.name: list(_settings(one.name, json.loads(one.arguments_schema or "{}")))
        for one in scripts
        if not one.error and task in (one.tasks or (task,))
    }


def broken(scripts: Scripts) -> str:
    """The scripts that cannot be used, with the reason."""
    return "; ".join(f"{one.name} cannot be used: {one.error}" for one in scripts if one.error)


def rows(settings: Known, names: Iterable[str], before: Iterable[Sequence[Any]]) -> list[Row]:
    """The settings of these scripts, with the values that were filled in before."""
    values = {str(row[0]): str(row[1] or "") for row in before}
    return [[name, values.get(name, ""), about] for one in names for name, _, about in settings.get(one, ())]


def scripts_of(names: Iterable[str], filled: Iterable[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """The scripts of a request in their order, with the values of a table. An empty value is the script's own. Raises
    InvalidInput.
    """
    chosen = list(names)
    values = [(str(row[0]), str(row[1] or "").strip()) for row in filled]
    settings = [f"{name}={value}" for name, value in values if value and name.partition(":")[0] in chosen]
    return parse_scripts([*chosen, *settings])


def _settings(script: str, schema: Mapping[str, Any]) -> Iterable[Row]:
    needed = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        yield [f"{script}:{name}", "", _about(field, name in needed)]


def _about(field: Mapping[str, Any], needed: bool) -> str:
    """What a setting is, from its JSON schema."""
    described = field.get("description") or field.get("type") or field.get("title") or ""
    usual = field.get("default")
    more = "needed" if needed else "" if usual is None else f"by default {json.dumps(usual)}"
    return f"{described} ({more})" if more else str(described)
