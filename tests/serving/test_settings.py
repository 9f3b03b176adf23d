"""Settings from a file, the environment and the command line."""

from __future__ import annotations

import json
import textwrap
import tomllib
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from runtime.errors import InvalidInput, NotFound
from serving.cli import commands as cli
from serving.settings import PREFIX, Settings, configure, declared, names

DOC = Path(__file__).parents[2] / "docs" / "serving" / "settings.md"


def kind_of(name: str) -> str:
    """The type of a setting, in words."""
    kind, _ = declared(name)
    kinds = [one for one in get_args(kind) if one is not NoneType] if NoneType in get_args(kind) else [kind]
    words = {str: "text", int: "whole number", float: "number", bool: "switch", Path: "path"}
    return words.get(kinds[0], "list of texts")


def item(name: str) -> str:
    """A setting as an item of the list in docs/serving/settings.md."""
    option, default = declared(name)[1], getattr(Settings(), name)
    low, high = option.min, option.max
    within = "" if low is None else f", at least {low:g}" if high is None else f", {low:g} to {high:g}"
    usual = "" if default in (None, "") else f"; default {json.dumps(default)}"
    text = f"- `{name}` ({kind_of(name)}{within}{usual}): {option.help}"
    return textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def test_the_page_has_every_setting() -> None:
    expected = "\n".join(map(item, names()))
    assert DOC.read_text().endswith(f"\n{expected}\n"), f"the list in docs/serving/settings.md should be:\n{expected}"


def test_every_setting_is_an_option() -> None:
    app: Any = typer.main.get_command(cli.app)
    parameters = {one.name for one in app.commands["serve"].params}
    assert parameters == {*names(), "config", "print_config"}


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('bundles = ["a", "b=c"]\nmax_queue = 1\nthreads = 1\ngrace = 1\nrequire_signature = "k.pem"\n')
    environment = {f"{PREFIX}THREADS": "2", f"{PREFIX}GRACE": "2.5", f"{PREFIX}DEVICE": "", f"{PREFIX}STRICT": "true"}
    found = configure({"grace": 3.0}, file, {**environment, "ENGINECAST_CACHE": "elsewhere"})
    assert found.settings == Settings(
        ["a", "b=c"], max_queue=1, threads=2, grace=3.0, strict=True, require_signature=Path("k.pem")
    )
    assert found.origins == {
        **dict.fromkeys(("bundles", "max_queue", "require_signature"), str(file)),
        **{"threads": f"{PREFIX}THREADS", "strict": f"{PREFIX}STRICT", "grace": "the command line"},
    }
    assert configure({}, None, {f"{PREFIX}BUNDLES": "a,b=c"}).settings.bundles == ["a", "b=c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_queu = 1", r"^max_queu: is no setting \(.*server.toml\): did you mean 'max_queue'"),
        ("max_queue = -1", r"^max_queue: is -1 \(.*server.toml\), expected at least 0"),
        ("grace = nan", r"^grace: is nan \(.*server.toml\), expected 0 to 3600"),
        ('max_queue = "1"', "^max_queue: is '1' .*valid integer"),
        ("max_queue = true", "^max_queue: is True .*valid integer"),
        ("bundles = 1", "^bundles: is 1 .*valid array"),
        ("max_queue = ", "^config: .*server.toml is no TOML file"),
        ("\ufeff\0", "^config: .*server.toml is no TOML file"),
    ],
)
def test_what_a_file_may_not_have(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        configure({}, file, {})


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("MAX_QUEU", "1", f"^{PREFIX}MAX_QUEU: is no setting .*did you mean '{PREFIX}MAX_QUEUE'"),
        ("MAX_QUEUE", "many", rf"^max_queue: is 'many' \({PREFIX}MAX_QUEUE\): .*integer"),
        ("STRICT", "perhaps", "^strict: is 'perhaps'"),
        ("GRACE", "3601", "^grace: is 3601.0 .*expected 0 to 3600"),
    ],
)
def test_what_the_environment_may_not_have(variable: str, text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        configure({}, None, {f"{PREFIX}{variable}": text})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no file of settings"):
        configure({}, tmp_path / "nothing.toml", {})


def test_print_config_is_a_file_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("max_queue = 3\nstrict = true\n")
    environment = {f"{PREFIX}CONFIG": str(file), f"{PREFIX}PLACE": 'un"et=\u00fc'}
    ended = CliRunner().invoke(cli.app, ["serve", "a", "--no-strict", "--print-config"], env=environment)
    assert ended.exit_code == 0, (ended.output, ended.exception)
    lines = ended.stdout.splitlines()
    assert f"max_queue = 3  # {file}" in lines and "strict = false  # the command line" in lines
    assert "grace = 30.0  # default" in lines and "# target is not set" in lines
    (tmp_path / "printed.toml").write_text(ended.stdout)
    assert tomllib.loads(ended.stdout)["place"] == 'un"et=\u00fc'
    assert configure({}, tmp_path / "printed.toml", {}).settings == Settings(["a"], max_queue=3, place='un"et=\u00fc')
