"""Choices whose best value depends on the processor: timed once on the device and stored in the user's cache.

Attention in bfloat16 makes a step 13 % faster on one processor and 24 % slower on another, and the instruction sets do
not predict which. An engine declares a `Choice` for each such alternative and prepares a representative part of a
submodel with each value. This module times the parts in turns, decides, and stores the decision:

<cache>/choices/<hash>.json   the decisions on one device with one version of a target, by key of the submodel
<cache>/choices/.lock         held during timing: one process at a time, because they would slow each other down

Stored decisions do not change. To set a value instead, use `Options.settings` for one engine or the environment
variable ENGINECAST_CHOICES for all ("attention=float32"). Its word "default" switches timing off ("default" or
"default,attention=float32").
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, ValidationError

from runtime.bundle.manifest import Frozen
from runtime.errors import EnginecastError, EngineError, InvalidInput, did_you_mean
from runtime.files import cache_folder, key_of, written
from runtime.placing.containers import allowance
from runtime.placing.processor import processor, processor_features
from runtime.timing import seconds, turns

log = logging.getLogger(__name__)

VARIABLE: Final = "ENGINECAST_CHOICES"
DEFAULT: Final = "default"
"""The word that switches timing off."""
TURNS: Final = 9
BUDGET: Final = 5.0
"""Seconds after which timing stops as soon as there are enough turns for a median."""
PATIENCE: Final = 60.0
"""Seconds to wait for another process that is timing."""
LOCK: Final = ".lock"
UNWORTHY: Final = "it has too little work to be worth it"

Values = Mapping[str, str]
"""A value for each choice, by its name."""
Prepare = Callable[[Values], Callable[[], object]]
"""Builds the part with these values and returns a function that runs it once. Raises EnginecastError."""


@dataclass(frozen=True)
class Choice:
    """An alternative of an engine. `values` lists what the bundle allows; the first is the default.

    Another value replaces the default if it saves more than the share `margin` of the part's time in three turns of
    four.
    """

    name: str
    values: tuple[str, ...]
    margin: float = 0.02

    @property
    def default(self) -> str:
        return self.values[0]


@dataclass(frozen=True)
class Decision:
    """The value of a choice, and the reason in words."""

    value: str
    reason: str


@dataclass(frozen=True)
class Subject:
    """The submodel to decide for. `name` is for messages; `key` identifies everything besides the device that the speed
    depends on.
    """

    name: str
    target: str
    version: str
    key: str


class Unworthy(EngineError):
    """A submodel has too little work for its choices to matter. That is stored: finding it out takes a while, too."""

    def __init__(self) -> None:
        super().__init__(UNWORTHY)


class Measured(Frozen):
    """The decisions for one submodel on one device, and the median seconds of its part: `default` with all defaults,
    `seconds` with one other value, by choice and value. There are no `values` where nothing is worth timing.
    """

    name: str
    date: AwareDatetime
    values: Mapping[str, str]
    default: float
    seconds: Mapping[str, Mapping[str, float]]

    def reason(self, choice: str) -> str:
        """The reason of the decision, as text."""
        value, others = self.values[choice], self.seconds.get(choice, {})
        if value in others:
            return f"measured on this processor: {self.default / others[value]:.2f} x as fast as the default"
        slower = ", ".join(f"{other} takes {seconds / self.default:.2f} x as long" for other, seconds in others.items())
        return (
            f"measured on this processor: {f'nothing else saves enough ({slower})' if slower else 'nothing else works'}"
        )


class Stored(Frozen):
    """A file of the store: the description of the device, whose hash is the file's name, and its measurements by
    key.
    """

    device: Mapping[str, Any]
    measured: Mapping[str, Measured]


_known: Final[dict[tuple[Path, str], Measured]] = {}
"""Measurements of this process, needed if the cache cannot be written."""


def decide(choices: Sequence[Choice], subject: Subject, prepare: Prepare, settings: Values) -> dict[str, Decision]:
    """Decide every choice: by its setting, else by a stored measurement, else by measuring now.

    Raises InvalidInput if a setting is not among the values of its choice. If measuring fails, the defaults are used,
    and the reason says why.
    """
    preset, allowed = environment()
    wanted = preset | dict(settings)
    decided = {choice.name: _as_set(choice, wanted[choice.name]) for choice in choices if choice.name in wanted}
    free = [choice for choice in choices if choice.name not in decided and len(choice.values) > 1]
    found: Measured | str = "" if allowed else f"{VARIABLE} has '{DEFAULT}'"
    if free and not found:
        found = _find(free, {name: decision.value for name, decision in decided.items()}, subject, prepare)
    for choice in choices:
        if choice.name in decided:
            continue
        if isinstance(found, Measured) and choice.name in found.values:
            decided[choice.name] = Decision(found.values[choice.name], found.reason(choice.name))
        else:
            why = UNWORTHY if isinstance(found, Measured) else found or "nothing else is possible here"
            decided[choice.name] = Decision(choice.default, f"default, not measured: {why}")
    return decided


def environment() -> tuple[dict[str, str], bool]:
    """The values set by ENGINECAST_CHOICES, and whether other choices may be measured. Raises InvalidInput for unknown
    names and values.
    """
    from runtime.engine import targets

    known = {name: values for engine in targets().values() for name, values in engine.choices.items()}
    found, allowed = dict[str, str](), True
    for word in filter(None, (word.strip() for word in os.environ.get(VARIABLE, "").split(","))):
        name, _, value = (part.strip() for part in word.partition("="))
        if word == DEFAULT:
            allowed = False
        elif name not in known:
            raise InvalidInput(
                VARIABLE, f"has '{word}', expected CHOICE=VALUE or {DEFAULT}: {did_you_mean(name, known)}"
            )
        elif value not in known[name]:
            raise InvalidInput(VARIABLE, f"has '{word}', expected {name} to be {' or '.join(known[name])}")
        else:
            found[name] = value
    return found, allowed


def _as_set(choice: Choice, value: str) -> Decision:
    if value not in choice.values:
        raise InvalidInput(
            choice.name, f"is set to '{value}': this bundle allows {' or '.join(choice.values)} on this processor"
        )
    return Decision(value, "as set")


def _find(choices: Sequence[Choice], fixed: Values, subject: Subject, prepare: Prepare) -> Measured | str:
    """The stored measurement, or a new one, which is stored; else the reason why measuring failed. One without values
    says that nothing is worth timing.
    """
    facts = fingerprint(subject.target, subject.version)
    path, key = _path(facts), key_of(subject.key, {choice.name: choice.values for choice in choices}, dict(fixed))
    if found := _look_up(path, key):
        return found
    with _alone(path.parent) as alone:
        if found := _look_up(path, key):
            return found
        if not alone:
            return "another process was measuring"
        start = time.perf_counter()
        log.info("%s on %s: measuring once which choices are fastest here", subject.name, subject.target)
        try:
            found = _measure(choices, fixed, subject, prepare)
        except Unworthy:
            found = Measured(name=subject.name, date=datetime.now(UTC), values={}, default=0.0, seconds={})
        except EnginecastError as error:
            return str(error)
        log.info(
            "%s on %s was measured in %.1f s: %s",
            subject.name,
            subject.target,
            time.perf_counter() - start,
            dict(found.values) or UNWORTHY,
        )
        _known[path, key] = found
        try:
            with written(path) as file:
                file.write(Stored(device=facts, measured=_read(path) | {key: found}).model_dump_json(indent=1).encode())
        except (OSError, EnginecastError) as error:
            log.info("the measurements of %s could not be stored: %s", subject.name, error)
        return found


def _measure(choices: Sequence[Choice], fixed: Values, subject: Subject, prepare: Prepare) -> Measured:
    """Time the defaults, and each other value with the defaults of the other choices. Raises EnginecastError if the
    defaults fail.
    """
    defaults = dict(fixed) | {choice.name: choice.default for choice in choices}
    others = [(choice, value) for choice in choices for value in choice.values[1:]]
    parts, tried = [prepare(defaults)], list[tuple[Choice, str]]()
    for choice, value in others:
        try:
            parts.append(prepare(defaults | {choice.name: value}))
            tried.append((choice, value))
        except EnginecastError as error:
            log.info("%s cannot have %s=%s: %s", subject.name, choice.name, value, error)
    base, *rest = turns([lambda part=part: seconds(part) for part in parts], TURNS, budget=BUDGET)  # type: ignore[misc]
    values, shares = {choice.name: choice.default for choice in choices}, dict[str, float]()
    times: dict[str, dict[str, float]] = {choice.name: {} for choice in choices}
    for (choice, value), taken in zip(tried, rest, strict=True):
        times[choice.name][value] = median(taken)
        _, share, upper = quantiles(
            [one / default for one, default in zip(taken, base, strict=True)], n=4, method="inclusive"
        )
        if upper < 1 - choice.margin and share < shares.get(choice.name, 1.0):
            values[choice.name], shares[choice.name] = value, share
    return Measured(name=subject.name, date=datetime.now(UTC), values=values, default=median(base), seconds=times)


def fingerprint(target: str, version: str) -> dict[str, Any]:
    """The conditions of a measurement: the processor, how much of it this process may use, and the target's version."""
    return {
        "processor": processor(),
        "features": processor_features(),
        "processors": allowance().cpus,
        "system": f"{platform.system()} {platform.machine()}",
        "target": target,
        "version": version,
    }


def measured(target: str, version: str) -> list[Measured]:
    """All measurements on this device with this version of a target, the newest last."""
    found = (one for one in _read(_path(fingerprint(target, version))).values() if one.values)
    return sorted(found, key=lambda one: one.date)


def _path(facts: Mapping[str, Any]) -> Path:
    return cache_folder() / "choices" / f"{key_of(facts)[:24]}.json"


def _look_up(path: Path, key: str) -> Measured | None:
    return _known.get((path, key)) or _read(path).get(key)


def _read(path: Path) -> dict[str, Measured]:
    """The measurements of a file; none if it is missing or damaged."""
    try:
        return dict(Stored.model_validate_json(path.read_bytes()).measured)
    except (OSError, ValidationError):
        return {}


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Lock out other processes of this user. Yields False if another holds the lock, True also if locks do not work."""
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
        alone = True
    except Timeout:
        alone = False
    except (OSError, NotImplementedError):  # a folder that cannot be written, a file system without locks
        alone = True
    try:
        yield alone
    finally:
        lock.release()
