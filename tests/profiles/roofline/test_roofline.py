"""The limits of a machine, and what calls have of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from profiles.process import Worker
from profiles.roofline import bounds, products, rates, work
from profiles.roofline.bounds import WEIGHTS, bounded, call, form
from profiles.rows import Row
from profiles.worker import Job
from runtime.bundle.manifest import Bundle
from runtime.bundle.precision import Precision
from runtime.engine import targets
from tests.profiles.report.test_report import row
from tests.runtime.targets.conftest import toy, value


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "EDGE", 128)
    monkeypatch.setattr(rates, "TIMES", 1)
    monkeypatch.setattr(rates.machine, "read_bandwidth", lambda repeat: 20e9)


@pytest.mark.usefixtures("small")
def test_rates_of_products_on_each_precision() -> None:
    said: list[str] = []
    found = rates.roofline(["onnxruntime", "openvino"], 1, said.append)
    assert (found[0].metric, found[0].unit, found[0].spread.median) == ("bandwidth", "GB/s", 20.0)
    names = [(one.target, one.quant) for one in found[1:]]
    known = [(name, each) for name in ("onnxruntime", "openvino") for each in ("float32", "int8", "int4")]
    assert names == known and all(one.unit == "Gop/s" and one.spread.minimum > 0 for one in found[1:])
    assert {one.source for one in found} == {rates.MACHINE} and len({one.run for one in found}) == 1
    assert "products in int4 on openvino" in said[-1]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "label"), [("float32", "float32"), ("int8", "int8 W8A8"), ("int4", "int4")])
def test_a_product_is_what_it_is_called(tmp_path: Path, name: str, label: str) -> None:
    made = products.product(name, tmp_path)
    assert str(made.precision).startswith(label) and (tmp_path / made.graph).is_file()
    assert made.nbytes > 128 * 128 / 2


def test_operations_are_counted(tmp_path: Path) -> None:
    """Of a convolution, a product and attention with merged heads."""

    def shaped(name: str, *dims: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng(0).standard_normal(dims).astype(np.float32)

    x, w, k = value("x", (2, 4, 6, 6)), value("w", (8, 4, 3, 3)), value("k", (4, 5))
    conv = ir.node("Conv", [x, w], num_outputs=1)
    product = ir.node("MatMul", [conv.outputs[0], k], num_outputs=1)
    path = tmp_path / "one.onnx"
    ir.save(toy([conv, product], [x], {"w": shaped("w", 8, 4, 3, 3), "k": shaped("k", 4, 5)}), path)
    expected = 2 * (2 * 8 * 4 * 4) * (4 * 3 * 3) + 2 * (2 * 8 * 4 * 5) * 4
    assert work.operations(path, {"x": shaped("x", 2, 4, 6, 6)}) == expected
    q, keys = value("q", (1, 10, 16)), value("keys", (1, 12, 16))
    attributes = {"q_num_heads": 2, "kv_num_heads": 2}
    ir.save(toy([ir.node("Attention", [q, keys, keys], attributes, num_outputs=1)], [q, keys]), path)
    found = work.operations(path, {"q": shaped("q", 1, 10, 16), "keys": shaped("keys", 1, 12, 16)})
    assert found == 2 * 2 * 10 * 12 * 16


@pytest.mark.parametrize(
    ("label", "compute", "expected"),
    [
        ("int8 W8A8", "float32", "int8"),
        ("int4 + int8 W4A8", "float32", "int8"),
        ("int4", "float32", "int4"),
        ("float16", "float32", "float32"),
        ("float16", "float16", "float16"),
    ],
)
def test_which_product_limits_a_submodel(bundle: Bundle, label: str, compute: Any, expected: str) -> None:
    submodel = bundle.manifest.submodels[0]
    assert form(submodel.model_copy(update={"precision": Precision.parse(label, compute)})) == expected


def test_the_slower_of_memory_and_arithmetic_is_the_limit(bundle: Bundle) -> None:
    """The submodels of this bundle are float32, of 100 bytes each."""
    shapes = {"sample": "2x4x8x8"}
    measured = [row("unet", "s", 4.0, settings=shapes), row("unet", "s", 4.0, settings={"sample": "1x4x8x8"})]
    counts = [row("operations.unet", "Gop", 80.0, settings=shapes | {WEIGHTS: 100})]
    assert call(counts[0]) == call(measured[0])

    def limits(bandwidth: float) -> list[Row]:
        return [row("bandwidth", "GB/s", bandwidth), row("product", "Gop/s", 100.0, quant="float32")]

    first, other = bounded(measured, bundle, counts, limits(20.0))
    assert first.bound == pytest.approx(80 / 110) and first.reached == pytest.approx(80 / 110 / 4)
    assert other.bound is None
    memory = bounded(measured, bundle, counts, limits(1e-7))[0].bound
    assert memory == pytest.approx(100e-9 / 1.1e-7)
    assert bounded(measured, bundle, counts, [])[0].bound is None
    table = [row("operations.unet", "Gop", 0.0, settings=shapes | {WEIGHTS: 100})]
    assert bounded(measured, bundle, table, limits(20.0))[0].bound is None  # of which a call reads some rows


def test_counting_asks_a_worker(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(Worker):
        def __init__(self, job: Job, environment: dict[str, str]) -> None:
            assert job.purpose == "count"

        hello: Any

        def __enter__(self) -> Fake:
            metrics: Any = {"unet": {"unit": "Gop", "settings": {"sample": "2x4"}}}
            self.hello = {"program": "p", "target": "t", "device": "d", "threads": 1, "versions": {}, "load": 1.0}
            self.hello["metrics"] = metrics
            return self

        def __exit__(self, *error: object) -> None: ...

        def measure(self, metric: str) -> float:
            return 7.0

    monkeypatch.setattr(bounds, "worker_of", Fake)
    (found,) = bounds.counted(Job(bundle=bundle.root, target="t"))
    assert (found.metric, found.spread.median) == ("operations.unet", 7.0)
    assert found.settings == {"sample": "2x4", WEIGHTS: 100}


def test_precisions_are_those_that_targets_name() -> None:
    assert set(products.PRECISIONS) <= {name for engine in targets().values() for name in engine.precisions}
