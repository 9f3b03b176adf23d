"""What a request says of how it is run, whatever it requests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """How soon a request is run. Larger ones leave the queue first and get a larger share of the engines."""

    BACKGROUND = -1
    NORMAL = 0
    URGENT = 1

    @property
    def cost(self) -> float:
        """What a second of an engine counts: an urgent request gets four times the share of a normal one, and that one
        four times the share of one in the background.
        """
        return 4.0**-self


@dataclass(frozen=True)
class Terms:
    """The model stays loaded for `keep_alive` seconds after the request, None for its usual time. With `finish`, the
    request goes on when its client leaves, and its result is kept for a while.
    """

    keep_alive: float | None = None
    priority: Priority = Priority.NORMAL
    finish: bool = False
