"""One network of a checkpoint: its config.json and its weights, as byte ranges of their files.

`open_component` finds the weight files in a folder, whole, in shards or in a variant. Nothing here reads weights into
memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from export.checkpoint.additions import Addition
from export.checkpoint.tensors import TensorRef, read_header
from runtime.bundle.manifest import is_file_name
from runtime.errors import NotFound, SourceError, UnsupportedModel, quoted
from runtime.files import other_content, read_regular

if TYPE_CHECKING:
    import torch

CONFIG: Final = "config.json"
STEMS: Final = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers call the weights of a component."""

USUAL_VARIANT: Final = "fp16"
"""The variant taken where a component exists only in several and none is chosen."""

PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SHARD: Final = re.compile(r"-\d+-of-\d+\.safetensors$")
VARIANT: Final = re.compile(
    rf"({'|'.join(STEMS)})(\.safetensors\.index\.(?P<index>\w+)\.json|\.(?P<file>\w+)\.safetensors(\.index\.json)?)"
)
"""A weight file or an index of a variant, as either library writes it."""
LDM: Final = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
"""Prefixes of a single-file checkpoint in the layout of the original Stable Diffusion code."""

LARGEST_JSON: Final = 1 << 26
"""Bytes of a config or an index: one of 100,000 tensors has some 10 MB."""
SAMPLED: Final = 1024
"""Bytes of a tensor's start, middle and end that enter the fingerprint."""


@dataclass(frozen=True)
class Checkpoint:
    """One network's published weights: its config.json, its safetensors files and, by the names in them, every tensor's
    byte range. `variant` says which of several saved forms these weights are, such as fp16; empty, the plain one.
    """

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    headers: Mapping[Path, bytes]
    variant: str = ""

    def mapped(self, model: torch.nn.Module, elsewhere: Collection[str] = ()) -> dict[str, TensorRef]:
        """The tensor of every parameter and persistent buffer of `model`, by its name in `model.state_dict()`, as
        from_pretrained loads it.

        `model` may be on the meta device; tensors named `elsewhere` are in other files; tied names share one TensorRef;
        dtypes are those published. Raises SourceError listing what is missing or of another shape, UnsupportedModel
        where loading would compute a tensor.
        """
        from export.checkpoint.keys import (
            map_names,
        )  # the libraries behind it are slow to import, and reading needs none of them

        return map_names(self.where, self.tensors, model, elsewhere)

    @property
    def where(self) -> str:
        """Where the weights lie, for messages."""
        if self.root in self.headers:
            return str(self.root)
        apart = [file for file in self.headers if file.parent != self.root]
        return f"{apart[0]}, read as {self.root}," if apart else str(self.root)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over config.json and, for every weight file, its header, its size and 3 x 1024 bytes of each
        tensor.

        Cheap (no file is read through), yet it differs between trainings of one architecture, whose headers are equal.
        It is no proof of integrity: single changed weights may go unseen.
        """
        config = b"" if self.root in self.headers else (self.root / CONFIG).read_bytes()
        return _fingerprint(config, self.headers, self.tensors)


def fingerprint_of(addition: Addition) -> str:
    """The same of an addition, whose path is a component's folder or a file of weights. Raises SourceError."""
    return (open_component if addition.path.is_dir() else open_file)(addition.path).fingerprint


def _fingerprint(config: bytes, headers: Mapping[Path, bytes], tensors: Mapping[str, TensorRef]) -> str:
    digest = hashlib.sha256(config)
    for file, header in sorted(headers.items()):
        digest.update(f"{len(header)} {file.stat().st_size}\n".encode())
        digest.update(header)
    for _, ref in sorted(tensors.items()):
        for piece in _samples(ref):
            digest.update(piece)
    return digest.hexdigest()


