"""DirectML: every submodel of both samples lowered, checked against the table and computed here; shapes, settings,
devices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from runtime.bundle.manifest import Bundle, Submodel
from runtime.engine import CompileOptions, Options, Slot, target
from runtime.errors import EngineError, EngineUnavailable, InvalidInput
from runtime.targets.directml import engine as directml
from runtime.targets.directml.engine import DirectML
from tests.runtime.targets.conftest import Make, Reference, canonical, emulated, snr_db, tokens

__all__ = ["emulated"]


@pytest.fixture
def decoder(tiny_bundle: Path) -> tuple[Submodel, Path]:
    """The small decoder, with two query heads for each key head."""
    bundle = Bundle(tiny_bundle)
    return bundle.submodel("decoder"), bundle.root / bundle.submodel("decoder").graph


@pytest.mark.parametrize("grouped", ["true", "false"])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_in_pieces_and_steps(decoder: tuple[Submodel, Path], emulated: Make, grouped: str, batch: int) -> None:
    """Prompts are cut into pieces of 4, the last of which begins among positions that are done; two conversations share
    buffers.
    """
    engine = emulated("directml", *decoder, {"shapes": "sequence=1;sequence=4", "context": "24", "grouped": grouped})
    slots = [Slot(), Slot()]
    references = [Reference(*decoder, batch) for _ in slots]
    calls = [tokens(decoder[0], batch, (6, 1, 1, 3, 9, 1), seed) for seed in range(2)]
    for turn in range(6):
        for slot, reference, texts in zip(slots, references, calls, strict=True):
            assert snr_db(engine.run(texts[turn], slot)["logits"], reference.run(texts[turn])) > 90
    with pytest.raises(EngineError, match="25 positions do not fit its cache of 24"):
        engine.run(tokens(decoder[0], batch, (24, 1))[1], slots[0])


def test_rows_with_padding(decoder: tuple[Submodel, Path], emulated: Make) -> None:
    """The graph for many positions reads the mask; that for one does not, and refuses."""
    call = tokens(decoder[0], 2, (4, 1))
    for one in call:
        one["attention_mask"][1, :2] = 0
    engine = emulated("directml", *decoder, {"shapes": "sequence=1;sequence=4", "context": "16"})
    reference, slot = Reference(*decoder, 2), Slot()
    assert snr_db(engine.run(call[0], slot)["logits"], reference.run(call[0])) > 90
    with pytest.raises(EngineError, match=r"attention_mask has zeros, .* or build it with the setting grouped=false"):
        engine.run(call[1], slot)
    whole = emulated("directml", *decoder, {"shapes": "sequence=1;sequence=4", "context": "16", "grouped": "false"})
    reference, slot = Reference(*decoder, 2), Slot()
    for one in call:
        assert snr_db(whole.run(one, slot)["logits"], reference.run(one)) > 90


def test_a_slot_that_begins_anew(decoder: tuple[Submodel, Path], emulated: Make) -> None:
    engine = emulated("directml", *decoder, {"context": "64"})
    slot, first = Slot(), tokens(decoder[0], 1, (5,))[0]
    before = engine.run(first, slot)["logits"]
    engine.trim(slot, 0)
    np.testing.assert_array_equal(engine.run(first, slot)["logits"], before)
    with pytest.raises(EngineError, match="the slot holds 1 rows, this call has 2"):
        engine.run(tokens(decoder[0], 2, (5, 1))[1], slot)


def test_what_is_stored(decoder: tuple[Submodel, Path], tmp_path: Path) -> None:
    submodel, graph = decoder
    artifact = DirectML.compile_with(CompileOptions({"context": "48"}), submodel, graph, tmp_path)
    assert artifact.files == ("decoder.onnx", "decoder.step.onnx", "decoder.json") and artifact.key == {"opset": "21"}
    plan = json.loads((tmp_path / "decoder.json").read_text())
    assert plan["capacity"] == 48 and plan["cache"] == "fixed" and plan["shapes"] == [{"sequence": 1}, {"sequence": 32}]
    step = [node.op_type for node in ir.load(tmp_path / "decoder.step.onnx").graph]
    many = [node.op_type for node in ir.load(tmp_path / "decoder.onnx").graph]
    assert step.count("GroupQueryAttention") == 2 and "Softmax" not in step
    assert many.count("Softmax") == 2 and not {"Attention", "TensorScatter", "GroupQueryAttention"} & set(many)


def test_shapes_choose_the_session(diffusion_bundle: Path, emulated: Make) -> None:
    bundle = Bundle(diffusion_bundle)
    submodel = bundle.submodel("vae_decoder")
    graph = bundle.root / submodel.graph
    shapes = "batch=1,height=4,width=4;batch=1,height=4,width=6,image_height=64"
    engine: Any = emulated("directml", submodel, graph, {"shapes": shapes})
    assert [dict(key) for key in engine._sessions] == [
        {"batch": 1, "height": 4, "width": 4},
        {"batch": 1, "height": 4, "width": 6},
    ]
    for width in (4, 6):
        inputs = submodel.signature.sample({"batch": 1, "height": 4, "width": width}, seed=2)
        (wanted,) = canonical(submodel, graph).run(None, inputs)
        assert snr_db(engine.run(inputs)["image"], wanted) > 90
    with pytest.raises(EngineError, match=r"batch=1,height=4,width=8 is no shape that it was compiled for, expected"):
        engine.run(submodel.signature.sample({"batch": 1, "height": 4, "width": 8}))


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"shape": "height=4"}, "shape", r"known: context, grouped, shapes"),
        ({"shapes": "sequence"}, "shapes", "has 'sequence', expected NAME=LENGTH"),
        ({"shapes": "sequense=4"}, "shapes", "did you mean 'sequence'"),
        ({"shapes": "sequence=0"}, "shapes", "expected NAME=LENGTH"),
        ({"context": "-1"}, "context", "greater than or equal to 0"),
        ({"context": "99999999"}, "context", "is 99999999, and the model has"),
        ({"grouped": "perhaps"}, "grouped", "valid boolean"),
    ],
)
def test_wrong_settings_are_named(
    decoder: tuple[Submodel, Path], tmp_path: Path, settings: dict[str, str], field: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        DirectML.compile_with(CompileOptions(settings), *decoder, tmp_path)
    assert caught.value.field == field and not list(tmp_path.iterdir())


def test_a_planted_node_fails_the_build(vlm_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(vlm_bundle)
    submodel = bundle.submodel("token_embedding")
    model = ir.load(bundle.root / submodel.graph)
    output = model.graph.outputs[0]
    planted = ir.node("Unique", [output], name="planted")
    planted.outputs[0].name, planted.outputs[0].type, planted.outputs[0].shape = "unique", output.type, ir.Shape(["n"])
    model.graph.append(planted)
    model.graph.outputs[0] = planted.outputs[0]
    (tmp_path / "planted.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(
        EngineError,
        match=r"could not compile token_embedding: DirectML has no kernel for node 'planted' \(Unique: version 11",
    ):
        DirectML.compile_with(CompileOptions(), submodel, tmp_path / "planted.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_refused(vlm_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(vlm_bundle)
    submodel = bundle.submodel("vision_encoder").computing("bfloat16")
    with pytest.raises(EngineError, match="DirectML computes in float32 and float16, not in bfloat16"):
        DirectML.compile_with(CompileOptions(), submodel, bundle.root / submodel.graph, tmp_path)


def test_it_compiles_where_it_cannot_run(decoder: tuple[Submodel, Path], tmp_path: Path) -> None:
    found = target("directml").available()
    assert found.compiles and found.version
    if found.usable:
        pytest.skip("DirectML runs here")
    assert "has no DmlExecutionProvider: pip install 'enginecast[directml]', on Windows" in found.reason
    with pytest.raises(EngineUnavailable, match="directml cannot run here: this ONNX Runtime"):
        DirectML.load(decoder[0], tmp_path, Options())
    with pytest.raises(InvalidInput, match="fallback"):
        DirectML.load(decoder[0], tmp_path, Options(settings={"fallback": "perhaps"}))


def test_devices_by_number(decoder: tuple[Submodel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a provider, the device's number reaches it."""
    opened: list[Any] = []
    monkeypatch.setattr(
        directml,
        "stored",
        lambda *args, **named: opened.append((args[3], named)) or (_ for _ in ()).throw(EngineError("stop")),
    )
    monkeypatch.setattr(DirectML, "available", classmethod(lambda cls: directml.Availability(True, ("dml:0",))))
    with pytest.raises(EngineError, match="stop"):
        DirectML.load(decoder[0], tmp_path, Options(device="dml:1", settings={"fallback": "none"}))
    ((device, named),) = opened
    assert (device.provider, device.memory, device.index, device.options) == (
        "DmlExecutionProvider",
        "dml",
        1,
        {"device_id": "1"},
    )
    assert named["fallback"] == "none"
    for wrong in ("cuda:0", "dml:x", "GPU"):
        with pytest.raises(EngineUnavailable, match=f"DirectML has no device '{wrong}' here"):
            DirectML.load(decoder[0], tmp_path, Options(device=wrong))
