"""The scores equal those of transformers' logits processors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.decoding import Sampling, choose, process
from runtime.errors import EngineError, InvalidInput

VOCABULARY = 50


def reference(logits: np.ndarray, tokens: list[int], sampling: Sampling) -> np.ndarray:
    steps: list[LogitsProcessor] = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps += [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    scores = LogitsProcessorList(steps)(torch.LongTensor([tokens]), torch.tensor(logits[None]))
    return np.asarray(scores[0])


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    st.builds(
        Sampling,
        temperature=st.floats(0.05, 3),
        top_k=st.integers(0, VOCABULARY + 5),
        top_p=st.floats(0.05, 1),
        repetition_penalty=st.floats(0.5, 2),
    ),
)
def test_scores_equal_transformers(seed: int, tokens: list[int], sampling: Sampling) -> None:
    logits = np.random.default_rng(seed).normal(0, 4, VOCABULARY).astype(np.float32)
    before = logits.copy()
    np.testing.assert_allclose(process(logits, tokens, sampling), reference(logits, tokens, sampling), rtol=1e-5)
    np.testing.assert_array_equal(logits, before)


def test_equal_scores_at_the_edge_of_top_k_all_stay() -> None:
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    sampling = Sampling(temperature=1, top_k=2)
    np.testing.assert_array_equal(process(logits, [0], sampling), reference(logits, [0], sampling))


def test_greedy_takes_the_best_after_the_penalty() -> None:
    logits = np.array([2, 3, -1], np.float32)
    rng = np.random.default_rng(0)
    assert choose(logits, [1], Sampling(top_k=1, top_p=0.1), rng) == 1
    assert choose(logits, [1], Sampling(repetition_penalty=2), rng) == 0


def test_draws_follow_the_probabilities_and_repeat_with_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampling = Sampling(temperature=1, top_k=3)

    def draw(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [choose(logits, [], sampling, rng) for _ in range(4000)]

    shares = np.bincount(draw(7), minlength=4) / 4000
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)
    assert shares[3] == 0
    assert draw(7) == draw(7) != draw(8)


def test_extremes_stay_numbers() -> None:
    logits = np.array([1e30, -1e30, -np.inf, 1e29], np.float32)
    assert choose(logits, [0], Sampling(temperature=0.01, top_p=0.01), np.random.default_rng(0)) == 0


def test_nan_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="not numbers"):
        choose(np.array([0, np.nan], np.float32), [], Sampling(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-9),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
