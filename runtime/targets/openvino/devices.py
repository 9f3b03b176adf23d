"""OpenVINO devices by name: CPU, GPU.1, NPU, or one composed of others, such as AUTO or HETERO:GPU,CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from runtime.errors import EngineUnavailable

MADE_OF_OTHERS: Final = ("AUTO", "BATCH", "HETERO", "MULTI")
"""Each is followed by a colon and a list of devices; AUTO alone chooses among all."""


@dataclass(frozen=True)
class Where:
    """A device by the SDK's name, and the devices that it may use."""

    name: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, core: Any, requested: str) -> Where:
        """The requested device, the CPU by default. Raises EngineUnavailable where one of its devices is not on this
        machine.
        """
        name, here = requested or "CPU", tuple(core.available_devices)
        kind, _, listed = name.partition(":")
        if kind not in MADE_OF_OTHERS:
            parts: tuple[str, ...] = (name,)
        elif listed:
            parts = tuple(
                re.sub(r"\(.*\)$", "", part.strip()) for part in listed.split(",") if not part.strip().startswith("-")
            )
        else:
            parts = here
        for part in parts:
            if _kind(part) not in map(_kind, here):
                raise EngineUnavailable(f"OpenVINO has no device '{part}' here: it found {', '.join(here) or 'none'}")
        return cls(name, parts)

    @property
    def cpu(self) -> bool:
        """Whether only the CPU is used, under any name."""
        return all(part == "CPU" for part in self.parts)

    @property
    def plain(self) -> bool:
        """Whether it is named CPU. Composed devices do not report everything that the CPU does."""
        return self.name == "CPU"

    @property
    def npu(self) -> bool:
        return any(_kind(part) == "NPU" for part in self.parts)

    def described(self, core: Any, compiled: Any) -> str:
        """The device for display: its full name, or the devices that really run the model."""
        if self.name.partition(":")[0] in MADE_OF_OTHERS:
            return f"{self.name} (on {', '.join(compiled.get_property('EXECUTION_DEVICES'))})"
        return f"{self.name} ({core.get_property(self.name, 'FULL_DEVICE_NAME')})"

    def fallbacks(self, core: Any, model: Any) -> tuple[str, ...]:
        """The nodes that HETERO does not run on the first of its devices."""
        if not self.name.startswith("HETERO:"):
            return ()
        places = list(core.query_model(model, self.name).values())
        others = {place: places.count(place) for place in dict.fromkeys(places) if place != self.parts[0]}
        return tuple(f"{count} of {len(places)} nodes on {place}" for place, count in others.items())


def _kind(name: str) -> str:
    return name.split(".")[0]
