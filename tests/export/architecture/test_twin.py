"""Reduced twins: the same random weights each time, for every name of the component, and nothing left of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.architecture.twin import twin_weights
from export.checkpoint.source import resolve
from export.family import Part, family_of


@pytest.fixture(params=["tiny_diffusion", "tiny_vlm"])
def twins(request: pytest.FixtureRequest) -> list[Part]:
    source = resolve(str(request.getfixturevalue(request.param)))
    return family_of(source).parts(source, True)


def test_a_twin_has_every_weight_and_leaves_none(twins: list[Part], own_cache: Path) -> None:
    for part in twins:
        with twin_weights(part) as weights:
            first = {name: ref.array().copy() for name, ref in weights.items()}
        with twin_weights(part) as second:
            expected = {
                name: tuple(value.shape)
                for name, value in part.components[0].model.named_parameters(remove_duplicate=False)
            }
            assert {name: ref.shape for name, ref in second.items()} == expected
            assert all((first[name] == second[name].array()).all() for name in expected)
            assert all(ref.dtype == "F16" and abs(ref.array().astype("f4")).max() < 2 for ref in second.values())
        assert not list(own_cache.glob("*twin*"))


def test_a_failure_leaves_no_weights(twins: list[Part], own_cache: Path) -> None:
    with pytest.raises(ValueError, match="went wrong"), twin_weights(twins[0]):
        raise ValueError("went wrong")
    assert not list(own_cache.glob("*twin*"))


def test_normalisations_scale_by_about_one(twins: list[Part]) -> None:
    with twin_weights(twins[0]) as weights:
        norms = [
            ref.array().astype("f4") for name, ref in weights.items() if "norm" in name and name.endswith("weight")
        ]
        assert norms and all(abs(float(torch.from_numpy(norm).mean()) - 1) < 0.1 for norm in norms)
