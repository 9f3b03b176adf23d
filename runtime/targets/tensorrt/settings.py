"""Settings of TensorRT's compilation and loading, given as texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, field_validator

from runtime.settings import Texts

UNITS: Final[Mapping[str, int]] = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _bytes(text: str) -> int:
    """Bytes of a size such as 512MiB."""
    number = text.rstrip("KMGiB")
    if not number.isdecimal() or text[len(number) :] not in UNITS:
        raise ValueError(f"is '{text}', expected a size such as 512MiB or 4GiB")
    return int(number) * UNITS[text[len(number) :]]


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(",") if part)


Bytes = Annotated[int, BeforeValidator(_bytes)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_paths)]


class TensorRTSettings(Texts):
    """Settings of `compile_with`, as texts from a command line.

    `compute_capability`: the GPUs to compile for, "8.9,12.0"; by default this machine's, or all that the SDK knows
    where it has none. `shapes`: narrower lengths than the signature's, "batch=1:2:8,height=64:64:128" (min:opt:max):
    less memory, faster kernels. `context`: positions that a decoder's cache holds; by default the model's whole
    context. `workspace`: memory that a layer may use while it runs, "4GiB"; by default all. `weights`: "engine" stores
    them in the engine; "refit" allows them to be exchanged later; "stripped" leaves them in the bundle's own files,
    from which they are read when the engine is loaded; "streamed" allows a part of them to stay in the host's memory.
    `compatible`: "version" makes an engine that later versions of the SDK load. `hardware` (TensorRT): "ampere+" makes
    one for all GPUs from Ampere on, "same" for those of the same compute capability. `timing_cache` (TensorRT): a file
    in which the times of kernels are kept between compilations. `optimization_level`: 0 (fast to compile) to 5 (fast to
    run). `plugins`: libraries with operators outside of the standard. They run as native code: name only those you
    trust. `tf32`: allows float32 products to be computed in TensorFloat-32, with 10 bits of mantissa.
    """

    compute_capability: tuple[int, ...] = ()
    shapes: Mapping[str, tuple[int, int, int]] = Field(default_factory=dict)
    context: int = Field(default=0, ge=0)
    workspace: Bytes = 0
    weights: Literal["engine", "refit", "stripped", "streamed"] = "engine"
    compatible: Literal["", "version"] = ""
    hardware: Literal["", "ampere+", "same"] = ""
    timing_cache: str = ""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    plugins: Paths = ()
    tf32: bool = False

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _capabilities(cls, text: str) -> tuple[int, ...]:
        parts = [part.strip().split(".") for part in text.split(",")]
        if not all(
            len(part) == 2 and part[0].isdecimal() and part[1].isdecimal() and len(part[1]) == 1 for part in parts
        ):
            raise ValueError(f"is '{text}', expected versions such as 8.9 or 8.9,12.0")
        return tuple(dict.fromkeys(int("".join(part)) for part in parts))

    @field_validator("shapes", mode="before")
    @classmethod
    def _shapes(cls, text: str) -> dict[str, tuple[int, int, int]]:
        found = {}
        for part in text.split(","):
            name, _, numbers = part.strip().partition("=")
            lengths = numbers.split(":")
            if not name or len(lengths) != 3 or not all(map(str.isdecimal, lengths)):
                raise ValueError(f"has '{part}', expected NAME=MIN:OPT:MAX, such as batch=1:2:8")
            low, usual, high = map(int, lengths)
            if not low <= usual <= high:
                raise ValueError(f"has '{part}', expected MIN <= OPT <= MAX")
            found[name] = low, usual, high
        return found

    def key(self) -> dict[str, str]:
        """The settings that decide where and how an engine can be loaded."""
        return {"weights": self.weights} | {
            name: value for name, value in (("compatible", self.compatible), ("hardware", self.hardware)) if value
        }


class TensorRTLoadSettings(Texts):
    """Settings of `Options.settings` when loading.

    `weight_budget`: bytes of streamed weights that stay on the device, "2GiB"; by default the SDK's choice for the
    available memory. `plugins`: libraries of the engine's plugins. They run as native code: name only those you trust.
    `lean_runtime`: the library of the version that compiled the engine, for one made with compatible=version.
    `runtime_cache`: a file in which kernels compiled on this device are kept for the next start (TensorRT for RTX).
    `graphs`: whether repeated work is recorded and replayed (CUDA Graphs).
    """

    weight_budget: Bytes = 0
    plugins: Paths = ()
    lean_runtime: Path | None = None
    runtime_cache: Path | None = None
    graphs: bool = True
