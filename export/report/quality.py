"""The quality of a quantized bundle beside the same model without quantization: measured when it is built, and kept in
the bundle.

    quality/quality.json      this file's `Quality`
    quality/*.png             the pictures it names: drawn by both models, or shown to both

`export.report.compare` measures it; `export.report.speed` measures speed, whose figures lie in the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import Field, SerializeAsAny, TypeAdapter, ValidationError, field_validator, model_validator

from export.report.measured import Floor, Measure, Measured, faults_of
from export.report.speed import Speed
from export.task import FOLDER, Comparison, Pictures, comparisons
from runtime.bundle.manifest import Bundle
from runtime.errors import BundleError, NotFound
from runtime.vision.images import encode_image

QUALITY: Final = f"{FOLDER}/quality.json"
SNR: Final = Measure(name="submodel_snr_db", title="SNR of every submodel's outputs", of="SNR of", unit=" dB")
FLOORS: Final = (
    Floor(
        quant="int8",
        measure=SNR,
        least=20,
        reason="Noise of 20 dB on the logits cost shapes-vlm 3 of 96 right answers.",
    ),
    Floor(
        quant="int4",
        measure=SNR,
        least=12,
        reason="Noise of 12 dB on the logits cost shapes-vlm 3 of 96 right answers, of 8 dB 8, of 5 dB 17.",
    ),
)
"""For models of every task; each task adds its own. Below these a build has failed."""


class OutputQuality(Measured):
    """One output of a submodel over all its calls, measured by `calibration.observe.metrics`. The peak of the PSNR is
    its largest magnitude.
    """

    name: str
    snr_db: float
    psnr_db: float
    cosine: float


class SubmodelQuality(Measured):
    """A submodel alone: both models get the inputs that it got in the reference's pipeline."""

    name: str
    precision: str
    reference_precision: str
    calls: int = Field(ge=0)
    outputs: tuple[OutputQuality, ...]


class TaskQuality(Measured):
    """An exam: the held-out cases of the checkpoint's task, and how many of them each model does right."""

    task: str
    cases: int = Field(ge=1)
    reference_right: int
    quantized_right: int


def _read(task: Comparison, results: Any) -> Any:
    """The results of a task. Raises ValueError naming every fault."""
    try:
        return TypeAdapter(tuple[task.result, ...]).validate_python(results)  # type: ignore[name-defined]
    except ValidationError as error:
        raise ValueError(f"{task.stored}: {faults_of(error)}") from None


class Quality(Measured):
    """Everything measured of one quantized bundle. `results` are those of compared requests, by the name that their
    task stores them under. `speed` is None when it was not timed.
    """

    quant: str
    reference_quant: str
    target: str
    reference_target: str
    device: str
    submodels: tuple[SubmodelQuality, ...]
    results: Mapping[str, tuple[SerializeAsAny[Measured], ...]] = {}
    task: TaskQuality | None = None
    speed: Speed | None = None

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, data: Any) -> Any:
        """Earlier versions wrote the results of each task beside the other figures."""
        names = {task.stored for task in comparisons().values()}
        moved = {name: data[name] for name in names & data.keys()} if isinstance(data, dict) else {}
        return {**data, "results": moved} if moved else data

    @field_validator("results", mode="before")
    @classmethod
    def _of_tasks(cls, data: Any) -> Any:
        """Results of tasks that this program does not know are left out."""
        if not isinstance(data, Mapping):
            return data
        return {task.stored: _read(task, data[task.stored]) for task in comparisons().values() if task.stored in data}

    def compared(self) -> list[tuple[Comparison, Sequence[Any]]]:
        """The tasks that there are results of, and these."""
        every = ((task, self.results.get(task.stored, ())) for task in comparisons().values())
        return [(task, results) for task, results in every if results]

    def summary(self) -> dict[str, float]:
        """The figures in short, for the manifest: the worst submodel, those of the task, and the exam's score."""
        found = {SNR.name: min(figures.values())} if (figures := self.found(SNR)) else {}
        for task, results in self.compared():
            found |= {task.measure.name: task.figure(results)} | task.summary(results)
        if self.task:
            found |= {
                f"{of}_right": getattr(self.task, f"{of}_right") / self.task.cases for of in ("reference", "quantized")
            }
        return found

    def found(self, measure: Measure) -> dict[str, float]:
        """The figures that a floor of this measure applies to, by name. Empty where the measure does not apply."""
        if measure == SNR:
            return {
                f"{SNR.of} {submodel.name}.{output.name}": output.snr_db
                for submodel in self.submodels
                for output in submodel.outputs
            }
        for task, results in self.compared():
            if task.measure == measure:
                return {measure.of: task.figure(results)}
        return {}

    def shortfalls(self, quant: str) -> list[str]:
        """Figures below their floors at this quantization, and submodels without a figure that a floor needs. Empty
        where all floors are held.
        """
        faults = [
            f"{name} is {figure:.3g}{floor.measure.unit}, expected at least {floor} at {quant}"
            for floor in floors(quant)
            for name, figure in self.found(floor.measure).items()
            if not figure >= floor.least
        ]
        if floors(quant):
            faults += [
                f"{submodel.name}: was not measured, no call of it was captured"
                for submodel in self.submodels
                if not submodel.calls
            ]
        return faults


def floors(quant: str) -> list[Floor]:
    """The floors of a quantization; none for "none" and for "int8-naive", a baseline for comparisons.

    nf4 has the floors of int4, and so has a search ("auto"), which gives layers int4 at the lowest; --max-drop limits
    it further.
    """
    quant = "int4" if quant in ("auto", "nf4") else quant
    every = (*FLOORS, *(floor for task in comparisons().values() for floor in task.floors))
    return [floor for floor in every if floor.quant == quant]


def save_quality(root: Path, quality: Quality, pictures: Pictures) -> None:
    """Write the results of `export.report.compare.measure` into the folder of a bundle that is being built."""
    (root / FOLDER).mkdir(exist_ok=True)
    for path, picture in pictures.items():
        (root / path).write_bytes(encode_image(picture))
    (root / QUALITY).write_text(quality.model_dump_json(indent=1))


def load_quality(bundle: Bundle) -> Quality:
    """The stored quality of a bundle. Raises NotFound when there is none, BundleError when it cannot be read."""
    path = bundle.root / QUALITY
    if not path.is_file():
        if bundle.manifest.quant == "none":
            raise NotFound(
                f"bundle {bundle.root} has no quality report: it is not quantized, so there is nothing to compare it "
                "with"
            )
        again = f"enginecast build SOURCE --quality full --quant {bundle.manifest.quant} --output {bundle.root} --force"
        raise NotFound(f"bundle {bundle.root} has no quality report, expected {QUALITY}: build it again with `{again}`")
    try:
        return Quality.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(
            f"{path} cannot be read ({faults_of(error)}): it is damaged, or another version of this program wrote it. "
            "Build the bundle again"
        ) from None
