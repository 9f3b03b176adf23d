"""Learned tokens of text encoders (textual inversion; Gal et al. 2022, arXiv:2208.01618), added when a model is built.

A token gets the next ids of the tokenizer and rows of the encoder's embedding, as diffusers' load_textual_inversion
gives them: `<x>` for the first vector of several, then `<x>_1`, `<x>_2` and so on, which pipelines write out of `<x>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from export.build.staging import cached, key_of
from export.checkpoint.additions import Addition
from export.checkpoint.component import read_json
from export.checkpoint.keys import listing
from export.checkpoint.source import Source
from export.checkpoint.tensors import EXPONENTS, TensorRef, check_finite, read_header
from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import BundleError, SourceError, quoted

ENCODERS: Final = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""The key of each text encoder's vectors in a file for several of them."""
UNNAMED: Final = ("emb_params", "clip_l", "clip_g")
"""Keys that are no token: the file's name is."""
FLAGS: Final = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
"""How transformers' tokenizers find a token that was added."""
CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"


@dataclass(frozen=True)
class Learned:
    """A learned token: its text, and its vectors [vectors, width] for one text encoder."""

    path: Path
    token: str
    vectors: TensorRef

    @property
    def tokens(self) -> list[str]:
        """The text of each vector's token."""
        count = self.vectors.shape[0] if len(self.vectors.shape) > 1 else 1
        return [self.token, *(f"{self.token}_{number}" for number in range(1, count))]

    def rows(self) -> NDArray[np.float32]:
        """float32 [vectors, width]"""
        return self.vectors.array().astype(np.float32).reshape(len(self.tokens), -1)


@dataclass(frozen=True)
class Vocabulary:
    """The learned tokens of one text encoder. Their ids begin at `first`, behind those of its tokenizer."""

    first: int
    learned: tuple[Learned, ...]

    @classmethod
    def of(cls, source: Source, encoder: str) -> Vocabulary:
        """Those that are added to an encoder of a source. Raises NotFound, or SourceError naming the file."""
        folder = source.root / tokenizer_of(encoder)
        several = len([name for name in ENCODERS if (source.root / name).is_dir()]) > 1
        learned = tuple(_read(one, encoder, several) for one in source.added("embedding"))
        if not learned:
            return cls(0, ())
        try:
            tokenizer = ClipTokenizer(folder)
        except BundleError as error:
            raise SourceError(str(error)) from None
        seen = set(tokenizer.vocabulary)
        for one in learned:
            if there := sorted(seen.intersection(one.tokens)):
                raise SourceError(
                    f"{one.path} adds the token {quoted(there[0])}, which {folder} has already: give it another name, "
                    f"--embedding NAME={one.path}"
                )
            seen.update(one.tokens)
        return cls(len(tokenizer.vocabulary), learned)

    @property
    def ids(self) -> dict[str, int]:
        """The id of each token."""
        tokens = (token for one in self.learned for token in one.tokens)
        return {token: self.first + number for number, token in enumerate(tokens)}

    def size(self, published: int) -> int:
        """How many tokens an encoder that was published with so many has."""
        return max(published, self.first + len(self.ids))

    def table(self, published: TensorRef, size: int) -> NDArray[np.float32]:
        """The embedding with the rows of the learned tokens: float32 [size, width]."""
        found = np.zeros((size, published.shape[1]), np.float32)
        found[: published.shape[0]] = published.array()
        first = self.first
        for one in self.learned:
            found[first : first + len(one.tokens)] = one.rows()
            first += len(one.tokens)
        return found

    def check(self, published: TensorRef) -> None:
        """Raises SourceError where vectors have another width than the published embedding."""
        for one in self.learned:
            if one.vectors.shape[-1] != published.shape[1]:
                raise SourceError(
                    f"{one.path} has vectors of width {one.vectors.shape[-1]}, the text encoder's embedding has "
                    f"{published.shape[1]}: take an embedding that was trained for this model"
                )

    def files(self, published: Mapping[str, Path]) -> dict[str, Path]:
        """The files of the tokenizer, by name, with the learned tokens in the one that lists added tokens."""
        if not self.learned:
            return dict(published)
        config = read_json(published[CONFIG])
        if "added_tokens_decoder" in config:
            more = {str(key): {"content": token, **FLAGS} for token, key in self.ids.items()}
            name, content = CONFIG, {**config, "added_tokens_decoder": {**config["added_tokens_decoder"], **more}}
        else:
            older = read_json(published[ADDED]) if ADDED in published else {}
            name, content = ADDED, {**older, **self.ids}
        return {**published, name: _kept(content)}


def tokenizer_of(encoder: str) -> str:
    """The folder of an encoder's tokenizer: those of the second have the same number."""
    return encoder.replace("text_encoder", "tokenizer")


def _kept(content: Mapping[str, Any]) -> Path:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return cached(key_of("tokenizer", text), ".json", lambda path: path.write_text(text, encoding="utf-8"))


def _read(addition: Addition, encoder: str, several: bool) -> Learned:
    """The vectors of a file for one of a model's encoders. Raises NotFound, or SourceError for another kind of file."""
    path, (_, tensors) = addition.path, read_header(addition.path)
    key = ENCODERS[encoder] if several else next(iter(tensors), "")
    expected = set(ENCODERS.values()) if several else {key}
    if tensors.keys() != expected or not key:
        wanted = (
            f"the tensors {' and '.join(sorted(expected))}, as this model has two text encoders"
            if several
            else ("one tensor, [vectors, width]")
        )
        raise SourceError(f"{path} has {listing(tensors)}, expected {wanted}: take an embedding of the same model")
    vectors = tensors[key]
    if len(vectors.shape) not in (1, 2) or 0 in vectors.shape or vectors.dtype not in EXPONENTS:
        raise SourceError(
            f"{path}: {quoted(key)} is {vectors.dtype} {list(vectors.shape)}, expected floating-point vectors "
            "[vectors, width]: take the file as it was published"
        )
    check_finite({key: vectors})
    named = addition.name if key in UNNAMED or addition.name != path.stem else key
    return Learned(path, named, vectors)
