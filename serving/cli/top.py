"""`enginecast top`: the models of a server as a table that renews itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.widgets import DataTable, Footer, Static

from runtime.errors import EnginecastError
from runtime.placing.memory import show_size
from serving.enginecast_pb import model_pb2

COLUMNS: Final = (
    "Model", "State", "Running", "Queued", "Tokens/s", "Steps/s", "Batch", "Requests", "Failed", "Memory", "Device",
)  # fmt: skip
SMOOTHING: Final = 0.5
"""The weight of the newest rate. Answers and pictures come in bursts."""
PATIENCE: Final = 5.0
"""Seconds that an answer of the server may take."""

Look = Callable[[], model_pb2.StatusResponse]
"""Gets the server's status. Raises the errors of the connection."""


@dataclass(frozen=True)
class Sample:
    """What a model had counted at a time in seconds."""

    time: float
    counts: dict[str, float]


class Rates:
    """How fast the counts of a model grow, per second, smoothed over a few samples."""

    def __init__(self) -> None:
        self._last: Sample | None = None
        self._rates: dict[str, float] = {}

    def add(self, sample: Sample) -> None:
        """Take the newest sample. Counts that fell are those of a server that was started again."""
        last, self._last = self._last, sample
        if last is None or sample.time <= last.time:
            return
        for name, count in sample.counts.items():
            rate = max(0.0, count - last.counts.get(name, 0)) / (sample.time - last.time)
            self._rates[name] = SMOOTHING * rate + (1 - SMOOTHING) * self._rates.get(name, rate)

    def of(self, name: str) -> float:
        """The rate of a count, 0 before the second sample."""
        return self._rates.get(name, 0.0)


class Top(App[None]):
    """Shows what `look` gets every `interval` seconds. A server that does not answer is asked again."""

    TITLE = "enginecast top"
    CSS = "#server { padding: 0 1; } DataTable { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [("q", "quit", "Quit")]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, address: str, look: Look, interval: float) -> None:
        super().__init__()
        self._address = address
        self._look = look
        self._interval = interval
        self._rates: dict[str, Rates] = {}
        self._looking = False
        self._server = Static(f"connecting to {address}", id="server", markup=False)
        self._table = DataTable[Text](cursor_type="none", zebra_stripes=True)

    def compose(self) -> ComposeResult:
        """The line about the server, the table, the keys."""
        yield self._server
        yield self._table
        yield Footer()

    def on_mount(self) -> None:
        """Look at once, then again and again."""
        self._table.add_columns(*COLUMNS)
        self.renew()
        self.set_interval(self._interval, self.renew)

    def renew(self) -> None:
        """Look in a thread. Only one at a time: a slow server is not asked more often than it answers."""
        if not self._looking:
            self._looking = True
            self.run_worker(self._renew())

    async def _renew(self) -> None:
        try:
            self._show(await asyncio.to_thread(self._look))
        except EnginecastError as error:
            self._say(f"{self._address}: {error}")
        finally:
            self._looking = False

    def _say(self, line: str) -> None:
        self._server.update(_printable(line))

    def _show(self, status: model_pb2.StatusResponse) -> None:
        stopping = ", stopping" if status.stopping else ""
        memory = show_size(status.memory_bytes) if status.memory_bytes else "unknown"
        up = _duration(status.uptime_seconds)
        self._say(f"{self._address}  version {status.version}  up {up}  memory {memory}{stopping}")
        self._table.clear()
        for model in status.models:
            rates = self._rates.setdefault(model.name, Rates())
            rates.add(Sample(time.monotonic(), dict(model.counts)))
            self._table.add_row(*(Text(_printable(cell)) for cell in row(model, rates)))


def row(model: model_pb2.Model, rates: Rates) -> list[str]:
    """The cells of a model, in the order of COLUMNS."""
    counts = dict(model.counts)
    runs = counts.get("runs", 0)
    batch = counts["calls"] / runs if runs else 0.0
    numbers = (rates.of("output_tokens"), rates.of("steps"), batch)
    return [
        model.name,
        model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
        str(model.running),
        str(model.queued),
        *(f"{number:.1f}" if number else "" for number in numbers),
        *(f"{counts.get(name, 0):.0f}" for name in ("requests", "failed")),
        " + ".join(f"{show_size(size)} {device}" for device, size in sorted(model.memory_bytes.items())),
        model.device,
    ]


def _duration(seconds: float) -> str:
    """Such as "2:03:04", hours first."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _printable(text: str) -> str:
    """A text of the server without characters that control terminals."""
    return "".join(char if char.isprintable() else "?" for char in text)
