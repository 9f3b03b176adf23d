"""What tokens spell, and how likely they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from runtime.language.answering import Answer
from runtime.language.logprobs import Logprobs, Pieces, TokenLogprob

SPECIALS = ["<unk>", "</s>"]


def with_bytes() -> Tokenizer:
    """Byte-level, as GPT-2, Qwen and Llama 3 have it."""
    names = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġred", "Ã©"]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


def with_fallback() -> Tokenizer:
    """SentencePiece with bytes for what it has no token for, as Llama 2."""
    names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁red", "red", "é"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "pieces"),
    [
        (with_bytes(), {"Ġred": b" red", "Ã©": "é".encode(), "Ã": b"\xc3", "Ċ": b"\n", "a": b"a", "</s>": b"</s>"}),
        (with_fallback(), {"▁red": b" red", "red": b"red", "▁": b" ", "é": "é".encode(), "<0xE2>": b"\xe2",
            "<0x41>": b"A", "</s>": b"</s>"}),
    ],
)  # fmt: skip
def test_a_token_spells_its_bytes(tokenizer: Tokenizer, pieces: dict[str, bytes]) -> None:
    found = Pieces(tokenizer)
    assert {name: found[tokenizer.token_to_id(name)] for name in pieces} == pieces


def test_every_byte_is_spelled() -> None:
    tokenizer = with_bytes()
    spelled = [Pieces(tokenizer)[id] for id in range(2, 258)]
    assert sorted(spelled) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("count", [0, 1, 20, 50])
def test_probabilities_are_those_of_the_logits(count: int) -> None:
    tokenizer, rng = with_bytes(), np.random.default_rng(count)
    logits = rng.normal(0, 9, 32).astype(np.float32)
    found = Logprobs(Pieces(tokenizer), count)
    found.push(7, logits, 0)
    (one,) = found.passed(1)
    wanted = torch.log_softmax(torch.tensor(logits), -1)
    best = wanted.topk(min(count, 32))
    np.testing.assert_allclose(one.logprob, float(wanted[7]), atol=1e-5)
    np.testing.assert_allclose([top.logprob for top in one.top], best.values.numpy(), atol=1e-5)
    assert [top.id for top in one.top] == best.indices.tolist() and not any(top.top for top in one.top)
    assert found.passed(9) == ()


def test_nothing_is_looked_up_unless_it_was_asked_for() -> None:
    found = Logprobs(Pieces(with_bytes()), None)
    found.push(7, np.zeros(32, np.float32), 0)
    assert found.passed(1) == ()


def spoken(text: str, stops: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """The pieces of an answer of single bytes, each with what its tokens spell."""
    tokenizer = with_bytes()
    of_byte = {Pieces(tokenizer)[id]: id for id in range(2, 258)}
    answer, logprobs, sent = Answer(tokenizer, stops), Logprobs(Pieces(tokenizer), 0), []
    for byte in text.encode():
        logprobs.push(of_byte[bytes([byte])], np.zeros(300, np.float32), answer.spelled)
        if piece := answer.push(of_byte[bytes([byte])]):
            sent.append((piece, logprobs.passed(answer.passed)))
        if answer.stopped:
            break
    if piece := answer.flush():
        sent.append((piece, logprobs.passed(answer.passed)))
    return [(piece, b"".join(one.piece for one in tokens)) for piece, tokens in sent]


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("aé", (), ["a", "é"]),
        ("aaab", ("aab",), ["a"]),
        ("aac", ("aab",), ["aac"]),
        ("xaa", ("aab",), ["x", "aa"]),
        ("né\n\nb", ("\n\n",), ["n", "é"]),
    ],
)
def test_tokens_come_with_the_text_that_they_spell(text: str, stops: tuple[str, ...], pieces: list[str]) -> None:
    """None of what is held back for a stop string, or cut by one."""
    assert spoken(text, stops) == [(piece, piece.encode()) for piece in pieces]


def test_a_part_of_a_character_is_shown_as_such() -> None:
    assert TokenLogprob(1, b"\xc3", -1.0).text == "\ufffd" and TokenLogprob(1, "é".encode(), -1.0).text == "é"
