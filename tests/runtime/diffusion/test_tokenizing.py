"""CLIP tokenizing against transformers.CLIPTokenizer, from every layout that models are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import BundleError, InvalidInput

transformers = pytest.importorskip("transformers")

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-diffusion" / "tokenizer"
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
    """A tiny tokenizer in the layout of Stable Diffusion 1.x: vocab.json, merges.txt, tokenizer_config.json,
    special_tokens_map.json.
    """
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
    tokens = (
        letters
        + [f"{letter}</w>" for letter in letters]
        + ["".join(pair) for pair in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    special = {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {
        "bos_token": special,
        "eos_token": special | {"content": "<|endoftext|>"},
        "unk_token": special | {"content": "<|endoftext|>"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8"
    )
    typed = {key: {"__type": "AddedToken", **value} for key, value in names.items()}
    config = {
        "model_max_length": LIMIT,
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "tokenizer_class": "CLIPTokenizer",
        **typed,
    }
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


LEARNED = ("<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<Style>", "<one>", "<cat-toy>_2x", "<Style>_1")


def write_learned(folder: Path, layout: str) -> Path:
    """A tokenizer with learned tokens, as textual inversion adds them, in each layout that folders have."""
    write_legacy(folder)
    if layout == "added_tokens.json":
        size = len(json.loads((folder / "vocab.json").read_text()))
        (folder / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate(LEARNED)}))
        return folder
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(LEARNED))
    tokenizer.add_tokens(
        [
            transformers.AddedToken("<wide>", lstrip=True, rstrip=True),
            transformers.AddedToken("<wide>_1", single_word=True),
        ]
    )
    if layout == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>", "<extra>_1"], "mask_token": "<mask>"})
    tokenizer.save_pretrained(folder / "new")
    if layout == "added_tokens_decoder":
        config, saved = (
            json.loads((folder / "new" / name).read_text()) for name in ("tokenizer_config.json", "tokenizer.json")
        )
        config["added_tokens_decoder"] = {token.pop("id"): token for token in saved["added_tokens"]}
        saved["added_tokens"] = []
        for name, content in (("tokenizer_config.json", config), ("tokenizer.json", saved)):
            (folder / "new" / name).write_text(json.dumps(content))
    return folder / "new"


@pytest.fixture(scope="module", params=["added_tokens.json", "tokenizer.json", "added_tokens_decoder", "special"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipTokenizer, Any]:
    """Our tokenizer and transformers' from one folder with learned tokens."""
    folder = write_learned(tmp_path_factory.mktemp("learned"), request.param)
    return ClipTokenizer(folder), transformers.CLIPTokenizer.from_pretrained(folder)


def check_as_diffusers(ours: ClipTokenizer, theirs: Any, text: str) -> None:
    """The ids of what diffusers' pipelines make of the text."""
    diffusers = pytest.importorskip("diffusers")
    check(ours, theirs, text, diffusers.loaders.TextualInversionLoaderMixin().maybe_convert_prompt(text, theirs))


@pytest.mark.parametrize(
    "text",
    [
        "a red <cat-toy>",
        "<cat-toy>_1",
        "<cat-toy>_1 <cat-toy>",
        "<cat-toy>x<cat-toy>_2x <CAT-TOY> <style> <Style>",
        " <wide> <wide>_1 a<wide>b <extra> <mask>",
        "<cat-toy>" * 8,
        "red " * 18 + "<cat-toy> the rest",
    ],
)
def test_learned_tokens_equal_diffusers(learned: tuple[ClipTokenizer, Any], text: str) -> None:
    check_as_diffusers(*learned, text)


@settings(max_examples=60)
@given(
    pieces=st.lists(
        st.sampled_from([*LEARNED, "<wide>", "<extra>", "_1", " ", "red", "A", "<", "<CAT-TOY>", "<style>"]),
        max_size=12,
    )
)
def test_learned_tokens_equal_diffusers_anywhere(learned: tuple[ClipTokenizer, Any], pieces: list[str]) -> None:
    check_as_diffusers(*learned, "".join(pieces))


def test_a_learned_token_of_three_vectors_gives_three_ids(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer(write_learned(tmp_path, "added_tokens.json"))
    first = len(json.loads((tmp_path / "vocab.json").read_text()))
    assert tokenizer("a red <cat-toy>").tolist()[3:6] == [first, first + 1, first + 2]
    assert tokenizer("<cat-toy>_1").tolist()[1:3] == [first + 1, tokenizer.end]
    assert tokenizer.last == LEARNED[-1]


def test_all_vectors_of_a_learned_token_count(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer(write_learned(tmp_path, "added_tokens.json"))
    tokenizer("red " * 19 + "<cat-toy>")
    with pytest.raises(InvalidInput, match=r"has 25 tokens, the model reads 22 .* from '<cat-toy> the 1' on"):
        tokenizer("red " * 20 + "<cat-toy> the 1")
    with pytest.raises(InvalidInput, match=r"has 23 tokens, the model reads 22 .* from 'the' on"):
        tokenizer("red " * 19 + "<cat-toy> the")


def check(ours: ClipTokenizer, theirs: Any, given: str, text: str | None = None) -> None:
    """`text` is what the library gets for the `given` one; the same where None."""
    text = given if text is None else text
    whole = theirs(text).input_ids
    if len(whole) > ours.limit:
        with pytest.raises(InvalidInput, match=f"has {len(whole) - 2} tokens, the model reads {ours.limit - 2}"):
            ours(given)
        return
    ids = ours(given)
    assert ids.dtype == np.int64
    assert ids.tolist() == theirs(text, padding="max_length", max_length=theirs.model_max_length).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers(pair: tuple[ClipTokenizer, Any], text: str) -> None:
    check(*pair, text)


@settings(max_examples=150)
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
        (
            "merges.txt",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            r"merges\.txt is a git-lfs pointer",
        ),
        (
            "vocab.json",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            r"vocab\.json is a git-lfs pointer",
        ),
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
