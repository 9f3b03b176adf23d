"""Which conditions a model takes, and that it refuses the others."""

from __future__ import annotations

import pytest

from runtime.diffusion.added import AddedConditions, conditions_of, time_ids
from runtime.errors import InvalidInput
from runtime.tasks.image import CONDITIONS

BASE = AddedConditions(force_zeros_for_empty_prompt=True)
REFINER = AddedConditions(force_zeros_for_empty_prompt=False, aesthetic=True)


@pytest.mark.parametrize(("added", "count"), [(None, 0), (BASE, 6), (REFINER, 6)])
def test_a_model_takes_what_it_names_and_nothing_else(added: AddedConditions | None, count: int) -> None:
    taken = conditions_of(added)
    assert len(taken) == count
    for name in CONDITIONS:
        stated = {name: 3.0 if name.endswith("score") else (8, 8)}
        if name in taken:
            assert time_ids(added, stated, (16, 16), 2)["time_ids"].shape[0] == 2
        else:
            with pytest.raises(InvalidInput, match=f"^{name}: does not apply to this model"):
                time_ids(added, stated, (16, 16), 2)
