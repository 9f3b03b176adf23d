"""Compares the outputs of a compiled target with those of the canonical graph. The target runs on this machine, or an
emulation of it.

The reference is the canonical graph on ONNX Runtime without optimizations. Int8 layers round their inputs, so a
different order of operations moves some of them by a whole step: two correct engines then agree to 30 to 50 dB. Float
graphs agree to 100 dB and more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from calibration.observe.lean import LeanEngine
from calibration.observe.metrics import CAP_DB, Comparison
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
ENOUGH: Final = 256
"""Numbers that are compared of each output at least, where so many are captured. A score of two numbers is sometimes
nearly zero, and its error by itself says nothing.
"""
POSITIONS: Final = (8, 1, 1)
"""New positions of each call of a decoder: a prompt and two decoding steps. Further calls exceed the attention window,
if there is one.
"""


class Reference:
    """The outputs of a submodel's canonical graph in the bundle at `root`, computed once for all targets.

    Its inputs are captured ones if there are any, of the usual lengths where possible, else random values, which int8
    may clip. A decoder's are random.
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
    """The worst output, over all calls. The calls of a decoder differ in kind, so each counts for itself."""
    slot = Slot() if reference.submodel.signature.states else None
    compared: dict[tuple[str, int], Comparison] = {}
    for index, (inputs, wanted) in enumerate(reference.calls):
        got = emulated.run(inputs, slot)
        for name, values in wanted.items():
            if not np.isfinite(got[name]).all():
                return Agreement(tensor=name, snr_db=-CAP_DB, device=emulated.device)
            compared.setdefault((name, index if slot else 0), Comparison()).add(values, got[name])
    name, ratio = min(((name, one.snr_db) for (name, _), one in compared.items()), key=lambda found: found[1])
    return Agreement(tensor=name, snr_db=ratio, device=emulated.device)


def _calls(signature: Signature, captured: Sequence[Mapping[str, Array]]) -> Iterable[dict[str, Array]]:
    """Inputs with batch 1: captured ones, else random ones of usual lengths; for a decoder, a prompt and further
    calls.
    """
    free = {name: dim.opt for name, dim in signature.dims.items() if not dim.sum_of}
    usual = signature.complete(free | {"batch": 1})
    return _decoder_calls(signature, usual) if signature.states else _captured_calls(signature, usual, captured)


def _captured_calls(
    signature: Signature, usual: Mapping[str, int], captured: Sequence[Mapping[str, Array]]
) -> list[dict[str, Array]]:
    """The first captured calls that give enough numbers of the smallest output, those of usual lengths first."""
    calls = [
        {one.name: call[one.name][:1] if _batched(one) else call[one.name] for one in signature.inputs}
        for call in captured
    ] or [signature.sample_call(usual, np.random.default_rng(0))]
    calls.sort(key=lambda call: any(call[one.name].shape != one.shape(usual) for one in signature.inputs))
    numbers = min(math.prod(one.shape(usual)) for one in signature.outputs)
    return calls[: -(-ENOUGH // numbers)]


def _decoder_calls(signature: Signature, usual: Mapping[str, int]) -> Iterator[dict[str, Array]]:
    """A prompt and decoding steps, also beyond its windows."""
    rng, past = np.random.default_rng(0), 0
    beyond = [count for window in signature.windows if 0 < window < REACH for count in (window, 1)]
    for count in (*POSITIONS, *beyond):
        yield signature.sample_call({**usual, **signature.decoder.lengths(past, count)}, rng)
        past += count


def _batched(tensor: Tensor) -> bool:
    return bool(tensor.dims) and getattr(tensor.dims[0], "name", "") == "batch"
