"""Scripts and their settings on the page, from the list of a server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InvalidInput
from runtime.scripting import Scripts
from serving.dialects.grpc import messages
from serving.enginecast_pb import model_pb2
from serving.page.backend import Local, Remote, Visitor
from serving.page.scripting import broken, known, rows, scripts_of
from tests.fakes.serving import FakeServer

ME = Visitor("page")
OWN = [messages.script_info(one) for one in Scripts().listed()]


def other(**of: Any) -> model_pb2.ScriptInfo:
    """A script of another package."""
    schema = {"properties": {"amount": {"type": "integer", "default": 3}, "way": {"type": "string"}}}
    return model_pb2.ScriptInfo(name="other", arguments_schema=json.dumps(schema | {"required": ["way"]}), **of)


def test_every_script_of_a_task_is_offered_with_its_settings() -> None:
    found = known([*OWN, other(tasks=["chat"])], "image")
    assert list(found) == ["styles", "wildcards", "xyz_grid"]
    assert found["wildcards"] == []
    assert found["styles"] == [["styles:names", "", "styles by name, with commas between them (needed)"]]
    assert [row[0] for row in found["xyz_grid"]] == [f"xyz_grid:{name}" for name in ("x", "y", "z", "cells")]
    assert found["xyz_grid"][3][2].endswith("(by default false)")
    assert list(known([*OWN, other(tasks=["chat"])], "chat")) == ["other"]
    assert known([other()], "image")["other"] == [
        ["other:amount", "", "integer (by default 3)"], ["other:way", "", "string (needed)"]
    ]  # fmt: skip


def test_a_broken_script_is_not_offered_but_named() -> None:
    bad = other(error="it cannot be imported")
    assert known([bad], "image") == {}
    assert broken([*OWN, bad]) == "other cannot be used: it cannot be imported"
    assert broken(OWN) == ""


def test_values_stay_while_scripts_are_chosen() -> None:
    settings = known([*OWN, other()], "image")
    first = rows(settings, ["other"], [])
    first[0][1] = "5"
    assert rows(settings, ["styles", "other"], first)[1] == ["other:amount", "5", "integer (by default 3)"]
    assert rows(settings, ["wildcards"], first) == []
    assert rows(settings, ["none"], [["none:x", None, ""]]) == []


def test_the_scripts_of_a_request() -> None:
    filled = [["xyz_grid:x", " steps=10,20 ", ""], ["xyz_grid:y", '{"field": "seed", "values": [1]}', ""]]
    filled += [["xyz_grid:z", "", ""], ["styles:names", "left over", ""]]
    assert scripts_of(["wildcards", "xyz_grid"], filled) == {
        "wildcards": {}, "xyz_grid": {"x": "steps=10,20", "y": {"field": "seed", "values": [1]}}
    }  # fmt: skip
    assert list(scripts_of(["b", "a"], [["a:c", "1", ""]])) == ["b", "a"]
    assert scripts_of([], filled) == {}
    with pytest.raises(InvalidInput, match="no JSON"):
        scripts_of(["a"], [["a:b", "{", ""]])


async def test_a_server_here_and_one_elsewhere_list_the_same(tmp_path: Path) -> None:
    with FakeServer(tmp_path / "bundles") as fake:
        remote = Remote(fake.address)
        assert await remote.scripts(ME) == await asyncio.to_thread(lambda: fake.do(Local(fake.host).scripts(ME))) == OWN
        assert remote.identity("draw") != remote.identity("talk")
        assert Local(fake.host).identity("draw") != Local(fake.host).identity("talk")
        await remote.close()
