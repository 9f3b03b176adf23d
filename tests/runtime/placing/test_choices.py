"""What is chosen by timing: on planted times, stored, shared by processes, and never in the way of loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from filelock import FileLock

from runtime.engine import targets
from runtime.errors import EngineError, InvalidInput, ResourceExhausted
from runtime.placing import choices
from runtime.placing.choices import DEFAULT, VARIABLE, Choice, Decision, Subject, Unworthy, decide, measured

ATTENTION = Choice("attention", ("bfloat16", "float32"))
ZERO_POINTS = Choice("zero_points", ("on", "off"), margin=0.05)
GROUP = Choice("activation_group", ("64", "32", "0"))
UNET = Subject("unet", "openvino", "2026.4.1", "key")


class Parts:
    """A planted part: what it takes is the product of what its values take, and so it says when it is run."""

    def __init__(self, **taken: float) -> None:
        self.taken = taken
        self.made: list[dict[str, str]] = []
        self.turn = 0

    def __call__(self, values: Mapping[str, str]) -> Callable[[], float]:
        self.made.append(dict(values))

        def run() -> float:
            product = 1.0
            for value in values.values():
                product *= self.taken.get(value, 1.0)
            return product

        return run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, timing allowed, and clocks that believe what a part says."""
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(choices, "seconds", lambda part: part())
    return tmp_path / "choices"


def values(decided: Mapping[str, Decision]) -> dict[str, str]:
    return {name: decision.value for name, decision in decided.items()}


def test_a_slow_default_is_replaced_and_the_reason_says_by_how_much() -> None:
    decided = decide([ATTENTION, ZERO_POINTS], UNET, Parts(bfloat16=1.25, on=0.97), {})
    assert values(decided) == {"attention": "float32", "zero_points": "on"}
    assert decided["attention"].reason == "measured on this processor: 1.25 x as fast as the default"
    assert (
        decided["zero_points"].reason
        == "measured on this processor: nothing else saves enough (off takes 1.03 x as long)"
    )


def test_the_fastest_of_several_values_is_taken() -> None:
    parts = Parts(**{"64": 1.0, "32": 0.9, "0": 0.8})
    assert values(decide([GROUP], UNET, parts, {})) == {"activation_group": "0"}
    assert parts.made == [{"activation_group": value} for value in GROUP.values]


def test_less_than_the_margin_keeps_the_default() -> None:
    assert values(decide([ATTENTION, ZERO_POINTS], UNET, Parts(bfloat16=1.03, on=1.03), {})) == {
        "attention": "float32",
        "zero_points": "on",
    }


def test_less_than_the_spread_keeps_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 takes 5 % less in the median, but more in every third turn."""
    turn = iter(range(1000))
    monkeypatch.setattr(choices, "seconds", lambda part: part() * (1.2 if next(turn) % 6 == 1 else 1.0))
    assert values(decide([ATTENTION], UNET, Parts(bfloat16=1.05), {})) == {"attention": "bfloat16"}


def test_what_was_decided_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another process, whatever the times are by then. Another model, version or processor is measured by
    itself.
    """
    first = decide([ATTENTION], UNET, Parts(bfloat16=1.25), {})
    for known in (choices._known, {}):
        monkeypatch.setattr(choices, "_known", known)
        later = Parts(float32=9)
        assert decide([ATTENTION], UNET, later, {}) == first and not later.made
    (file,) = cache.glob("*.json")
    assert json.loads(file.read_bytes())["device"]["processor"] == choices.processor()
    assert [(one.name, dict(one.values)) for one in measured("openvino", "2026.4.1")] == [
        ("unet", {"attention": "float32"})
    ]
    others = (Subject("unet", "openvino", "2026.4.1", "other"), Subject("unet", "openvino", "2027.0", "key"))
    for other in others:
        assert values(decide([ATTENTION], other, Parts(), {})) == {"attention": "bfloat16"}
    monkeypatch.setattr(choices, "processor", lambda: "another")
    assert values(decide([ATTENTION], UNET, Parts(), {})) == {"attention": "bfloat16"}
    assert len(list(cache.glob("*.json"))) == 3


def test_too_little_work_is_found_out_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def prepare(values: Mapping[str, str]) -> Callable[[], float]:
        tried.append(values)
        raise Unworthy

    first = decide([ATTENTION], UNET, prepare, {})
    assert first == {"attention": Decision("bfloat16", "default, not measured: it has too little work to be worth it")}
    for known in (choices._known, {}):
        monkeypatch.setattr(choices, "_known", known)
        assert decide([ATTENTION], UNET, prepare, {}) == first
    assert len(tried) == 1 and len(list(cache.glob("*.json"))) == 1
    assert measured("openvino", "2026.4.1") == [], "it is nothing that was measured"


