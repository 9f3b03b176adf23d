"""OpenVINO's devices as they are asked for: CPU, GPU.1, NPU, or made of others, such as AUTO or HETERO:GPU,CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from runtime.errors import EngineUnavailable

MADE_OF_OTHERS: Final = ("AUTO", "BATCH", "HETERO", "MULTI")
"""Each takes a list of devices behind a colon; AUTO alone chooses among all."""


@dataclass(frozen=True)
class Where:
    """A device by the SDK's name, and the devices that it may come down to."""

    name: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, core: Any, asked: str) -> Where:
        """What was asked for, the CPU by default. Raises EngineUnavailable where a part of it is not here."""
        name, here = asked or "CPU", tuple(core.available_devices)
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
        """Whether it is the CPU alone, by whatever name."""
        return all(part == "CPU" for part in self.parts)

    @property
    def plain(self) -> bool:
        """Whether it is the CPU by its own name: what is made of others does not tell everything that the CPU does."""
        return self.name == "CPU"

    @property
    def npu(self) -> bool:
        return any(_kind(part) == "NPU" for part in self.parts)

    def told(self, core: Any, compiled: Any) -> str:
        """The device in words: by its full name, or which of its parts really run the model."""
        if self.name.partition(":")[0] in MADE_OF_OTHERS:
            return f"{self.name} (on {', '.join(compiled.get_property('EXECUTION_DEVICES'))})"
        return f"{self.name} ({core.get_property(self.name, 'FULL_DEVICE_NAME')})"

    def fallbacks(self, core: Any, model: Any) -> tuple[str, ...]:
        """Of HETERO, what is not computed by the first of its devices."""
        if not self.name.startswith("HETERO:"):
            return ()
        places = list(core.query_model(model, self.name).values())
        others = {place: places.count(place) for place in dict.fromkeys(places) if place != self.parts[0]}
        return tuple(f"{count} of {len(places)} nodes on {place}" for place, count in others.items())


def _kind(name: str) -> str:
    return name.split(".")[0]
