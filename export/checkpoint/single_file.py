"""Single-file checkpoints in the layout of the original Stable Diffusion code, as the networks of a diffusers pipeline.

The functions behind diffusers' `from_single_file` rename the tensors (diffusers.loaders.single_file_utils), so what it
loads is what is exported; GGUF files have the same names. They get stand-ins for tensors: a slice of one is a byte
range of the same file, and a transposed one, of which a text encoder has at most one, is computed once and kept in the
user's cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import ml_dtypes
import numpy as np

from export.build.staging import cached, key_of
from export.checkpoint.component import CONFIG, LDM, Checkpoint, component_config, open_component, read_json
from export.checkpoint.gguf_file import SUFFIX, read_gguf
from export.checkpoint.tensors import DTYPES, TensorRef, read_header
from runtime.errors import InvalidInput, NotFound, SourceError, UnsupportedModel

UNET: Final = "model.diffusion_model."
FIRST: Final = f"{UNET}input_blocks.0.0.weight"
"""Of the UNet's first convolution [outputs, channels of the latents, 3, 3]."""
CROSS: Final = "attn2.to_k.weight"
"""Ending of a cross attention's keys [outputs, width of the hidden states of prompts]."""
PUBLISHED: Final[Mapping[tuple[int, int], str]] = {
    (768, 4): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    (768, 9): "stable-diffusion-v1-5/stable-diffusion-inpainting",
    (1024, 4): "stabilityai/stable-diffusion-2-1",
    (1024, 9): "stabilityai/stable-diffusion-2-inpainting",
    (2048, 4): "stabilityai/stable-diffusion-xl-base-1.0",
    (2048, 9): "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    (1280, 4): "stabilityai/stable-diffusion-xl-refiner-1.0",
}
"""The models that single files are derived from, by the width of hidden states and the channels of latents: where
diffusers takes the small files from.
"""
CLIP: Final = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP: Final = ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.")
"""Prefixes of text encoders: those of OpenAI's CLIP, under transformers' names, and those of OpenCLIP."""
SMALL: Final = "model_index.json, scheduler, tokenizers, and the config.json of each network"


def read(file: Path, values: bool = True) -> tuple[bytes, dict[str, TensorRef]]:
    """The header's bytes and every tensor by name. Without `values`, those that are quantized have a shape alone."""
    return read_gguf(file, values) if file.suffix == SUFFIX else read_header(file)


