"""Every setting of a generation_config.json is followed as transformers follows it, reported, or refused by name before
any work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from export.architecture.generation import FILE, SETTINGS, Generation, read_generation
from runtime.errors import EnginecastError, SourceError, UnsupportedModel
from runtime.language.sampling import Rules

VOCABULARY = 512


def read(root: Path, config: dict[str, Any] | None = None, **settings: Any) -> Generation:
    (root / FILE).write_text(json.dumps({"eos_token_id": 2} | settings))
    return read_generation(root, config or {}, VOCABULARY)


def test_every_setting_of_the_library_has_its_use() -> None:
    """A version of transformers with a new setting fails here, until it is decided what to do with it."""
    known = {name for name in vars(GenerationConfig()) if name not in ("_original_object_hash", "_mask_length")}
    assert known <= SETTINGS.keys(), f"not decided: {known - SETTINGS.keys()}"
    assert SETTINGS.keys() <= known | {"_commit_hash"}, f"not the library's: {SETTINGS.keys() - known}"
    assert all(use.what == "read" or use.why for use in SETTINGS.values())


def test_what_the_library_takes_where_nothing_is_said(tmp_path: Path) -> None:
    found = read(tmp_path)
    usual = GenerationConfig._get_default_generation_params()
    assert (found.defaults.temperature, found.defaults.top_k, found.defaults.top_p) == (
        0,
        usual["top_k"],
        usual["top_p"],
    )
    assert found.defaults.rules == Rules() and found.ends == (2,) and not found.notes and found.defaults.max_length == 0
    assert (
        read(tmp_path, top_k=None, temperature=None, top_p=None, repetition_penalty=None, bad_words_ids=None) == found
    )


def test_settings_are_read(tmp_path: Path) -> None:
    found = read(
        tmp_path, do_sample=True, temperature=0.7, top_k=0, top_p=0.9, repetition_penalty=1.1, max_new_tokens=33,
        eos_token_id=[2, 7, 600],
        stop_strings="###", min_p=0.1, bad_words_ids=[[4], [5, 6]], sequence_bias=[[[8], 1.5]], forced_eos_token_id=2,
        suppress_tokens=[9], exponential_decay_length_penalty=[3, 1.2], no_repeat_ngram_size=3, min_new_tokens=2,
        num_return_sequences=3,
    )  # fmt: skip
    defaults = found.defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.repetition_penalty) == (0.7, 0, 0.9, 1.1)
    assert defaults.answers == 3 and read(tmp_path, num_beams=4, num_return_sequences=2).defaults.answers == 2
    assert defaults.max_tokens == 33 and defaults.stop == ("###",) and found.ends == (2, 7)
    assert defaults.rules == Rules(
        min_p=0.1, bad_words_ids=((4,), (5, 6)), sequence_bias=(((8,), 1.5),), forced_eos_token_id=(2,),
        suppress_tokens=(9,),
        exponential_decay_length_penalty=(3, 1.2), no_repeat_ngram_size=3, min_new_tokens=2,
    )  # fmt: skip


def test_lengths_of_prompt_and_answer(tmp_path: Path) -> None:
    assert (
        read(tmp_path, max_length=40).defaults.longest(30) == 10
        and read(tmp_path, max_length=40).defaults.longest(50) == 1
    )
    assert read(tmp_path, max_length=40, max_new_tokens=7).defaults.longest(30) == 7
    assert read(tmp_path).defaults.longest(30) == 256


def test_without_the_file_config_json_counts(tmp_path: Path) -> None:
    found = read_generation(
        tmp_path, {"text_config": {"eos_token_id": 5, "top_k": 9}, "repetition_penalty": 1.5}, VOCABULARY
    )
    assert found.ends == (5,) and found.defaults.top_k == 9 and found.defaults.repetition_penalty == 1.5


def test_no_end_token_is_reported(tmp_path: Path) -> None:
    for settings in ({"eos_token_id": None}, {"eos_token_id": []}):
        found = read(tmp_path, **settings)
        assert found.ends == () and [note for note in found.notes if "names no end token" in note]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_beam_groups", 2, "num_beam_groups 2: beams are searched as one group"),
        ("max_time", 2.5, "deadline"),
        ("cache_implementation", "quantized", "as the engine keeps them"),
        ("my_own_setting", 1, "my_own_setting, which is no setting"),
    ],
)
def test_what_is_not_followed_is_reported(tmp_path: Path, name: str, value: object, words: str) -> None:
    (note,) = read(tmp_path, **{name: value}).notes
    assert words in note and note.startswith(FILE)


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("guidance_scale", 1.5, 1.0),
        ("penalty_alpha", 0.6, 0.0),
        ("dola_layers", "high", None),
        ("constraints", ["x"], None),
        ("force_words_ids", [[1]], None),
        ("token_healing", True, False),
        ("watermarking_config", {"bias": 2.0}, None),
        ("encoder_repetition_penalty", 1.5, 1.0),
        ("encoder_no_repeat_ngram_size", 2, 0),
    ],
)
def test_what_would_change_answers_is_refused(tmp_path: Path, name: str, value: object, neutral: object) -> None:
    with pytest.raises(UnsupportedModel, match=rf"generation_config\.json: {name} is .* remove {name} from the file"):
        read(tmp_path, **{name: value})
    assert not read(tmp_path, **{name: neutral}).notes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": -1}, "top_k is -1: Input should be greater than or equal to 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": "0.9"}, 'top_p is "0.9"'),
        ({"temperature": -1}, "temperature is -1"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0.0 with do_sample true, expected 0.01 or more"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": True}, "max_new_tokens is true"),
        ({"eos_token_id": "</s>"}, "eos_token_id is"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": [2, None]}, "eos_token_id is"),
        ({"stop_strings": [""]}, "stop_strings has 1 strings"),
        ({"stop_strings": ["x"] * 99}, "stop_strings has 99 strings"),
        ({"min_p": 2}, "min_p is 2"),
        ({"min_p": float("nan")}, "min_p"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is"),
        ({"bad_words_ids": [[-5]]}, "bad_words_ids is"),
        ({"bad_words_ids": [[4, 9999]]}, "bad_words_ids names token 9999, expected ids below 512"),
        ({"suppress_tokens": "x"}, "suppress_tokens is"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty is"),
        ({"suppress_tokens": [2], "forced_eos_token_id": 2}, "transformers refuses these settings"),
    ],
)
def test_values_that_no_model_can_have_are_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SourceError) as caught:
        read(tmp_path, **settings)
    assert words in str(caught.value)
    assert "Correct the file" in str(caught.value) or "write do_sample false" in str(caught.value)
    assert str(tmp_path / FILE) in str(caught.value) and "Download" not in str(caught.value)


def test_a_file_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("[1]")
    with pytest.raises(EnginecastError, match=FILE):
        read_generation(tmp_path, {}, VOCABULARY)


def test_the_documentation_names_what_is_not_followed() -> None:
    page = (Path(__file__).parents[3] / "docs" / "compatibility.md").read_text()
    assert not [
        name for name, use in SETTINGS.items() if use.what in ("read", "reported", "refused") and name not in page
    ]
