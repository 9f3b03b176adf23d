"""Where the weights come from: a folder, a single file, a sample or a hub id, and the components in it, as byte ranges
of their files.

`resolve` finds the folder and says what it holds; `open_component` opens one network of it. Nothing here reads weights
into memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from export.checkpoint import single_file
from export.checkpoint.additions import Addition
from export.checkpoint.component import (
    CONFIG,
    PICKLES,
    Checkpoint,
    open_component,
    read_json,
    refuse_pickle,
    variants,
    weight_files,
)
from export.checkpoint.gguf_file import SUFFIX
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

__all__ = ["Checkpoint", "Source", "TensorRef", "check_finite", "open_component", "read_json", "release", "resolve"]

SAMPLES: Final = Path(__file__).parents[2] / "samples"
SAMPLE: Final = "sample:"
PIPELINE: Final = "model_index.json"
ADAPTER: Final = "adapter_config.json"
LORA: Final = re.compile(r"(^|[._])lora([._]|$)|\.base_layer\.")
"""In names of adapters' tensors and of the layers that they wrap."""

MERGE: Final = (
    "merge it into its model with fuse_lora() and unload_lora_weights() of a diffusers pipeline, or merge_and_unload() "
    "of PEFT, "
    "save the result with save_pretrained()"
)
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
Layout = Literal["diffusers", "transformers"]


@dataclass(frozen=True)
class Source:
    """A model's folder. `architecture` is the class that made it: `StableDiffusionPipeline`,
    `LlavaForConditionalGeneration`, ... `variant` says which of several saved forms of its weights is read, where
    they are not in `file`, one for the whole model; `additions` are what the build adds to it.
    """

    root: Path
    name: str
    layout: Layout
    architecture: str
    variant: str = ""
    file: Path | None = None
    additions: tuple[Addition, ...] = ()

    def open(self, folder: str = "") -> Checkpoint:
        """The component in this folder of the source. Raises what `open_component` raises."""
        if self.file is not None:
            return single_file.open_single_file(self.file, self._contents, self.root / folder)
        return open_component(self.root / folder, self.variant)

    @cached_property
    def _contents(self) -> tuple[bytes, dict[str, TensorRef]]:
        """The header and the tensors of `file`, read once for all its networks."""
        assert self.file is not None, "a folder has files of each network"
        return single_file.read(self.file)

    def added(self, kind: str) -> tuple[Addition, ...]:
        """The additions of a kind, in their order."""
        return tuple(one for one in self.additions if one.kind == kind)


def resolve(source: str, variant: str = "", config: Path | None = None, weights: bool = True) -> Source:
    """The model that `source` names: a folder, `sample:NAME` (in a source checkout), a hub id `org/name`, downloaded
    unless it is in the cache, or a single file whose small files lie in the folder `config`.

    `variant` is one that a component of a folder has. Without `weights`, only the small files of a hub id are needed.

    Raises NotFound when there is none (or the hub cannot be reached), SourceError when it holds no model, InvalidInput
    for a variant that no component has or a `config` that is missing or of no use, and UnsupportedModel for another
    single file.
    """
    if not source:
        raise InvalidInput("SOURCE", f"is empty: expected a folder, {SAMPLE}NAME or a hub id org/name")
    path = _path(source)
    if path.is_file() and not source.startswith(SAMPLE):
        return _single_file(path, variant, config)
    if config is not None:
        raise InvalidInput("config", f"belongs to a single file, which {source} is not: leave it out")
    if source.startswith(SAMPLE):
        return _inspect(_sample(source.removeprefix(SAMPLE)), source.removeprefix(SAMPLE), variant)
    if path.is_dir():
        return _inspect(path, check_name("SOURCE", path.resolve().name), variant)
    if HUB_ID.fullmatch(source):
        return _inspect(_download(source, variant, weights), source.partition("/")[2], variant)
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


