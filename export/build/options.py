"""The options of a build and of a capture, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from calibration.capture.sets import CalibrationSet
from calibration.quantize.plan import BLOCKS
from calibration.quantize.recipes import RECIPES
from calibration.requests.files import read_images, read_prompts, read_questions
from calibration.requests.requests import Requests, built_in
from calibration.search.search import GOALS, Goal
from export.build.staging import check_place, check_writable
from export.checkpoint.additions import Addition, check_additions
from export.checkpoint.source import Source, is_hub_id, resolve
from export.finished.artifacts import check_strippable
from runtime.bundle.manifest import MANIFEST, Artifact, Bundle, check_name
from runtime.engine import check_precisions, target
from runtime.errors import BundleError, EngineUnavailable, InvalidInput, NotFound, SourceError, did_you_mean

QUANTS: Final = ("none", *RECIPES, "auto")
COMPUTES: Final = ("auto", "float32", "float16", "bfloat16")
PARITIES: Final = ("auto", "full", "twin")
QUALITIES: Final = ("auto", "full", "none")


@dataclass(frozen=True)
class Options:
    """What to build. `source` is a folder, `sample:NAME` or a hub id; `parity` one of auto, full, twin.

    `name` is what clients call the model; empty, it is the source's. `calibration` is a set made by `enginecast
    calibrate`; without one, built-in requests are captured where a recipe needs them, for int4 where the model is not
    so big that this takes long. `quality` is one of auto, full, none: whether the quantized model is compared with the
    float one; `speed`, one of the same, whether both are timed beside PyTorch, too; `agreement`, one of the same,
    whether what targets compiled is compared with the graph it was compiled from. `allow_low_quality` keeps a bundle
    that falls below the floors. `max_drop` and `goal` are those of quant "auto". `compute` is what targets that have it
    may compute in where that is measured to be harmless; auto is the recipe's own. `block` is the number of consecutive
    inputs that share a scale of 4 bits, 0 being the recipe's. `strip_canonical` leaves graphs and weights out that no
    target reads. `settings` are those of each target, by its name. `variant` is the form of the weights that is read
    where a source has several, such as fp16; empty, the plain one. `config` is the folder with the small files of a
    source that is a single file. `additions` are added to the source.
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
    agreement: str = "auto"
    allow_low_quality: bool = False
    max_drop: float = 1.0
    goal: Goal = "size"
    compute: str = "auto"
    block: int = 0
    strip_canonical: bool = False
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    variant: str = ""
    config: Path | None = None
    additions: Sequence[Addition] = ()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("quant", self.quant, QUANTS),
            ("parity", self.parity, PARITIES),
            ("quality", self.quality, QUALITIES),
            ("speed", self.speed, QUALITIES),
            ("agreement", self.agreement, QUALITIES),
            ("goal", self.goal, GOALS),
            ("compute", self.compute, COMPUTES),
        ):
            if value not in known:
                raise InvalidInput(name, f"'{value}' is not known: {did_you_mean(value, known)}")
        if self.block and (self.block not in BLOCKS or self.quant not in ("int4", "nf4")):
            expected = f"one of {', '.join(map(str, sorted(BLOCKS)))} with --quant int4 or nf4"
            raise InvalidInput("block", f"is {self.block} with --quant {self.quant}, expected {expected}")
        if self.calibration is not None and self.quant == "none":
            raise InvalidInput("calibration", "is of no use without --quant: nothing is quantized")
        if self.name:
            check_name("name", self.name)
        if not self.targets:
            raise InvalidInput("target", "is missing: name at least one, such as --target openvino")
        found = {name: target(name).available() for name in self.targets}
        unusable = [f"{name}: {one.reason}" for name, one in found.items() if not (one.usable or one.compiles)]
        if unusable:
            raise EngineUnavailable(f"cannot compile for {'; '.join(unusable)}")
        if self.quant in RECIPES:
            check_precisions(self.targets, RECIPES[self.quant].precisions)
        if self.strip_canonical:
            check_strippable(
                [Artifact(target=name, submodel="any", key=dict(self.settings.get(name, {}))) for name in self.targets],
                (),
            )
        self._check_measures()
        check_settings(self.targets, self.settings)
        check_additions(self.additions)

    def _check_measures(self) -> None:
        """Raise InvalidInput for a comparison that is requested and cannot be made."""
        compared = self.quant != "none" and self.quality != "none"
        requests = {
            "quality": self.quality == "full",
            "speed": self.speed == "full",
            "allow_low_quality": self.allow_low_quality,
        }
        for name in (name for name, requested in requests.items() if requested):
            if self.quant == "none":
                raise InvalidInput(
                    name, "is of no use without --quant: nothing is quantized, so there is nothing to compare"
                )
            if not compared:
                raise InvalidInput(name, "is of no use with --quality none: it is part of that comparison")
        idle = [name for name in self.targets if not target(name).available().usable]
        if self.speed == "full" and idle:
            raise InvalidInput("speed", f"cannot be full: {', '.join(idle)} does not run here, so it cannot be timed")

    def check(self) -> None:
        """Check what small files show, before the libraries that make models are even imported: can this be built?

        Raises what resolving the source raises (a hub id is not looked up), NotFound, InvalidInput or
        ResourceExhausted.
        """
        check_place(self.output)
        if self.calibration is not None and not self.calibration.is_file():
            raise NotFound(f"calibration set {self.calibration} does not exist: make one with `enginecast calibrate`")
        source = None if is_hub_id(self.source) else resolve(self.source, self.variant, self.config)
        for addition in self.additions:
            addition.check()
        if not (self.output / MANIFEST).is_file() or self.force:
            return
        try:
            found = Bundle(self.output)
        except BundleError:
            return  # a damaged one is looked at by the build
        of = found.manifest.source
        differs = {
            "quantization": found.manifest.quant != self.quant,
            "source": source is not None and (source.architecture, source.name) != (of.architecture, of.name),
            "set of additions": {(one.kind, one.name, one.scale) for one in self.additions}
            != {(one.kind, one.name, one.scale) for one in of.additions},
            "name": bool(self.name) and found.manifest.name != self.name,
            "set of targets": not set(self.targets) <= set(found.targets),
        }
        if any(differs.values()):
            what = " and ".join(name for name, one in differs.items() if one)
            raise InvalidInput(
                "output",
                f"{self.output} holds another bundle: of another {what}. Choose another folder, or replace it with "
                "--force",
            )


def check_settings(targets: Sequence[str], settings: Mapping[str, Mapping[str, str]]) -> None:
    """Raise InvalidInput for settings of other targets than these, and for those that their targets lack."""
    unknown = sorted(set(settings) - set(targets))
    if unknown:
        raise InvalidInput("setting", f"is for {unknown[0]}, which is not among the targets {', '.join(targets)}")
    for name, own in settings.items():
        try:
            target(name).check_settings(own)
        except InvalidInput as error:
            raise InvalidInput("setting", f"{name}.{error}") from None


@dataclass(frozen=True)
class CaptureOptions:
    """What to capture. `source` is as in a build; at most one of `prompts`, `images`, `questions` is given, else
    requests are built-in.

    `count` is the most requests to run, None what is usual for where they come from; `variant`, `config` and
    `additions` are as in a build. Raises InvalidInput.
    """

    source: str
    output: Path
    prompts: Path | None = None
    images: Path | None = None
    questions: Path | None = None
    count: int | None = None
    seed: int = 0
    variant: str = ""
    config: Path | None = None
    additions: Sequence[Addition] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("prompts", "images", "questions") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInput(given[1], f"cannot be given together with {given[0]}: capture one set of each")
        if self.count is not None and self.count < 1:
            raise InvalidInput("count", f"is {self.count}, expected 1 or more requests")
        if self.seed < 0:
            raise InvalidInput("seed", f"is {self.seed}, expected 0 or more")
        if self.output.is_dir():
            raise InvalidInput(
                "output", f"{self.output} is a folder, expected a file such as {self.output / 'set.safetensors'}"
            )
        if self.output.exists() and not _is_set(self.output):
            raise InvalidInput("output", f"{self.output} exists and is no calibration set: choose another file")
        check_additions(self.additions)

    def check(self) -> None:
        """Check what small files show, as `Options.check` does of a build: can this be captured?"""
        check_writable(self.output)
        for addition in self.additions:
            addition.check()
        if not is_hub_id(self.source):
            self.requests(task_of(resolve(self.source, self.variant, self.config)))

    def requests(self, task: str, fingerprint: str = "") -> Requests:
        """Where requests come from for this task, and the checkpoint with this fingerprint. Raises NotFound or
        InvalidInput.
        """
        if self.prompts:
            return read_prompts(self.prompts, task, self.seed)
        if self.images:
            return read_images(self.images, task, self.seed)
        if self.questions:
            return read_questions(self.questions, task, self.seed)
        return built_in(task, self.seed, fingerprint)


def task_of(source: Source) -> str:
    """What a model does: those in diffusers' layout draw, those in transformers' answer."""
    return "image" if source.layout == "diffusers" else "chat"


def _is_set(path: Path) -> bool:
    try:
        CalibrationSet.load(path)
    except (InvalidInput, NotFound, SourceError):
        return False
    return True
