"""Names of samplers as other programs show them."""

from __future__ import annotations

import pytest

from runtime.diffusion.labels import LABELS, SCHEDULES, named, shown
from runtime.diffusion.solver import samplers, solvers
from runtime.diffusion.spacing import SPACINGS
from runtime.errors import InvalidInput


def test_every_solver_and_spacing_has_a_label() -> None:
    assert set(LABELS) == set(solvers()) and len(set(LABELS.values())) == len(LABELS)
    assert set(SCHEDULES) == {"", *SPACINGS}


@pytest.mark.parametrize("sampler", samplers())
def test_labels_name_their_sampler(sampler: str) -> None:
    assert named(*shown(sampler)) == sampler


@pytest.mark.parametrize(
    ("label", "schedule", "sampler"),
    [
        ("Euler a", "", "euler_ancestral"),
        ("euler A", "automatic", "euler_ancestral"),
        ("Euler", "Karras", "euler_karras"),
        ("DPM++ 2M", "Automatic", "dpmpp_2m_karras"),
        ("DPM++ 2M", "Uniform", "dpmpp_2m"),
        ("DPM++ 2M SDE", "Automatic", "dpmpp_2m_sde_exponential"),
        ("DPM++ SDE Karras", "", "dpmpp_sde_karras"),
        ("DPM++ 2M Karras", "exponential", "dpmpp_2m_exponential"),
        ("DPM2 a", "", "kdpm2_ancestral_karras"),
        ("PLMS", "Automatic", "pndm"),
    ],
)
def test_names_of_the_web_ui(label: str, schedule: str, sampler: str) -> None:
    assert named(label, schedule) == sampler


@pytest.mark.parametrize(
    ("label", "schedule", "words"),
    [
        ("DPM++ 2M Heun", "", "sampler: 'DPM++ 2M Heun' is not known: did you mean 'DPM++ 2M"),
        ("Euler", "KL Optimal", "schedule: 'KL Optimal' is not known"),
        ("Euler a", "Karras", "schedule: 'Karras' is none of Euler a, expected one of Automatic, Uniform"),
        ("Karras", "", "sampler: 'Karras' is not known"),
    ],
)
def test_others_are_refused(label: str, schedule: str, words: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        named(label, schedule)
    assert str(raised.value).startswith(words)
