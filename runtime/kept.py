"""What further requests may use again, held in memory by what identifies it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values of at most `most` bytes together: the ones used longest ago go first. Several threads may use it."""

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value, which must not be changed; None if there is none."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Hold a value of so many bytes. One that is too large is not held."""
        with self._lock:
            self._held.pop(key, None)
            if nbytes <= self.most:
                self._held[key] = value, nbytes
            while self.nbytes > self.most:
                self._held.popitem(last=False)

    def discard(self, key: K) -> None:
        """Forget a value, if it is held."""
        with self._lock:
            self._held.pop(key, None)

    def values(self) -> list[V]:
        """Every value, the one used longest ago first."""
        with self._lock:
            return [value for value, _ in self._held.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(nbytes for _, nbytes in self._held.values())
