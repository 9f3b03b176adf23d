"""Features of pictures that were encoded before."""

from __future__ import annotations

import threading
from collections import OrderedDict

from runtime.bundle.signature import Array


class FeatureCache:
    """Arrays by what identifies their picture, of at most `most` bytes together: the ones used longest ago go first.
    Several threads may use it.
    """

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._held: OrderedDict[bytes, Array] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Array | None:
        """The array, which must not be changed; None if there is none."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: bytes, features: Array) -> None:
        """Hold an array. One that is too large is not held."""
        with self._lock:
            self._held[key] = features
            self._held.move_to_end(key)
            while self.nbytes > self._most:
                self._held.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(features.nbytes for features in self._held.values())
