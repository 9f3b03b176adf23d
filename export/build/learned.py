"""What a build learns from the float model at work: captured calls, and from them folds, ranges and codes
of each part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from calibration.capture.data import SAMPLES, record
from calibration.capture.sets import CalibrationSet
from calibration.observe.lean import LeanEngine
from calibration.quantize.codes import read_codes, read_records
from calibration.quantize.gptq import compensate
from calibration.quantize.plan import plan
from calibration.quantize.tuning import Tuning
from calibration.requests.requests import briefly, built_in
from export.build.bundle import draft, place
from export.build.keys import code
from export.build.staging import cached, key_of
from export.build.state import Build, part_graph
from export.family import Part
from runtime.bundle.manifest import Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array
from runtime.engine import Engine
from runtime.placing.loading import LoadedModel, open_pipeline


def captured(state: Build, folder: Path) -> CalibrationSet:
    """The set given, else what submodels get while the float model does built-in requests, captured once for the same
    checkpoint.
    """
    if state.calibration is not None:
        return state.calibration

    def measure(path: Path) -> None:
        with floating_model(state, folder) as model:
            requests = built_in(model.task, fingerprint=state.fingerprint)
            record(model, briefly(requests) if state.brief else requests, limit=SAMPLES).save(path)

    config = state.family.config(state.source)
    key = key_of("samples", state.fingerprint, config, state.calibration_key, state.tools, code())
    return CalibrationSet.load(cached(key, ".safetensors", measure))


def tuned(state: Build, part: Part, samples: CalibrationSet) -> Tuning:
    """What calibration finds for a part that takes part in it."""
    chosen = state.recipe(part)
    assert chosen is not None

    def measure(path: Path) -> None:
        path.write_text(
            json.dumps(Tuning.measure(part_graph(state, part), chosen, samples.samples[part.name]).record())
        )

    requested = state.options.quant, state.options.block, state.calibration_key
    key = key_of("tuning", state.fingerprint, part.name, requested, state.tools, code())
    return Tuning.of_record(json.loads(cached(key, ".json", measure).read_bytes()))


def compensated(state: Build, part: Part, tuning: Tuning, calls: Sequence[Mapping[str, Array]]) -> Tuning:
    """The tuning with int4 weights compensated on these calls; as it is without such weights, or where one call is all
    there is.
    """
    chosen = state.recipe(part)
    assert chosen is not None
    if len(calls) < 2:
        return tuning
    model = part_graph(state, part)
    layers = plan(model, chosen, tuning.ranges, tuning.dilution)
    if not any(planned.weight_type == "int4" for planned in layers):
        return tuning
    key = key_of("codes", state.fingerprint, part.name, asdict(chosen), state.calibration_key, state.tools, code())
    path = cached(key, ".safetensors", lambda path: compensate(model, layers, tuning.folds, calls, path))
    return replace(
        tuning,
        codes=read_codes(path),
        compensated={record["weight"]: record["snr_db"] for record in read_records(path)},
    )


@contextmanager
def floating_model(state: Build, folder: Path) -> Iterator[LoadedModel]:
    """The float model on weights mapped from the checkpoint, each submodel loaded when its first call comes. Its own
    files are laid into `folder`.
    """
    parts = {part.name: part for part in state.parts}
    submodels = {
        name: Submodel(
            name=name,
            signature=part.signature,
            graph=place(name),
            precision=Precision(weights=("float32",)),
            nbytes=state.size(part),
        )
        for name, part in parts.items()
    }
    bundle = draft(state, folder, list(submodels.values()), quant="none")

    class Engines(dict[str, Engine]):
        def __missing__(self, name: str) -> Engine:
            self[name] = LeanEngine(submodels[name], part_graph(state, parts[name]))
            return self[name]

    pipeline = open_pipeline(bundle)
    with closing(LoadedModel(bundle, state.task, LeanEngine.target, LeanEngine.device, Engines(), pipeline)) as model:
        yield model
