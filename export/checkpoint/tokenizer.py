"""The tokenizer of a chat model, as transformers makes it of a checkpoint's files.

A published tokenizer.json is not the whole of it: tokenizer_config.json and older files add tokens and change their
flags, and the class that they name may split words in its own way, whatever tokenizer.json says. So the library makes
the tokenizer, and what it makes is what the bundle holds. Where that is what tokenizer.json says already, the published
file is taken as it is.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from export.build.staging import cached, key_of
from runtime.bundle.manifest import sha256
from runtime.errors import SourceError

FILE: Final = "tokenizer.json"
VOCABULARIES: Final = (FILE, "tokenizer.model", "vocab.json", "vocab.txt")
"""One of them holds the words; without any, the library makes a tokenizer of three."""
SAMPLES: Final = ("a photo of 2 cats", "A  Red Fox, in the snow!", "it's (not) a dog-house.", "x", "")
"""Texts that a tokenizer.json must read as the class of its model does, where the two cannot be compared themselves."""
FILES: Final = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


def tokenizer_file(folder: Path, placeholder: str = "") -> Path:
    """The file of the tokenizer whose files lie in a folder: the published tokenizer.json, or one in the cache. Raises
    SourceError naming what is wrong.

    `placeholder` is a special token that the model's processor adds where the tokenizer does not have it.
    """
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not any(file.name in VOCABULARIES for file in found):
        raise SourceError(
            f"{folder} has no tokenizer, none of {', '.join(VOCABULARIES)}: take the files from where the model "
            "was published"
        )
    files = {file.name: sha256(file) for file in found}
    return _made(folder, placeholder, key_of("tokenizer", version("transformers"), placeholder, files))


@cache
def _made(root: Path, placeholder: str, key: str) -> Path:
    try:
        tokenizer = AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        if placeholder:
            tokenizer.add_tokens([AddedToken(placeholder, normalized=False, special=True)], special_tokens=True)
        published = Tokenizer.from_file(str(root / FILE)).to_str() if (root / FILE).is_file() else "{}"
        slow = not hasattr(tokenizer, "backend_tokenizer")
        made = _like(root / FILE, tokenizer) if slow else tokenizer.backend_tokenizer.to_str()
    except SourceError:
        raise
    except Exception as error:  # the libraries raise exceptions of every kind
        reason = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{root}: its tokenizer files cannot be read ({type(error).__name__}: {reason}). They must be of one model "
            "and complete: "
            f"transformers' AutoTokenizer.from_pretrained('{root}') has to work"
        ) from None
    if _meaning(made) == _meaning(published):
        return root / FILE
    return cached(key, ".json", lambda path: path.write_text(made, encoding="utf-8"))


def _like(file: Path, tokenizer: Any) -> str:
    """A published tokenizer.json, for a class that makes none, such as SigLIP's. Raises SourceError where there is
    none, or it reads texts as other tokens.
    """
    kind = type(tokenizer).__name__
    if not file.is_file():
        raise SourceError(f"{file} does not exist, and a {kind} makes none: take it from where the model was published")
    found: Any = Tokenizer.from_file(str(file))
    found.no_padding()
    for text in SAMPLES:
        if found.encode(text).ids != tokenizer(text)["input_ids"]:
            raise SourceError(
                f"{file} reads '{text}' as other tokens than the {kind} of the same folder: take both from where the "
                "model was published"
            )
    return str(found.to_str())


def _meaning(tokenizer: str) -> dict[str, Any]:
    """What decides on ids: not how batches are cut and padded."""
    return json.loads(tokenizer) | {"truncation": None, "padding": None}
