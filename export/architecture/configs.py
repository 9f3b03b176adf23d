"""Configs of transformers' models, for graphs: precisions and kernels that a config names are the library's matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from export.checkpoint.source import read_json
from runtime.errors import SourceError, UnsupportedModel, did_you_mean

PRECISIONS: Final = ("dtype", "torch_dtype")
KERNELS: Final = ("attn_implementation", "_attn_implementation")
"""Fields that name a kernel of attention: all of the library's compute the same."""
OURS: Final = "enginecast"
"""How the names of attentions begin that this package registers with transformers, to trace graphs."""
KNOWN_KERNELS: Final = ("eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith(OURS)))


def config_data(file: Path, sections: Sequence[str]) -> dict[str, Any]:
    """A config.json without the precisions that its sections name, since graphs compute in float32, and without
    kernels. Raises UnsupportedModel for a kernel that transformers does not have: it may be another attention.
    """
    data = read_json(file)
    for part in sections:
        given = data.get(part) or {}
        _require_kernel(file, f"{part}.", given)
        data[part] = {key: value for key, value in given.items() if key not in (*PRECISIONS, *KERNELS)}
    _require_kernel(file, "", data)
    return {key: value for key, value in data.items() if key not in KERNELS}


def parsed(file: Path, kind: type[Any], sections: Sequence[str], changes: Mapping[str, Mapping[str, Any]]) -> Any:
    """A config of the library's class `kind` with these changes to its sections. Raises
    SourceError or UnsupportedModel.
    """
    data = config_data(file, sections)
    return made(file, kind, data | {part: data[part] | changes.get(part, {}) for part in sections})


def made(file: Path, kind: type[Any], data: Mapping[str, Any]) -> Any:
    """The library's config of a file's data. Raises SourceError."""
    try:
        return kind.from_dict(dict(data))
    except Exception as error:  # configs are checked with exceptions of every kind
        raise SourceError(
            f"{file} is no config that transformers can read: {' '.join(str(error).split())}. Correct it"
        ) from None


def require_activation(file: Path, field: str, value: Any) -> None:
    """Raises UnsupportedModel for an activation function that transformers does not have."""
    if value not in ACT2FN:
        raise UnsupportedModel(
            f"{file}: {field} is {value!r}, which transformers does not have: {did_you_mean(str(value), ACT2FN)}"
        )


def _require_kernel(file: Path, prefix: str, given: Mapping[str, Any]) -> None:
    for name in KERNELS:
        named = given.get(name)
        for value in named.values() if isinstance(named, dict) else (named,):
            if value is not None and value not in KNOWN_KERNELS:
                raise UnsupportedModel(
                    f"{file}: {prefix}{name} is {value!r}, an attention that transformers does not have: "
                    f"{did_you_mean(str(value), KNOWN_KERNELS)}. Take a checkpoint with another, or remove the field "
                    "if the model does not need it"
                )
