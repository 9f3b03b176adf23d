"""Reduced twins: the family's own code and config with fewer layers and random weights, to prove a conversion without
the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from safetensors.torch import save_file

from export.build.staging import unfinished
from export.checkpoint.tensors import TensorRef, read_header, release
from export.family import Part

STD: Final = 0.05


@contextmanager
def twin_weights(part: Part) -> Iterator[dict[str, TensorRef]]:
    """Seeded random float16 weights for the components of a reduced part, as a safetensors file that lives as long as
    the block.

    Parameters that are tied get the same values.
    """
    generator = torch.Generator().manual_seed(0)
    names = {
        part.tensor(component, name): parameter
        for component in part.components
        for name, parameter in component.model.named_parameters(remove_duplicate=False)
    }
    tensors, made = dict[str, torch.Tensor](), dict[int, torch.Tensor]()
    for name, parameter in names.items():
        if id(parameter) in made:
            tensors[name] = made[id(parameter)].clone()
            continue
        values = torch.randn(parameter.shape, generator=generator) * STD
        is_scale = parameter.ndim == 1 and name.endswith("weight")  # of a normalisation
        tensors[name] = made[id(parameter)] = (values + 1 if is_scale else values).half()
    file = unfinished(f"{part.name}-twin.safetensors")
    try:
        save_file(tensors, file)
        yield read_header(file)[1]
    finally:
        release()
        file.unlink(missing_ok=True)
