"""The documentation: errors are explained with their codes, pages can be reached, local links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime import errors
from serving.dialects.grpc import status

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TREE = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.EnginecastError)]


def test_every_error_is_in_the_table() -> None:
    table = re.findall(
        r"^\| `(\w+)`[^|]*\| (\d+) \| `(\w+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE
    )
    assert {row[0] for row in table} == {one.__name__ for one in TREE} - {"EnginecastError"}
    for name, exit_code, code in table:
        error = getattr(errors, name)
        assert int(exit_code) == error.exit_code, name
        assert code == status.code(error.__new__(error)).name, name


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages - listed == {page for page in pages if page.startswith("decisions/0")}
    index = (DOCS / "decisions" / "index.md").read_text()
    assert all(page.name in index for page in DOCS.glob("decisions/0*.md"))


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("examples/**/README.md")]))
def test_local_links(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("targets/*.md")]))
def test_files_that_are_named_exist(page: Path) -> None:
    rooms = "enginecast|export|runtime|serving|calibration|profiles|samples|proto|tests"
    named = re.findall(rf"`((?:{rooms})/[\w/.-]*)", page.read_text()) if page.name != "CHANGELOG.md" else []
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
