"""Low-rank branches of a part's layers, whose matrices are inputs of its graph: LoRA files are chosen by each request.

A layer computes weight * x + up * (down * x). The matrices of all layers lie side by side in two inputs of a fixed
rank, `lora_down` [rank, inputs of all layers] and `lora_up` [rank, outputs of all layers]; the rows of a LoRA that
is not used are zeros. Weights and their quantization stay as they are: the branches compute in float.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional as F

from export.build.staging import cached, key_of
from export.checkpoint.lora import Lora, LowRank, read_lora
from export.checkpoint.source import Source
from export.checkpoint.tensors import check_finite
from export.family import Part, Reference
from runtime.bundle.signature import Tensor
from runtime.diffusion.adapters import DOWN, FOLDER, UP
from runtime.errors import InvalidInput

LARGEST_RANK: Final = 512


@dataclass(frozen=True)
class Branch:
    """A layer with a branch, the name of its weight in its component, and where its columns begin in both inputs."""

    folder: str
    weight: str
    layer: nn.Linear | nn.Conv2d
    first_in: int
    first_out: int

    @property
    def inputs(self) -> int:
        """Columns of `lora_down`: a convolution has one for each weight of a filter."""
        return math.prod(self.layer.weight.shape[1:])

    @property
    def outputs(self) -> int:
        return int(self.layer.weight.shape[0])

    def matrices(self, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's columns of both inputs: [rank, inputs] and [rank, outputs]."""
        return (
            down[:, self.first_in : self.first_in + self.inputs],
            up[:, self.first_out : self.first_out + self.outputs],
        )

    def added(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What the branch adds to the layer's output."""
        first, second = self.matrices(down, up)
        if isinstance(self.layer, nn.Linear):
            return F.linear(F.linear(x, first), second.T)
        filters = first.reshape(-1, *self.layer.weight.shape[1:])
        low = F.conv2d(x, filters, None, self.layer.stride, self.layer.padding, self.layer.dilation)
        return F.conv2d(low, second.T[..., None, None])

    def product(self, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The branch as a change of the layer's weight."""
        first, second = self.matrices(down, up)
        return (second.T @ first).reshape(self.layer.weight.shape)


@dataclass(frozen=True)
class Branches:
    """The branches of a part, and the rank that they have together."""

    several: tuple[Branch, ...]
    rank: int

    @classmethod
    def of(cls, part: Part, weights: Mapping[str, Sequence[str]], rank: int) -> Branches:
        """Of the layers of the part that hold these weights, by component."""
        found, first_in, first_out = list[Branch](), 0, 0
        for component in part.components:
            layers = dict(component.model.named_modules())
            for weight in weights.get(component.folder, ()):
                layer = layers.get(weight.removesuffix(".weight"))
                if isinstance(layer, nn.Linear | nn.Conv2d):  # a twin has fewer
                    found.append(Branch(component.folder, weight, layer, first_in, first_out))
                    first_in, first_out = first_in + found[-1].inputs, first_out + found[-1].outputs
        return cls(tuple(found), rank)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The inputs that they add to the part's signature."""
        last = self.several[-1]
        columns = {DOWN: last.first_in + last.inputs, UP: last.first_out + last.outputs}
        down, up = (
            Tensor(name=name, dtype="float32", dims=(self.rank, width), values="small")
            for name, width in columns.items()
        )
        return down, up

    def packed(self, layers: Mapping[str, Mapping[str, LowRank]], rank: int) -> dict[str, NDArray[np.float32]]:
        """The matrices of a LoRA, by component and weight, as rows of both inputs."""
        found = {tensor.name: np.zeros((rank, *tensor.shape({})[1:]), np.float32) for tensor in self.tensors}
        for branch in self.several:
            low_rank = layers.get(branch.folder, {}).get(branch.weight)
            if low_rank is not None:
                up, down = low_rank.matrices()
                rows = slice(low_rank.rank)
                found[DOWN][rows, branch.first_in : branch.first_in + branch.inputs] = down
                found[UP][rows, branch.first_out : branch.first_out + branch.outputs] = up.T
        return found

    def apply(self, part: Part) -> Part:
        """The part with its branches."""
        signature = part.signature.model_copy(update={"inputs": (*part.signature.inputs, *self.tensors)})
        return replace(
            part,
            module=Adapted(part.module, self.several),
            reference=_merged(part.reference, self.several),
            signature=signature,
        )


@dataclass(frozen=True)
class Adapters:
    """The LoRA files that requests choose from: each as it is, and its layers by component and weight."""

    several: Mapping[str, tuple[Lora, Mapping[str, Mapping[str, LowRank]]]]

    @classmethod
    def of(cls, source: Source, parts: Iterable[Part]) -> Adapters:
        """Those added to a source with these parts. Raises what reading and matching them raise, and InvalidInput for
        more than requests can choose from.
        """
        models = {component.folder: component.model for part in parts for component in part.components}
        loras = {one.name: read_lora(one.path) for one in source.added("adapter")}
        found = cls({name: (lora, lora.matched(models, source.architecture)) for name, lora in loras.items()})
        if found.rank > LARGEST_RANK:
            raise InvalidInput(
                "adapter",
                f"{len(loras)} LoRA files have rank {found.rank} together, expected at most {LARGEST_RANK}: every "
                "request computes all of them. Add fewer, or add some to the weights with --lora",
            )
        return found

    @property
    def ranks(self) -> dict[str, int]:
        """The largest rank of each."""
        return {name: max(one.rank for one in lora.layers.values()) for name, (lora, _) in self.several.items()}

    @property
    def rank(self) -> int:
        return sum(self.ranks.values())

    def branches(self, part: Part) -> Branches:
        """The branches of a part: of every layer that one of the files changes."""
        weights: dict[str, dict[str, None]] = {}
        for _, layers in self.several.values():
            for folder, changed in layers.items():
                weights.setdefault(folder, {}).update(dict.fromkeys(changed))
        return Branches.of(part, {folder: list(names) for folder, names in weights.items()}, self.rank)

    def applied(self, parts: Sequence[Part]) -> list[Part]:
        """The parts with their branches."""
        found = ((part, self.branches(part)) for part in parts)
        return [branches.apply(part) if branches.several else part for part, branches in found]

    def files(self, parts: Sequence[Part]) -> dict[str, Path]:
        """The file of each in the cache, by its path in the bundle. Raises SourceError for numbers that are not
        finite.
        """
        branches = {part.name: found for part in parts if (found := self.branches(part)).several}
        columns = {
            name: [(one.folder, one.weight, one.inputs, one.outputs) for one in found.several]
            for name, found in branches.items()
        }
        return {
            f"{FOLDER}/{name}.safetensors": cached(
                key_of("adapter", lora.sha256, columns),
                ".safetensors",
                partial(_pack, lora, layers, branches, self.ranks[name]),
            )
            for name, (lora, layers) in self.several.items()
        }


def _pack(
    lora: Lora, layers: Mapping[str, Mapping[str, LowRank]], branches: Mapping[str, Branches], rank: int, path: Path
) -> None:
    check_finite({f"{lora.path.name}: {name}": ref for name, ref in lora.tensors.items()})
    packed = {name: found.packed(layers, rank) for name, found in branches.items()}
    save_file({f"{name}.{which}": rows for name, both in packed.items() for which, rows in both.items()}, path)


class Adapted(nn.Module):
    """A part's module with branches. Its parameters have the names that they have there."""

    def __init__(self, module: nn.Module, branches: Sequence[Branch]) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self._inner, self._branches = (module,), branches

    def forward(self, *inputs: torch.Tensor) -> Any:
        *own, down, up = inputs
        with ExitStack() as stack:
            for branch in self._branches:
                hook = branch.layer.register_forward_hook(_adds(branch, down, up))
                stack.callback(hook.remove)
            return self._inner[0].forward(*own)


def _adds(branch: Branch, down: torch.Tensor, up: torch.Tensor) -> Any:
    return lambda layer, inputs, output: output + branch.added(inputs[0], down, up)


def _merged(reference: Reference, branches: Sequence[Branch]) -> Reference:
    """The library's forward with the products in the weights, while each layer runs: another way to the same."""

    def forward(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *own, down, up = inputs
        with ExitStack() as stack:
            for branch in branches:
                stack.enter_context(_changed(branch, down, up))
            return reference(*own)

    return forward


@contextmanager
def _changed(branch: Branch, down: torch.Tensor, up: torch.Tensor) -> Iterator[None]:
    kept = list[Any]()

    def before(layer: nn.Module, inputs: Any) -> None:
        kept.append(layer._parameters["weight"])
        layer._parameters["weight"] = nn.Parameter(kept[-1] + branch.product(down, up), requires_grad=False)

    def after(layer: nn.Module, inputs: Any, output: Any) -> None:
        layer._parameters["weight"] = kept.pop()

    # weights that are read only while a layer runs are there before, and are dropped after
    hooks = branch.layer.register_forward_pre_hook(before), branch.layer.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
