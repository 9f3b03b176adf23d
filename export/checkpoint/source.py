"""Where the weights come from: a folder, a sample or a hub id, and the components in it, as byte ranges
of their files.

`resolve` finds the folder and says what it holds; `open_component` opens one network of it. Nothing here reads weights
into memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from export.checkpoint.additions import Addition
from export.checkpoint.plausible import check_sizes
from export.checkpoint.tensors import TensorRef, check_finite, read_header, release
from runtime.bundle.manifest import check_name, is_file_name
from runtime.errors import (
    InvalidInput,
    MissingDependency,
    NotFound,
    SourceError,
    UnsupportedModel,
    did_you_mean,
    quoted,
)
from runtime.files import other_content, read_regular

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Source", "TensorRef", "check_finite", "open_component", "read_json", "release", "resolve"]

SAMPLES: Final = Path(__file__).parents[2] / "samples"
SAMPLE: Final = "sample:"
PIPELINE: Final = "model_index.json"
CONFIG: Final = "config.json"
STEMS: Final = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers call the weights of a component."""

VARIANT: Final = "fp16"
"""The variant taken where a component exists only in several."""

PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ADAPTER: Final = "adapter_config.json"
LORA: Final = re.compile(r"(^|[._])lora([._]|$)|\.base_layer\.")
"""In names of adapters' tensors and of the layers that they wrap."""

MERGE: Final = (
    "merge it into its model with fuse_lora() and unload_lora_weights() of a diffusers pipeline, or merge_and_unload() "
    "of PEFT, "
    "save the result with save_pretrained()"
)
SHARD: Final = re.compile(r"-\d+-of-\d+\.safetensors$")
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LDM: Final = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
"""Prefixes of a single-file checkpoint in the layout of the original Stable Diffusion code."""
LDM_XL: Final = "conditioner.embedders."
"""Prefix of the text encoders of SDXL's."""

LARGEST_JSON: Final = 1 << 26
"""Bytes of a config or an index: one of 100,000 tensors has some 10 MB."""
SAMPLED: Final = 1024
"""Bytes of a tensor's start, middle and end that enter the fingerprint."""

Layout = Literal["diffusers", "transformers"]


@dataclass(frozen=True)
class Source:
    """A model's folder. `architecture` is the class that made it: `StableDiffusionPipeline`,
    `LlavaForConditionalGeneration`, ... `additions` are what the build adds to it.
    """

    root: Path
    name: str
    layout: Layout
    architecture: str
    additions: tuple[Addition, ...] = ()

    def added(self, kind: str) -> tuple[Addition, ...]:
        """The additions of a kind, in their order."""
        return tuple(one for one in self.additions if one.kind == kind)


@dataclass(frozen=True)
class Checkpoint:
    """One network's published weights: its config.json, its safetensors files and, by the names in them, every tensor's
    byte range.
    """

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    headers: Mapping[Path, bytes]

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

        return map_names(self.root, self.tensors, model, elsewhere)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over config.json and, for every weight file, its header, its size and 3 x 1024 bytes of each
        tensor.

        Cheap (no file is read through), yet it differs between trainings of one architecture, whose headers are equal.
        It is no proof of integrity: single changed weights may go unseen.
        """
        return _fingerprint((self.root / CONFIG).read_bytes(), self.headers, self.tensors)


def fingerprint_of(addition: Addition) -> str:
    """The same of an addition, whose path is a component's folder or a file of weights. Raises SourceError."""
    if addition.path.is_dir():
        return open_component(addition.path).fingerprint
    if addition.path.suffix in PICKLES:
        _refuse_pickle(addition.path)
    header, tensors = read_header(addition.path)
    return _fingerprint(b"", {addition.path: header}, tensors)


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


