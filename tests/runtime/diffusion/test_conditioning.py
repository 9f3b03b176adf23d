"""From prompts to text states: any number of encoders, and the negative prompt's row before the prompt's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime.diffusion.conditioning import Conditioning, Prompts, TextEncoder, TextStates
from runtime.errors import BundleError, InvalidInput
from runtime.pipeline import Call

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-diffusion" / "tokenizer"
FIRST = TextEncoder("first", "tokenizer", "states")
SECOND = TextEncoder("second", "tokenizer", "states", pooled="summary")


def encoded(conditioning: Conditioning, prompts: Prompts) -> tuple[TextStates, list[str]]:
    """The text states, and which submodels were called: each gives ids + 1, the second half as wide."""
    called: list[str] = []
    work = conditioning.encode(prompts)
    try:
        call = next(work)
        while True:
            assert isinstance(call, Call)
            called.append(call.submodel)
            states = np.repeat(1 + call.inputs["input_ids"][..., None], 4 if call.submodel == "first" else 2, axis=2)
            call = work.send({"states": states.astype(np.float32), "summary": states[:, 0].astype(np.float32)})
    except StopIteration as end:
        return end.value, called


def test_one_encoder() -> None:
    conditioning = Conditioning([FIRST], [SAMPLE])
    prompts = conditioning.tokenize("a red circle", "blue", guided=True)
    found, called = encoded(conditioning, prompts)
    ids = prompts.encoded[0].ids
    assert called == ["first"] and not found.pooled
    np.testing.assert_array_equal(found.states, np.repeat(1 + ids[..., None], 4, axis=2))
    np.testing.assert_array_equal(ids[0], conditioning.tokenizers[0]("blue"))
    np.testing.assert_array_equal(ids[1], conditioning.tokenizers[0]("a red circle"))


def test_states_of_two_encoders_stand_side_by_side() -> None:
    conditioning = Conditioning([FIRST, SECOND], [SAMPLE, SAMPLE])
    prompts = conditioning.tokenize("a red circle", "blue", guided=True)
    found, called = encoded(conditioning, prompts)
    assert called == ["first", "second"]
    assert found.states.shape == (2, conditioning.tokenizers[0].limit, 6) and found.pooled["summary"].shape == (2, 2)
    assert conditioning.origins == {"input_ids": f"{SAMPLE} or {SAMPLE}", "summary": "second"}


@pytest.mark.parametrize("negative", ["", "blue"])
@pytest.mark.parametrize("guided", [True, False])
def test_only_an_empty_negative_prompt_of_a_guided_request_is_zeros(guided: bool, negative: str) -> None:
    conditioning = Conditioning([FIRST, SECOND], [SAMPLE, SAMPLE], zeros_for_empty=True)
    prompts = conditioning.tokenize("a red circle", negative, guided)
    found, _ = encoded(conditioning, prompts)
    for rows in (found.states, *found.pooled.values()):
        assert len(rows) == 1 + guided and rows.dtype == np.float32 and rows[-1].any()
        assert bool(rows[0].any()) == (not guided or bool(negative))


def test_a_negative_prompt_that_is_too_long_is_refused_though_it_is_not_encoded() -> None:
    with pytest.raises(InvalidInput) as caught:
        Conditioning([FIRST], [SAMPLE]).tokenize("a", "red " * 100, guided=False)
    assert caught.value.field == "negative_prompt"


def test_tokenizers_must_read_the_same_number_of_tokens(tmp_path: Path) -> None:
    other = shutil.copytree(SAMPLE, tmp_path / "tokenizer")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 12}))
    with pytest.raises(BundleError, match=r"tokenizer 12.*expected the same"):
        Conditioning([FIRST, SECOND], [SAMPLE, other])


def test_the_shorter_of_two_weighted_prompts_is_followed_by_empty_chunks() -> None:
    conditioning = Conditioning([FIRST, SECOND], [SAMPLE, SAMPLE])
    tokenizer = conditioning.tokenizers[0]
    prompts = conditioning.tokenize("red " * 70, "blue", guided=True, weighted=True)
    found, called = encoded(conditioning, prompts)
    assert prompts.chunks == 3 and called == ["first", "second"]
    assert found.states.shape == (2, 3 * tokenizer.limit, 6) and found.pooled["summary"].shape == (2, 2)
    negative = prompts.encoded[0].ids[:3]
    np.testing.assert_array_equal(negative, [tokenizer("blue"), tokenizer(""), tokenizer("")])
    np.testing.assert_array_equal(found.pooled["summary"], np.full((2, 2), 1 + tokenizer.start))


def test_an_empty_negative_prompt_is_as_many_zeros_as_the_prompt_has_tokens() -> None:
    conditioning = Conditioning([FIRST, SECOND], [SAMPLE, SAMPLE], zeros_for_empty=True)
    found, _ = encoded(conditioning, conditioning.tokenize("red " * 70, "", guided=True, weighted=True))
    assert found.states.shape[:2] == (2, 3 * conditioning.tokenizers[0].limit)
    assert not found.states[0].any() and found.states[1].all()
