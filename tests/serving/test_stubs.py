from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from serving.generate import PROTOS, STUBS, generate


def test_regenerating_gives_the_committed_stubs(tmp_path: Path) -> None:
    made = {path.name: path.read_text() for path in generate(tmp_path)}
    assert made == {path.name: path.read_text() for path in STUBS.iterdir() if path.suffix in (".py", ".pyi")}


def test_proto_holds_nothing_but_protos() -> None:
    assert {path.suffix for path in PROTOS.rglob("*") if path.is_file()} == {".proto"}


ARMS = ("Queued", "ImageProgress", "Image", "ImageDone", "TextDelta", "ChatDone", "Embeddings", "Scores", "EmbedDone")


def test_every_field_has_a_comment() -> None:
    for path in PROTOS.rglob("*.proto"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        for before, line in pairwise(lines):
            if line.endswith(";") and "=" in line and not line.startswith(("//", "syntax")) and "oneof" not in before:
                # The arms of an event oneof are messages that carry their own comments.
                arm = line.split()[0] in ARMS
                assert before.startswith("//") or arm, f"{path.name}: {line}"
