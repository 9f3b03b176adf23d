"""What a build is asked for, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from calibration.quantize import BLOCKS, RECIPES
from calibration.search import GOALS, Goal
from export.artifacts import check_strippable
from runtime.bundle import Artifact
from runtime.engine import check_precisions, target
from runtime.errors import EngineUnavailable, InvalidInput, did_you_mean

QUANTS: Final = ("none", *RECIPES, "auto")
COMPUTES: Final = ("auto", "float32", "float16", "bfloat16")
PARITIES: Final = ("auto", "full", "twin")
QUALITIES: Final = ("auto", "full", "none")


@dataclass(frozen=True)
class Options:
    """What to build. `source` is a folder, `sample:NAME` or a hub id; `parity` one of auto, full, twin.

    `name` is what clients call the model; empty, it is the source's. `calibration` is a set made by `enginecast calibrate`; without one,
    built-in requests are captured where a recipe needs them, for int4 where the model is not so big that this takes long. `quality` is one
    of auto, full, none: whether the quantized model is compared with the float one; `speed`, one of the same, whether both are timed beside
    PyTorch, too. `allow_low_quality` keeps a bundle that falls below the floors. `max_drop` and `goal` are those of quant "auto". `compute`
    is what targets that have it may compute in where that is measured to be harmless; auto is the recipe's own. `block` is the number of
    consecutive inputs that share an int4 scale, 0 being the recipe's. `strip_canonical` leaves graphs and weights out that no target reads.
    `settings` are those of each target, by its name.
    """

    source: str
    output: Path
    targets: tuple[str, ...] = ("onnxruntime",)
    quant: str = "none"
    parity: str = "auto"
    force: bool = False
    name: str = ""
    calibration: Path | None = None
    quality: str = "auto"
    speed: str = "auto"
    allow_low_quality: bool = False
    max_drop: float = 1.0
    goal: Goal = "size"
    compute: str = "auto"
    block: int = 0
    strip_canonical: bool = False
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("quant", self.quant, QUANTS),
            ("parity", self.parity, PARITIES),
            ("quality", self.quality, QUALITIES),
            ("speed", self.speed, QUALITIES),
            ("goal", self.goal, GOALS),
            ("compute", self.compute, COMPUTES),
        ):
            if value not in known:
                raise InvalidInput(name, f"'{value}' is not known: {did_you_mean(value, known)}")
        if self.block and (self.block not in BLOCKS or self.quant != "int4"):
            expected = f"one of {', '.join(map(str, sorted(BLOCKS)))} with --quant int4"
            raise InvalidInput("block", f"is {self.block} with --quant {self.quant}, expected {expected}")
        if self.calibration is not None and self.quant == "none":
            raise InvalidInput("calibration", "is of no use without --quant: nothing is quantized")
        if not self.targets:
            raise InvalidInput("target", "is missing: name at least one, such as --target openvino")
        found = {name: target(name).available() for name in self.targets}
        unusable = [f"{name}: {one.reason}" for name, one in found.items() if not (one.usable or one.compiles)]
        if unusable:
            raise EngineUnavailable(f"cannot compile for {'; '.join(unusable)}")
        if self.quant in RECIPES:
            check_precisions(self.targets, RECIPES[self.quant].precisions)
        if self.strip_canonical:
            check_strippable([Artifact(target=name, submodel="", key=dict(self.settings.get(name, {}))) for name in self.targets], ())
        strangers = sorted(set(self.settings) - set(self.targets))
        if strangers:
            raise InvalidInput("setting", f"is for {strangers[0]}, which is not among the targets {', '.join(self.targets)}")
