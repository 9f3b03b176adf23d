"""Weighted prompts: what Automatic1111's web UI documents of brackets, chunks and commas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.diffusion.emphasis import Piece, parse, read, weigh
from runtime.diffusion.tokenizing import ClipTokenizer
from runtime.errors import InvalidInput
from runtime.limits import PROMPT_CHUNKS

TOKENIZER = ClipTokenizer(Path(__file__).parents[3] / "samples" / "shapes-diffusion" / "tokenizer")
ROOM = TOKENIZER.room


def weights(prompt: str) -> list[tuple[str | None, float]]:
    return [(piece.text, round(piece.weight, 6)) for piece in parse(prompt) if piece.text != ""]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("", []),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[unbalanced", [("unbalanced", round(1 / 1.1, 6))]),
        ("balanced) after all]", [("balanced) after all]", 1.0)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        (r"a \\ b \c", [("a \\ b c", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(word:1.5)", [("word", 1.5)]),
        ("(word: -0.5 )", [("word", -0.5)]),
        ("(word:.5)(one:2.)", [("word", 0.5), ("one", 2.0)]),
        ("word:1.5)", [("word:1.5)", 1.0)]),
        ("a: b", [("a: b", 1.0)]),
        ("[(x)]", [("x", 1.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
                (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("a BREAK b", [("a ", 1.0), (None, 1.0), (" b", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
    ],
)  # fmt: skip
def test_brackets_weigh(prompt: str, expected: list[tuple[str | None, float]]) -> None:
    """The first of these are the examples of the web UI's own documentation."""
    assert weights(prompt) == expected


@given(st.text(alphabet="ab ()[]:1.\\", max_size=40))
def test_every_text_can_be_read(prompt: str) -> None:
    assert all(isinstance(piece, Piece) and np.isfinite(piece.weight) for piece in parse(prompt))


def rows(prompt: str) -> list[list[int]]:
    """The tokens of each chunk, without start, end and padding."""
    found = read(TOKENIZER, prompt, "prompt")
    assert found.ids.shape == found.weights.shape == (len(found.ids), TOKENIZER.limit)
    for ids in found.ids:
        assert ids[0] == TOKENIZER.start and TOKENIZER.end in ids
    return [ids[1 : ids.tolist().index(TOKENIZER.end)].tolist() for ids in found.ids]


def test_a_chunk_has_room_tokens() -> None:
    (red,) = TOKENIZER.tokens("red")
    assert rows("") == [[]]
    assert rows("red " * ROOM) == [[red] * ROOM]
    assert rows("red " * (ROOM + 1)) == [[red] * ROOM, [red]]


def test_what_follows_the_last_comma_of_a_full_chunk_moves_on() -> None:
    (red,), (comma,) = TOKENIZER.tokens("red"), TOKENIZER.tokens(",")
    assert comma == TOKENIZER.comma
    near, far = ROOM - 5, ROOM - 21
    assert rows("red " * near + "," + " red" * 10) == [[red] * near + [comma], [red] * 10]
    assert rows("red " * far + "," + " red" * 30) == [[red] * far + [comma] + [red] * 20, [red] * 10]
    assert rows("red " * ROOM + ", red") == [[red] * ROOM, [comma, red]]


def test_break_begins_a_chunk() -> None:
    (red,) = TOKENIZER.tokens("red")
    assert rows("red BREAK red red") == [[red], [red, red]]
    assert rows("BREAK red BREAK") == [[], [red]]


def test_weights_stand_at_their_tokens() -> None:
    found = read(TOKENIZER, "red (blue:1.5) [square]", "prompt")
    np.testing.assert_allclose(found.weights[0, :5], [1, 1, 1.5, 1 / 1.1, 1], rtol=1e-6)
    assert (found.weights[0, 5:] == 1).all()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("red " * (PROMPT_CHUNKS.most * ROOM + 1), "negative_prompt: has 17 chunks .*, expected at most 16"),
        ("((red:90):2)", "negative_prompt: weighs 'red' by 180, expected -100 to 100"),
        ("(red:-1" + "0" * 400 + ")", "negative_prompt: weighs 'red' by -inf, expected -100 to 100"),
    ],
)
def test_what_is_too_much_is_named(prompt: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(TOKENIZER, prompt, "negative_prompt")


def test_weighing_keeps_the_mean() -> None:
    states = np.random.default_rng(0).uniform(0.5, 1, (2, 4, 3)).astype(np.float32)
    factors = np.array([[1, 1, 1, 1], [1, 2, 0.5, 1]], np.float32)
    found = weigh(states, factors)
    np.testing.assert_allclose(found.mean((1, 2)), states.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found[1, 1] / found[1, 0], 2 * states[1, 1] / states[1, 0], rtol=1e-5)
    assert weigh(states, np.ones((2, 4), np.float32)) is states
