"""`enginecast models` against a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime.errors import InvalidInput, NotFound, Unavailable
from serving.cli import commands as cli
from serving.cli.offered import default_versions, keep_alive_of, offers, repository
from serving.cli.options import parse_keep_alive
from serving.host.offers import ENDLESS
from serving.settings import Settings
from tests.fakes.serving import FakeServer, bundle, request


def run(server: FakeServer, *arguments: str) -> str:
    ended = CliRunner().invoke(cli.app, ["models", *arguments, "--address", server.address])
    if ended.exception:
        raise ended.exception
    return ended.stdout


def test_they_are_loaded_reloaded_and_unloaded(cold: FakeServer) -> None:
    assert run(cold, "load", "draw") == "draw is ready on fake (none)\n"
    manifest = cold.host.catalog.find("draw").offer.root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"quant":"none"', '"quant":"int8"'))
    assert run(cold, "reload", "draw") == "draw is ready on fake (none)\n"
    rows = json.loads(run(cold, "list", "--json"))
    assert [(row["name"], row["state"], row["quant"], row["loads on demand"]) for row in rows] == [
        ("draw", "ready", "int8", False),
        ("talk", "unloaded", "none", True),
    ]
    assert 0 <= rows[0]["idle"] < 5 and rows[0]["unloads in"] is None and rows[0]["memory"] >= 0
    assert run(cold, "unload", "draw", "--grace", "0") == "draw is unloaded\n"
    table = run(cold, "list")
    assert "loads on demand" in table and "draw" in table
    with pytest.raises(Unavailable, match="is unloaded"):
        list(cold.client.generate(request()))


def test_a_model_that_does_not_exist(cold: FakeServer) -> None:
    with pytest.raises(NotFound, match="did you mean 'draw'"):
        run(cold, "load", "drow")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("10m", 600), ("2h", 7200), ("1d", 86_400), ("0", 0), ("-1", -1)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_keep_alive(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 minutes", "-5", "8d", "nan", "1e3"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_keep_alive(text)
    assert caught.value.field == "keep_alive"


class TestSettings:
    def test_keep_alive_and_a_repository(self, tmp_path: Path) -> None:
        root = bundle(tmp_path, "a").root
        named = Settings(bundles=[str(root)], repository=tmp_path)
        (offer,) = offers(named)
        assert offer.keep_alive is None and keep_alive_of(named) is None
        folder = repository(named)
        assert folder is not None and folder.look().offers[0].keep_alive == 300
        (offer,) = offers(Settings(bundles=[str(root)], keep_alive="endless"))
        assert offer.keep_alive == ENDLESS
        assert offers(Settings(repository=tmp_path)) == []

    def test_neither(self) -> None:
        with pytest.raises(InvalidInput, match=r"or a --repository"):
            offers(Settings())

    def test_default_versions(self) -> None:
        assert default_versions(Settings(default_versions=["a@2", "b@10"])) == {"a": "2", "b": "10"}
        for wrong in ("a", "a@", "@1", "a@x", "a@0"):
            with pytest.raises(InvalidInput, match="expected NAME@VERSION"):
                default_versions(Settings(default_versions=[wrong]))
