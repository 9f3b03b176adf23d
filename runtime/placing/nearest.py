"""The measured figures of a bundle on this machine, or on the nearest one.

The rows come from `runtime.placing.measured`. Those of the nearest device count: of this machine, else of one whose
processor has the same vendor and instruction sets, as many processors and the same system; never of others. On each,
figures of the bundle itself come first, then those of another model of its family with the same numbers. Only figures
of one model on one device, with the same settings, are compared. Where there are none, nothing is decided.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from runtime.bundle.manifest import Manifest
from runtime.placing.devices import Machine
from runtime.placing.fingerprint import Fingerprint
from runtime.placing.measured import Row

ANSWER_TOKENS: Final = 64
"""Length in tokens of the answer whose time ranks chat models."""
PROMPT_TOKENS: Final = 512
"""Length in tokens of the text that it answers where the model sees no pictures."""
PROGRAM: Final = "enginecast"
"""Rows of other programs decide nothing."""
UNITS: Final = ("s", "tokens/s")
"""Rows of other units, such as operations, are no times."""
ACCELERATORS: Final = ("cuda", "gpu", "npu", "dml", "directml", "coreml", "tensorrt")
"""Words in the names of devices that are not the processor."""


class Way(NamedTuple):
    """A way to compare targets: by the seconds of `what`, computed of the medians of these metrics."""

    what: str
    metrics: tuple[str, ...]
    seconds: Callable[..., float] = float


WAYS: Final = (
    Way("a picture", ("picture",)),
    Way("an embedding", ("embedding",)),
    Way(
        f"an answer of {ANSWER_TOKENS} tokens about a picture",
        ("first_token", "decode"),
        lambda first, rate: first + ANSWER_TOKENS / rate,
    ),
    Way(
        f"an answer of {ANSWER_TOKENS} tokens to {PROMPT_TOKENS}",
        ("prefill", "decode"),
        lambda prefill, rate: PROMPT_TOKENS / prefill + ANSWER_TOKENS / rate,
    ),
)
"""In order of preference. The last resort is a call of the largest submodel."""


@dataclass(frozen=True, order=True)
class Near:
    """How near a row is, the nearest first: the distance of its device and of its model, 0 or 1 each; and what figures
    must have in common to be compared, its processor and its model.
    """

    device: int
    model: int
    cpu: str
    source: str

    @property
    def words(self) -> str:
        """Where the figures come from, as the end of a sentence."""
        model = f", of {self.source}, another model of its family" if self.model else ""
        where = f"{self.cpu}, another processor with the same instruction sets" if self.device else "this processor"
        return f"on {where}{model}"


class Setup(NamedTuple):
    """What figures are compared by: the label of the numbers, the target, and its threads."""

    quant: str
    target: str
    threads: int


@dataclass(frozen=True)
class Profile:
    """The figures of one model on one device: seconds of `what` by setup, and the date of the newest one."""

    near: Near
    what: str
    seconds: Mapping[Setup, float]
    date: datetime

    def fastest(self, key: Callable[[Setup], str | int]) -> dict[str | int, float]:
        """The least seconds by a part of the setup, the fastest first."""
        found: dict[str | int, float] = {}
        for setup, seconds in sorted(self.seconds.items(), key=lambda item: item[1]):
            found.setdefault(key(setup), seconds)
        return found

    def only(self, keep: Callable[[Setup], bool]) -> Profile:
        """The figures of these setups."""
        kept = {setup: seconds for setup, seconds in self.seconds.items() if keep(setup)}
        return Profile(self.near, self.what, kept, self.date)

    @property
    def source(self) -> str:
        """What was measured, where and when, as the end of a sentence."""
        return f"for {self.what} {self.near.words}, {self.date:%Y-%m-%d}"


def profiles(manifests: Sequence[Manifest], rows: Iterable[tuple[Near, Row]]) -> list[Profile]:
    """The profiles of bundles of one model, from their `near_rows`, the nearest first; each has at least two setups.
    Those of rows that were measured in turns come before those of all rows, the newest first.
    """
    groups = defaultdict[tuple[Near, str], list[Row]](list)
    for near, row in rows:
        groups[near, row.run].append(row)
        if row.run:
            groups[near, ""].append(row)
    sizes = {submodel.name: submodel.nbytes for submodel in manifests[0].submodels}
    ways = (*WAYS, *(Way(f"a call of {name}", (name,)) for name in sorted(sizes, key=lambda name: -sizes[name])[:1]))
    found = [(run, profile) for (near, run), group in groups.items() if (profile := _profile(near, group, ways))]
    newest = sorted(found, key=lambda item: item[1].date, reverse=True)
    ordered = sorted(newest, key=lambda item: (item[1].near.device, item[1].near.model, not item[0]))
    return [profile for _, profile in ordered if len(profile.seconds) > 1]


def near_rows(manifests: Sequence[Manifest], machine: Machine, rows: Iterable[Row]) -> Iterator[tuple[Near, Row]]:
    """The rows that mean something for bundles of one model on this machine, and how near they are."""
    here = Fingerprint.of(machine)
    for row in rows:
        device, model = _device(row, machine, here), _model(row, manifests)
        if device is not None and model is not None and _counts(row):
            yield Near(device, model, row.cpu, row.source), row


def _counts(row: Row) -> bool:
    return row.program.startswith(PROGRAM) and row.unit in UNITS and row.spread.median > 0


def _device(row: Row, machine: Machine, here: Fingerprint) -> int | None:
    """How far the device of a row is from this machine; None if its figures mean nothing here. Rows without a
    fingerprint are compared by the processor's name, accelerators by theirs.
    """
    others = [other for other in machine.devices if other.kind != "cpu"]
    if any(word in row.device.casefold() for word in ACCELERATORS) and not any(
        other.model in row.device for other in others
    ):
        return None
    there = row.fingerprint
    if there is None:
        return 0 if row.cpu == machine.host.model else None
    if there.alike(here):
        return 0
    parts = (
        (one.processor.vendor, frozenset(one.processor.features), one.processors, one.system) for one in (there, here)
    )
    return 1 if next(parts) == next(parts) else None


def _model(row: Row, manifests: Sequence[Manifest]) -> int | None:
    """How far the model of a row is from these bundles of one model; None if it is another one."""
    if any((row.bundle, row.source, row.quant) == (one.name, one.source.name, one.quant) for one in manifests):
        return 0
    source = manifests[0].source
    related = row.family != "" and row.family == source.family and row.source != source.name
    return 1 if related and row.quant in {one.quant for one in manifests} else None


def _profile(near: Near, rows: Sequence[Row], ways: Iterable[Way]) -> Profile | None:
    """The figures by the way that has the most."""
    found = [profile for way in ways if (profile := _by(way, near, rows))]
    return max(found, key=lambda profile: len(profile.seconds), default=None)


def _by(way: Way, near: Near, rows: Sequence[Row]) -> Profile | None:
    medians = [_comparable([row for row in rows if row.metric == metric]) for metric in way.metrics]
    setups = [setup for setup in medians[0] if all(setup in one for one in medians)]
    if not setups:
        return None
    seconds = {setup: way.seconds(*(one[setup].spread.median for one in medians)) for setup in setups}
    return Profile(near, way.what, seconds, max(one[setup].date for one in medians for setup in setups))


def _comparable(rows: Iterable[Row]) -> dict[Setup, Row]:
    """The newest row of each setup, of those settings that have the most setups."""
    groups = defaultdict[object, dict[Setup, Row]](dict)
    for row in sorted(rows, key=lambda row: row.date):
        groups[tuple(sorted(row.settings.items()))][Setup(row.quant, row.target, row.threads)] = row
    return max(groups.values(), key=lambda group: (len(group), max(row.date for row in group.values())), default={})


def shapes_of(row: Row) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the inputs of a submodel's call; None where the row has others settings."""
    try:
        return {name: tuple(map(int, filter(None, str(text).split("x")))) for name, text in row.settings.items()}
    except ValueError:
        return None
