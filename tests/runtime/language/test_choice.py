"""The scores equal those of transformers' logits processors."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.errors import EngineError, InvalidInput
from runtime.language.choice import choose
from runtime.language.processors import process
from runtime.language.sampling import Bounds, Rules, Sampling

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


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_penalties_of_counts_are_those_of_openai(temperature: float) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, with c[j] the times that the answer has token j."""
    logits = np.random.default_rng(0).normal(0, 3, 8).astype(np.float32)
    tokens, bounds = [7, 7, 1, 2, 2, 2, 5], Bounds(prompt=2)
    sampling = Sampling(temperature, frequency_penalty=0.75, presence_penalty=-1.5)
    counts = np.array([0, 1, 3, 0, 0, 1, 0, 0])
    wanted = (logits - counts * 0.75 + (counts > 0) * 1.5) / (temperature or 1)
    np.testing.assert_allclose(process(logits, tokens, sampling, bounds), wanted, rtol=1e-6)
    assert choose(logits, tokens, Sampling(frequency_penalty=2), np.random.default_rng(0), bounds) != 2


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
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", 2.1),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


# The rules of a generation_config.json, beside the processors that the library itself makes of such a file

ENDS = (2, 3)
token = st.integers(0, VOCABULARY - 1)
tokens_of = st.lists(token, min_size=1, max_size=3).map(tuple)
few = st.lists(token, max_size=6).map(tuple)
RULES = st.builds(
    Rules,
    sequence_bias=st.lists(
        st.tuples(tokens_of, st.floats(-9, 9, width=32)), max_size=3, unique_by=lambda pair: pair[0]
    ).map(tuple),
    bad_words_ids=st.lists(tokens_of, max_size=4, unique=True).map(tuple),
    no_repeat_ngram_size=st.integers(0, 4),
    min_length=st.integers(0, 25),
    min_new_tokens=st.integers(0, 12),
    forced_eos_token_id=st.sampled_from([(), (2,), (2, 3)]),
    remove_invalid_values=st.booleans(),
    exponential_decay_length_penalty=st.none() | st.tuples(st.integers(0, 8), st.floats(1, 1.5)),
    suppress_tokens=few,
    begin_suppress_tokens=few,
    min_p=st.sampled_from([0.0, 0.02, 0.2]),
    top_h=st.none() | st.floats(0.2, 1),
    typical_p=st.sampled_from([1.0, 0.9, 0.4]),
    epsilon_cutoff=st.sampled_from([0.0, 3e-4, 0.02]),
    eta_cutoff=st.sampled_from([0.0, 2e-3, 0.05]),
)


@pytest.fixture(scope="module")
def library() -> LlamaForCausalLM:
    """A model of the library, for the processors that its generate makes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )


def processors(library: LlamaForCausalLM, sampling: Sampling, bounds: Bounds) -> LogitsProcessorList:
    """What transformers' generate applies with these settings."""
    ruled = sampling.rules.model_dump(mode="json")
    ruled |= {name: None for name in ("sequence_bias", "bad_words_ids", "forced_eos_token_id") if not ruled[name]}
    config = GenerationConfig(
        **ruled, do_sample=sampling.temperature != 0, temperature=float(sampling.temperature) or 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p, repetition_penalty=float(sampling.repetition_penalty), max_length=bounds.longest,
        eos_token_id=list(bounds.ends),
    )  # fmt: skip
    library._prepare_special_tokens(config, True, device="cpu")
    found: LogitsProcessorList = library._get_logits_processor(
        generation_config=config, input_ids_seq_length=bounds.prompt, device="cpu"
    )
    return found


@settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.lists(st.integers(0, 9), min_size=2, max_size=20),
    prompt=st.integers(1, 20),
    rules=RULES,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5, 30]),
    top_p=st.sampled_from([1.0, 0.8]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_rules_equal_transformers(
    library: LlamaForCausalLM, seed: int, tokens: list[int], prompt: int, rules: Rules, temperature: float, top_k: int,
    top_p: float,
    penalty: float,
) -> None:  # fmt: skip
    assume(
        not rules.forced_eos_token_id or set(rules.forced_eos_token_id) - set(rules.suppress_tokens)
    )  # the library refuses that
    logits = np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)
    bounds = Bounds(min(prompt, len(tokens)), len(tokens) + 1 + seed % 3, ENDS)
    sampling = Sampling(temperature, top_k, top_p, penalty, rules)
    got = process(logits, tokens, sampling, bounds)
    assume(np.isfinite(got.max()))  # else there is nothing to choose, and the library fails
    wanted = processors(library, sampling, bounds)(torch.LongTensor([tokens]), torch.tensor(logits[None]))[0].numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_token_is_forced_behind_a_prompt_of_one_token(library: LlamaForCausalLM) -> None:
    logits, bounds = np.arange(VOCABULARY, dtype=np.float32), Bounds(1, 9, ENDS)
    sampling = Sampling(rules=Rules(forced_bos_token_id=7))
    for tokens in ([4], [4, 5]):
        wanted = processors(library, sampling, bounds)(torch.LongTensor([tokens]), torch.tensor(logits[None]))[
            0
        ].numpy()
        np.testing.assert_array_equal(process(logits, tokens, sampling, bounds), wanted)


def test_values_that_are_no_numbers_may_be_removed(library: LlamaForCausalLM) -> None:
    logits = np.array([np.nan, np.inf, -np.inf, 1, *[0] * (VOCABULARY - 4)], np.float32)
    sampling, bounds = Sampling(rules=Rules(remove_invalid_values=True)), Bounds(1, 9, ENDS)
    wanted = processors(library, sampling, bounds)(torch.LongTensor([[4]]), torch.tensor(logits[None]))[0].numpy()
    np.testing.assert_array_equal(process(logits, [4], sampling, bounds), wanted)
    assert choose(logits, [4], sampling, np.random.default_rng(0), bounds) == 1


def test_rules_that_leave_no_token_are_an_engine_error() -> None:
    sampling = Sampling(temperature=1, rules=Rules(suppress_tokens=tuple(range(VOCABULARY))))
    with pytest.raises(EngineError, match="leave no token to choose"):
        choose(np.zeros(VOCABULARY, np.float32), [0], sampling, np.random.default_rng(0))
