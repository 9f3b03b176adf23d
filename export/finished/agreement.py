"""Compares the outputs of a compiled target with those of the canonical graph. The target runs on this machine, or an
emulation of it.

The reference is the canonical graph on ONNX Runtime without optimizations. Int8 layers round their inputs, so a
different order of operations moves some of them by a whole step: two correct engines then agree to 30 to 50 dB. Float
graphs agree to 100 dB and more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from calibration.observe.lean import LeanEngine
from calibration.observe.metrics import snr_db
from runtime.bundle.manifest import Agreement, Artifact, Submodel
from runtime.bundle.signature import Array, Signature, Tensor
from runtime.engine import Compiled, Engine, Options, Slot
from runtime.errors import EngineError, EngineUnavailable

FLOORS: Final = {"float32": 60.0, "half": 25.0, "quantized": 15.0}
"""Least signal-to-noise ratio in dB by precision. Wrong graphs have less than 10 dB: see decision 11."""
REACH: Final = 128
"""The most positions of a sample. Longer attention windows are tested on the reduced model, whose windows are
shorter.
"""
POSITIONS: Final = (8, 1, 1)
"""New positions of each call of a decoder: a prompt and two decoding steps. Further calls exceed the attention window,
if there is one.
"""


class Reference:
    """The outputs of a submodel's canonical graph in the bundle at `root`, computed once for all targets.

    Its inputs are captured ones of the usual lengths if there are any, else random values, which int8 may clip.
    """

    def __init__(self, submodel: Submodel, root: Path, captured: Sequence[Mapping[str, Array]] = ()) -> None:
        self.submodel, self.root = submodel, root
        self._captured = captured

    @cached_property
    def calls(self) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        """Inputs and outputs of every call. The calls of a decoder use one slot."""
        slot = Slot() if self.submodel.signature.states else None
        with closing(LeanEngine.load(self.submodel, self.root, Options())) as engine:
            return [(inputs, engine.run(inputs, slot)) for inputs in _calls(self.submodel.signature, self._captured)]


def agree(engine: type[Engine], reference: Reference, artifact: Artifact) -> Artifact:
    """Compare an artifact with the reference. Returns it with the result, or with the reason why it cannot run here.

    Raises EngineError if the outputs differ too much.
    """
    submodel = reference.submodel
    try:
        emulated = engine.emulate(submodel, reference.root, Options(compiled=Compiled.of(reference.root, artifact)))
    except EngineUnavailable as error:
        return artifact.model_copy(update={"unchecked": str(error)})
    with closing(emulated):
        found = _compare(emulated, reference)
    quantized = submodel.dynamic or submodel.precision.quantized or submodel.precision.activations != "float"
    least = FLOORS["quantized" if quantized else "float32" if submodel.precision.compute == "float32" else "half"]
    if not found.snr_db >= least:
        raise EngineError(
            f"the {engine.target} engine of {submodel.name} does not compute what its graph says: {found.tensor} has "
            f"{found.snr_db:.1f} dB on {found.device}, expected at least {least:.0f}. Build for another target, and "
            "please report this"
        )
    return artifact.model_copy(update={"agreement": found})


def summary(artifact: Artifact) -> str:
    """The result of `agree` in a few words."""
    return f"{artifact.agreement.snr_db:.0f} dB" if artifact.agreement else artifact.unchecked


def _compare(emulated: Engine, reference: Reference) -> Agreement:
    """The worst output of all calls."""
    slot = Slot() if reference.submodel.signature.states else None
    worst = Agreement(tensor="", snr_db=math.inf, device=emulated.device)
    for inputs, wanted in reference.calls:
        got = emulated.run(inputs, slot)
        for name, values in wanted.items():
            ratio = snr_db(values, got[name]) if np.isfinite(got[name]).all() else -math.inf
            if ratio < worst.snr_db:
                worst = worst.model_copy(update={"tensor": name, "snr_db": ratio})
    return worst.model_copy(update={"snr_db": float(np.clip(worst.snr_db, -300, 300))})


def _calls(signature: Signature, captured: Sequence[Mapping[str, Array]]) -> Iterator[dict[str, Array]]:
    """Inputs of usual lengths with batch 1; for a decoder, a prompt and further calls."""
    rng = np.random.default_rng(0)
    free = {name: dim.opt for name, dim in signature.dims.items() if not dim.sum_of}
    usual = signature.complete(free | {"batch": 1})
    for call in captured if not signature.states else ():
        row = {
            tensor.name: call[tensor.name][:1] if _batched(tensor) else call[tensor.name] for tensor in signature.inputs
        }
        if all(row[tensor.name].shape == tensor.shape(usual) for tensor in signature.inputs):
            yield row
            return
    past = 0
    beyond = [count for window in signature.windows if 0 < window < REACH for count in (window, 1)]
    for count in (*POSITIONS, *beyond) if signature.states else (0,):
        lengths = usual | (signature.port.lengths(past, count) if signature.port else {})
        yield signature.sample_call(lengths, rng)
        past += count


def _batched(tensor: Tensor) -> bool:
    return bool(tensor.dims) and getattr(tensor.dims[0], "name", "") == "batch"
