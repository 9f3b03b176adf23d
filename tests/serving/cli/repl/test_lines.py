"""Lines that belong together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runtime.errors import InvalidInput
from serving.cli.repl.lines import whole


def reader(text: str) -> tuple[Callable[[str], str], list[str]]:
    """Reads the lines of a text, and the prompts that it was given."""
    lines, prompts = iter(text.split("\n")), list[str]()

    def read(prompt: str) -> str:
        prompts.append(prompt)
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    return read, prompts


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("one", "one"),
        ("one\\\ntwo\\\nthree\nfour", "one\ntwo\nthree"),
        ("ends with two \\\\\nnext", "ends with two \\\\"),
        ("last \\", "last \n"),
        ('"""one line"""', "one line"),
        ('"""one\n two\\\n\nthree""" \nfour', "one\n two\\\n\nthree"),
        ('"""\none\n"""', "one"),
        ('/set system """be\nterse"""', "/set system be\nterse"),
        ('/draw """a\nfox"""', "/draw a\nfox"),
        ('what does """ mean in Python?', 'what does """ mean in Python?'),
    ],
)
def test_lines_that_belong_together(typed: str, expected: str) -> None:
    read, prompts = reader(typed)
    assert whole(read) == expected
    assert prompts == ["> ", *["... "] * (len(prompts) - 1)]


def test_a_block_has_to_be_closed() -> None:
    with pytest.raises(InvalidInput, match='""": is not closed'):
        whole(reader('"""one\ntwo')[0])
    with pytest.raises(EOFError):
        read, _ = reader("one")
        whole(read)
        whole(read)
