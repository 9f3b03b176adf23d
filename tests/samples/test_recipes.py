"""The recipes of the samples: a training that was stopped goes on as if it had not been."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samples.recipes import addition, train_blip2, train_control, train_draft, train_lora, train_vlm

pytestmark = pytest.mark.full
STOPPED = KeyboardInterrupt
"""What stops it."""


def stopping(call: Any, after: int) -> Any:
    """The function, which stops the training once it was called so often."""
    calls = iter(range(after))

    def stopped(*args: Any) -> Any:
        if next(calls, None) is None:
            raise STOPPED
        return call(*args)

    return stopped


def train_addition(recipe: Any, run: Path, after: int) -> dict[str, Tensor]:
    """The averaged weights of a short training, stopped after so many steps."""
    torch.manual_seed(0)
    pipeline = addition.open_base()
    if recipe is train_lora:
        added: nn.Module = nn.ModuleList(train_lora.branches(pipeline.unet).values())
        predict = partial(train_lora.predict, pipeline.unet)
    else:
        network = train_control.build_network(pipeline)
        added, predict = network, partial(train_control.predict, pipeline.unet, network)
    plan = replace(recipe.PLAN, examples=8, steps=4, batch=2, save_every=2)
    return addition.train(plan, run, pipeline, added, recipe.draw, stopping(predict, after)).average


@pytest.mark.parametrize("recipe", [train_lora, train_control])
def test_an_addition(recipe: Any, tmp_path: Path) -> None:
    unbroken = train_addition(recipe, tmp_path / "unbroken", after=4)
    with pytest.raises(STOPPED):
        train_addition(recipe, tmp_path / "stopped", after=3)
    resumed = train_addition(recipe, tmp_path / "stopped", after=2)
    assert all(torch.equal(resumed[name], one) for name, one in unbroken.items())


@pytest.mark.parametrize("recipe", [train_vlm, train_blip2])
def test_a_model_that_answers(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_vlm, "validate", lambda averaged, data: {"all": 1.0})
    plan = recipe.Recipe(pictures=8, batch=2)
    for run, minutes in (("unbroken", inf), ("stopped", 0.0), ("stopped", inf)):
        train_vlm.train(tmp_path / run, plan, minutes, *recipe.open_training(plan, None))
    unbroken, resumed = (train_vlm.load_file(tmp_path / run / "best.safetensors") for run in ("unbroken", "stopped"))
    assert all(torch.equal(resumed[name], one) for name, one in unbroken.items())


def test_a_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped behind the checkpoint of its second step."""
    teacher, plan = train_draft.Teacher(), train_draft.Plan(steps=4, batch=2, save_every=2)
    unbroken = train_draft.train(plan, tmp_path / "unbroken", teacher).state_dict()
    with monkeypatch.context() as patch, pytest.raises(STOPPED):
        patch.setattr(teacher, "positions", stopping(teacher.positions, 3))
        train_draft.train(plan, tmp_path / "stopped", teacher)
    resumed = train_draft.train(plan, tmp_path / "stopped", teacher).state_dict()
    assert all(torch.equal(resumed[name], one) for name, one in unbroken.items())


def test_the_draft_that_lies_in_the_folder_guesses_right() -> None:
    assert min(train_draft.score(train_draft.OUT, train_draft.Teacher(), batches=1)) > 0.8
