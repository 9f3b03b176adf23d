"""How models of the toy task are compared: the same numbers, scaled by both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Final

import numpy as np
from runtime.tasks.scale import Scaled, ScaleRequest

from calibration.observe.metrics import snr_db
from export.report.measured import ComparedByName, Floor, Measure, Measured
from export.report.running import run
from export.task import SEED, Comparison, Effort, Pictures, SpeedEffort
from runtime.bundle.manifest import Bundle
from runtime.pipeline import Pipeline
from runtime.placing.loading import LoadedModel

SNR: Final = Measure(name="numbers_snr_db", title="SNR of the scaled numbers", of="SNR of the numbers", unit=" dB")


class NumbersQuality(Measured):
    numbers: tuple[float, ...]
    snr_db: float


class Scale(Comparison):
    name = ScaleRequest.task
    stored = "numbers"
    result = NumbersQuality
    noun = "row of numbers"
    measure = SNR
    floors = (Floor(quant="int8", measure=SNR, least=20, reason="Noise of 20 dB changes the second digit."),)

    def wanted(self, effort: Effort) -> int:
        return 2

    def general(self) -> Iterator[ScaleRequest]:
        for number in count():
            rng = np.random.default_rng(SEED + number)
            yield ScaleRequest(tuple(map(float, rng.standard_normal(8))))

    def comparing(self, request: ScaleRequest, number: int, effort: Effort) -> ScaleRequest:
        return request

    def compare(
        self,
        number: int,
        request: ScaleRequest,
        quantized: LoadedModel,
        reference: LoadedModel,
        pictures: Pictures,
        compared: ComparedByName,
    ) -> NumbersQuality:
        wanted, found = (np.array(run(model, request).one(Scaled).numbers) for model in (reference, quantized))
        return NumbersQuality(numbers=tuple(found), snr_db=snr_db(wanted, found))

    def figure(self, results: Sequence[NumbersQuality]) -> float:
        return min(one.snr_db for one in results)

    def summary(self, results: Sequence[NumbersQuality]) -> dict[str, float]:
        return {}

    def shown(self, bundle: Bundle, results: Sequence[NumbersQuality]) -> dict[str, Any]:
        return {"least": self.figure(results)}

    def timed(self, model: LoadedModel, effort: SpeedEffort) -> tuple[Pipeline, str]:
        return model.pipeline(ScaleRequest((1.0, 2.0))), "two numbers"


TASK: Final = Scale()
