"""From the names of a published checkpoint to the names of the module, as transformers and diffusers map them on load.

The libraries' own tables and functions do the renaming, so what they load is what is exported: transformers' conversion
mapping (transformers.conversion_mapping, core_model_loading.rename_source_key: LLaVA's `language_model.model.` ->
`model.language_model.`, `text_model.` dropped, base model prefixes added or dropped) and diffusers'
ModelMixin._fix_state_dict_keys_on_load (the attention of older VAEs: query, key, value, proj_attn). Only names change:
a conversion that would compute a tensor is refused.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.checkpoint.source import LORA, MERGE
from export.checkpoint.tensors import CHUNK, TensorRef
from runtime.errors import SourceError, UnsupportedModel

if TYPE_CHECKING:
    import torch

log: Final = logging.getLogger(__name__)

WRAPPED: Final = (
    (
        re.compile(r"(^|\.)_orig_mod\."),
        "are of a model compiled by torch: save the model in it, with model._orig_mod.save_pretrained()",
    ),
    (
        re.compile(r"^module\.|(^|\.)_fsdp_wrapped_module\."),
        "are of a model wrapped for training on several devices: save the model in it, with "
        "model.module.save_pretrained()",
    ),
    (LORA, f"are of an adapter (LoRA) that is not merged into its model: {MERGE}, and build that"),
    (
        re.compile(r"\.(qweight|qzeros|absmax|quant_map|SCB|weight_scale|weight_packed)$"),
        "are quantized already: take the checkpoint that it was made from",
    ),
)
"""Names that no model has, and what they say of how the weights were saved."""

LISTED: Final = 8
"""Names shown of a long list."""


def map_names(
    where: str, tensors: Mapping[str, TensorRef], model: torch.nn.Module, elsewhere: Collection[str] = ()
) -> dict[str, TensorRef]:
    """The tensor of every parameter and persistent buffer of `model`, by its name in `model.state_dict()`.

    `tensors` are those of the checkpoint at `where`, by published name; `model` may be on the meta device or hold fake
    tensors. Names `elsewhere` are of tensors that other files hold. Tied names share one TensorRef. Names that the
    model has no use for are left out, as on load in either library, and logged unless the library knows them as
    harmless (`position_ids`, rotary `inv_freq`).

    Raises SourceError that lists missing names and other shapes, and UnsupportedModel where loading would compute a
    tensor.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in elsewhere}
    named = renamed(where, tensors, model)
    found = {name: ref for name, ref in named.items() if name in expected}
    _refuse_wrapped(where, [name for name in named if name not in expected])
    _tie(where, found, getattr(model, "all_tied_weights_keys", None) or {})
    _check(where, found, expected)
    if unused := sorted(name for name in named if name not in expected and not _ignored(name, model)):
        log.info("%s: %s has no use for %s", where, type(model).__name__, listing(unused))
    return {name: found[name] for name in expected}


def _refuse_wrapped(where: str, unused: Iterable[str]) -> None:
    """Raises UnsupportedModel where names say that the weights are not those of the model alone: what they add would be
    left out.
    """
    for pattern, what in WRAPPED:
        if names := [name for name in unused if pattern.search(name)]:
            raise UnsupportedModel(f"{where}: the weights {listing(names)} {what}")


def renamed(where: str, tensors: Mapping[str, TensorRef], model: torch.nn.Module) -> dict[str, TensorRef]:
    """The tensors by their names in the model, unchecked. Raises UnsupportedModel where loading would compute one."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return _renamed_by_transformers(where, tensors, model)
    from diffusers.models.modeling_utils import ModelMixin

    renamed = OrderedDict(tensors)
    if isinstance(model, ModelMixin):
        # It only moves dictionary entries, whatever they are: tensors on load, byte ranges here.
        model._fix_state_dict_keys_on_load(renamed)
    return renamed


def _renamed_by_transformers(where: str, tensors: Mapping[str, TensorRef], model: Any) -> dict[str, TensorRef]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, expected = model.base_model_prefix, model.state_dict()
    published: dict[str, str] = {}
    for key in tensors:
        name, converted = rename_source_key(key, renamings, converters, prefix, expected)
        if (
            name not in expected and key in expected
        ):  # convert_and_load_state_dict_in_model does the same: the name was right already
            name, converted = rename_source_key(key, [], [], prefix, expected)
        if converted is not None and name in expected:
            raise UnsupportedModel(
                f"{where}: '{key}' becomes '{name}' of {type(model).__name__} only by computing it (transformers' "
                f"{converted}), which "
                "weightless export cannot: load the model with transformers and save it with save_pretrained(..., "
                "save_original_format=False)"
            )
        if name in published:
            raise SourceError(
                f"{where}: '{published[name]}' and '{key}' are both '{name}' of {type(model).__name__}: remove one of "
                "them"
            )
        published[name] = key
    return {name: tensors[key] for name, key in published.items()}


def _tie(where: str, found: dict[str, TensorRef], tied: Mapping[str, str]) -> None:
    """Give tied names one tensor. `tied` is target -> source; as in transformers' tie_weights, whichever of a group
    exists serves all.
    """
    for source in dict.fromkeys(tied.values()):
        group = [source, *(target for target, its in tied.items() if its == source)]
        present = [name for name in group if name in found]
        if not present:
            continue
        shared = found[present[0]]
        for other in present[1:]:
            if not _same(shared, found[other]):
                raise SourceError(
                    f"{where}: '{present[0]}' and '{other}' are tied by config.json but hold other values: "
                    "set tie_word_embeddings to false in config.json if both are wanted"
                )
        found.update(dict.fromkeys(group, shared))


def _same(a: TensorRef, b: TensorRef) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    left, right = (ref.array().reshape(-1).view(np.uint8) for ref in (a, b))
    return all(np.array_equal(left[i : i + CHUNK], right[i : i + CHUNK]) for i in range(0, a.nbytes, CHUNK))


def _check(where: str, found: Mapping[str, TensorRef], expected: Mapping[str, tuple[int, ...]]) -> None:
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"missing {listing(missing)}")
    if other := [name for name in expected if name in found and found[name].shape != expected[name]]:
        shapes = [f"{name} (expected {list(expected[name])}, found {list(found[name].shape)})" for name in other]
        faults.append(f"of another shape {listing(shapes)}")
    if faults:
        raise SourceError(
            f"the weights in {where} do not fit its config.json: {'; '.join(faults)}. Take both from the same "
            "checkpoint"
        )


def _ignored(name: str, model: torch.nn.Module) -> bool:
    """Whether the library drops that unexpected name without a word
    (PreTrainedModel._adjust_missing_and_unexpected_keys).
    """
    patterns = [
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    return any(re.search(pattern, name) for pattern in patterns)


def listing(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} ({', '.join(names[:LISTED])}{more})"
