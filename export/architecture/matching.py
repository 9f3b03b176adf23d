"""Whether a file of weights was made for the model that it is added to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import nn

from export.checkpoint.tensors import TensorRef
from runtime.errors import UnsupportedModel

SHOWN: Final = 3


def check_made_for(file: Path, tensors: Mapping[str, TensorRef], module: nn.Module, what: str) -> None:
    """Raises UnsupportedModel where a file holds other tensors than the module that is built for a model; `what` names
    what the file is of.
    """
    found = {name: ref.shape for name, ref in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    other = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if other:
        listed = "; ".join(f"{name} is {found.get(name)}, expected {expected.get(name)}" for name in other[:SHOWN])
        more = f" and {len(other) - SHOWN:,} more" if len(other) > SHOWN else ""
        raise UnsupportedModel(
            f"{file} has {len(found)} tensors, expected {len(expected)}; {listed}{more}: this {what} was made for "
            "another base model"
        )
