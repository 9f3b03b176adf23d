"""Engines of a model that are loaded one after another while its first requests run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from runtime.engine import Engine
from runtime.errors import Unavailable


class Arriving(Mapping[str, Engine]):
    """The engines of these submodels, in the order in which requests need them. Reading one waits until it is there.

    One thread loads: it puts in what `following` names. Any thread may read. `notify` is called in the loading thread
    after each engine. Reading raises the error of loading once there is one, and Unavailable after `close`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.notify: Callable[[], None] = lambda: None
        self._names = tuple(names)
        self._here: dict[str, Engine] = {}
        self._wanted: list[str] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def __getitem__(self, name: str) -> Engine:
        if not self.want(name):
            self._wait(name)
        return self._here[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def here(self) -> dict[str, Engine]:
        """Those that are loaded, in order."""
        return {name: self._here[name] for name in self._names if name in self._here}

    @property
    def coming(self) -> tuple[str, ...]:
        """Those that are not, in order."""
        return tuple(name for name in self._names if name not in self._here)

    def want(self, name: str) -> bool:
        """Whether a submodel is loaded. If not, it is loaded before those that nobody wants.

        Raises KeyError for one that the model lacks: who calls it would wait for ever, and loading would fail for it.
        """
        if name in self._here:
            return True
        if name not in self._names:
            raise KeyError(name)
        if name not in self._wanted:
            self._wanted.append(name)
        return False

    def following(self) -> str | None:
        """What to load next, None at the end. Raises Unavailable after `close`."""
        if self._error is not None:
            raise self._error
        return next((name for name in (*self._wanted, *self._names) if name not in self._here), None)

    def put(self, name: str, engine: Engine) -> None:
        """An engine is loaded. Raises Unavailable after `close`, and closes it."""
        with self._changed:
            error = self._error
            if error is None:
                self._here[name] = engine
                self._changed.notify_all()
        if error is not None:
            engine.close()
            raise error
        self.notify()

    def fail(self, error: BaseException) -> None:
        """No more are loaded: whoever waits for one gets this error. Only the first call counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """No more are loaded. What is being loaded is freed at once when it is there."""
        if self.coming:
            self.fail(Unavailable("the model was closed while it was loaded: load it again"))

    def _wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: name in self._here or self._error is not None)
            if name not in self._here and self._error is not None:
                raise self._error


def here(engines: Mapping[str, Engine]) -> Mapping[str, Engine]:
    """The engines of a model that are loaded."""
    return engines.here if isinstance(engines, Arriving) else engines


def coming(engines: Mapping[str, Engine]) -> tuple[str, ...]:
    """The submodels of a model that are still being loaded."""
    return engines.coming if isinstance(engines, Arriving) else ()


def wanted(engines: Mapping[str, Engine], name: str) -> bool:
    """Whether the engine of a submodel is loaded, as `Arriving.want`."""
    return not isinstance(engines, Arriving) or engines.want(name)
