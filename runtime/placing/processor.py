"""The processor: its name, its makers' numbers, its instruction sets and its cores, from /proc/cpuinfo on Linux,
sysctl on macOS, and the registry and IsProcessorFeaturePresent on Windows. What a system does not tell is unknown.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from runtime.bundle.manifest import Frozen

UNKNOWN: Final = "unknown"
FEATURES: Final = {
    **{name: name.upper() for name in ("avx2", "avx512f", "neon", "sve", "bf16", "i8mm")},
    **{"avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX512-VNNI", "avx512vnni": "AVX512-VNNI", "avx512_bf16": "AVX512-BF16"},
    "avx512_fp16": "AVX512-FP16",
    **{"amx_tile": "AMX", "amx_int8": "AMX-INT8", "amx_bf16": "AMX-BF16"},
    **{
        "asimd": "NEON",
        "asimddp": "DOTPROD",
        "advsimd": "NEON",
        "feat_dotprod": "DOTPROD",
        "feat_bf16": "BF16",
        "feat_i8mm": "I8MM",
    },
}
"""Instruction sets that decide which kernels a quantized layer gets. Keys are flags of /proc/cpuinfo and, in lower
case, names under hw.optional on macOS; values are the vendors' spellings.
"""
WINDOWS_FEATURES: Final = {19: "NEON", 40: "AVX2", 41: "AVX512F", 43: "DOTPROD"}
"""Arguments of Windows' IsProcessorFeaturePresent (PF_ARM_NEON_INSTRUCTIONS_AVAILABLE and others)."""


def processor() -> str:
    """The system's name of the processor, as in benchmark rows.

    On x86 Linux, family and model are appended: virtual machines call processors of several generations "AMD EPYC".
    """
    fields = dict(re.findall(r"^(model name|Model|cpu family|model)[ \t]*:[ \t]*(.*\S)", cpuinfo(), re.MULTILINE))
    if name := fields.get("model name") or fields.get("Model"):
        return (
            f"{name} (family {fields['cpu family']}, model {fields['model']})"
            if {"cpu family", "model"} <= fields.keys()
            else name
        )
    return _string("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def cores() -> int:
    """Physical cores that this process may use; 0 if unknown. With simultaneous multithreading there are fewer cores
    than processors.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    found = set()
    for block in cpuinfo().split("\n\n"):
        fields = dict(re.findall(r"^(processor|physical id|core id)[ \t]*:[ \t]*(\d+)", block, re.MULTILINE))
        if len(fields) == 3 and (usable is None or int(fields["processor"]) in usable):
            found.add((fields["physical id"], fields["core id"]))
    return len(found)


def processor_features() -> tuple[str, ...]:
    """The processor's instruction sets listed in `FEATURES`, such as AVX512-VNNI."""
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    flags: Iterable[str] = listed[1].split() if listed else ()
    if platform.system() == "Darwin":
        names = ("AdvSIMD", "arm.FEAT_DotProd", "arm.FEAT_BF16", "arm.FEAT_I8MM", "avx2_0", "avx512f")
        flags = [
            name.removeprefix("arm.").removesuffix("_0").lower() for name in names if any(sysctl(f"hw.optional.{name}"))
        ]
    if platform.system() == "Windows":
        return _windows_features()
    return tuple(dict.fromkeys(FEATURES[flag] for flag in FEATURES if flag in set(flags)))


def _windows_features() -> tuple[str, ...]:
    import ctypes

    present: Any = getattr(ctypes, "windll").kernel32.IsProcessorFeaturePresent  # noqa: B009 (other systems' stubs lack it)
    return tuple(name for number, name in WINDOWS_FEATURES.items() if present(number))


def cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(errors="replace") if file.is_file() else ""


def sysctl(name: str) -> bytes:
    """A value of macOS' sysctl(3): a number, or a string that ends with a zero byte. Empty on other systems."""
    if platform.system() != "Darwin":
        return b""
    import ctypes

    libc, size = ctypes.CDLL(None), ctypes.c_size_t(256)
    buffer = ctypes.create_string_buffer(size.value)
    failed = libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0)
    return b"" if failed else buffer.raw[: size.value]


class Processor(Frozen):
    """A kind of processor. `family`, `model` and `stepping` are the maker's numbers, None where the system does not
    tell them; `features` are its instruction sets of `FEATURES`.

    On ARM they are the architecture, the part, and variant and revision as in the register MIDR (variant * 16 +
    revision); on macOS family is hw.cpufamily.
    """

    vendor: str
    name: str
    family: int | None = None
    model: int | None = None
    stepping: int | None = None
    features: tuple[str, ...] = ()


