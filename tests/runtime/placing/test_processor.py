"""The processor as /proc/cpuinfo, sysctl and the registry describe it."""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path

import pytest

from runtime.placing import processor
from runtime.placing.processor import Processor

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 2
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8

processor\t: 1
stepping\t: 9
"""
NEOVERSE = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd asimddp sve bf16 i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 3
"""


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")


@pytest.mark.usefixtures("linux")
def test_a_processor_of_each_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    features = ("AVX2", "AVX512F", "AVX512-VNNI", "AVX512-BF16", "AVX512-FP16", "AMX", "AMX-INT8")
    monkeypatch.setattr(processor, "cpuinfo", lambda: XEON)
    assert processor.identity() == Processor(
        vendor="GenuineIntel", name="Intel(R) Xeon(R) Processor", family=6, model=207, stepping=2, features=features
    )
    monkeypatch.setattr(processor, "cpuinfo", lambda: NEOVERSE)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    found = processor.identity()
    assert (found.vendor, found.name, found.family, found.model, found.stepping) == ("ARM", "aarch64", 8, 0xD40, 19)
    assert sorted(found.features) == ["BF16", "DOTPROD", "I8MM", "NEON", "SVE"]


@pytest.mark.usefixtures("linux")
def test_what_a_system_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpuinfo", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert processor.identity() == Processor(vendor="unknown", name="riscv64")


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "machdep.cpu.brand_string": b"Apple M4\0",
        "hw.cpufamily": (0x6F5129AC).to_bytes(4, "little"),
        "hw.optional.AdvSIMD": b"\1\0\0\0",
    }
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(processor, "cpuinfo", lambda: "")
    monkeypatch.setattr(processor, "sysctl", lambda name: values.get(name, b""))
    assert processor.identity() == Processor(vendor="Apple", name="Apple M4", family=0x6F5129AC, features=("NEON",))


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "Identifier": "AMD64 Family 25 Model 97 Stepping 2",
        "VendorIdentifier": "AuthenticAMD",
        "ProcessorNameString": "AMD Ryzen 9 7900 12-Core Processor             ",
    }
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(processor, "_registry", lambda: values)
    monkeypatch.setattr(processor, "_windows_features", lambda: ("AVX2",))
    assert processor.identity() == Processor(
        vendor="AuthenticAMD",
        name="AMD Ryzen 9 7900 12-Core Processor",
        family=25,
        model=97,
        stepping=2,
        features=("AVX2",),
    )


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="reads /proc/cpuinfo of x86")
def test_this_processor() -> None:
    found, text = processor.identity(), Path("/proc/cpuinfo").read_text()
    assert found.vendor in text and found.name in text
    assert f"model\t\t: {found.model}\n" in text and f"stepping\t: {found.stepping}\n" in text
    assert ("AVX512-FP16" in found.features) == (" avx512_fp16 " in text)


def test_processors_of_one_name_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    info = "vendor_id\t: AuthenticAMD\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
    found = []
    for numbers in ((25, 17), (26, 2)):
        monkeypatch.setattr(processor, "cpuinfo", partial(info.format, *numbers))
        found.append(processor.processor())
    assert found == ["AMD EPYC (family 25, model 17)", "AMD EPYC (family 26, model 2)"]
    monkeypatch.setattr(processor, "cpuinfo", lambda: "processor\t: 0\nmodel name\t: ARMv8 Processor\n")
    assert processor.processor() == "ARMv8 Processor"


def test_cores_are_counted_among_the_processors_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets of two cores with two threads each; one thread of the last core is not this process's."""
    blocks = [f"processor\t: {n}\nphysical id\t: {n // 4}\ncore id\t\t: {n // 2 % 2}\n" for n in range(8)]
    monkeypatch.setattr(processor, "cpuinfo", lambda: "\n".join(blocks))
    for usable, cores in ((range(8), 4), (range(7), 4), (range(6), 3), ((0, 1), 1)):
        monkeypatch.setattr(
            processor.os, "sched_getaffinity", lambda process, usable=usable: set(usable), raising=False
        )
        assert processor.cores() == cores
    monkeypatch.setattr(processor, "cpuinfo", lambda: "processor\t: 0\nmodel name\t: ARMv8 Processor\n")
    assert processor.cores() == 0
