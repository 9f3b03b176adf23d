"""CLIP prompts to token ids, from the tokenizer folder that a diffusion model is published with.

The vocabulary and merges come from tokenizer.json where there is one, else from vocab.json and merges.txt, as Stable Diffusion 1.x has
them. What CLIP does around them (Unicode NFC, white space, lower case, word splitting, byte-level BPE; Radford et al. 2021,
arXiv 2103.00020, section 2.4) is the same for every CLIP model and stands here, as it does in transformers.CLIPTokenizer, whose ids
these equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from runtime.errors import BundleError, InvalidInput

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
SPECIAL: Final = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
"""The special tokens of a CLIP model that names none."""
WORD: Final = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SHOWN: Final = 80
"""How many characters of a text an error message quotes."""


class ClipTokenizer:
    """The tokenizer of one CLIP text encoder. `limit` is its sequence length in tokens, start and end included (77 for SD 1.x).

    Raises BundleError when the folder lacks a file or holds another kind of tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _read_json(folder / "tokenizer_config.json")
        published = _read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
        special = _special_tokens(folder, config)
        self._tokenizer = _build(*_vocabulary(folder, published), special["unk_token"])
        self._tokenizer.add_tokens(_added_tokens(config, published, special))
        self.start, self.end, self.pad = (self._id(folder, special[name]) for name in ("bos_token", "eos_token", "pad_token"))
        self.limit = _limit(folder, config)

    @property
    def last(self) -> str:
        """The text of the token with the largest id, which a text encoder must have an embedding for."""
        text: str = max(self._tokenizer.get_vocab().items(), key=lambda item: item[1])[0]
        return text.removesuffix("</w>")

    def __call__(self, text: str, field: str = "prompt") -> NDArray[np.int64]:
        """Token ids of a prompt: start, text, end, padding; int64 [limit]. An empty text is valid.

        Raises InvalidInput for `field` when the text is longer than the model can read: nothing is cut off silently.
        """
        try:
            (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)  # `encode` holds the interpreter lock
        except (UnicodeEncodeError, TypeError):
            raise InvalidInput(field, "is not valid Unicode text") from None
        room = self.limit - 2
        if len(encoding.ids) > room:
            lost = text[encoding.offsets[room][0] :]
            quoted = lost if len(lost) <= SHOWN else f"{lost[:SHOWN]}..."
            raise InvalidInput(
                field,
                f"has {len(encoding.ids)} tokens, the model reads {room} (and start and end): shorten it by what comes from '{quoted}' on",
            )
        ids = [self.start, *encoding.ids, self.end]
        return np.array(ids + [self.pad] * (self.limit - len(ids)), np.int64)

    def _id(self, folder: Path, token: AddedToken) -> int:
        found: int | None = self._tokenizer.token_to_id(token.content)
        if found is None:
            raise BundleError(f"{folder} has no token '{token.content}', which its configuration names: copy the tokenizer again")
        return found


def _build(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: AddedToken) -> Tokenizer:
    """CLIP's pipeline around a vocabulary."""
    model = BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=unknown.content)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def _vocabulary(folder: Path, published: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and the pairs to merge, most frequent first."""
    if not published:
        lines = _read(folder / "merges.txt").splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in pairs):
            raise BundleError(f"{folder / 'merges.txt'} is damaged: expected two tokens on each line. Copy the tokenizer again")
        return _read_json(folder / "vocab.json"), [(first, second) for first, second in pairs]
    model = published.get("model", {})
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise BundleError(f"{folder / 'tokenizer.json'} is no CLIP tokenizer: expected BPE with the word ending </w>")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return model["vocab"], [(first, second) for first, second in pairs]


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The start, end, unknown and padding token. Folders of older format may hold them in a file of their own, which then decides."""
    own = folder / "special_tokens_map.json"
    named = {**SPECIAL, **{key: config[key] for key in SPECIAL if config.get(key)}}
    if "added_tokens_decoder" not in config and own.is_file():
        named |= {key: value for key, value in _read_json(own).items() if key in SPECIAL}
    return {key: _added(value) for key, value in named.items()}


def _added_tokens(config: Mapping[str, Any], published: Mapping[str, Any], special: Mapping[str, AddedToken]) -> list[AddedToken]:
    """Tokens that are found in a text before words are split. The first of a name counts."""
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        found = [listed[key] for key in sorted(listed, key=int)]
    else:
        found = sorted(published.get("added_tokens", ()), key=lambda token: int(token["id"]))
    return [_added(token) for token in found] + list(special.values())


def _added(token: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {key: bool(token[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in token}
    return AddedToken(token["content"], special=bool(token.get("special", True)), **flags)


def _limit(folder: Path, config: Mapping[str, Any]) -> int:
    limit = config.get("model_max_length")
    if not isinstance(limit, int) or not 2 < limit < 100_000:
        raise BundleError(
            f"{folder / 'tokenizer_config.json'} has model_max_length {limit}, expected the model's sequence length, such as 77"
        )
    if config.get("padding_side", "right") != "right":
        raise BundleError(
            f"{folder / 'tokenizer_config.json'} has padding_side {config['padding_side']}, expected right, as all CLIP models have"
        )
    return limit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read ({error}): copy the tokenizer again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path))
    except ValueError as error:
        raise BundleError(f"{path} is no JSON ({error}): copy the tokenizer again") from None
    if not isinstance(data, dict):
        raise BundleError(f"{path} is damaged: expected a JSON object. Copy the tokenizer again")
    return data
