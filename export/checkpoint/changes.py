"""Weights that a build changes: each is computed of the checkpoint's and of what is added, one at a time, into a file
of float32 tensors in the cache. Where they will lie is known before any is computed, so graphs and plans need none.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from calibration.ground.progress import each
from export.build.keys import code
from export.build.staging import cached, key_of
from export.checkpoint.component import Checkpoint
from export.checkpoint.embeddings import ENCODERS, Vocabulary
from export.checkpoint.keys import renamed
from export.checkpoint.lora import Lora, LowRank, read_lora
from export.checkpoint.source import Source
from export.checkpoint.tensors import TensorRef, check_finite
from runtime.bundle.manifest import sha256
from runtime.files import cache_folder

if TYPE_CHECKING:
    from torch import nn

Floats = NDArray[np.float32]
ALIGNMENT: Final = 64
"""Bytes: engines map tensors that begin at a multiple of it."""


@dataclass(frozen=True)
class Change:
    """A weight that is computed: its shape and the function that makes it."""

    shape: tuple[int, ...]
    made: Callable[[], Floats]


@dataclass(frozen=True)
class Changes:
    """The changed weights by component and name in the library's model. `key` identifies what they are made of, and
    `read` are the tensors of the files that were added.
    """

    key: str = ""
    weights: Mapping[str, Mapping[str, Change]] = field(default_factory=dict)
    read: Mapping[str, TensorRef] = field(default_factory=dict)

    def refs(self, component: str) -> dict[str, TensorRef]:
        """Where the changed weights of a component lie once `write` was called."""
        start, found = len(self._header), {}
        for (folder, name), change, offset in self._places():
            if folder == component:
                nbytes = 4 * int(np.prod(change.shape))
                found[name] = TensorRef(self._path, start + offset, nbytes, "F32", change.shape)
        return found

    def write(self) -> None:
        """Check what was added, and compute the weights, unless that was done by an earlier build. Raises SourceError
        for numbers that are not finite.
        """
        if self.weights:
            check_finite(self.read)
            cached(self.key, self._path.suffix, self._write)

    @property
    def _path(self) -> Path:
        return cache_folder() / f"{self.key}.safetensors"

    def _places(self) -> Iterator[tuple[tuple[str, str], Change, int]]:
        """Every weight with its component and name, and its offset in the data."""
        offset = 0
        for folder, changes in self.weights.items():
            for name, change in changes.items():
                yield (folder, name), change, offset
                offset += 4 * int(np.prod(change.shape))

    @cached_property
    def _header(self) -> bytes:
        entries: dict[str, Any] = {
            f"{folder}/{name}": {
                "dtype": "F32",
                "shape": list(change.shape),
                "data_offsets": [offset, offset + 4 * int(np.prod(change.shape))],
            }
            for (folder, name), change, offset in self._places()
        }
        text = json.dumps(entries).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(self._header)
            for _, change, _ in each("weight", list(self._places())):
                _append(file, change)


def _append(file: BinaryIO, change: Change) -> None:
    array = change.made()
    assert array.shape == change.shape and array.dtype == np.float32, "a change makes what it says"
    file.write(np.ascontiguousarray(array).data)


def changes_of(source: Source, models: Mapping[str, nn.Module], checkpoints: Mapping[str, Checkpoint]) -> Changes:
    """What the additions of a source change in its components' weights. Raises SourceError, naming the file, where one
    does not fit.
    """
    loras, files = read_loras(source), [*source.added("lora"), *source.added("embedding")]
    if not files:
        return Changes()
    weights = {
        folder: _tables(source, folder, models[folder], checkpoints[folder]) for folder in ENCODERS if folder in models
    }
    for folder, terms in products(loras, models, source.architecture).items():
        changed = weights.setdefault(folder, {})
        published = checkpoints[folder].mapped(models[folder], list(changed))
        changed |= {
            name: Change(published[name].shape, partial(_sum, published[name], several))
            for name, several in terms.items()
        }
    prints = {folder: checkpoints[folder].fingerprint for folder in weights}
    contents = [(one.kind, one.name, one.scale, sha256(one.path)) for one in files]
    read = {f"{lora.path.name}: {name}": ref for lora, _ in loras for name, ref in lora.tensors.items()}
    return Changes(key_of("changes", prints, contents, code()), weights, read)


def _tables(source: Source, folder: str, model: Any, checkpoint: Checkpoint) -> dict[str, Change]:
    """The embedding of a text encoder with learned tokens, by its name."""
    vocabulary = Vocabulary.of(source, folder)
    if not vocabulary.learned:
        return {}
    embedding = model.get_input_embeddings()
    name = next(f"{path}.weight" for path, module in model.named_modules() if module is embedding)
    published = renamed(checkpoint.where, checkpoint.tensors, model)[name]
    vocabulary.check(published)
    size = embedding.num_embeddings
    return {name: Change((size, published.shape[1]), partial(vocabulary.table, published, size))}


def read_loras(source: Source) -> list[tuple[Lora, float]]:
    """The LoRA files that are added to the weights, each with its scale. Raises what `read_lora` raises."""
    return [(read_lora(one.path), one.scale) for one in source.added("lora")]


def products(
    loras: Sequence[tuple[Lora, float]], models: Mapping[str, nn.Module], made: str
) -> dict[str, dict[str, list[tuple[float, LowRank]]]]:
    """What is added to each weight, by component and name: scales and products. Raises SourceError where a file does
    not fit the models; `made` names them.
    """
    found: dict[str, dict[str, list[tuple[float, LowRank]]]] = {}
    for lora, scale in loras:
        for folder, layers in lora.matched(models, made).items():
            for name, low_rank in layers.items():
                found.setdefault(folder, {}).setdefault(name, []).append((scale, low_rank))
    return found


def _sum(weight: TensorRef, terms: list[tuple[float, LowRank]]) -> Floats:
    """A weight and the products that are added to it, each times its scale."""
    total = weight.array().astype(np.float32)
    for scale, low_rank in terms:
        total += np.float32(scale) * low_rank.delta(weight.shape)
    return total
