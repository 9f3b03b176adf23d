"""What a target compiled is compared with the canonical graph: agreement, disagreement, and what cannot be computed
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from calibration.observe.lean import LeanEngine
from export.finished.agreement import ENOUGH, Reference, _calls, _compare, agree
from runtime.bundle.manifest import Artifact, Bundle, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Array, Dim, Signature, Tensor
from runtime.engine import Availability, Engine, FakeEngine, Options, Slot, targets
from runtime.errors import EngineError


class Wrong(LeanEngine):
    """The reference itself, with an output that is off."""

    target = "wrong"
    factor = 1.5

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        return {name: array * np.float32(self.factor) for name, array in super().run(inputs, slot).items()}


class NotANumber(Wrong):
    factor = np.nan


class Elsewhere(LeanEngine):
    """A target of other machines."""

    target = "elsewhere"

    @classmethod
    def available(cls) -> Availability:
        return Availability(False, reason="it needs a quantum computer", compiles=True)


def found(engine: type[Engine], root: Path, submodel: str, captured: tuple[Mapping[str, Array], ...] = ()) -> Artifact:
    return agree(
        engine,
        Reference(Bundle(root).submodel(submodel), root, captured),
        Artifact(target=engine.target, submodel=submodel),
    )


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("submodel", ["vision_encoder", "token_embedding", "decoder"])
def test_targets_agree(tiny_bundle: Path, target: str, submodel: str) -> None:
    artifact = found(targets()[target], tiny_bundle, submodel)
    assert artifact.agreement is not None and not artifact.unchecked
    print(f"{target} {submodel}: {artifact.agreement.snr_db:.0f} dB on {artifact.agreement.device}")
    assert artifact.agreement.snr_db > 80 and target in artifact.agreement.device


@pytest.mark.parametrize("engine", [Wrong, NotANumber])
def test_another_result_is_refused(tiny_bundle: Path, engine: type[Engine]) -> None:
    with pytest.raises(
        EngineError, match=r"does not compute what its graph says: logits has .* dB .*expected at least 60"
    ):
        found(engine, tiny_bundle, "decoder")


def test_what_cannot_be_computed_here_says_why(tiny_bundle: Path) -> None:
    artifact = found(Elsewhere, tiny_bundle, "decoder")
    assert artifact.agreement is None and "quantum computer" in artifact.unchecked


def test_captured_calls_of_usual_lengths_are_taken(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submodel: Submodel = Bundle(tiny_bundle).submodel("vision_encoder")
    usual = {name: dim.opt for name, dim in submodel.signature.dims.items()}
    seen: list[Array] = []

    class Watched(LeanEngine):
        target = "watched"

        def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
            seen.extend(inputs.values())
            return super().run(inputs, slot)

        @classmethod
        def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
            return super().load(submodel, root, options)

    call = {tensor.name: np.full(tensor.shape(usual), 0.25, tensor.dtype) for tensor in submodel.signature.inputs}
    found(Watched, tiny_bundle, "vision_encoder", (call,))
    assert len(seen) == 1 and len(seen[0]) == 1 and (seen[0] == 0.25).all()


LENGTH = Dim(name="length", min=1, opt=4, max=8)
SCORER = Signature(
    inputs=(Tensor(name="x", dtype="float32", dims=(LENGTH,)),),
    outputs=(Tensor(name="scores", dtype="float32", dims=(2,)),),
)


def test_small_outputs_are_compared_over_captured_calls_of_any_length() -> None:
    """One score of nearly zero says nothing of an engine, all of them do."""
    captured = [{"x": np.full(length, length, np.float32)} for length in (3, 4, 8)]
    float32 = Precision(weights=("float32",))
    submodel = Submodel(name="scorer", signature=SCORER, graph="onnx/a/model.onnx", precision=float32, nbytes=0)
    reference = Reference(submodel, Path(), captured)
    assert [len(call["x"]) for call in _calls(SCORER, captured)] == [4, 3, 8], "those of the usual length first"
    large = Tensor(name="scores", dtype="float32", dims=(LENGTH, ENOUGH))
    assert len(list(_calls(SCORER.model_copy(update={"outputs": (large,)}), captured))) == 1
    wanted = [np.float32([0.01, -0.01]), np.float32([9, -9]), np.float32([8, 8])]
    reference.calls = [
        (inputs, {"scores": scores}) for inputs, scores in zip(_calls(SCORER, captured), wanted, strict=True)
    ]
    answers = iter(wanted)
    found = _compare(FakeEngine(lambda inputs: {"scores": next(answers) + np.float32(0.1)}), reference)
    assert found.tensor == "scores" and 30 < found.snr_db < 40
