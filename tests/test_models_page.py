"""The page of models names proofs that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PROOF: Final = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def test_every_proof_is_a_test() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    proofs = PROOF.findall(page)
    assert len(proofs) > 30
    for file, name in proofs:
        text = (ROOT / file).read_text()
        assert re.search(rf"^def {name or 'test_'}", text, re.MULTILINE), f"{file} has no {name}"


def test_every_entry_has_a_proof() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    entries = re.split(r"^- ", page, flags=re.MULTILINE)[1:]
    assert len(entries) > 25 and all(PROOF.search(entry) for entry in entries)