def _samples(ref: TensorRef) -> Iterable[bytes]:
    if ref.nbytes:
        data = ref.array().reshape(-1).view("u1")
        for start in (0, ref.nbytes // 2, max(0, ref.nbytes - SAMPLED)):
            yield data[start : start + SAMPLED].tobytes()


def open_file(path: Path) -> Checkpoint:
    """Open a single file of weights that has no config, such as an adapter's. Raises NotFound or SourceError."""
    if path.suffix in PICKLES:
        refuse_pickle(path)
    header, tensors = read_header(path)
    return Checkpoint(path, {}, tensors, {path: header})


def open_component(folder: Path, variant: str = "") -> Checkpoint:
    """Open a component of a diffusers pipeline, or a transformers model. Headers are read and checked, tensors are not.

    Weight files are those of the `variant`, where there are any, else the plain ones: of diffusers' models the shards
    of an index, then `diffusion_pytorch_model.safetensors`; of transformers' models `model.safetensors`, then shards.
    Where there are neither and no variant is chosen, the only variant, or fp16 of several.

    Raises NotFound for a missing folder or file, SourceError for a damaged file or a pickle checkpoint,
    UnsupportedModel for weights that are already quantized.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} does not exist: expected a folder with {CONFIG} and safetensors weights")
    config = component_config(folder)
    headers: dict[Path, bytes] = {}
    tensors: dict[str, TensorRef] = {}
    files = weight_files(folder, "_class_name" in config, variant)
    for file in files.paths:
        headers[file], found = read_header(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise SourceError(
                f"{file}: tensor {quoted(twice[0])} stands in {tensors[twice[0]].file.name} too. Download the "
                "checkpoint again"
            )
        tensors.update(found)
    if absent := sorted(files.owners.keys() - tensors.keys()):
        raise SourceError(
            f"{files.owners[absent[0]]}: tensor {quoted(absent[0])} of the index is not in it. Download the checkpoint "
            "again"
        )
    if any(name.startswith(LDM) for name in tensors):
        raise UnsupportedModel(
            f"{folder} holds a whole model in the original Stable Diffusion layout, expected one network of it. Build "
            f"the file itself: enginecast build {files.paths[0]} --config FOLDER"
        )
    return Checkpoint(folder, config, tensors, headers, files.variant)


def component_config(folder: Path) -> dict[str, Any]:
    """The config.json of a component. Raises NotFound, SourceError, or UnsupportedModel where its weights are quantized
    already.
    """
    config = read_json(folder / CONFIG)
    if "quantization_config" in config:
        raise UnsupportedModel(
            f"{folder} is quantized already ({CONFIG} has quantization_config): take the checkpoint it was made from"
        )
    return config


class WeightFiles(NamedTuple):
    """The weight files of a component and, where an index lists them, the file that each tensor should be in."""

    paths: Sequence[Path]
    owners: Mapping[str, Path]
    variant: str


def weight_files(folder: Path, diffusers: bool, variant: str = "") -> WeightFiles:
    """The files of the form that the library prefers, as in `open_component`; `diffusers` says which library."""
    names, found = {path.name for path in folder.iterdir()}, variants(folder)
    plain = next((name for name in _plain(diffusers) if name in names), None)
    if variant in found:
        return _files(folder, found[variant], variant)
    if plain is not None:
        return _files(folder, plain, "")
    only = next(iter(found)) if len(found) == 1 else USUAL_VARIANT
    if only in found and not variant:
        return _files(folder, found[only], only)
    if found:
        raise SourceError(
            f"{folder} holds only variants of the weights, {', '.join(found.values())}: choose one of them, such as "
            f"--variant {next(iter(found))}"
        )
    _refuse(folder, names)


def variants(folder: Path) -> dict[str, str]:
    """The variants of a component's weights, and the file of each, or its index."""
    names = sorted(path.name for path in folder.iterdir())
    matches = [match for name in names if (match := VARIANT.fullmatch(name))]
    return {match["index"] or match["file"]: match.string for match in matches}


def _plain(diffusers: bool) -> Iterator[str]:
    """The names of weights that are no variant, in the library's order."""
    endings = (".safetensors.index.json", ".safetensors") if diffusers else (".safetensors", ".safetensors.index.json")
    return (f"{stem}{ending}" for stem in (STEMS if diffusers else reversed(STEMS)) for ending in endings)


def _files(folder: Path, name: str, variant: str) -> WeightFiles:
    path = folder / name
    return WeightFiles(*(_indexed(path) if path.suffix == ".json" else ([path], {})), variant)


def _indexed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shards of an index and the shard of each tensor. A shard outside the index's folder is refused."""
    owners = read_json(index).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(name, str) for name in owners.values()):
        raise SourceError(f"{index} has no weight_map from tensor to file. Download it again")
    if strange := sorted({name for name in owners.values() if not is_file_name(name)}):
        raise SourceError(f"{index} names {quoted(strange[0])}, expected a file in its own folder. Download it again")
    if absent := sorted({name for name in owners.values() if not (index.parent / name).is_file()}):
        raise NotFound(
            f"{index} lists {len(absent)} shards that do not exist: {', '.join(absent)}. Download the checkpoint again"
        )
    files = {name: index.parent / name for name in sorted(set(owners.values()))}
    return list(files.values()), {tensor: files[name] for tensor, name in owners.items()}


def _refuse(folder: Path, names: set[str]) -> NoReturn:
    """Say why a folder without usable weights is no component."""
    if any(SHARD.search(name) for name in names):
        raise NotFound(
            f"{folder} has shards but no {STEMS[1]}.safetensors.index.json: download the checkpoint again, with its "
            "index"
        )
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        refuse_pickle(folder / pickles[0])
    raise NotFound(
        f"{folder} has no weights: expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}, whole or in shards"
    )


def refuse_pickle(file: Path) -> NoReturn:
    target = file.parent / f"{STEMS[0] if file.name.startswith(STEMS[0]) else STEMS[1]}.safetensors"
    raise SourceError(
        f"{file} is a pickle, which can run code when it is read, and is refused. Convert it to safetensors: "
        f'python -c "import torch; from safetensors.torch import save_file; '
        f"state = torch.load('{file}', map_location='cpu', weights_only=True); "
        f"save_file({{name: value.clone().contiguous() for name, value in state.items()}}, '{target}')\" "
        "(a single-file Stable Diffusion .ckpt has its tensors in state['state_dict'])"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises NotFound or SourceError."""
    if not file.is_file():
        raise NotFound(f"{file} does not exist: download the checkpoint again, with all its files")
    try:
        data = read_regular(file, LARGEST_JSON)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}") from None
    if other := other_content(data):
        raise SourceError(f"{file} {other}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file} is no JSON: {error}. Download it again") from None
    if not isinstance(content, dict):
        raise SourceError(f"{file} holds {type(content).__name__}, expected a JSON object. Download it again")
    return content
