"""Classifier-free guidance: which rows there are, and how their predictions become one."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.diffusion.guidance import Guidance


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_up_to_one_there_is_only_the_prompt(scale: float) -> None:
    x = np.ones((1, 4, 2, 2), np.float32)
    guidance = Guidance(scale)
    assert (guidance.guided, guidance.rows) == (False, 1) and guidance.batch(x).shape == x.shape
    assert guidance.combine(x) is x


def test_above_one_the_prediction_is_pushed_away_from_the_negative_prompts() -> None:
    guidance = Guidance(3.0)
    assert guidance.guided and guidance.batch(np.ones((1, 4, 2, 2), np.float32)).shape == (2, 4, 2, 2)
    output = np.array([[1.0], [2.0]], np.float32)
    combined = guidance.combine(output)
    assert combined.tolist() == [[4.0]] and combined.dtype == np.float32
