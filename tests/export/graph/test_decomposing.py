"""Programs are translated without torch's decomposition where that changes nothing, and with it everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import nn

import export.graph.shortcuts
from export.graph.decomposing import FORMS, where_needed
from export.graph.shortcuts import registry
from export.graph.trace import trace
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from tests.export.graph.test_shortcuts import described

ROWS = Dim(name="rows", min=2, opt=8, max=64, multiple=2)


def signature(*outputs: tuple[Any, ...]) -> Signature:
    """Of one input [batch, rows, 8] and outputs of these dims."""
    named = tuple(Tensor(name=f"y{i}", dtype="float32", dims=dims) for i, dims in enumerate(outputs))
    return Signature(inputs=(Tensor(name="x", dtype="float32", dims=(BATCH, ROWS, 8)),), outputs=named)


@contextmanager
def decompositions(always: bool = False) -> Iterator[Mock]:
    """Counts programs that torch decomposes, which are all of them with `always`."""
    counted = Mock()

    def counting(decompose: Any) -> Any:
        counted.side_effect = decompose
        return counted if always else where_needed(counted)

    with patch.object(export.graph.shortcuts, "where_needed", counting):
        yield counted


class Plain(nn.Module):
    """Every operator that has another form, some of them without gradients."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            x = x * torch.arange(8, device=x.device).to(torch.float32)
        x = nn.functional.dropout(x, 0.5, training=False)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2).contiguous()
        halves = heads.reshape(x.shape).to(x.device).to(torch.float32).chunk(2, dim=-1)
        mask = (halves[0] > 0) & (halves[1] > 0)
        kept = mask.to(torch.float32) + mask.to(device=x.device, dtype=torch.float32)
        more = torch.zeros_like(x).to(x.device, dtype=torch.float32, copy=True)
        return (kept, heads.transpose(1, 2).flatten(2) + more)


class Rounding(nn.Module):
    """An operator that has no translation."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (nn.functional.softshrink(x),)


class Halving(nn.Module):
    """Chunks of an axis that has no fixed length."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.chunk(2, dim=1)


class Adding(nn.Module):
    """A view that is seen in what it views, once that was changed in place."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        doubled = x * 2
        seen = doubled.contiguous()
        doubled.add_(1)
        return (seen,)


def test_operators_with_another_form() -> None:
    wanted = signature((BATCH, ROWS, 4), (BATCH, ROWS, 8))
    with torch.no_grad():
        program = torch.export.export(Plain(), (torch.ones(2, 4, 8),))
    kinds = {node.target for node in program.graph.nodes}
    assert kinds >= FORMS.keys(), FORMS.keys() - kinds
    with decompositions() as counted:
        found = described(trace(Plain(), wanted))
    counted.assert_not_called()
    with decompositions(always=True) as counted:
        assert found == described(trace(Plain(), wanted))
    counted.assert_called_once()


@pytest.mark.parametrize("module", [Rounding(), Adding()], ids=["no translation", "changed in place"])
def test_others_are_decomposed(module: nn.Module) -> None:
    with decompositions() as counted:
        found = described(trace(module, signature((BATCH, ROWS, 8))))
    counted.assert_called_once()
    with decompositions(always=True):
        assert found == described(trace(module, signature((BATCH, ROWS, 8))))


@pytest.mark.parametrize("module", [Halving(), nn.Dropout().train()], ids=["an axis of any length", "in training"])
def test_forms_that_depend_on_more(module: nn.Module) -> None:
    """torch decides what becomes of them."""
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (torch.ones(2, 8, 8),), dynamic_shapes=({1: 2 * rows},))
    torch_s = Mock()
    assert where_needed(torch_s)(program, registry()) is torch_s.return_value
    torch_s.assert_called_once_with(program, registry())
