"""Decoders with caches of fixed length: the same logits as the canonical graph, at any lengths, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import Array, Signature
from runtime.errors import EngineError
from runtime.targets.lowering.half import to_half
from runtime.targets.lowering.static_cache import with_static_cache

CAPACITY = 24


def session(model: Any, folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class Decoder:
    """The canonical graph and the static one, fed the same."""

    def __init__(self, bundle: Path, half: bool = False, window: int = 0) -> None:
        opened = Bundle(bundle)
        submodel = opened.submodel("decoder")
        graph = bundle / submodel.graph
        self.signature: Signature = submodel.signature
        self.canonical = ir.load(graph)
        if window:
            self.signature = limit(self.canonical, self.signature, window)
        self.static = with_static_cache(
            to_half(self.canonical, "float16") if half else self.canonical, self.signature, CAPACITY
        )
        self.sessions = session(self.canonical, graph.parent), session(self.static, graph.parent)
        self.dtype = np.float16 if half else np.float32

    def run(self, counts: list[int], pads: list[int]) -> list[float]:
        """The relative error of the logits of each call; `pads` positions at the start of each row are padding."""
        rng, batch, length = np.random.default_rng(0), len(pads), 0
        states = self.signature.states
        past: dict[str, Array] = {
            s.past.name: np.zeros(s.past.shape({"batch": batch, "past": 0}), np.float32) for s in states
        }
        cache: dict[str, Array] = {
            s.past.name: np.zeros(s.past.shape({"batch": batch, "past": CAPACITY}), self.dtype) for s in states
        }
        errors = []
        for count in counts:
            start, length = length, length + count
            mask = (np.arange(length) >= np.array(pads)[:, None]).astype(np.int64)
            given = {
                "inputs_embeds": rng.standard_normal(
                    (batch, count, int(str(self.signature.inputs[0].dims[-1])))
                ).astype(np.float32),
                "position_ids": np.tile(np.arange(start, length), (batch, 1)),
            }
            whole = np.zeros((batch, CAPACITY), np.int64)
            whole[:, :length] = mask
            wanted, *grown = self.sessions[0].run(None, given | {"attention_mask": mask} | past)
            got, *updated = self.sessions[1].run(
                None, given | {"attention_mask": whole, "write_indices": np.full(batch, start)} | cache
            )
            past, cache = dict(zip(past, grown, strict=True)), dict(zip(cache, updated, strict=True))
            errors.append(float(np.abs(got - wanted).max() / np.abs(wanted).max()))
        return errors


def limit(model: Any, signature: Signature, window: int) -> Signature:
    """Let the last layer of a decoder see the latest `window` positions only; the signature that says so."""
    node = [node for node in model.graph if node.op_type == "Attention"][-1]
    compare = next(node for node in model.graph if node.op_type == "LessOrEqual")
    columns, rows = compare.inputs
    constant = ir.Value(name="window", const_value=ir.tensor(np.array(window), name="window"))
    model.graph.register_initializer(constant)
    made = [ir.node("Sub", [rows, constant])]
    made.append(ir.node("Greater", [columns, made[0].outputs[0]]))
    made.append(ir.node("And", [node.inputs[3], made[1].outputs[0]]))
    for index, one in enumerate(made):
        one.name = one.outputs[0].name = f"near.{index}"
    model.graph.insert_before(node, made)
    node.replace_input_with(3, made[-1].outputs[0])
    last = [state.model_copy(update={"window": window}) for state in signature.states[-2:]]
    return signature.model_copy(update={"states": (*signature.states[:-2], *last)})


@pytest.fixture(scope="module", params=[0, 6], ids=["whole", "window"])
def decoder(tiny_bundle: Path, request: pytest.FixtureRequest) -> Decoder:
    """The small decoder, with two query heads for each key head; once with a window in its second layer."""
    return Decoder(tiny_bundle, window=request.param)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=4), batch=st.integers(1, 3))
def test_the_same_logits_at_any_lengths(decoder: Decoder, counts: list[int], batch: int) -> None:
    assert max(decoder.run(counts, [0] * batch)) < 1e-5


def test_up_to_the_last_position(decoder: Decoder) -> None:
    assert max(decoder.run([CAPACITY - 2, 1, 1], [0])) < 1e-5


def test_rows_padded_on_the_left(decoder: Decoder) -> None:
    """Padding gives finite numbers, and none of the rows' own logits changes."""
    errors = decoder.run([5, 1, 3, 1], [0, 2, 4])
    assert np.isfinite(errors).all() and max(errors) < 1e-5


def test_caches_have_the_type_that_attention_computes_in(tiny_bundle: Path) -> None:
    half = Decoder(tiny_bundle, half=True)
    types = {value.name: value.dtype for value in (*half.static.graph.inputs, *half.static.graph.outputs)}
    for state in half.signature.states:
        assert types[state.past.name] == types[state.present.name] == ir.DataType.FLOAT16
    assert types["logits"] == ir.DataType.FLOAT
    assert max(half.run([5, 1, 1], [0, 0])) < 0.02


def test_the_given_graph_stays_as_it_is(decoder: Decoder, tiny_bundle: Path) -> None:
    names = [value.name for value in decoder.canonical.graph.inputs]
    assert "write_indices" not in names and decoder.canonical.opset_imports[""] == 23
    assert {"write_indices", *names} == {value.name for value in decoder.static.graph.inputs}
    assert not [node for node in decoder.static.graph if node.op_type == "Attention" and len(node.outputs) > 1]


def test_a_mask_that_is_not_causal_is_refused(decoder: Decoder) -> None:
    """The rebuilt mask would let tokens see more than the model was trained with."""
    model = decoder.canonical.clone()
    (compare,) = (node for node in model.graph if node.op_type == "LessOrEqual")
    compare.op_type = "Less"
    with pytest.raises(EngineError, match="is not causal over the positions that attention_mask allows"):
        with_static_cache(model, decoder.signature, CAPACITY)


def test_a_decoder_that_reads_the_mask_elsewhere_is_refused(decoder: Decoder) -> None:
    model = decoder.canonical.clone()
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    total = ir.node("ReduceSum", [mask], {"keepdims": 0}, name="count")
    total.outputs[0].name = "counted"
    model.graph.append(total)
    model.graph.outputs.append(total.outputs[0])
    with pytest.raises(
        EngineError, match="reads attention_mask outside of attention, in count: its length cannot be fixed"
    ):
        with_static_cache(model, decoder.signature, CAPACITY)


def test_a_window_that_the_signature_does_not_say_is_refused(tiny_bundle: Path) -> None:
    limited = Decoder(tiny_bundle, window=6)
    without = limited.signature.model_copy(
        update={"states": tuple(state.model_copy(update={"window": 0}) for state in limited.signature.states)}
    )
    with pytest.raises(EngineError, match="is not causal over the positions that attention_mask allows, expected that"):
        with_static_cache(limited.canonical, without, CAPACITY)
    other = limited.signature.model_copy(
        update={"states": tuple(state.model_copy(update={"window": 5}) for state in limited.signature.states)}
    )
    with pytest.raises(EngineError, match="allows, the latest 5 of them, expected that"):
        with_static_cache(limited.canonical, other, CAPACITY)