def open_component(folder: Path) -> Checkpoint:
    """Open a component of a diffusers pipeline, or a transformers model. Headers are read and checked, tensors are not.

    Weight files in order of preference, as the libraries have it: of diffusers' models the shards of an index, then
    `diffusion_pytorch_model.safetensors`; of transformers' models `model.safetensors`, then shards; in both, a variant
    last (`model.fp16.safetensors`), single or sharded. Raises NotFound for a missing folder or file, SourceError for a
    damaged file or a pickle checkpoint, UnsupportedModel for weights that are already quantized.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} does not exist: expected a folder with {CONFIG} and safetensors weights")
    config = read_json(folder / CONFIG)
    if "quantization_config" in config:
        raise UnsupportedModel(
            f"{folder} is quantized already ({CONFIG} has quantization_config): take the checkpoint it was made from"
        )
    headers: dict[Path, bytes] = {}
    tensors: dict[str, TensorRef] = {}
    files, owners = _weight_files(folder, "_class_name" in config)
    for file in files:
        headers[file], found = read_header(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise SourceError(
                f"{file}: tensor {quoted(twice[0])} stands in {tensors[twice[0]].file.name} too. Download the "
                "checkpoint again"
            )
        tensors.update(found)
    if absent := sorted(owners.keys() - tensors.keys()):
        raise SourceError(
            f"{owners[absent[0]]}: tensor {quoted(absent[0])} of the index is not in it. Download the checkpoint again"
        )
    if any(name.startswith(LDM) for name in tensors):
        _refuse_ldm(folder, tensors)
    return Checkpoint(folder, config, tensors, headers)


def _weight_files(folder: Path, diffusers: bool) -> tuple[list[Path], dict[str, Path]]:
    """The files of the form that the library prefers and, where an index lists them, the file that each tensor should
    be in.
    """
    names = {path.name for path in folder.iterdir()}
    endings = (".safetensors.index.json", ".safetensors") if diffusers else (".safetensors", ".safetensors.index.json")
    for stem in STEMS if diffusers else reversed(STEMS):
        for name in (f"{stem}{ending}" for ending in endings):
            if name in names:
                return _indexed(folder / name) if name.endswith(".json") else ([folder / name], {})
    variant = re.compile(rf"({'|'.join(STEMS)})(\.safetensors\.index\.\w+\.json|\.\w+\.safetensors(\.index\.json)?)")
    variants = sorted(name for name in names if variant.fullmatch(name))
    chosen = variants if len(variants) == 1 else [name for name in variants if f".{VARIANT}." in name]
    if len(chosen) == 1:
        path = folder / chosen[0]
        return _indexed(path) if path.suffix == ".json" else ([path], {})
    if variants:
        raise SourceError(
            f"{folder} holds only variants of the weights, {', '.join(variants)}: rename one to {STEMS[1]}.safetensors"
        )
    _refuse(folder, names)


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
        _refuse_pickle(folder / pickles[0])
    raise NotFound(
        f"{folder} has no weights: expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}, whole or in shards"
    )


def _refuse_pickle(file: Path) -> NoReturn:
    target = file.parent / f"{STEMS[0] if file.name.startswith(STEMS[0]) else STEMS[1]}.safetensors"
    raise SourceError(
        f"{file} is a pickle, which can run code when it is read, and is refused. Convert it to safetensors: "
        f'python -c "import torch; from safetensors.torch import save_file; '
        f"state = torch.load('{file}', map_location='cpu', weights_only=True); "
        f"save_file({{name: value.clone().contiguous() for name, value in state.items()}}, '{target}')\" "
        "(a single-file Stable Diffusion .ckpt: diffusers' "
        "StableDiffusionPipeline.from_single_file(...).save_pretrained(folder))"
    )


def _refuse_ldm(path: Path, names: Iterable[str]) -> NoReturn:
    pipeline = (
        "StableDiffusionXLPipeline" if any(name.startswith(LDM_XL) for name in names) else "StableDiffusionPipeline"
    )
    raise UnsupportedModel(
        f"{path} is a single-file checkpoint in the original Stable Diffusion layout, expected a diffusers folder. "
        "Make one: "
        f'python -c "from diffusers import {pipeline}; '
        f"{pipeline}.from_single_file('{path}').save_pretrained('{path.with_suffix('')}-diffusers')\""
    )


def resolve(source: str, weights: bool = True) -> Source:
    """The folder that `source` names: a path, `sample:NAME` (in a source checkout) or a hub id `org/name`, downloaded
    unless it is in the cache; without `weights`, its small files alone.

    Raises NotFound when there is none (or the hub cannot be reached), SourceError when it holds no model, and
    UnsupportedModel for a single-file checkpoint.
    """
    if not source:
        raise InvalidInput("SOURCE", f"is empty: expected a folder, {SAMPLE}NAME or a hub id org/name")
    if source.startswith(SAMPLE):
        return _inspect(_sample(source.removeprefix(SAMPLE)), source.removeprefix(SAMPLE))
    path = _path(source)
    if path.is_dir():
        return _inspect(path, check_name("SOURCE", path.resolve().name))
    if path.is_file():
        _refuse_file(path)
    if HUB_ID.fullmatch(source):
        return _inspect(_download(source, weights), source.partition("/")[2])
    raise NotFound(
        f"{source} does not exist: expected a folder in diffusers or transformers layout, {SAMPLE}NAME or a hub id "
        "org/name"
    )


def _path(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise NotFound(
            f"{source} does not exist: there is no such user, or none with a home folder. Write the folder in full"
        ) from None


def _sample(name: str) -> Path:
    if not SAMPLES.is_dir():
        raise NotFound(
            f"{SAMPLE}{name} does not exist: samples come with a source checkout of enginecast, not with its wheel. "
            "Build from a checkout, or name a checkpoint's folder"
        )
    known = sorted(path.name for path in SAMPLES.iterdir() if (path / PIPELINE).is_file() or (path / CONFIG).is_file())
    if name not in known:
        raise NotFound(f"there is no sample '{name}': {did_you_mean(name, known)}")
    return SAMPLES / name


def is_hub_id(source: str) -> bool:
    """Whether a source is to be looked up at the hub: it is neither a sample nor a folder."""
    return not source.startswith(SAMPLE) and not Path(source).exists() and HUB_ID.fullmatch(source) is not None


def _inspect(root: Path, name: str) -> Source:
    """Tell the layout and the architecture of a folder. Sizes that its configs cannot mean are refused."""
    if (root / PIPELINE).is_file():
        for component, made_by in read_json(root / PIPELINE).items():
            if isinstance(made_by, list) and is_file_name(component) and (root / component / CONFIG).is_file():
                _check_sizes(root / component)
        return Source(
            root, name, "diffusers", _class_name(root / PIPELINE, read_json(root / PIPELINE).get("_class_name"))
        )
    if (root / CONFIG).is_file():
        _check_sizes(root)
        config = read_json(root / CONFIG)
        declared = config.get("architectures") or [config.get("_class_name")]
        return Source(
            root, name, "transformers", _class_name(root / CONFIG, declared[0] if isinstance(declared, list) else None)
        )
    if (root / ADAPTER).is_file():
        _refuse_adapter(root)
    files = sorted(path for path in root.iterdir() if path.is_file() and path.suffix in (".safetensors", *PICKLES))
    if files:
        _refuse_file(files[0])
    raise SourceError(
        f"{root} holds no model: expected {PIPELINE} (diffusers layout) or {CONFIG} (transformers layout)"
    )


def _check_sizes(folder: Path) -> None:
    """Raise SourceError for sizes in a component's config.json that its weights cannot have, or no weights where they
    cannot be read.
    """
    config, tensors = read_json(folder / CONFIG), None
    with suppress(NotFound, SourceError, OSError):  # whoever opens the component says what is wrong with its weights
        files, _ = _weight_files(folder, "_class_name" in config)
        tensors = {name: ref for file in files for name, ref in read_header(file)[1].items()}
    check_sizes(folder / CONFIG, config, tensors)


def _class_name(file: Path, declared: object) -> str:
    if not isinstance(declared, str):
        raise SourceError(
            f"{file} does not say which class made it (found {declared!r}): expected _class_name or architectures"
        )
    return declared


def _refuse_file(path: Path) -> NoReturn:
    """A single file is never a model; say what to do with this kind."""
    if path.suffix in PICKLES:
        _refuse_pickle(path)
    names = read_header(path)[1] if path.suffix == ".safetensors" else {}
    if any(name.startswith(LDM) for name in names):
        _refuse_ldm(path, names)
    if any(LORA.search(name) for name in names):
        _refuse_adapter(path)
    raise UnsupportedModel(
        f"{path} is a single file, expected a folder in diffusers or transformers layout, with its {CONFIG}"
    )


def _refuse_adapter(path: Path) -> NoReturn:
    raise UnsupportedModel(f"{path} holds an adapter (LoRA) without the model that it changes: {MERGE}, and build that")


def _download(hub_id: str, weights: bool) -> Path:
    """A hub repository's folder in the local cache, fetched where it is not complete: configs, tokenizers and
    safetensors only.
    """
    try:
        from httpx2 import HTTPError  # what the hub's client raises unwrapped, of a broken proxy for one
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise MissingDependency("huggingface_hub", "export") from None
    try:
        root = Path(snapshot_download(hub_id, allow_patterns=[PIPELINE, CONFIG]))
        # A pipeline's own folder often holds single-file twins of the whole model beside the components: several GB not
        # wanted.
        inside = "*/" if (root / PIPELINE).is_file() else ""
        patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
        wanted = [PIPELINE, *(f"{inside}{pattern}" for pattern in patterns)]
        return Path(
            snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["*.non_ema.*", "safety_checker/*"])
        )
    except (OSError, HTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NotFound(
            f"{hub_id} is no folder here and could not be fetched from the hub ({type(error).__name__}: {reason}). "
            "Check the name and the network, `hf auth login` for a gated model, or give a folder that was downloaded "
            "elsewhere"
        ) from None


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
