"""The board of a cluster: the states of all models, as their replicas report them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import Final, TypeVar

from serving.cluster.wire import Overview
from serving.host.states import ModelState, Status

T = TypeVar("T", int, float)

SILENT_SECONDS: Final = 8.0
"""A replica that reported nothing for this time counts as gone."""
ORDER: Final = (ModelState.READY, ModelState.LOADING, ModelState.UNLOADING, ModelState.UNLOADED, ModelState.FAILED)
"""A model with several replicas is in the first of these states that one of them has."""


class Board:
    """Keeps nothing that replicas do not report again: it may be started anew at any time.

    `known` are the models that are named on the command line, as they are while they have no replica. With a
    `repository` there are more.
    """

    def __init__(self, known: Sequence[Status], repository: bool) -> None:
        self._known = {status.name: status for status in known}
        self._repository = repository
        self._stopping = False
        self._reports: dict[str, tuple[float, Sequence[Status]]] = {}

    def report(self, replica: str, statuses: Sequence[Status]) -> None:
        """Note the models of a replica."""
        self._reports[replica] = monotonic(), statuses

    def stop(self) -> None:
        """The cluster is stopped."""
        self._stopping = True

    def overview(self) -> Overview:
        """The models of the cluster now."""
        now = monotonic()
        self._reports = {name: one for name, one in self._reports.items() if now - one[0] < SILENT_SECONDS}
        found: dict[str, list[Status]] = {name: [] for name in self._known}
        for _, statuses in self._reports.values():
            for status in statuses:
                found.setdefault(status.name, []).append(status)
        statuses = [joined(each) if each else self._known[name] for name, each in sorted(found.items())]
        return Overview(tuple(self._known), self._repository, statuses, self._stopping)


def added(each: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """The sums of several mappings of numbers."""
    total = Counter[str]()
    for numbers in each:
        total.update(numbers)
    return dict(total)


def joined(statuses: Sequence[Status]) -> Status:
    """The status of a model with several replicas: numbers are added up, the rest is of one in the best state."""
    best = min(statuses, key=lambda status: ORDER.index(status.state))
    number = len(statuses)
    return replace(
        best,
        running=sum(status.running for status in statuses),
        queued=sum(status.queued for status in statuses),
        counts=added(status.counts for status in statuses),
        memory=added(status.memory for status in statuses),
        notes=(*best.notes, f"It has {number} replica{'s' if number > 1 else ''} on the cluster."),
    )
