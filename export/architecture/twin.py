"""Reduced twins: the family's own code and config with fewer layers and random weights, to prove a conversion without
the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from export.build.staging import unfinished
from export.checkpoint.tensors import TensorRef, release
from export.family import Part

STD: Final = 0.05
CHUNK: Final = 1 << 22


@contextmanager
def twin_weights(part: Part) -> Iterator[dict[str, TensorRef]]:
    """Seeded random float16 weights for the components of a reduced part, in a file that lives as long as the block,
    written one tensor at a time: a twin of a large model still has several hundred million of them.

    Parameters that are tied are the same place in it.
    """
    generator = torch.Generator().manual_seed(0)
    found, places = dict[str, TensorRef](), dict[int, int]()
    file = unfinished(f"{part.name}-twin.weights")
    try:
        with file.open("wb") as output:
            for component in part.components:
                for name, parameter in component.model.named_parameters(remove_duplicate=False):
                    if id(parameter) not in places:
                        places[id(parameter)] = output.tell()
                        output.writelines(_values(name, parameter, generator))
                    tensor = part.tensor(component, name)
                    found[tensor] = TensorRef(
                        file, places[id(parameter)], 2 * parameter.numel(), "F16", tuple(parameter.shape)
                    )
        yield found
    finally:
        release()
        file.unlink(missing_ok=True)


def _values(name: str, parameter: torch.Tensor, generator: torch.Generator) -> Iterator[bytes]:
    """The bytes of a parameter's values, some millions at a time."""
    middle = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0  # the scales of a normalisation
    for start in range(0, parameter.numel(), CHUNK):
        count = min(CHUNK, parameter.numel() - start)
        yield torch.randn(count, generator=generator).mul_(STD).add_(middle).half().numpy().tobytes()