ARM_VENDORS: Final = {
    0x41: "ARM", 0x42: "Broadcom", 0x43: "Cavium", 0x46: "Fujitsu", 0x48: "HiSilicon", 0x4E: "NVIDIA",
    0x50: "Applied Micro", 0x51: "Qualcomm", 0x53: "Samsung", 0x56: "Marvell", 0x61: "Apple", 0x6D: "Microsoft",
    0xC0: "Ampere",
}  # fmt: skip
"""Implementers of the register MIDR_EL1, as in Arm's manual and in util-linux."""
REGISTRY: Final = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
"""Where Windows describes the first processor, below HKEY_LOCAL_MACHINE."""


def identity() -> Processor:
    """This machine's processor. Never raises."""
    if platform.system() == "Darwin":
        found = _apple()
    elif platform.system() == "Windows":
        found = _windows(_registry())
    else:
        block = cpuinfo().split("\n\n")[0]
        fields = dict(re.findall(r"^([^:\n]*?)[ \t]*:[ \t]*(.*\S)", block, re.MULTILINE))
        found = _arm(fields) if "CPU implementer" in fields else _x86(fields)
    return found.model_copy(update={"features": processor_features()})


def _x86(fields: Mapping[str, str]) -> Processor:
    numbers = (_number(fields.get(name)) for name in ("cpu family", "model", "stepping"))
    family, model, stepping = numbers
    name = fields.get("model name") or fields.get("Model") or platform.machine() or UNKNOWN
    return Processor(vendor=fields.get("vendor_id", UNKNOWN), name=name, family=family, model=model, stepping=stepping)


def _arm(fields: Mapping[str, str]) -> Processor:
    implementer, part = _number(fields["CPU implementer"]), _number(fields.get("CPU part"))
    variant, revision = _number(fields.get("CPU variant")), _number(fields.get("CPU revision"))
    return Processor(
        vendor=ARM_VENDORS.get(implementer or 0, UNKNOWN),
        name=fields.get("model name") or platform.machine() or UNKNOWN,
        family=_number(fields.get("CPU architecture")),
        model=part,
        stepping=None if variant is None or revision is None else variant << 4 | revision,
    )


def _apple() -> Processor:
    """Macs with Apple's processors have no vendor, model and stepping among their values."""
    numbers = (_integer(name) for name in ("hw.cpufamily", "machdep.cpu.model", "machdep.cpu.stepping"))
    family, model, stepping = numbers
    vendor = _string("machdep.cpu.vendor") or ("Apple" if platform.machine() == "arm64" else UNKNOWN)
    name = _string("machdep.cpu.brand_string") or UNKNOWN
    return Processor(vendor=vendor, name=name, family=family, model=model, stepping=stepping)


def _windows(values: Mapping[str, str]) -> Processor:
    """Of values such as Identifier: "Intel64 Family 6 Model 158 Stepping 10"."""
    numbers = dict(re.findall(r"(Family|Model|Stepping|Revision) (\w+)", values.get("Identifier", "")))
    return Processor(
        vendor=values.get("VendorIdentifier", UNKNOWN),
        name=values.get("ProcessorNameString", "").strip() or platform.processor() or UNKNOWN,
        family=_number(numbers.get("Family")),
        model=_number(numbers.get("Model")),
        stepping=_number(numbers.get("Stepping")),
    )


def _registry() -> dict[str, str]:
    """The texts that Windows keeps of the processor; none where they cannot be read."""
    import winreg

    registry: Any = winreg  # other systems' stubs lack its functions
    try:
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, REGISTRY) as key:
            values = [registry.EnumValue(key, number) for number in range(registry.QueryInfoKey(key)[1])]
    except OSError:
        return {}
    return {name: value for name, value, _ in values if isinstance(value, str)}


def _number(text: str | None) -> int | None:
    """A number in decimal digits, or in hexadecimal ones after 0x."""
    try:
        return int(text or "", 0)
    except ValueError:
        return None


def _string(name: str) -> str:
    return sysctl(name).rstrip(b"\0").decode(errors="replace")


def _integer(name: str) -> int | None:
    return int.from_bytes(sysctl(name), "little") if sysctl(name) else None
