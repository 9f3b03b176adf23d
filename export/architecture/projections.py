"""How the kinds of image adapters (IP-Adapter) make tokens of a picture's features: what a file's tensors say of its
kind, diffusers' module for it, and the module's names of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from torch import nn

from export.checkpoint.single_file import Stored
from export.checkpoint.tensors import TensorRef
from runtime.errors import UnsupportedModel

PREFIX: Final = "image_proj."
"""What the names of a projection's tensors begin with in the file of an adapter."""
TOKENS: Final = 4
"""Tokens that a plain adapter makes of a picture."""
HEAD: Final = 64
"""The width of a head of the resampler's attention."""
FUSED: Final = "to_kv"
"""Keys and values of the resampler in one matrix, as the files have them."""
UNKNOWN: Final[Mapping[str, str]] = {
    "perceiver_resampler.proj_in.weight": "FaceID Plus",
    "norm.weight": "FaceID",
}
"""Tensors that only files of kinds have that read the features of a face recognizer."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Projection:
    """What a file says of its projection: the width of the features that it reads, those of each position of the
    encoder's last layer but one (`hidden`) or one vector for the picture, and the width of the tokens that it makes.
    """

    hidden: bool
    width: int
    context: int
    make: Callable[[], nn.Module]


def _plain(shapes: Shapes) -> Projection:
    rows, width = shapes["proj.weight"]
    context = rows // TOKENS
    return Projection(False, width, context, lambda: ImageProjection(width, context, TOKENS))


def _full(shapes: Shapes) -> Projection:
    width, context = shapes["proj.0.weight"][1], shapes["proj.3.weight"][0]
    return Projection(True, width, context, lambda: IPAdapterFullImageProjection(width, context))


def _plus(shapes: Shapes) -> Projection:
    _, queries, inner = shapes["latents"]
    width, context = shapes["proj_in.weight"][1], shapes["proj_out.weight"][0]
    heads = shapes["layers.0.0.to_q.weight"][0] // HEAD
    return Projection(
        True, width, context, lambda: IPAdapterPlusImageProjection(width, context, inner, 4, HEAD, heads, queries)
    )


@dataclass(frozen=True)
class Kind:
    """A kind: the tensor that only its files have, what their shapes say, and patterns of names with what the library
    calls them.
    """

    mark: str
    read: Callable[[Shapes], Projection]
    names: Mapping[str, str]


KINDS: Final = (
    Kind("proj.weight", _plain, {r"^proj": "image_embeds"}),
    Kind("proj.3.weight", _full, {r"^proj\.0": "ff.net.0.proj", r"^proj\.2": "ff.net.2", r"^proj\.3": "norm"}),
    Kind(
        "latents",
        _plus,
        {
            r"(layers\.\d+)\.0\.norm1": r"\1.ln0",
            r"(layers\.\d+)\.0\.norm2": r"\1.ln1",
            r"(layers\.\d+)\.0\.to_out": r"\1.attn.to_out.0",
            r"(layers\.\d+)\.0\.to_": r"\1.attn.to_",
            r"(layers\.\d+)\.1\.0": r"\1.ff.0",
            r"(layers\.\d+)\.1\.1": r"\1.ff.1.net.0.proj",
            r"(layers\.\d+)\.1\.3": r"\1.ff.1.net.2",
        },
    ),
)
"""Plain adapters, "full face", and those with a resampler ("plus", "plus face")."""


def read(file: Path, tensors: Mapping[str, TensorRef]) -> Projection:
    """The projection of an adapter's file. Raises UnsupportedModel where it is of no kind that can be built."""
    shapes = {name.removeprefix(PREFIX): ref.shape for name, ref in tensors.items() if name.startswith(PREFIX)}
    kind = _kind(file, shapes)
    try:
        return kind.read(shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise UnsupportedModel(
            f"{file} has {PREFIX}{kind.mark}, but no whole projection beside it ({error}): take the file as it was "
            "published"
        ) from None


def _kind(file: Path, shapes: Shapes) -> Kind:
    expected = "expected an IP-Adapter of the kind plain, plus, plus face or full face"
    if found := next((kind for kind in KINDS if kind.mark in shapes), None):
        return found
    if named := next((name for mark, name in UNKNOWN.items() if mark in shapes), None):
        raise UnsupportedModel(
            f"{file} is an adapter of the kind {named}, which reads the features of a face recognizer, {expected}"
        )
    raise UnsupportedModel(f"{file} has none of {', '.join(PREFIX + kind.mark for kind in KINDS)}: {expected}")


def named(file: Path, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors of an adapter's file under the library's names. Keys and values in one matrix are taken apart."""
    names = _kind(file, {name.removeprefix(PREFIX): ref.shape for name, ref in tensors.items()}).names
    found: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        own = name.removeprefix(PREFIX)
        if own == name:
            found[name] = ref
            continue
        for pattern, replacement in names.items():
            own = re.sub(pattern, replacement, own)
        found |= {PREFIX + part: piece for part, piece in _apart(own, ref).items()}
    return found


def _apart(name: str, ref: TensorRef) -> dict[str, TensorRef]:
    if FUSED not in name:
        return {name: ref}
    both, half = Stored(ref), ref.shape[0] // 2
    return {name.replace(FUSED, "to_k"): both[:half].ref, name.replace(FUSED, "to_v"): both[half:].ref}
