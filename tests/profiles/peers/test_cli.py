from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from profiles import cli, rows
from profiles.peers import cli as peers
from profiles.peers import declared
from profiles.peers.declared import Peer
from profiles.peers.environments import Workplace
from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError, InvalidInput

RUNNER = CliRunner()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is not read: it is of the bundle of `tiny_bundle`."""
    monkeypatch.setattr(peers, "_identity", lambda checkpoint: ("chat", "fingerprint"))


def invoke(*words: object) -> str:
    ended = RUNNER.invoke(cli.app, ["bench", "peers", *map(str, words)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.mark.usefixtures("known")
def test_what_is_refused(tiny_bundle: Path, workplace: Workplace) -> None:
    where = (workplace.checkpoint, "--folder", workplace.folder)
    with pytest.raises(InvalidInput, match="BUNDLE: is missing"):
        invoke(*where)
    with pytest.raises(InvalidInput, match=r"BUNDLE: .* was built from another checkpoint than"):
        invoke(*where, tiny_bundle)
    with pytest.raises(InvalidInput, match="only: 'diffusers' is no peer of this checkpoint"):
        invoke(*where, "--prepare-only", "--only", "diffusers")
    with pytest.raises(InvalidInput, match="width: does not apply to a model that answers"):
        invoke(*where, "--prepare-only", "--width", 64)
    with pytest.raises(InvalidInput, match="rows: is where --store puts rows"):
        invoke(*where, "--prepare-only", "--rows", "rows.jsonl")


@pytest.mark.usefixtures("known")
def test_preparing_names_those_that_fail(workplace: Workplace, toys: Callable[..., Peer]) -> None:
    toys("one", task="chat")
    (workplace.checkpoint / "refused").touch()
    with pytest.raises(EngineError, match=r"one: .*this checkpoint is refused"):
        invoke(workplace.checkpoint, "--folder", workplace.folder, "--prepare-only")
    (workplace.checkpoint / "refused").unlink()
    invoke(workplace.checkpoint, "--folder", workplace.folder, "--prepare-only")
    assert list(workplace.folder.glob("exports/checkpoint-*/toy/weights"))


def test_one_command_makes_the_table(
    tiny_bundle: Path, workplace: Workplace, toys: Callable[..., Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is measured for real."""
    fingerprint = Bundle(tiny_bundle).manifest.source.fingerprint
    monkeypatch.setattr(peers, "_identity", lambda checkpoint: ("chat", fingerprint))
    toys("quick", task="chat", metrics=("prefill",), seconds=9.0)
    toys("other", task="chat", metrics=("prefill",), broken="load")
    page, stored = tmp_path / "page.md", tmp_path / "rows.jsonl"
    options = ["--target", "onnxruntime", "--repeat", "6", "--prompt-tokens", "30", "--new-tokens", "4", "--store"]
    where = ["--folder", workplace.folder, "--table", page, "--rows", stored]
    output = invoke(workplace.checkpoint, tiny_bundle, *options, *where)
    assert "left out: other: other: MemoryError: no room for it" in output
    found = {(row.program.split()[0], row.metric): row for row in rows.read(stored)}
    assert 20 < int(found["enginecast", "prefill"].settings["prompt_tokens"]) <= 30
    assert found["pip", "prefill"].values == (9.0,) * 6 and ("enginecast", "decode") not in found
    text = page.read_text()
    assert text.count("| prefill |") == 2 and "Left out:\n\n- other: other: MemoryError" in text
    with pytest.raises(InvalidInput, match="metric: 'decode' is not measured of these peers"):
        invoke(workplace.checkpoint, tiny_bundle, *where[:2], "--metric", "decode")


def test_a_picture_is_measured_where_it_is_named_and_ours_in_fewer_calls(
    diffusion_bundle: Path,
    workplace: Workplace,
    toys: Callable[..., Peer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fingerprint = Bundle(diffusion_bundle).manifest.source.fingerprint
    monkeypatch.setattr(peers, "_identity", lambda checkpoint: ("image", fingerprint))
    toy, stored = toys("plain", named=("picture",), seconds=9.0), tmp_path / "rows.jsonl"
    assert declared.usual([toy]) == ("unet",) and declared.known([toy]) == ("unet", "picture")
    where = [workplace.checkpoint, diffusion_bundle, "--folder", workplace.folder, "--target", "onnxruntime"]
    size = ["--width", "64", "--height", "64", "--steps", "3"]
    options = ["--repeat", "1", "--no-limits", "--metric", "picture", "--store", "--rows", stored]
    invoke(*where, *size, *options, "--forecast", "1,3")
    found = {row.program.split()[0]: row for row in rows.read(stored) if row.metric == "picture"}
    assert found["enginecast"].settings == {"width": 64, "height": 64, "steps": 3, "forecast": "1,3"}
    assert found["pip"].values == (9.0,) and found["pip"].settings == {"sample": "64x64x3"}
    output = invoke(*where, *size, *options, "--forecast", "1,9")
    assert f"left out: {Bundle(diffusion_bundle).name} on onnxruntime: " in output and "forecast" in output
