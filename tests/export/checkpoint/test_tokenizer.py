"""Bundles tokenize as transformers does with the same folder, whatever its files are."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

from export.checkpoint.source import resolve
from export.checkpoint.tokenizer import tokenizer_file
from export.family import family_of
from runtime.errors import SourceError

TEXTS = [
    "a",
    " a b",
    "USER: <image>\nwhat is it? ASSISTANT:",
    "<image>a <image> b",
    "é€😀",
    "<s>a</s>b",
    "x <pic> y",
    "",
]
NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPECIALS = ["<unk>", "<s>", "</s>"]


def llama() -> Tokenizer:
    """As older versions converted SentencePiece models: the first space is put in by a normalizer."""
    letters = sorted({*"".join(TEXTS), *"abcdefghijklmnopqrstuvwxyz▁"} - {" "})
    pieces = [*SPECIALS, *(f"<0x{i:02X}>" for i in range(256)), *letters, "▁a", "wh", "at", "what", "▁what"]
    merges = [("▁", "a"), ("w", "h"), ("a", "t"), ("wh", "at"), ("▁", "what")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


@pytest.fixture
def folder(tiny_vlm: Path, tmp_path: Path) -> Path:
    """A LLaVA whose tokenizer is to be written."""
    copy = Path(shutil.copytree(tiny_vlm, tmp_path / "source"))
    for name in NAMES:
        (copy / name).unlink(missing_ok=True)
    return copy


def write(folder: Path, tokenizer: Tokenizer, **files: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def normal(image: Tokenizer) -> Tokenizer:
    image.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return image


FAST = "PreTrainedTokenizerFast"
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IMAGE = {
    "content": "<image>",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}
LAST = llama().get_vocab_size()
ADDED = {str(LAST): IMAGE, str(LAST + 1): IMAGE | {"content": "<pic>", "special": False, "lstrip": True}}
FOLDERS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "the class as it is": (True, {"tokenizer_class": FAST}, {}),
    "Llama's class": (True, {"tokenizer_class": "LlamaTokenizer"}, {}),
    "Llama's class of old": (True, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": True},
        {}),
    "tokens added by the config": (False, {"tokenizer_class": FAST, "added_tokens_decoder": ADDED}, {}),
    "tokens added by name": (False, {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": ["<image>"]}, {}),
    "tokens added by older files": (
        False, {"tokenizer_class": "LlamaTokenizer"},
        {"added_tokens": {"<image>": LAST}, "special_tokens_map": {"additional_special_tokens": ["<image>"]}},
    ),
    "flags changed by the config": (
        True, {"tokenizer_class": FAST, "added_tokens_decoder": {str(LAST): IMAGE | {"rstrip": True, "lstrip": True}}},
        {},
    ),
    "no class": (True, {}, {}),
}  # fmt: skip
"""Whether tokenizer.json has the image token, what tokenizer_config.json says, and older files."""


@pytest.mark.parametrize("case", FOLDERS)
def test_ids_are_those_of_transformers(folder: Path, case: str) -> None:
    complete, config, older = FOLDERS[case]
    write(folder, normal(llama()) if complete else llama(), tokenizer_config=CONFIG | config, **older)
    library = AutoTokenizer.from_pretrained(folder)
    source = resolve(str(folder))
    ours = Tokenizer.from_file(str(family_of(source).assets(source)["tokenizer/tokenizer.json"]))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == library(text, add_special_tokens=False)["input_ids"], text
        assert ours.encode(text).ids == library(text)["input_ids"], text
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True), text


def test_a_file_that_says_it_all_is_taken_as_it_is(tiny_vlm: Path) -> None:
    assert tokenizer_file(tiny_vlm) == tiny_vlm / "tokenizer.json"


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, bytes):
        return bytes([*varint(number << 3 | 2), *varint(len(value))]) + value
    if isinstance(value, float):
        return bytes(varint(number << 3 | 5)) + struct.pack("<f", value)
    return bytes([*varint(number << 3), *varint(value)])


def varint(value: int) -> list[int]:
    return [value] if value < 128 else [value & 127 | 128, *varint(value >> 7)]


def sentencepiece(tokenizer: Tokenizer) -> bytes:
    """The same words as a SentencePiece model of the BPE kind, with bytes for what is in none."""
    pieces = b""
    for i, piece in enumerate(sorted(tokenizer.get_vocab(with_added_tokens=False), key=tokenizer.token_to_id)):
        kind = 2 if piece == "<unk>" else 3 if piece in SPECIALS else 6 if piece.startswith("<0x") else 1
        pieces += field(1, field(1, piece.encode()) + field(2, float(-i)) + field(3, kind))
    trainer = field(2, field(3, 2) + field(35, 1))
    normalizer = field(3, field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1))
    return pieces + trainer + normalizer


def test_a_sentencepiece_model_alone(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece(llama()))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"tokenizer_class": "LlamaTokenizer"}))
    made = Tokenizer.from_file(str(tokenizer_file(folder)))
    library = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert made.encode(text, add_special_tokens=False).ids == library(text, add_special_tokens=False)["input_ids"]
    assert made.encode("b what a", add_special_tokens=False).ids[1:] == [
        made.token_to_id("▁what"),
        made.token_to_id("▁a"),
    ]


def test_no_tokenizer_at_all(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"has no tokenizer, none of tokenizer\.json, tokenizer\.model, vocab\.json"):
        tokenizer_file(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "version https://git-lfs.github.com/spec/v1"])
def test_damaged_files_are_named(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=r"its tokenizer files cannot be read \(\w+: ?"):
        tokenizer_file(folder)


def test_code_of_the_checkpoint_is_not_run(folder: Path) -> None:
    config = CONFIG | {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    write(folder, normal(llama()), tokenizer_config=config)
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    try:
        assert tokenizer_file(folder).is_file()
    except SourceError as error:
        assert "trust_remote_code" in str(error)
