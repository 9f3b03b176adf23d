"""Switched graphs do what quantized graphs do, and noise is measured where it arises."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from calibration.observe.lean import lean_session
from calibration.observe.ranges import Range
from calibration.quantize.plan import plan
from calibration.quantize.qdq import quantize
from calibration.quantize.recipes import INT4_EVERYWHERE, RECIPES
from calibration.quantize.tuning import Tuning
from calibration.search.sensitivity import FLOAT, Board, snr_db
from export.graph.trace import trace
from runtime.bundle.signature import BATCH, Signature, Tensor
from runtime.errors import InvalidInput

SIGNATURE = Signature(
    inputs=(
        Tensor(name="x", dtype="float32", dims=(BATCH, 8, 64)),
        Tensor(name="time", dtype="float32", dims=(BATCH, 64)),
    ),
    outputs=(Tensor(name="y", dtype="float32", dims=(BATCH, 8, 64)),),
)


class Toy(nn.Module):
    """Two MatMuls, a Gemm and a convolution too small to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy, self.time, self.last = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)
        self.conv = nn.Conv1d(8, 8, 9, padding=4, groups=8)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.last(torch.relu(self.noisy(self.conv(x)) + self.time(time)[:, None])),)


@pytest.fixture(scope="module")
def toy() -> ir.Model:
    torch.manual_seed(0)
    module = Toy().eval()
    values = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    model = trace(module.to("meta"), SIGNATURE)
    for name, array in values.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    return [SIGNATURE.sample({"batch": 2}, seed) for seed in range(count)]


@pytest.fixture(scope="module")
def ranges(toy: ir.Model) -> dict[str, Range]:
    from calibration.quantize.plan import activation_tensors

    return {name: Range(4.0, 40.0) for name in activation_tensors(toy, RECIPES["int8"])}


@pytest.fixture(scope="module")
def board(toy: ir.Model, ranges: dict[str, Range]) -> Board:
    return Board(
        toy, [plan(toy, RECIPES["int8"], ranges), plan(toy, INT4_EVERYWHERE)], Tuning(ranges=ranges), samples()
    )


def test_an_assignment_is_what_the_quantized_graph_gives(toy: ir.Model, ranges: dict[str, Range], board: Board) -> None:
    int8, int4 = plan(toy, RECIPES["int8"], ranges), plan(toy, INT4_EVERYWHERE)
    mixed = [four if number % 2 else eight for number, (eight, four) in enumerate(zip(int8, int4, strict=True))]
    for plans in (int8, int4, mixed):
        session = lean_session(quantize(toy, plans, ranges))
        reference = lean_session(toy)
        error = power = 0.0
        for sample in samples():
            wanted, got = reference.run(["y"], sample)[0], session.run(["y"], sample)[0]
            error, power = error + float(np.square(got - wanted).sum()), power + float(np.square(wanted).sum())
        assert board.noise(board.choice(plans)) == pytest.approx(error / power, rel=1e-3)


def test_nothing_quantized_is_no_noise(board: Board) -> None:
    assert board.noise(np.full(len(board.layers), FLOAT)) == 0 and snr_db(0) == 200
    assert snr_db(0.01) == pytest.approx(20)


def test_each_alternative_is_measured_alone_and_noises_add_up(toy: ir.Model, board: Board) -> None:
    found = board.alternatives()
    int4 = plan(toy, INT4_EVERYWHERE)
    assert [len(forms) for forms in found] == [{"Conv": 0, "Gemm": 1, "MatMul": 2}[planned.op] for planned in int4]
    alone = sum(forms[-1].noise for forms in found if forms)
    assert alone > 0 and board.noise(board.choice(int4)) == pytest.approx(alone, rel=0.3)
    for name, forms in zip(board.layers, found, strict=True):
        if len(forms) == 2:
            assert forms[1].plan.weight_type == "int4" and forms[1].noise > forms[0].noise, name


def test_without_samples_there_is_nothing_to_measure(toy: ir.Model) -> None:
    with pytest.raises(InvalidInput, match="samples"):
        Board(toy, [], Tuning(), [])


def test_calls_that_fit_are_run_together(
    toy: ir.Model, ranges: dict[str, Range], board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [plan(toy, RECIPES["int8"], ranges), plan(toy, INT4_EVERYWHERE)]
    calls = [*samples(), SIGNATURE.sample({"batch": 3}, 9)]
    together = Board(toy, recipes, Tuning(ranges=ranges), calls)
    monkeypatch.setattr("calibration.search.sensitivity.TOGETHER_BYTES", 0)
    apart = Board(toy, recipes, Tuning(ranges=ranges), calls)
    assert [len(call["x"]) for call in together._calls] == [6, 3] and len(apart._calls) == 4
    choice = together.choice(recipes[1])
    assert together.noise(choice) == pytest.approx(apart.noise(choice), rel=1e-4)
    assert together.work == apart.work


def test_a_little_of_an_error_does_a_little(board: Board) -> None:
    index, form = next(
        (index, form) for index, forms in enumerate(board.alternatives()) for form in forms if form.plan.activation
    )

    def change(share: float) -> np.ndarray:
        errors = board.none()
        errors.weights[index, 0] = errors.activations[index] = share
        return board.change(errors)

    assert np.corrcoef(change(0.2), change(0.1))[0, 1] > 0.99 and np.corrcoef(change(0.1), change(-0.1))[0, 1] < -0.99
    assert np.std(change(0.2)) / np.std(change(0.1)) == pytest.approx(2, rel=0.02)
    assert not change(0).any()
    assert float(np.square(change(1)).sum()) == pytest.approx(form.noise, rel=1e-4)


def test_only_scales_are_held(toy: ir.Model, ranges: dict[str, Range]) -> None:
    from calibration.search.sensitivity import _switched

    forms = [
        {planned.node: planned for planned in recipe}
        for recipe in (plan(toy, RECIPES["int8"], ranges), plan(toy, INT4_EVERYWHERE))
    ]
    switched = _switched(toy, forms, [("int8", 0), ("int4", 64)], Tuning(ranges=ranges))
    floats = sum(value.const_value.nbytes for value in toy.graph.initializers.values() if value.const_value is not None)
    all_of_it = sum(
        value.const_value.nbytes for value in switched.graph.initializers.values() if value.const_value is not None
    )
    assert 0 < all_of_it - floats < floats / 10


def test_figures_that_are_known_are_not_measured(board: Board) -> None:
    names: list[str] = []

    def kept(name: str, measure: object) -> np.ndarray:
        names.append(name)
        return np.array(0.5)

    found = board.alternatives(kept)
    assert {form.noise for forms in found for form in forms} == {0.5}
    assert len(set(names)) == len(names) == sum(map(len, found))
