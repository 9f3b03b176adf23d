"""Implausible sizes in a config.json are refused before a library is imported or anything is allocated.

A width is compared with the largest dimension that a tensor of the weight files has, a number of layers with the number
of tensors, what both imply with the number of weights. Lengths that no tensor has are bounded. What is within the
bounds and wrong all the same is found when names and shapes are mapped (`export.checkpoint.keys`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from export.checkpoint.tensors import TensorRef
from runtime.errors import SourceError

WIDTHS: Final = frozenset(
    "hidden_size intermediate_size vocab_size num_attention_heads num_key_value_heads head_dim attention_head_dim "
    "block_out_channels "
    "cross_attention_dim in_channels out_channels latent_channels num_channels norm_num_groups patch_size "
    "addition_time_embed_dim "
    "projection_class_embeddings_input_dim".split()
)
DEPTHS: Final = frozenset("num_hidden_layers layers_per_block transformer_layers_per_block".split())
LENGTHS: Final[Mapping[str, int]] = {
    "max_position_embeddings": 1 << 24,
    "original_max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
    "image_seq_length": 1 << 20,
    "image_size": 1 << 16,
    "sample_size": 1 << 16,
    "projection_dim": 1 << 20,
}
"""The largest values of what no tensor need have as a dimension: tokens, pixels, features."""
LISTS: Final = frozenset(
    "attention_head_dim block_out_channels cross_attention_dim layers_per_block num_attention_heads sample_size "
    "transformer_layers_per_block".split()
)
"""What UNets give once for each block, or for height and width."""
REQUIRED: Final = frozenset("hidden_size intermediate_size num_hidden_layers block_out_channels vocab_size".split())
"""What no model leaves to be chosen, so that null is no value; where a library has a default it may be absent."""
ANY_WIDTH: Final = 1 << 16
ANY_DEPTH: Final = 256
"""Widths and numbers of layers up to these cost nothing before names and shapes are compared."""
MOST_BLOCKS: Final = 64


def check_sizes(file: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorRef] | None = None) -> None:
    """Raise SourceError for numbers of a config.json that are none, or that its weight files cannot have.

    Without `tensors`, where they cannot be read, only what no model has is refused.
    """
    width, depth, lists = 1 << 24, 1 << 16, LISTS if "_class_name" in config else frozenset()
    if tensors is not None:
        width = max(ANY_WIDTH, *(max(ref.shape, default=0) for ref in tensors.values()), 0)
        depth = max(ANY_DEPTH, len(tensors))
    for where, part in _parts("", config):
        for name, value in part.items():
            most = width if name in WIDTHS else depth if name in DEPTHS else LENGTHS.get(name)
            if most is not None:
                limit = f"{most:,}" + (
                    ", the most that its weight files allow" if tensors and name not in LENGTHS else ""
                )
                _check(file, f"{where}{name}", name, _numbers(value, name in lists), most, limit)
        _check_positions(file, where, part, width)
        if tensors is not None:
            _check_total(file, where, part, sum(math.prod(ref.shape) for ref in tensors.values()))


def _parts(where: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A config and the configs in it (text_config, vision_config, ...), each with its place."""
    yield where, config
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            yield from _parts(f"{where}{name}.", value)


def _check(file: Path, where: str, name: str, numbers: Collection[object], most: int, limit: str) -> None:
    least = 0 if name == "transformer_layers_per_block" else 1
    for number in numbers:
        if number is None and name not in REQUIRED:
            continue
        if type(number) is not int:
            raise SourceError(f"{file}: {where} is {_shown(number)}, expected a whole number. {_FIX}")
        if not least <= number <= most:
            raise SourceError(f"{file}: {where} is {_shown(number)}, expected {least} to {limit}. {_FIX}")


def _numbers(value: object, several: bool) -> Collection[object]:
    """The value, or where it may be a list, of lists even, what is in it; the list itself where that is empty or too
    long.
    """
    if not several or not isinstance(value, list):
        return [value]
    if not 0 < len(value) <= MOST_BLOCKS:
        return [value]
    return [number for one in value for number in (_numbers(one, several) if isinstance(one, list) else [one])]


def _check_positions(file: Path, where: str, part: Mapping[str, Any], width: int) -> None:
    """A vision tower has a position for each patch, which is a dimension of a tensor."""
    size, patch = part.get("image_size"), part.get("patch_size")
    if type(size) is int and type(patch) is int and (size // patch) ** 2 > width:
        raise SourceError(
            f"{file}: {where}image_size {size} has {(size // patch) ** 2:,} patches of {patch}, expected at most "
            f"{width:,}. {_FIX}"
        )


def _check_total(file: Path, where: str, part: Mapping[str, Any], elements: int) -> None:
    """Each layer of a transformer has at least two matrices of hidden_size by intermediate_size."""
    sizes = [part.get(name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    if (
        all(type(size) is int for size in sizes)
        and (implied := 2 * math.prod(int(size or 0) for size in sizes)) > elements
    ):
        raise SourceError(
            f"{file}: {where}num_hidden_layers, hidden_size and intermediate_size imply {implied:,} weights or more, "
            "its weight files hold "
            f"{elements:,}. {_FIX}"
        )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


_FIX: Final = "Take the config.json that was published with these weights"
