"""Verdicts on rows, and the command that prints them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from profiles import cli
from profiles.compare.verdicts import more_is_better, notes, verdicts
from profiles.rows import Row, append
from runtime.errors import InvalidInput
from runtime.placing.fingerprint import here
from runtime.timing import Spread

TIMES = (1.00, 1.01, 0.99, 1.02, 0.98, 1.00, 1.01, 0.99)


def row(values: tuple[float, ...] = TIMES, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "metric": "unet", "unit": "s", "spread": Spread.of(values), "values": values, "program": "enginecast 1",
        "bundle": "b", "source": "s", "quant": "int8", "target": "openvino", "device": "CPU", "cpu": "x", "threads": 2,
        "settings": {"width": 512}, "versions": {}, "date": datetime(2026, 1, 2, tzinfo=UTC), "fingerprint": here(),
        "run": "one",
    }  # fmt: skip
    return Row(**fields | changes)


def times(factor: float) -> tuple[float, ...]:
    return tuple(factor * value for value in TIMES)


def test_a_sentence_for_each_figure() -> None:
    first = [row(), row(metric="vae"), row(metric="decode", unit="tokens/s"), row(values=(1.0, 1.1), metric="load")]
    second = [
        row(times(1.1)), row(TIMES[1:] + TIMES[:1], metric="vae"), row(times(1.1), metric="decode", unit="tokens/s"),
        row(values=(2.0, 2.1), metric="load"),
    ]  # fmt: skip
    unet, vae, decode, load = verdicts(first, second)
    assert str(unet) == (
        "unet (width 512): B is 1.100 x A (interval 1.100 to 1.100): the difference is real, B is worse"
    )
    assert str(vae).endswith("no difference is shown")
    assert str(decode).endswith("the difference is real, B is better")
    assert "of 2 measurements: too few to say whether that is real, expected 6" in str(load)
    assert not notes([unet, vae, decode, load])


def test_only_the_same_figures_are_compared() -> None:
    """A field tells rows apart where a side has several values of it: precisions are compared, sizes are not."""
    (found,) = verdicts([row(quant="int8")], [row(times(2), quant="int4"), row(settings={"width": 64}, quant="int4")])
    assert (found.first.quant, found.second.quant) == ("int8", "int4") and found.ratio is not None
    both = [row(), row(target="onnxruntime")]
    assert [one.second.target for one in verdicts(both, both)] == ["openvino", "onnxruntime"]
    newer = row(times(3), date=datetime(2026, 1, 3, tzinfo=UTC))
    (found,) = verdicts([row()], [newer, row(times(2))])
    assert found.second is newer
    with pytest.raises(InvalidInput, match="no figure in common with A: unet beside picture"):
        verdicts([row()], [row(metric="picture")])


def test_what_must_be_known_besides() -> None:
    machine = here().model_copy(update={"processors": 64.0})
    (found,) = verdicts([row(fingerprint=machine)], [row(run="two").model_copy(update={"values": ()})])
    assert found.ratio is None and not found.paired
    said = notes([found])
    assert len(said) == 3
    assert "different machines" in said[0] and "single measurements" in said[1] and "not measured in turns" in said[2]


def test_what_is_better() -> None:
    assert [unit for unit in ("s", "tokens/s", "pictures/min", "%", "GB", "J", "requests") if more_is_better(unit)] == [
        "tokens/s",
        "pictures/min",
        "%",
    ]


def compare(*words: str) -> str:
    return CliRunner().invoke(cli.app, ["bench", "compare", *words], catch_exceptions=False).output


def test_files_on_the_command_line(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    append(first, [row(), row(metric="vae")])
    append(second, [row(times(0.5), run="two"), row(run="two", metric="vae")])
    said = compare(str(first), str(second))
    assert "unet (width 512): B is 0.500 x A" in said and "the difference is real, B is better" in said
    assert "vae (width 512)" in said and "note: not measured in turns" in said
    assert "vae" not in compare(str(first), str(second), "--metric", "unet")
    for words, message in (
        (("--metric", "none"), "metric: 'none' is not in"),
        (("--repeat", "9"), "repeat: is how bundles are measured"),
        (("--steps", "9"), "steps: is how bundles are measured"),
        (("--target", "tensorrt"), "no figure in common"),
    ):
        with pytest.raises(InvalidInput, match=message):
            compare(str(first), str(second), *words)
    with pytest.raises(InvalidInput, match="a bundle and a file"):
        compare(str(first), str(tmp_path))


@pytest.mark.full
def test_two_bundles_in_turns(tiny_bundle: Path, tmp_path: Path) -> None:
    """A bundle beside itself."""
    other = tmp_path / "other"
    other.symlink_to(tiny_bundle)
    options = "--target onnxruntime --metric prefill --repeat 6 --prompt-tokens 30"
    said = compare(str(tiny_bundle), str(other), *options.split())
    assert "prefill (prompt_tokens" in said and "(interval " in said
    assert "load: B is" in said and "too few" in said and "in turns" not in said
