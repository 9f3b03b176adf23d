"""Noises estimated from a few probes are those that are measured one by one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calibration.observe.ranges import Range
from calibration.quantize.plan import activation_tensors, plan
from calibration.quantize.recipes import INT4_EVERYWHERE, RECIPES
from calibration.quantize.tuning import Tuning
from calibration.search.approximate import FAINTEST, LEAST, SOURCES_PER_PROBE, approximate, fitted
from calibration.search.sensitivity import Board, Measure
from export.graph.trace import trace
from runtime.bundle.signature import BATCH, Signature, Tensor

SIGNATURE = Signature(
    inputs=(Tensor(name="x", dtype="float32", dims=(BATCH, 4, 8, 64)),),
    outputs=(Tensor(name="y", dtype="float32", dims=(BATCH, 4, 8, 64)),),
)


class Block(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        with torch.no_grad():
            self.down.weight *= gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Toy(nn.Module):
    """Residual blocks of which each matters differently, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(10 ** float(power)) for power in np.linspace(-1.5, 0.5, 20)))
        self.conv, self.last = nn.Conv2d(4, 128, 3, padding=1), nn.Conv2d(128, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.blocks(x + self.last(torch.relu(self.conv(x)))),)


@pytest.fixture(scope="module")
def toy() -> ir.Model:
    torch.manual_seed(0)
    module = Toy().eval()
    values = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    model = trace(module.to("meta"), SIGNATURE)
    for name, array in values.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


@pytest.fixture(scope="module")
def tuning(toy: ir.Model) -> Tuning:
    return Tuning(ranges={name: Range(4.0, 40.0) for name in activation_tensors(toy, RECIPES["int8"])})


@pytest.fixture(scope="module")
def board(toy: ir.Model, tuning: Tuning) -> Board:
    forms = [plan(toy, RECIPES["int8"], tuning.ranges), plan(toy, RECIPES["int8-weight"]), plan(toy, INT4_EVERYWHERE)]
    return Board(toy, forms, tuning, [SIGNATURE.sample({"batch": 1}, seed) for seed in range(4)])


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def test_a_third_of_the_runs_rank_as_all_of_them_do(toy: ir.Model, tuning: Tuning, board: Board) -> None:
    names: list[str] = []

    def kept(name: str, measure: Measure) -> np.ndarray:
        names.append(name)
        return measure()

    found, wanted = approximate(toy, board, tuning, kept), board.alternatives()
    assert [[form.plan for form in forms] for forms in found] == [[form.plan for form in forms] for forms in wanted]
    estimates, noises = ([form.noise for forms in every for form in forms] for every in (found, wanted))
    assert len(names) == len(set(names)) == max(LEAST, -(-82 // SOURCES_PER_PROBE)) < len(noises) / 4
    assert np.corrcoef(ranks(estimates), ranks(noises))[0, 1] > 0.95
    worst = len(noises) // 10
    assert len(set(np.argsort(estimates)[-worst:]) & set(np.argsort(noises)[-worst:])) >= 0.8 * worst
    assert np.median(np.abs(10 * np.log10(np.divide(estimates, noises)))) < 1.5


def test_what_is_kept_decides_what_comes_next(toy: ir.Model, tuning: Tuning, board: Board) -> None:
    known: dict[str, np.ndarray] = {}
    first = approximate(toy, board, tuning, lambda name, measure: known.setdefault(name, measure()))
    calls: list[str] = []

    def again(name: str, measure: Measure) -> np.ndarray:
        if int(name.removeprefix("probe-")) < 20:
            return known[name]
        calls.append(name)
        return measure()

    assert approximate(toy, board, tuning, again) == first, "stopped after 20 probes, it goes on to the same end"
    assert len(calls) == len(known) - 20


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(20, 60))
def test_noises_that_are_orthogonal_are_found(seed: int, sources: int) -> None:
    """Of sources whose effects have nothing in common, spread over 30 dB, with half as many probes as sources."""
    generator = np.random.default_rng(seed)
    noises = 10 ** generator.uniform(-3, 0, sources)
    probes = generator.choice([-1.0, 1.0], (max(16, sources // 2), sources)) / np.sqrt(
        noises
    )  # equally loud, as later rounds have it
    effects = np.linalg.qr(generator.normal(size=(4 * sources, sources)))[0] * np.sqrt(noises)
    changes = probes @ effects.T
    found = fitted(changes @ changes.T, probes)
    assert np.median(np.abs(10 * np.log10(found / noises))) < 1.5
    assert (found > 0).all()
    assert (fitted(changes @ changes.T, probes, FAINTEST) * np.mean(probes**2, axis=0) >= FAINTEST * 0.999).all()
