"""What attention sees by the meaning of the signature's windows, beside transformers' own mask functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from runtime.targets.lowering.masks import seen


@pytest.mark.parametrize("window", [0, 1, 2, 5, 9])
@pytest.mark.parametrize(("past", "sequence"), [(0, 7), (8, 1), (3, 4)])
def test_windows_mean_what_the_library_means(window: int, past: int, sequence: int) -> None:
    function = sliding_window_causal_mask_function(window) if window else causal_mask_function
    position = torch.arange(past + sequence)
    wanted = function(0, 0, position[past:, None], position[None]).numpy()
    allowed = np.ones((2, past + sequence), np.int64)
    allowed[1, :2] = 0
    got = seen(past, sequence, allowed, window)
    np.testing.assert_array_equal(got[0, 0], wanted)
    np.testing.assert_array_equal(got[1, 0], wanted & (allowed[1] != 0))
