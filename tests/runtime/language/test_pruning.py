"""The features that are kept of a picture are those that are least alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.signature import Array
from runtime.engine import FakeEngine
from runtime.language.config import ChatConfig
from runtime.language.layout import Size, layout_named
from runtime.language.pruning import diverse
from runtime.language.text import Message
from runtime.language.vision import Vision
from runtime.pipeline import Pipeline, drive
from tests.runtime.language.layouts import test_anyres as anyres

IMAGE = 9


def test_one_of_each_kind_is_kept() -> None:
    """Of three kinds of features that are alike up to their length, wherever they are."""
    kinds = np.eye(4, dtype=np.float32)[[0, 0, 1, 0, 0, 0, 2, 2, 0]]
    features = kinds * np.arange(1, 10, dtype=np.float32)[:, None]
    kept = diverse(features, 3)
    assert kept.tolist() == sorted(kept) and len(kinds[kept].argmax(1)) == len(set(kinds[kept].argmax(1))) == 3
    assert diverse(features, 9).tolist() == diverse(features, 12).tolist() == [*range(9)]


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 9))
def test_the_choice_is_greedy(positions: int, count: int, seed: int) -> None:
    """Each one taken is the least like its nearest among those before, by the cosine; of those as good, the first."""
    features = np.random.default_rng(seed).standard_normal((positions, 5)).astype(np.float32)
    kept = diverse(features, count)
    assert kept.tolist() == sorted(set(kept)) and len(kept) == min(count, positions)
    units = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
    likeness = units @ units.T
    taken = [int(likeness.mean(axis=1).round(6).argmin())]
    while len(taken) < len(kept):
        rest = [place for place in range(positions) if place not in taken]
        taken.append(min(rest, key=lambda place: likeness[place, taken].max()))
    assert kept.tolist() == sorted(taken)


def test_ties_go_to_the_first() -> None:
    """Two features are always equally like the two: however a processor rounds, the choice is the same."""
    for seed in range(200):
        features = np.random.default_rng(seed).standard_normal((2, 5)).astype(np.float32)
        assert diverse(features, 1).tolist() == [0]
        mirrored = np.concatenate([features, features[::-1]])
        assert diverse(mirrored, 2).tolist() == [0, 1]


def test_features_without_a_direction() -> None:
    features = np.zeros((6, 3), np.float32)
    assert diverse(features, 4).tolist() == [0, 1, 2, 3]
    assert len(diverse(features.astype(np.float16), 6)) == 6


def encode(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Features that are the mean colours of the patches, and their squares."""
    pixels = inputs["pixel_values"]
    cut = pixels.reshape(len(pixels), 3, *(anyres.EDGE // anyres.PATCH, anyres.PATCH) * 2).mean((3, 5))
    colours = cut.reshape(len(pixels), 3, anyres.PATCHES).swapaxes(1, 2)
    return {"image_features": np.concatenate([colours, colours**2], axis=2)}


@pytest.mark.parametrize("start", [0, 4, 31, 40])
def test_pictures_of_several_tiles_keep_the_numbers_of_their_places(tmp_path: Path, start: int) -> None:
    """Also where the decoder holds the first picture, which is not encoded then, or a part of one."""
    layout = layout_named("anyres").open(anyres.write(tmp_path, anyres.EDGE), anyres.PATCHES, {"grids": anyres.GRIDS})
    pictures = anyres.picture(50, 50), anyres.picture(20, 70)
    sizes = [layout.positions(Size.of(picture)) for picture in pictures]
    config = ChatConfig(
        context_length=999, vocab_size=10, hidden_size=anyres.HIDDEN, bos_token_id=None, eos_token_ids=(),
        image_token_id=IMAGE, tokens_per_image=anyres.PATCHES,
    )  # fmt: skip
    vision = Vision(layout, IMAGE, config, None)
    prompt = vision.prompt([1, IMAGE, 2, IMAGE, 3], [Message("user", pictures)], 30)
    assert (len(prompt.ids), prompt.seen, prompt.length) == (63, 60, 3 + sum(sizes)) and min(sizes) > 30
    embeds, encoder, found = np.zeros((1, 63 - start, anyres.HIDDEN), np.float32), FakeEngine(encode), list[int]()

    def inserted() -> Pipeline:
        found.extend((yield from vision.insert(prompt, start, embeds)))

    assert not list(drive(inserted(), {"vision_encoder": encoder}))
    tiles = [layout.tiles(picture, "messages") for picture in pictures]
    packed = [
        layout.pack(encode({"pixel_values": some})["image_features"], Size.of(picture))
        for some, picture in zip(tiles, pictures, strict=True)
    ]
    first, second = (diverse(features, 30) for features in packed)
    assert found == [0, *(1 + first), 1 + sizes[0], *(2 + sizes[0] + second), 2 + sum(sizes)][start:]
    text = np.zeros((1, anyres.HIDDEN), np.float32)
    wanted = np.concatenate([text, packed[0][first], text, packed[1][second], text])
    np.testing.assert_array_equal(embeds[0], wanted[start:])
    assert [len(call["pixel_values"]) for call in encoder.calls] == [len(tiles[1]) + len(tiles[0]) * (start < 31)]
