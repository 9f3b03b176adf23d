"""Sessions for shapes, what runs elsewhere, calls that are replayed, caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from runtime.bundle.manifest import Bundle, Submodel
from runtime.errors import EngineError
from runtime.targets.sessions.base import SessionEngine
from runtime.targets.sessions.caches import Cache, Rows, bind, covered, joined
from runtime.targets.sessions.sessions import CPU, Device
from tests.runtime.targets.conftest import plain


@pytest.fixture
def embedding(vlm_bundle: Path) -> tuple[Submodel, Path]:
    bundle = Bundle(vlm_bundle)
    submodel = bundle.submodel("token_embedding")
    return submodel, bundle.root / submodel.graph


def ids(batch: int, sequence: int) -> dict[str, Any]:
    return {"input_ids": np.arange(batch * sequence).reshape(batch, sequence)}


def test_one_session_for_each_shape_and_two_are_kept(embedding: tuple[Submodel, Path]) -> None:
    opened: list[dict[str, int]] = []
    engine = plain(*embedding, opened=opened)
    for length in (3, 4, 3, 5, 3, 4):
        assert engine.run(ids(1, length))["inputs_embeds"].shape[:2] == (1, length)
    assert [shape["sequence"] for shape in opened] == [3, 4, 5, 4], "3 was used last when 5 came"
    assert all(shape["batch"] == 1 for shape in opened)


def test_shapes_that_were_compiled_for_stay(embedding: tuple[Submodel, Path]) -> None:
    opened: list[dict[str, int]] = []
    shapes = ({"batch": 1, "sequence": 3}, {"batch": 2, "sequence": 3}, {"sequence": 7})
    engine = plain(*embedding, opened=opened, shapes=shapes)
    assert opened == list(shapes[:2]), "those that fix all lengths are opened at once"
    for batch in (1, 2, 3, 4, 5, 1, 2):
        engine.run(ids(batch, 7))
    engine.run(ids(1, 3))
    assert opened.count({"batch": 1, "sequence": 3}) == 1 and opened.count({"batch": 1, "sequence": 7}) == 2
    with pytest.raises(
        EngineError,
        match=r"could not run token_embedding: batch=1,sequence=5 is no shape .* expected batch=1,sequence=3 or",
    ):
        engine.run(ids(1, 5))


def test_one_session_for_all(embedding: tuple[Submodel, Path]) -> None:
    opened: list[dict[str, int]] = []
    engine = plain(*embedding, opened=opened, vary=True)
    for length in (3, 4, 5):
        engine.run(ids(2, length))
    assert opened == [{}]


def test_a_closed_engine_says_so(embedding: tuple[Submodel, Path]) -> None:
    engine = plain(*embedding, vary=True)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="token_embedding was closed: load it again"):
        engine.run(ids(1, 2))


@pytest.mark.parametrize("vary", [True, False])
def test_replayed_calls_read_their_inputs_anew(embedding: tuple[Submodel, Path], vary: bool) -> None:
    """As with CUDA graphs: inputs and outputs stay where they are, for two shapes at a time; results are
    the caller's.
    """
    engine, other = plain(*embedding, vary=vary, replay=True), plain(*embedding, vary=True)
    results = []
    for seed, length in enumerate((3, 3, 4, 3, 5, 5, 4, 3, 3)):
        given = {"input_ids": np.random.default_rng(seed).integers(0, 500, (2, length))}
        results.append((engine.run(given)["inputs_embeds"], other.run(given)["inputs_embeds"]))
    for got, wanted in results:
        np.testing.assert_array_equal(got, wanted)
    assert len(engine._calls) <= 2


def fake(session: Any, nodes: Sequence[str], providers: Sequence[str] = ("Fast", CPU)) -> Any:
    """A session that says it runs on a provider called Fast, but for some nodes."""
    found = [SimpleNamespace(domain="", op_type=name, name=name) for name in nodes]
    parts = [
        SimpleNamespace(ep_name=CPU, get_nodes=lambda: found),
        SimpleNamespace(ep_name="Fast", get_nodes=lambda: found),
    ]
    return SimpleNamespace(get_providers=lambda: list(providers), get_provider_graph_assignment_info=lambda: parts)


def inspected(embedding: tuple[Submodel, Path], session: Any, fallback: str) -> SessionEngine:
    engine = plain(*embedding, vary=True, fallback=fallback)
    engine._device = Device("Fast")
    engine._inspected(session)
    return engine


def test_what_runs_on_the_cpu_is_reported(embedding: tuple[Submodel, Path]) -> None:
    engine = inspected(embedding, fake(None, ["Shape", "Gather", "Shape"]), "shapes")
    assert engine.device == "plain with 2 Shape, 1 Gather on the CPU"
    assert inspected(embedding, fake(None, []), "none").device == "plain"
    many = ["Conv", "MatMul", "Shape", "Gather", "Concat", "Slice"]
    assert inspected(embedding, fake(None, many), "any").device.endswith("and others on the CPU")


def test_work_that_would_run_on_the_cpu_is_refused(embedding: tuple[Submodel, Path]) -> None:
    with pytest.raises(
        EngineError, match=r"would run 1 Shape, 1 Conv on the CPU: load it with the setting fallback=any"
    ):
        inspected(embedding, fake(None, ["Shape", "Conv"]), "shapes")


def test_a_provider_that_did_not_start_is_no_provider(embedding: tuple[Submodel, Path]) -> None:
    """ONNX Runtime warns and runs everything on the CPU."""
    with pytest.raises(EngineError, match="could not start Fast, and would run all on the CPU"):
        inspected(embedding, fake(None, [], [CPU]), "any")


# Caches


def cache(bundle: Path, types: str = "tensor(float)", longest: int = 1000) -> Cache:
    signature = Bundle(bundle).submodel("decoder").signature
    return Cache(signature, 2, Device(CPU), {state.past.name: types for state in signature.states}, longest)


def test_caches_double_and_keep_what_they_held(tiny_bundle: Path) -> None:
    made = cache(tiny_bundle)
    (name, first), *_ = made.reserve(10).items()
    first.numpy()[:, :, :10] = 7
    assert first.shape()[2] == 256 and made.reserve(256)[name] is first
    grown = made.reserve(257)[name].numpy()
    assert grown.shape[2] == 512 and (grown[:, :, :10] == 7).all() and not grown[:, :, 10:].any()
    assert made.reserve(1000)[name].shape()[2] == 1000, "no longer than the model can be"
    with pytest.raises(EngineError, match="1001 positions do not fit its cache of 1000"):
        made.reserve(1001)


def test_caches_of_bfloat16_are_bound_as_such(tiny_bundle: Path) -> None:
    """numpy lacks the type: buffers of 16 bits grow like others, and sessions read them as what they are."""
    made = cache(tiny_bundle, "tensor(bfloat16)", 400)
    (name, first), *_ = made.reserve(3).items()
    first.numpy()[:, :, :3] = 7
    grown = made.reserve(300)[name]
    assert grown.shape()[2] == 400 and (grown.numpy()[:, :, :3] == 7).all()
    shape = grown.shape()
    values = [onnx.helper.make_tensor_value_info(put, onnx.TensorProto.BFLOAT16, shape) for put in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])
    binding, other = session.io_binding(), made.like()[name]
    bind(binding, "input", "x", grown, Device(CPU))
    bind(binding, "output", "y", other, Device(CPU))
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(other.numpy(), grown.numpy())


def test_caches_of_half(tiny_bundle: Path) -> None:
    found = next(iter(cache(tiny_bundle, "tensor(float16)", 40).whole().values()))
    assert found.numpy().dtype == np.float16 and not found.numpy().any() and found.shape()[2] == 40


def test_rows_of_caches_are_joined(tiny_bundle: Path) -> None:
    first, second = cache(tiny_bundle), cache(tiny_bundle)
    (name, value), *_ = first.reserve(10).items()
    value.numpy()[1, :, :10] = 7
    second.reserve(300)[name].numpy()[0, :, :300] = 8
    rows = [Rows(first, 1, 1), Rows(second, 0, 1)]
    made = joined(rows)
    found = made.values[name].numpy()
    assert made.batch == 2 and made.capacity == 512 == found.shape[2]
    assert (found[0, :, :10] == 7).all() and not found[0, :, 10:].any() and (found[1, :, :300] == 8).all()
    assert covered(rows) is None and covered([Rows(made, 0, 1), Rows(made, 1, 1)]) is made
    assert covered([Rows(made, 0, 1)]) is None, "not all of its rows"
