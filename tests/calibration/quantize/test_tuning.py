"""What calibration finds is carried out, survives JSON, and is not needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.observe.lean import lean_session
from calibration.quantize.layers import sums
from calibration.quantize.plan import LEAST_SNR, plan
from calibration.quantize.recipes import RECIPES
from calibration.quantize.tuning import Tuning
from runtime.bundle.manifest import Bundle


@pytest.fixture(scope="module")
def floating(tiny_bundle: Path) -> Path:
    return tiny_bundle / "onnx" / "vision_encoder" / "model.onnx"


def samples(bundle: Path, count: int = 4) -> list[dict[str, np.ndarray]]:
    signature = Bundle(bundle).submodel("vision_encoder").signature
    return [signature.sample({"images": 1}, seed) for seed in range(count)]


def run(model: ir.Model, sample: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(lean_session(model).run(["image_features"], sample)[0])


def test_found_folded_and_recorded(tiny_bundle: Path, floating: Path) -> None:
    found = Tuning.measure(ir.load(floating), RECIPES["int8"], samples(tiny_bundle))
    again = Tuning.of_record(json.loads(json.dumps(found.record())))
    assert again.ranges == found.ranges and again.ranges
    assert again.dilution == found.dilution and again.attention == found.attention
    assert all(np.allclose(again.importance[name], values) for name, values in found.importance.items())
    model, sample = ir.load(floating), samples(tiny_bundle, 9)[8]
    folded = again.folded(model)
    wanted = run(model, sample)
    np.testing.assert_allclose(run(folded, sample), wanted, rtol=1e-3, atol=1e-4 * float(np.abs(wanted).max()))
    quantized = again.quantize(folded, plan(folded, RECIPES["int8"], again.ranges))
    assert 0 < float(np.square(run(quantized, sample) - wanted).sum() / np.square(wanted).sum()) < 0.02


def test_naive_takes_the_largest_magnitude_and_folds_nothing(tiny_bundle: Path, floating: Path) -> None:
    found = Tuning.measure(ir.load(floating), RECIPES["int8-naive"], samples(tiny_bundle))
    assert not found.folds and not found.importance and {seen.method for seen in found.ranges.values()} == {"minmax"}
    layers = plan(ir.load(floating), RECIPES["int8-naive"], found.ranges)
    assert all(layer.activation for layer in layers if layer.weight_type == "int8" and layer.op != "Gemm")


def test_one_call_gives_ranges_alone(tiny_bundle: Path, floating: Path) -> None:
    found = Tuning.measure(ir.load(floating), RECIPES["int8"], samples(tiny_bundle, 1))
    assert found.ranges and not found.folds


def test_without_data_nothing_changes(floating: Path) -> None:
    model = ir.load(floating)
    assert Tuning().folded(model) is model
    assert any(
        name.endswith(".int8")
        for name in Tuning().quantize(model, plan(model, RECIPES["int8-weight"])).graph.initializers
    )


def test_a_decoder_with_a_cache(tiny_bundle: Path) -> None:
    """Its presents are read by nobody, and its past has length 0."""
    bundle = Bundle(tiny_bundle)
    signature = bundle.submodel("decoder").signature
    lengths = {dim.name: dim.opt for tensor in signature.inputs for dim in tensor.dims if not isinstance(dim, int)}
    calls = []
    for seed in range(3):
        call = signature.sample({**lengths, "batch": 1, "past": 0, "total": lengths["sequence"]}, seed)
        past = {
            s.past.name: np.zeros(s.past.shape({**lengths, "batch": 1, "past": 0}), s.past.dtype)
            for s in signature.states
        }
        calls.append(call | past)
    found = Tuning.measure(ir.load(tiny_bundle / "onnx" / "decoder" / "model.onnx"), RECIPES["int8"], calls)
    assert found.ranges and all(np.isfinite(seen.peak) for seen in found.ranges.values())


def test_layers_are_held_against_the_sums_they_add_to(tiny_bundle: Path, floating: Path) -> None:
    model, calls = ir.load(floating), samples(tiny_bundle)
    found, landings = Tuning.measure(model, RECIPES["int8"], calls), sums(model)
    assert landings and found.dilution.keys() == landings.keys()
    node, (added, total) = next(iter(landings.items()))
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    copy.graph.outputs.extend([values[added], values[total]])
    powers = [
        [float(np.square(array).sum()) for array in lean_session(copy).run([added, total], call)] for call in calls
    ]
    assert found.dilution[node] == pytest.approx(
        max(0, -10 * np.log10(np.mean([own / other for own, other in powers]))), abs=0.01
    )


def test_what_targets_may_do_besides(tiny_bundle: Path, floating: Path) -> None:
    model = ir.load(floating)
    found = Tuning.measure(model, RECIPES["int8"], samples(tiny_bundle))
    layers = found.plan(found.folded(model), RECIPES["int8"])
    attentions = [str(node.name) for node in model.graph if node.op_type == "Attention"]
    assert found.attention.keys() == set(attentions)
    assert set(found.bfloat16(layers)) == {name for name, snr_db in found.attention.items() if snr_db >= LEAST_SNR}
    assert found.bfloat16([replace(layer, activation=False) for layer in layers]) == ()
    made = {
        str(node.name) for node in found.quantize(found.folded(model), layers).graph if node.op_type == "QuantizeLinear"
    }
    spanned = replace(found, ranges={name: seen._replace(low=-0.25, high=2.0) for name, seen in found.ranges.items()})
    assert spanned.activation_ranges(found.folded(model), layers) == dict.fromkeys(made, (-0.25, 2.0))
