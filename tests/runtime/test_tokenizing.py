"""CLIP tokenizing against transformers.CLIPTokenizer, from every layout that models are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import BundleError, InvalidInput
from runtime.tokenizing import ClipTokenizer

transformers = pytest.importorskip("transformers")

SAMPLE = Path(__file__).parents[2] / "export" / "samples" / "shapes-diffusion" / "tokenizer"
LIMIT = 24
TEXTS = [
    "",
    " ",
    "a large red circle at the top left on a white background",
    "  A\tRED\n\ncircle,  it's   red!!! 123 \u00a0x ",
    "caf\u00e9 cafe\u0301 na\u00efve \u4e2d\u6587 \U0001f600 \u0130stanbul",
    "a <|endoftext|> b <|ENDOFTEXT|> <|startoftext|>c",
    "don't we'll they're '' `` \x00 \x7f",
]


def alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def write_legacy(folder: Path, pad: str = "<|endoftext|>") -> Path:
    """A tiny tokenizer in the layout of Stable Diffusion 1.x: vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json."""
    merges = [
        ("r", "e"),
        ("re", "d</w>"),
        ("c", "i"),
        ("ci", "r"),
        ("a", "t</w>"),
        ("t", "h"),
        ("th", "e</w>"),
        ("l", "e</w>"),
        ("1", "2</w>"),
    ]
    letters = alphabet()
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    special = {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"bos_token": special, "eos_token": special | {"content": "<|endoftext|>"}, "unk_token": special | {"content": "<|endoftext|>"}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8")
    typed = {key: {"__type": "AddedToken", **value} for key, value in names.items()}
    config = {"model_max_length": LIMIT, "pad_token": "<|endoftext|>", "do_lower_case": True, "tokenizer_class": "CLIPTokenizer", **typed}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({**names, "pad_token": pad}))
    return folder


@pytest.fixture(scope="module", params=["legacy", "padded with !", "saved again", "sample"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipTokenizer, Any]:
    """Our tokenizer and transformers' from one folder."""
    root = tmp_path_factory.mktemp("tokenizer")
    folder = write_legacy(root / "legacy", pad="!" if request.param == "padded with !" else "<|endoftext|>")
    if request.param == "saved again":
        transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(root / "new")
        folder = root / "new"
        assert (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").exists()
    if request.param == "sample":
        if not SAMPLE.is_dir():
            pytest.skip("the sample model is not in this tree")
        folder = SAMPLE
    return ClipTokenizer(folder), transformers.CLIPTokenizer.from_pretrained(folder)


def check(ours: ClipTokenizer, theirs: Any, text: str) -> None:
    whole = theirs(text).input_ids
    if len(whole) > ours.limit:
        with pytest.raises(InvalidInput, match=f"has {len(whole) - 2} tokens, the model reads {ours.limit - 2}"):
            ours(text)
        return
    ids = ours(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == theirs(text, padding="max_length", max_length=theirs.model_max_length).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers(pair: tuple[ClipTokenizer, Any], text: str) -> None:
    check(*pair, text)


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.text("aAred circle'st12 \t\n<|>!", max_size=40)))
def test_equals_transformers_on_any_text(pair: tuple[ClipTokenizer, Any], text: str) -> None:
    check(*pair, text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_legacy(tmp_path / "tokenizer")


def test_a_text_over_the_limit_is_reported_with_what_would_be_lost(folder: Path) -> None:
    tokenizer = ClipTokenizer(folder)
    tokenizer("red " * (LIMIT - 2))
    with pytest.raises(InvalidInput) as caught:
        tokenizer("red " * (LIMIT - 2) + "the rest", "negative_prompt")
    assert caught.value.field == "negative_prompt"
    assert "the model reads 22" in str(caught.value) and "'the rest'" in str(caught.value)


def test_twenty_thousand_words_make_a_short_message(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="20000 tokens") as caught:
        ClipTokenizer(folder)("red " * 20_000)
    assert len(str(caught.value)) < 300


def test_half_a_surrogate_pair_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="Unicode"):
        ClipTokenizer(folder)("a \ud800 b")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        ClipTokenizer(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "{", "no JSON"),
        ("tokenizer_config.json", "{}", "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": 77, "padding_side": "left"}', "padding_side"),
        ("special_tokens_map.json", '{"pad_token": "<pad>x"}', None),
        ("vocab.json", "[]", "JSON object"),
        ("merges.txt", "a b c", "two tokens"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "no CLIP tokenizer"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, text: str, message: str | None) -> None:
    (folder / name).write_text(text)
    if message is None:  # a padding token of its own gets the next free id, as in transformers
        assert ClipTokenizer(folder)("")[-1] == transformers.CLIPTokenizer.from_pretrained(folder).pad_token_id
        return
    with pytest.raises(BundleError, match=message):
        ClipTokenizer(folder)
