"""Settings that /set changes, read as the options of the commands are declared."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer

from runtime.errors import InvalidInput
from serving.cli.answering import Answering
from serving.cli.repl.loop import Screen
from serving.cli.repl.settings import Settings


@dataclass(frozen=True)
class Others:
    file: Annotated[Path | None, typer.Option(help="A file.")] = None
    kind: Annotated[Literal["round", "square"], typer.Option(help="A kind.")] = "round"


SETTINGS = Settings(Screen(), Answering(temperature=0.5), Others())


@pytest.mark.parametrize(
    ("name", "text", "group", "expected"),
    [
        ("max_tokens", "7", Answering, 7),
        ("top-k", "0", Answering, 0),
        ("top_p", "0.25", Answering, 0.25),
        ("stop", "'a b' c", Answering, ["a b", "c"]),
        ("context_overflow", "slide", Answering, "slide"),
        ("verbose", "on", Screen, True),
        ("history", "OFF", Screen, False),
        ("file", "'/tmp/a b'", Others, Path("/tmp/a b")),
        ("kind", "square", Others, "square"),
    ],
)
def test_values_are_read_by_their_kind(name: str, text: str, group: type, expected: object) -> None:
    changed = SETTINGS.set(name, text)
    field = name.replace("-", "_")
    assert getattr(changed.of(group), field) == expected
    assert changed.of(Answering).temperature == 0.5, "the others stay"
    assert getattr(changed.unset(name).of(group), field) == getattr(group(), field)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temprature", "1", "/set: knows no 'temprature': did you mean 'temperature'?"),
        ("max_tokens", "many", "max_tokens: is 'many', expected a whole number"),
        ("max_tokens", "-1", "max_tokens: is -1, expected at least 0"),
        ("top_k", str(2**32), "top_k: is 4294967296, expected at most 4,294,967,295"),
        ("temperature", "nan", "temperature: is 'nan', expected a number"),
        ("temperature", "1e999", "temperature: is '1e999', expected a number"),
        ("verbose", "maybe", "verbose: is 'maybe', expected on or off"),
        ("kind", "rund", "kind: is 'rund': did you mean 'round'?"),
        ("stop", "'a", "stop: is ''a', which has a quote that is not closed"),
        ("file", "~nobody-has-this-name/x", "file: is '~nobody-has-this-name/x'"),
    ],
)
def test_mistakes_are_named(name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        SETTINGS.set(name, text)
    assert message in str(caught.value)


def test_every_setting_is_shown_with_its_purpose() -> None:
    rows = {name: (value, help) for name, value, help in SETTINGS.set("stop", "'a b' c").rows()}
    assert rows.keys() == {field.name for group in (Screen, Answering, Others) for field in fields(group)}
    assert all(help for _, help in rows.values())
    assert (rows["temperature"][0], rows["stop"][0], rows["verbose"][0], rows["seed"][0]) == (
        "0.5", "'a b' c", "off", "",
    )  # fmt: skip
