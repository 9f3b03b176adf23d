"""Figures of a report: stored results, floors that a bundle must reach, and submodels compared call by call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ConfigDict, ValidationError

from calibration.observe.metrics import Comparison
from runtime.bundle.manifest import Frozen
from runtime.errors import EngineError, InvalidInput
from runtime.pipeline import Outputs


class Measured(Frozen):
    """Stored figures, all finite: a bundle may come from anywhere. Fields that other versions add are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


def faults_of(error: ValidationError) -> str:
    """What is wrong with stored figures, with the place of each fault."""
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors())


class Measure(Frozen):
    """A figure that floors are set for: its `name` in manifests, its `title` on the page, and in messages the words
    `of`, as in "SNR of".
    """

    name: str
    title: str
    of: str
    unit: str = ""


class Floor(Frozen):
    """The least that a bundle of this `quant` must reach in one measure, and why it is set there.

    The reason is the damage that noise of known size did to a model's results, or another floor, so it does not change
    with the next build. The noise is Gaussian, the same in every call, on one output; its SNR is the stated figure.
    """

    quant: str
    measure: Measure
    least: float
    reason: str

    def __str__(self) -> str:
        return f"{self.least:g}{self.measure.unit}"


@dataclass
class Compared:
    """The outputs of one submodel, compared call by call."""

    calls: int = 0
    outputs: dict[str, Comparison] = field(default_factory=dict)

    def add(self, submodel: str, reference: Outputs, quantized: Outputs) -> None:
        """Count one call. Raises EngineError for outputs that are not finite."""
        self.calls += 1
        for name, array in reference.items():
            try:
                self.outputs.setdefault(name, Comparison()).add(array, quantized[name])
            except InvalidInput as error:
                raise EngineError(
                    f"submodel '{submodel}', output '{name}': {error}. Build with a higher precision"
                ) from None


ComparedByName = Mapping[str, Compared]
