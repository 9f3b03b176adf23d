"""Fingerprints of machines."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.placing import fingerprint
from runtime.placing.containers import Allowance
from runtime.placing.devices import Device, Machine, detect
from runtime.placing.fingerprint import Accelerator, Fingerprint
from runtime.placing.processor import Processor

GB = 10**9
MACHINE = Machine(
    (
        Device("cpu", "cpu", "AMD EPYC", 24 * GB, 9 * GB),
        Device("cuda:0", "cuda", "NVIDIA L4", 24 * GB, 20 * GB, ("SM89",), driver="580.95.05"),
        Device("npu", "intel-npu", "Intel(R) AI Boost", 24 * GB, shares="cpu"),
    ),
    Allowance(1.5),
)


def test_this_machine() -> None:
    found, machine = fingerprint.here(), detect()
    assert found is fingerprint.here()
    assert (found.memory, found.processors) == (machine.host.memory, machine.allowed.cpus)
    assert found.processor.features == machine.host.features
    assert Fingerprint.model_validate_json(found.model_dump_json()) == found


def test_a_machine_with_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "cores", lambda: 0)
    found = Fingerprint.of(MACHINE)
    line = str(found.model_copy(update={"processor": Processor(vendor="AuthenticAMD", name="AMD EPYC", family=26)}))
    assert line.startswith(
        "AMD EPYC (AuthenticAMD, family 26); no instruction sets known; 1.5 processors, unknown cores"
    )
    assert line.endswith("NVIDIA L4 SM89 580.95.05; Intel(R) AI Boost")
    assert (found.cores, found.processors, found.memory) == (None, 1.5, 24 * GB)
    assert found.accelerators == (
        Accelerator(
            name="cuda:0", kind="cuda", model="NVIDIA L4", features=("SM89",), memory=24 * GB, driver="580.95.05"
        ),
        Accelerator(name="npu", kind="intel-npu", model="Intel(R) AI Boost"),
    )


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"memory": 8 * GB}, True),
        ({"accelerators": ()}, True),
        ({"processors": 2.0}, False),
        ({"system": "Windows AMD64"}, False),
        ({"processor": Processor(vendor="AuthenticAMD", name="AMD EPYC", features=("AVX2",))}, False),
    ],
)
def test_what_a_figure_of_the_processor_depends_on(changes: dict[str, Any], alike: bool) -> None:
    one = Fingerprint.of(MACHINE)
    assert one.alike(one.model_copy(update=changes)) is alike
