"""Which models stay loaded: those that were used lately, as many as fit into the memory for models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Final

from runtime.bundle.manifest import Bundle
from runtime.errors import EnginecastError, ResourceExhausted
from runtime.placing.heap import give_back
from runtime.placing.memory import show_size
from serving.host.offers import ENDLESS
from serving.host.served import Served


@dataclass(frozen=True)
class Needs:
    """Bytes of each memory, by the name of its device: what a loaded model takes, and what its `caches` may hold."""

    engines: Mapping[str, int] = field(default_factory=dict)
    caches: Mapping[str, int] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, int]:
        """Both together."""
        names = dict.fromkeys((*self.engines, *self.caches))
        return {name: self.engines.get(name, 0) + self.caches.get(name, 0) for name in names}


Estimate = Callable[[Bundle, str | None], Needs]
"""What a bundle will need on a target."""
RETRY_SECONDS: Final = 5.0
"""The time after which a model in use may have become idle."""
HOST: Final = "cpu"
"""The name of the host's memory."""


class Memory:
    """The memory for all loaded models: `most` bytes on each device, None without a limit. `release` returns the host's
    memory of unloaded models to the system.
    """

    def __init__(
        self,
        most: int | None = None,
        estimate: Estimate = lambda bundle, target: Needs(),
        release: Callable[[], None] = give_back,
    ) -> None:
        self.release = release
        self._most = most
        self._estimate = estimate

    def needs(self, bundle: Bundle, target: str | None) -> Needs:
        """What a model will need, nothing without a limit. Raises the errors of the estimate."""
        return Needs() if self._most is None else self._estimate(bundle, target)

    def surplus(self, name: str, needs: Mapping[str, int], loaded: Collection[Served]) -> Served | None:
        """The model to unload so that the model `name` fits beside the `loaded` ones: the idle one that was used least
        recently. None if it fits.

        Raises ResourceExhausted if unloading all idle ones would not suffice.
        """
        for device, need in needs.items():
            self._possible(name, device, need, loaded)
        idle = [served for served in loaded if _may_go(served)]
        tight = [device for device in needs if self._over(device, needs, loaded)]
        holding = [served for served in idle if any(served.memory.get(device) for device in tight)]
        return min(holding, key=lambda served: served.last_used or 0.0, default=None)

    def _over(self, device: str, needs: Mapping[str, int], loaded: Collection[Served]) -> bool:
        return self._most is not None and needs[device] + _held(device, loaded) > self._most

    def _possible(self, name: str, device: str, need: int, loaded: Collection[Served]) -> None:
        if self._most is None:
            return
        wanted = f"model {name} needs {show_size(need)} of {device} memory"
        if need > self._most:
            raise ResourceExhausted(
                f"{wanted}, with what its caches may hold, more than the {show_size(self._most)} for all models: "
                "allow more with --models-memory, or less to this model with --prefix-cache, --picture-cache or "
                "--memory-limit"
            )
        kept = [served for served in loaded if not _may_go(served) and served.memory.get(device)]
        if need + (held := _held(device, kept)) > self._most:
            raise ResourceExhausted(
                f"{wanted}, and {show_size(held)} of the {show_size(self._most)} for all models are held by "
                f"{', '.join(sorted(served.name for served in kept))}, which are in use or always stay loaded: try "
                "again later, or allow more with --models-memory",
                RETRY_SECONDS,
            )


def measured(bundle: Bundle, needs: Needs, growth: int) -> dict[str, int]:
    """What a loaded model takes: `growth` bytes of the host's memory, on other devices what it was estimated to need,
    and everywhere what its caches may hold.

    Memory that was free in this process before is not seen in its growth, so the stored bytes of the weights count at
    least.
    """
    stored = sum(submodel.nbytes for submodel in bundle.manifest.submodels)
    engines = {**needs.engines, HOST: max(growth, min(stored, needs.engines.get(HOST, 0)))}
    return replace(needs, engines=engines).all


def _held(device: str, models: Collection[Served]) -> int:
    return sum(served.memory.get(device, 0) for served in models)


def _may_go(served: Served) -> bool:
    return served.idle and served.offer.keep_alive is not None


class KeepAlive:
    """Unloads models, by `unload`, that no request has used for their keep-alive."""

    def __init__(self, unload: Callable[[Served], Coroutine[Any, Any, None]]) -> None:
        self._unload = unload
        self._timers: dict[Served, asyncio.TimerHandle] = {}
        self._unloading: set[asyncio.Task[None]] = set()

    def loaded(self, served: Served, seconds: float | None) -> None:
        """A model was loaded: `used`, with the keep-alive of the last request if some ended meanwhile."""
        asked, served.asked = served.asked, ()
        self.used(served, *(asked or (seconds,)))

    def used(self, served: Served, seconds: float | None = None) -> None:
        """A model was loaded, or a request of it ended: it stays for `seconds`, None for the keep-alive of its offer.

        Nothing unloads a model whose offer has none.
        """
        if served.begun.is_set():
            served.asked = (seconds,)
        served.last_used = monotonic()
        self.forget(served)
        usual = served.offer.keep_alive
        wait = usual if seconds is None else seconds
        if usual is not None and wait is not None and wait != ENDLESS and served.idle:
            served.expires = served.last_used + wait
            self._timers[served] = asyncio.get_running_loop().call_later(wait, self._over, served)

    def forget(self, served: Served) -> None:
        """The model is used again or is unloaded."""
        served.expires = None
        if (timer := self._timers.pop(served, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """Unload nothing any more."""
        for served in list(self._timers):
            self.forget(served)

    def _over(self, served: Served) -> None:
        self.forget(served)
        task = asyncio.create_task(self._quietly(served))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _quietly(self, served: Served) -> None:
        if served.idle:  # asked here: a request may have come between the end of the time and this task
            with suppress(EnginecastError):  # it is in the log, and the model is used or changed again
                await self._unload(served)