def test_settings_and_the_variable_decide_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(bfloat16=1.25, on=1.25)
    monkeypatch.setenv(VARIABLE, "attention=bfloat16")
    decided = decide([ATTENTION, ZERO_POINTS], UNET, parts, {})
    assert decided["attention"] == Decision("bfloat16", "as set") and decided["zero_points"].value == "off"
    assert all(made["attention"] == "bfloat16" for made in parts.made), "the rest is measured beside what is set"
    assert values(decide([ATTENTION], UNET, parts, {"attention": "float32"})) == {"attention": "float32"}
    with pytest.raises(
        InvalidInput, match="attention: is set to 'half': this bundle allows bfloat16 or float32 on this processor"
    ):
        decide([ATTENTION], UNET, parts, {"attention": "half"})


def test_the_variable_can_switch_measuring_off(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    parts = Parts(bfloat16=1.25)
    monkeypatch.setenv(VARIABLE, f"{DEFAULT}, zero_points=off")
    decided = decide([ATTENTION, ZERO_POINTS], UNET, parts, {})
    assert decided["attention"] == Decision("bfloat16", "default, not measured: ENGINECAST_CHOICES has 'default'")
    assert decided["zero_points"].value == "off" and not parts.made and not cache.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "attentoin=float32",
            "ENGINECAST_CHOICES: has 'attentoin=float32', expected CHOICE=VALUE or default: did you mean 'attention'",
        ),
        ("attention", "ENGINECAST_CHOICES: has 'attention', expected attention to be bfloat16 or float32"),
        ("attention=int4", "ENGINECAST_CHOICES: has 'attention=int4', expected attention to be bfloat16 or float32"),
    ],
)
def test_words_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InvalidInput, match=says):
        decide([ATTENTION], UNET, Parts(), {})


def test_every_engine_says_what_it_chooses() -> None:
    for engine in targets().values():
        assert all(len(set(known)) == len(known) > 1 for known in engine.choices.values())


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"device": {}, "measured": {"key": 1}}', b"\xff"])
def test_a_damaged_store_is_written_anew(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    decide([ATTENTION], UNET, Parts(), {})
    (file,) = cache.glob("*.json")
    file.write_bytes(damage)
    monkeypatch.setattr(choices, "_known", {})
    assert values(decide([ATTENTION], UNET, Parts(bfloat16=2), {})) == {"attention": "float32"}
    assert len(measured("openvino", "2026.4.1")) == 1


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured holds for the process."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "file"))
    for parts in (Parts(bfloat16=2), Parts(float32=2)):
        assert values(decide([ATTENTION], UNET, parts, {})) == {"attention": "float32"}
    assert not parts.made


def test_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise ResourceExhausted("the disk filled up")

    monkeypatch.setattr(choices, "written", full)
    assert values(decide([ATTENTION], UNET, Parts(bfloat16=2), {})) == {"attention": "float32"}


def test_what_cannot_be_made_is_not_chosen() -> None:
    class Broken(Parts):
        def __call__(self, values: Mapping[str, str]) -> Callable[[], float]:
            if values["attention"] in self.taken:
                raise EngineError("no kernel")
            return super().__call__(values)

    assert values(decide([ATTENTION], UNET, Broken(float32=0.1), {})) == {"attention": "bfloat16"}
    decided = decide([ATTENTION], Subject("unet", "openvino", "1", "broken"), Broken(bfloat16=0.1), {})
    assert decided["attention"] == Decision("bfloat16", "default, not measured: no kernel")


def test_another_process_that_measures_for_long_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    monkeypatch.setattr(choices, "PATIENCE", 0.01)
    parts = Parts(bfloat16=2)
    with FileLock(cache / choices.LOCK):
        decided = decide([ATTENTION], UNET, parts, {})
    assert (
        decided["attention"] == Decision("bfloat16", "default, not measured: another process was measuring")
        and not parts.made
    )
    assert values(decide([ATTENTION], UNET, parts, {})) == {"attention": "float32"}, "nothing was stored that time"


MEASURES = """
import sys, time
from runtime.placing.choices import Choice, Subject, decide

def prepare(values):
    print("made", flush=True)
    return lambda: time.sleep(0.06 if values["attention"] == "bfloat16" else 0.01)

choices = [Choice("attention", ("bfloat16", "float32"))]
print(decide(choices, Subject("unet", "openvino", "1", "key"), prepare, {})["attention"].value)
"""


def test_two_processes_measure_once(cache: Path) -> None:
    environment = os.environ | {"ENGINECAST_CACHE": str(cache.parent)}
    both = [
        subprocess.Popen([sys.executable, "-c", MEASURES], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = sorted(process.communicate(timeout=60)[0].split() for process in both)
    assert said == [["float32"], ["made", "made", "float32"]]
