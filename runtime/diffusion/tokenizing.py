"""CLIP prompts to token ids, from the tokenizer folder that a diffusion model is published with.

The vocabulary and merges come from tokenizer.json where there is one, else from vocab.json and merges.txt, as Stable
Diffusion 1.x has them. What CLIP does around them (Unicode NFC, white space, lower case, word splitting, byte-level
BPE; Radford et al. 2021, arXiv 2103.00020, section 2.4) is the same for every CLIP model and stands here, as it does in
transformers.CLIPTokenizer, whose ids these equal. Learned tokens of several vectors (textual inversion; Gal et al.
2022, arXiv 2208.01618) are written out as diffusers' pipelines do.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, count, takewhile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from runtime.errors import BundleError, InvalidInput
from runtime.files import other_content, read_regular

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
SPECIAL: Final = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": END}
"""The special tokens of a CLIP model that names none."""
NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a model may name, in the order in which those that its vocabulary lacks get their ids."""
WORD: Final = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LARGEST: Final = 1 << 26
"""Bytes of a tokenizer's file."""
SHOWN: Final = 80
"""How many characters of a text an error message quotes."""


class ClipTokenizer:
    """The tokenizer of one CLIP text encoder. `limit` is its sequence length in tokens, start and end included (77 for
    SD 1.x).

    Raises BundleError when the folder lacks a file or holds another kind of tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _read_json(folder / "tokenizer_config.json")
        published = _read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
        special, extra = _special_tokens(folder, config)
        self._tokenizer = _build(*_vocabulary(folder, published), special["unk_token"])
        self._tokenizer.add_tokens(_added_tokens(folder, config, published, [*special.values(), *extra]))
        self.start, self.end, self.pad = (
            self._id(folder, special[name]) for name in ("bos_token", "eos_token", "pad_token")
        )
        self.limit = _limit(folder, config)
        self._written_out = _several_vectors(
            {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        )

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The id of every token, added ones included."""
        found: Mapping[str, int] = self._tokenizer.get_vocab()
        return found

    @property
    def last(self) -> str:
        """The text of the token with the largest id. The text encoder needs an embedding for it."""
        text: str = max(self.vocabulary.items(), key=lambda item: item[1])[0]
        return text.removesuffix("</w>")

    def __call__(self, text: str, field: str = "prompt") -> NDArray[np.int64]:
        """Token ids of a prompt: start, text, end, padding; int64 [limit]. An empty text is valid.

        Raises InvalidInput for `field` when the text is longer than the model can read: nothing is cut off.
        """
        found = self.tokens(text, field)
        if len(found) > self.room:
            lost = text[self._beyond(self._encode(text), self.room) :]
            quoted = lost if len(lost) <= SHOWN else f"{lost[:SHOWN]}..."
            raise InvalidInput(
                field,
                f"has {len(found)} tokens, the model reads {self.room} (and start and end): shorten it by what comes "
                f"from '{quoted}' on, or request prompt_weights, which reads longer ones",
            )
        return self.row(found)

    def tokens(self, text: str, field: str = "prompt") -> list[int]:
        """Token ids of a text of any length, without start and end. Raises InvalidInput for `field`."""
        try:
            encoding = self._encode(text)
        except (UnicodeEncodeError, TypeError):
            raise InvalidInput(field, "is not valid Unicode text") from None
        whole = self._all_vectors(text, encoding.tokens) if self._written_out else text
        return list(encoding.ids if whole == text else self._encode(whole).ids)

    def row(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """At most `room` token ids between start and end, padded: int64 [limit]."""
        ids = [self.start, *tokens, self.end]
        return np.array(ids + [self.pad] * (self.limit - len(ids)), np.int64)

    @property
    def room(self) -> int:
        """The tokens of a text that the encoder reads, without start and end."""
        return self.limit - 2

    @property
    def comma(self) -> int | None:
        """The token of a comma at the end of a word; None where the vocabulary has none."""
        found: int | None = self._tokenizer.token_to_id(",</w>")
        return found

    def _encode(self, text: str) -> Encoding:
        (encoding,) = self._tokenizer.encode_batch(
            [text], add_special_tokens=False
        )  # `encode` holds the interpreter lock
        return encoding

    def _all_vectors(self, text: str, tokens: Sequence[str]) -> str:
        """The text with every vector of each learned token in it, by the plain replacement that diffusers'
        maybe_convert_prompt does.
        """
        for token in dict.fromkeys(tokens):
            if token in self._written_out:
                text = text.replace(token, " ".join(self._written_out[token]))
        return text

    def _beyond(self, encoding: Encoding, room: int) -> int:
        """The position in the text of the first token that does not fit."""
        lengths = accumulate(len(self._written_out.get(token, (token,))) for token in encoding.tokens)
        starts = (start for (start, _), length in zip(encoding.offsets, lengths, strict=True) if length > room)
        return int(next(starts, encoding.offsets[-1][0]))

    def _id(self, folder: Path, token: AddedToken) -> int:
        found: int | None = self._tokenizer.token_to_id(token.content)
        if found is None:
            raise BundleError(
                f"{folder} has no token '{token.content}', which its configuration names: copy the tokenizer again"
            )
        return found


def _build(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: AddedToken) -> Tokenizer:
    """CLIP's pipeline around a vocabulary."""
    model = BPE(
        vocab=vocabulary,
        merges=merges,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        unk_token=unknown.content,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def _vocabulary(folder: Path, published: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and the pairs to merge, most frequent first."""
    if not published:
        lines = _read(folder / "merges.txt").splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in pairs):
            raise BundleError(
                f"{folder / 'merges.txt'} is damaged: expected two tokens on each line. Copy the tokenizer again"
            )
        return _read_json(folder / "vocab.json"), [(first, second) for first, second in pairs]
    model = published.get("model", {})
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise BundleError(f"{folder / 'tokenizer.json'} is no CLIP tokenizer: expected BPE with the word ending </w>")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return model["vocab"], [(first, second) for first, second in pairs]


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens by their part, and those without one. In folders of older format, a file of their
    own decides.
    """
    own = folder / "special_tokens_map.json"
    named = {**SPECIAL, **{key: config[key] for key in NAMED if config.get(key)}}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    if "added_tokens_decoder" not in config and own.is_file():
        listed = _read_json(own)
        named |= {key: value for key, value in listed.items() if key in NAMED}
        extra = [*extra, *listed.get("additional_special_tokens", ())]
    extra = extra.values() if isinstance(extra, Mapping) else extra
    return {key: _special(named[key]) for key in NAMED if key in named}, [_special(token) for token in extra]


def _added_tokens(
    folder: Path, config: Mapping[str, Any], published: Mapping[str, Any], special: Sequence[AddedToken]
) -> list[AddedToken]:
    """Tokens that are found in a text before words are split, in the order of their ids. The first of a name counts.

    They stand in tokenizer_config.json; in folders of older format in added_tokens.json (ids by token) and
    tokenizer.json.
    """
    found: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        found = {int(key): _added(token) for key, token in config["added_tokens_decoder"].items()}
    else:
        names = {token.content for token in special}
        if (folder / "added_tokens.json").is_file():
            for token, key in _read_json(folder / "added_tokens.json").items():
                found[int(key)] = AddedToken(token, special=token in names, normalized=token not in names)
        found |= {int(token["id"]): _added(token) for token in published.get("added_tokens", ())}
    return [found[key] for key in sorted(found)] + list(special)


def _special(token: str | Mapping[str, Any]) -> AddedToken:
    return AddedToken(token, special=True) if isinstance(token, str) else _added({**token, "special": True})


def _added(token: Mapping[str, Any]) -> AddedToken:
    flags = {
        key: bool(token[key]) for key in ("lstrip", "rstrip", "single_word", "normalized", "special") if key in token
    }
    return AddedToken(token["content"], **flags)


def _several_vectors(added: Collection[str]) -> dict[str, tuple[str, ...]]:
    """All tokens of each learned token that has several vectors: `<x>`, `<x>_1`, `<x>_2` and so on."""
    several = {}
    for token in added:
        further = takewhile(added.__contains__, (f"{token}_{i}" for i in count(1)))
        if tokens := tuple(further):
            several[token] = (token, *tokens)
    return several


def _limit(folder: Path, config: Mapping[str, Any]) -> int:
    limit = config.get("model_max_length")
    if not isinstance(limit, int) or not 2 < limit < 100_000:
        raise BundleError(
            f"{folder / 'tokenizer_config.json'} has model_max_length {limit}, expected the model's sequence length, "
            "such as 77"
        )
    if config.get("padding_side", "right") != "right":
        raise BundleError(
            f"{folder / 'tokenizer_config.json'} has padding_side {config['padding_side']}, expected right, as all "
            "CLIP models have"
        )
    return limit


def _read(path: Path) -> str:
    try:
        text = read_regular(path, LARGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read ({error}): copy the tokenizer again") from None
    if other := other_content(text[:SHOWN].encode()):
        raise BundleError(f"{path} {other}")
    return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path))
    except ValueError as error:
        raise BundleError(f"{path} is no JSON ({error}): copy the tokenizer again") from None
    if not isinstance(data, dict):
        raise BundleError(f"{path} is damaged: expected a JSON object. Copy the tokenizer again")
    return data