def is_whole_model(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of the original layout."""
    return any(name.startswith(LDM) for name in names)


def check(file: Path, tensors: Mapping[str, TensorRef], folder: Path | None) -> Path:
    """The folder with the small files of a single file. Raises InvalidInput where none is named, UnsupportedModel
    for a file without a UNet, NotFound and SourceError where the folder is none, or of another model.
    """
    found = _kind(tensors)
    if found is None:
        raise UnsupportedModel(f"{file} has no UNet of Stable Diffusion (no {FIRST}): expected a file of a whole model")
    known = PUBLISHED.get(found)
    of = f"those of {known}" if known else "those of the model that it was derived from"
    if folder is None:
        fetch = f", such as `hf download {known} --include '*.json' '*.txt' --local-dir FOLDER`" if known else ""
        raise InvalidInput(
            "config",
            f"is missing: {file} holds weights alone. Name a folder with its small files, --config FOLDER ({SMALL}): "
            f"{of}{fetch}",
        )
    config = folder / "unet" / CONFIG
    if not config.is_file():
        raise NotFound(f"{config} does not exist: --config expects a folder with {SMALL}, {of}")
    unet = {"cross_attention_dim": 1280, "in_channels": 4} | read_json(config)
    if (unet["cross_attention_dim"], unet["in_channels"]) != found:
        raise SourceError(
            f"{config} is of another model than {file}, whose UNet reads hidden states of width {found[0]} and latents "
            f"of {found[1]} channels: expected the small files of its own, {of}"
        )
    return folder


def _kind(tensors: Mapping[str, TensorRef]) -> tuple[int, int] | None:
    """The width of hidden states and the channels of latents of the UNet."""
    cross = next((ref for name, ref in tensors.items() if name.startswith(UNET) and name.endswith(CROSS)), None)
    if cross is None or FIRST not in tensors:
        return None
    return cross.shape[-1], tensors[FIRST].shape[1]


def open_single_file(file: Path, contents: tuple[bytes, Mapping[str, TensorRef]], folder: Path) -> Checkpoint:
    """The network whose config.json is in `folder`, which is named as in a diffusers pipeline, of a single file, whose
    `contents` are what `read` gives; the folder's own weights where the file has none of it.

    Raises NotFound, SourceError, or UnsupportedModel for a network that is not in such files.
    """
    header, tensors = contents
    config = component_config(folder)
    convert = CONVERSIONS.get(folder.name)
    if convert is None:
        raise UnsupportedModel(f"{folder} is of no network of a single-file checkpoint: {', '.join(CONVERSIONS)}")
    found = convert({name: Stored(ref) for name, ref in tensors.items()}, config)
    if not found:
        try:
            return open_component(folder)
        except NotFound as error:
            raise SourceError(f"{file} has no weights of {folder.name}, and neither has --config: {error}") from None
    return Checkpoint(folder, config, {name: one.ref for name, one in found.items()}, {file: header})


@dataclass(frozen=True)
class Stored:
    """What stands for a tensor while the library converts: it is sliced, transposed and passed on, never computed."""

    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    @property
    def ndim(self) -> int:
        return len(self.ref.shape)

    def __getitem__(self, index: Any) -> Stored:
        """Rows, with all of the other axes but those of length 1 that are indexed with 0."""
        rows, *rest = index if isinstance(index, tuple) else (index,)
        start, stop, _ = rows.indices(self.shape[0])
        dropped = {axis for axis, one in enumerate(rest, 1) if not isinstance(one, slice)}
        assert all(self.shape[axis] == 1 for axis in dropped), "rows are a byte range, columns are none"
        assert all(one == slice(None) for one in rest if isinstance(one, slice)), "the same"
        kept = tuple(length for axis, length in enumerate(self.shape) if axis and axis not in dropped)
        size = self.ref.nbytes // self.shape[0]
        part = replace(
            self.ref,
            offset=self.ref.offset + start * size,
            nbytes=(stop - start) * size,
            shape=(stop - start, *kept),
        )
        return Stored(part)

    @property
    def T(self) -> Stored:  # noqa: N802 -- the name that tensors have
        return Stored(_transposed(self.ref))

    def contiguous(self) -> Stored:
        return self

    def clone(self) -> Stored:
        return self

    def detach(self) -> Stored:
        return self


@lru_cache
def _transposed(ref: TensorRef) -> TensorRef:
    """A matrix with its axes exchanged, in a file of its own in the cache, named after its values."""
    from safetensors.numpy import save_file

    values = np.ascontiguousarray(ref.array().T)
    # numpy's writer knows no bfloat16: only the bytes matter, and their type is the reference's
    plain = values.view(np.uint16) if DTYPES[ref.dtype] == ml_dtypes.bfloat16 else values
    key = key_of("transposed", ref.dtype, ref.shape, hashlib.sha256(plain.tobytes()).hexdigest())
    file = cached(key, ".safetensors", lambda path: save_file({"transposed": plain}, path))
    return replace(read_header(file)[1]["transposed"], dtype=ref.dtype)


Tensors = Mapping[str, Stored]


def _unet(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return dict(convert_ldm_unet_checkpoint(dict(tensors), {"layers_per_block": 2, **config}))


def _vae(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return dict(convert_ldm_vae_checkpoint(dict(tensors), config))


def _text_encoder(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Of the text encoders in the file, the one that is as wide as the config says."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    width = config.get("text_config", config)["hidden_size"]
    if any(_is(tensors, f"{prefix}text_model.embeddings.position_embedding.weight", width) for prefix in CLIP):
        return dict(convert_ldm_clip_checkpoint(dict(tensors)))
    for prefix in OPEN_CLIP:
        if _is(tensors, f"{prefix}positional_embedding", width):
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
            return dict(convert_open_clip_checkpoint(model, dict(tensors), prefix))
    return {}


def _is(tensors: Tensors, name: str, width: int) -> bool:
    """Whether the table of positions with this name belongs to an encoder of this width."""
    return name in tensors and tensors[name].shape[-1] == width


CONVERSIONS: Final[Mapping[str, Callable[[Tensors, Mapping[str, Any]], Tensors]]] = {
    "unet": _unet, "vae": _vae, "text_encoder": _text_encoder, "text_encoder_2": _text_encoder,
}  # fmt: skip
"""How each network of a pipeline is found in a single file, by its folder's name."""
