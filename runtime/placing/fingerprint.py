"""The fingerprint of a device: everything about a machine that the speed of a bundle on it depends on.

Rows of figures carry it (`profiles.rows.Row`), so that they can be told apart years later: two machines of one kind
differ in their instruction sets, and one machine in what a container allows.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Final

from runtime.bundle.manifest import Frozen
from runtime.placing.devices import Device, Machine, detect
from runtime.placing.processor import Processor, cores, identity

GIB: Final = 1 << 30


class Accelerator(Frozen):
    """A device besides the processor. `features` has the compute capability of an NVIDIA GPU, such as SM89; `memory` is
    in bytes, None where it is unknown or the processor's; `driver` is a version, "" where it is unknown.
    """

    name: str
    kind: str
    model: str
    features: tuple[str, ...] = ()
    memory: int | None = None
    driver: str = ""

    @classmethod
    def of(cls, device: Device) -> Accelerator:
        return cls(
            name=device.name,
            kind=device.kind,
            model=device.model,
            features=device.features,
            memory=None if device.shares else device.memory,
            driver=device.driver,
        )


class Fingerprint(Frozen):
    """A machine as this process may use it: its processor, physical cores (None where the system does not tell),
    processors granted (a fraction where a container has a quota of their time), memory in bytes, system and its
    architecture ("Linux x86_64"), and other devices.
    """

    processor: Processor
    cores: int | None
    processors: float
    memory: int | None
    system: str
    accelerators: tuple[Accelerator, ...] = ()

    @classmethod
    def of(cls, machine: Machine) -> Fingerprint:
        """That of a machine that `detect` described: this one."""
        return cls(
            processor=identity(),
            cores=cores() or None,
            processors=machine.allowed.cpus,
            memory=machine.host.memory,
            system=f"{platform.system()} {platform.machine()}",
            accelerators=tuple(Accelerator.of(device) for device in machine.devices[1:]),
        )

    def __str__(self) -> str:
        """One line for people."""
        one = self.processor
        numbers = ", ".join(
            f"{name} {value}"
            for name, value in (("family", one.family), ("model", one.model), ("stepping", one.stepping))
            if value is not None
        )
        memory = "memory unknown" if self.memory is None else f"{self.memory / GIB:.1f} GiB"
        parts = [
            f"{one.name} ({', '.join(filter(None, (one.vendor, numbers)))})",
            " ".join(one.features) or "no instruction sets known",
            f"{self.processors:g} processors, {self.cores or 'unknown'} cores, {memory}, {self.system}",
            *(" ".join(filter(None, (each.model, *each.features, each.driver))) for each in self.accelerators),
        ]
        return "; ".join(parts)

    def alike(self, other: Fingerprint) -> bool:
        """Whether a figure of the processor on one holds for the other: processor, processors granted and system are
        the same. Memory and other devices may differ.
        """
        return (self.processor, self.processors, self.system) == (other.processor, other.processors, other.system)


@cache
def here() -> Fingerprint:
    """This machine's, found once. Never raises."""
    return Fingerprint.of(detect())