def _inspect(root: Path, name: str, variant: str) -> Source:
    """Tell the layout and the architecture of a folder. Sizes that its configs cannot mean are refused."""
    if (root / PIPELINE).is_file():
        index = read_json(root / PIPELINE)
        _check_folders(root, _components(root, index), variant)
        return Source(root, name, "diffusers", _class_name(root / PIPELINE, index.get("_class_name")), variant)
    if (root / CONFIG).is_file():
        _check_folders(root, [root], variant)
        config = read_json(root / CONFIG)
        declared = config.get("architectures") or [config.get("_class_name")]
        architecture = _class_name(root / CONFIG, declared[0] if isinstance(declared, list) else None)
        return Source(root, name, "transformers", architecture, variant)
    if (root / ADAPTER).is_file():
        _refuse_adapter(root)
    files = sorted(
        path for path in root.iterdir() if path.is_file() and path.suffix in (".safetensors", SUFFIX, *PICKLES)
    )
    if files:
        _single_file(files[0], "", None)  # which says what it needs
    raise SourceError(
        f"{root} holds no model: expected {PIPELINE} (diffusers layout) or {CONFIG} (transformers layout)"
    )


def _components(root: Path, index: Mapping[str, Any]) -> list[Path]:
    """The folders of a pipeline's components that have a config.json."""
    return [
        root / name
        for name, made_by in index.items()
        if isinstance(made_by, list) and is_file_name(name) and (root / name / CONFIG).is_file()
    ]


def _check_folders(root: Path, folders: Sequence[Path], variant: str) -> None:
    """Raise SourceError for sizes that the components cannot have, InvalidInput for a variant that none of them has."""
    for folder in folders:
        _check_sizes(folder, variant)
    known = sorted({name for folder in folders for name in variants(folder)})
    if variant and variant not in known:
        there = f"there are {', '.join(known)}" if known else "there is none: leave it out"
        raise InvalidInput("variant", f"{root} has no weights of the variant {quoted(variant)}, {there}")


def _check_sizes(folder: Path, variant: str) -> None:
    """Raise SourceError for sizes in a component's config.json that its weights cannot have, or no weights where they
    cannot be read.
    """
    config, tensors = read_json(folder / CONFIG), None
    with suppress(NotFound, SourceError, OSError):  # whoever opens the component says what is wrong with its weights
        files = weight_files(folder, "_class_name" in config, variant).paths
        tensors = {name: ref for file in files for name, ref in read_header(file)[1].items()}
    check_sizes(folder / CONFIG, config, tensors)


def _class_name(file: Path, declared: object) -> str:
    if not isinstance(declared, str):
        raise SourceError(
            f"{file} does not say which class made it (found {declared!r}): expected _class_name or architectures"
        )
    return declared


def _single_file(path: Path, variant: str, config: Path | None) -> Source:
    """A file with the networks of a whole model; the small files lie in the folder `config`."""
    if path.suffix in PICKLES:
        refuse_pickle(path)
    tensors = single_file.read(path, values=False)[1] if path.suffix in (".safetensors", SUFFIX) else {}
    if any(LORA.search(name) for name in tensors):
        _refuse_adapter(path)
    if not single_file.is_whole_model(tensors):
        raise UnsupportedModel(
            f"{path} is a single file, expected a folder in diffusers or transformers layout, with its {CONFIG}, or a "
            "file in the original layout of Stable Diffusion"
        )
    if variant:
        raise InvalidInput("variant", f"belongs to a folder, and {path} is a file: leave it out")
    folder = single_file.check(path, tensors, config)
    index = read_json(folder / PIPELINE)
    for component in _components(folder, index):
        check_sizes(component / CONFIG, read_json(component / CONFIG), tensors)
    architecture = _class_name(folder / PIPELINE, index.get("_class_name"))
    return Source(folder, check_name("SOURCE", path.stem), "diffusers", architecture, file=path)


def _refuse_adapter(path: Path) -> NoReturn:
    raise UnsupportedModel(
        f"{path} holds an adapter (LoRA) without the model that it changes: build that model, and add a diffusion "
        f"model's adapter with --lora FILE.safetensors. Otherwise {MERGE}, and build that"
    )


def _download(hub_id: str, variant: str, weights: bool) -> Path:
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
        ignored = ["safety_checker/*", *(["*.non_ema.*"] if variant != "non_ema" else [])]
        return Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=ignored))
    except (OSError, HTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NotFound(
            f"{hub_id} is no folder here and could not be fetched from the hub ({type(error).__name__}: {reason}). "
            "Check the name and the network, `hf auth login` for a gated model, or give a folder that was downloaded "
            "elsewhere"
        ) from None
