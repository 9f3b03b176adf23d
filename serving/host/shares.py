"""Whose turn it is: clients share the engines of a model evenly, by the seconds they used (Demers et al. 1989, fair
queueing).
"""

from __future__ import annotations

from collections.abc import Collection


class Shares:
    """The seconds of engines that each client used while it had requests. A client that comes, or comes back, begins
    with the least that another has used, so that it is neither behind nor ahead.
    """

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    def present(self, clients: Collection[str]) -> None:
        """Take note of the clients that have requests; those of others are forgotten."""
        self._used = {client: used for client, used in self._used.items() if client in clients}
        least = min(self._used.values(), default=0.0)
        for client in clients:
            self._used.setdefault(client, least)

    def charge(self, client: str, seconds: float) -> None:
        """A client used an engine."""
        if client in self._used:
            self._used[client] += seconds

    def used(self, client: str) -> float:
        """Seconds that a client used, on the scale of the others."""
        return self._used.get(client, 0.0)
