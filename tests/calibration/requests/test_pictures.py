"""General pictures: those that scikit-image ships, and drawn ones."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.requests.pictures import DRAWN, HELD_OUT, PHOTOGRAPHS, SIZE, Drawing, photograph
from runtime.errors import NotFound


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, *HELD_OUT])
def test_the_installed_package_ships_them(name: str) -> None:
    picture = photograph(name)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 10


def test_one_that_is_not_shipped() -> None:
    with pytest.raises(NotFound, match="install scikit-image"):
        photograph("none.png")


def test_some_are_never_calibrated_with() -> None:
    assert not set(PHOTOGRAPHS) & set(HELD_OUT)


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
def test_drawn_pictures_are_seeded(draw: Drawing) -> None:
    one, again, other = (draw(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one.shape == (SIZE[1], SIZE[0], 3) and one.dtype == np.uint8
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert len(np.unique(one.reshape(-1, 3), axis=0)) > 3
