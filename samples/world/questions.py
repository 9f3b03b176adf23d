"""Questions about scenes and words, each with exactly one right answer: what the sample vision-language model learns
and is scored in.

A question belongs to one of `KINDS`. Scenes and words that `held_out` reserves are the only ones `test_questions` asks
about, and `draw_scene` and `draw_word` never hand them to a training. Everything here is pure and seeded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from samples.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    POSITIONS,
    SHAPES,
    SIDES,
    SIZES,
    Scene,
    Thing,
    held_out,
    render,
)

KINDS: Final = ("colour", "shape", "size", "position", "count", "left", "caption", "read")
SCENE_KINDS: Final = tuple(kind for kind in KINDS if kind != "read")
"""Those about scenes."""
CORNERS: Final = tuple(place for place in POSITIONS if place != "center")
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
CELL: Final = 32
"""Width in pixels of a letter of a word, in a picture with a 128 pixel edge."""
INKS: Final = {
    "white": ("black", "red", "green", "blue", "purple"),
    "gray": ("black", "white", "yellow"),
    "black": ("white", "red", "green", "yellow", "purple", "cyan"),
}
"""The inks that can be read easily on each background."""
WORDS: Final = tuple(
    """
    ant ape arm art ash axe bad bag bat bed bee big bit bow box boy bug bus cab cap car cat cow cup cut day dig dog dot
    dry ear eat egg elf end eye fan far fig fir fit fly fog fox fun fur gap gas gem hat hen hot hut ice ink jam jar jaw
    jet job joy key kid kit lab lap leg lid lip log map mix mop mud net new nod nut oak oil old one owl pan paw pea pen
    pet pie pig pin pot ram rat ray rib row rug run saw sea sky sun tea ten tie toe top toy tub van wax web wet wig win
    yak zip zoo able army away baby ball band bark barn bear bell bird blow boat bone book bulb cake calf camp card cave
    city clay coal coat coin cold corn crab crow dark deer desk dish dive door drum duck dust exit face fact farm fern
    film fire fish flag foam foot fork frog game gate gift goat gold hair hand harp hawk hill home horn iron jazz jump
    kite knee lake lamp leaf lime lion maze milk moon nest note oven palm park pear pink plum pond quiz rain ring road
    rock roof rose salt sand seal ship shoe snow soap sock soup star swan tent toad tree tube vase wave west wind wing
    wolf wood wool yard zero
    """.split()
)


@dataclass(frozen=True)
class Word:
    """A word of three or four letters, written across the picture."""

    text: str
    ink: str
    background: str

    @property
    def caption(self) -> str:
        return f"the word {self.text} in {self.ink} on a {self.background} background"

    @property
    def column(self) -> int:
        """The left edge of the first letter in pixels, a whole half cell."""
        return (4 - len(self.text)) * CELL // 2


@dataclass(frozen=True)
class Question:
    """One question, its one right answer and the kind of seeing it asks for."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, eq=False)
class Case:
    """A question with the picture it is about: uint8 RGB [128, 128, 3]."""

    picture: NDArray[np.uint8]
    question: str
    answer: str
    kind: str


def at(place: str) -> str:
    """The place as a caption says it."""
    if place == "center":
        return "in the center"
    return f"on the {place}" if place in SIDES else f"at the {place}"


def blip2_prompt(kind: str, text: str) -> str:
    """A question as the published BLIP-2 takes it: a caption is what it writes for a picture alone."""
    return "" if kind == "caption" else f"Question: {text} Answer:"


def scene_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every question that has one right answer in this scene; `rng` picks the colour asked for that is not there."""
    asked = [Question("caption", "describe the picture.", scene.caption)]
    asked.append(Question("colour", "what color is the background?", scene.background))
    by_shape = Counter(thing.shape for thing in scene.things)
    by_colour = Counter(thing.colour for thing in scene.things)
    by_look = Counter((thing.size, thing.shape) for thing in scene.things)
    for thing in scene.things:
        asked.append(Question("colour", f"what color is the shape {at(thing.place)}?", thing.colour))
        asked.append(Question("shape", f"what shape is {at(thing.place)}?", thing.shape))
        asked.append(Question("size", f"what size is the {thing.colour} {thing.shape}?", thing.size))
        asked.append(Question("position", f"where is the {thing.colour} {thing.shape}?", thing.place))
        if by_look[thing.size, thing.shape] == 1:
            asked.append(Question("colour", f"what color is the {thing.size} {thing.shape}?", thing.colour))
        if by_shape[thing.shape] == 1:
            asked.append(Question("colour", f"what color is the {thing.shape}?", thing.colour))
        if by_colour[thing.colour] == 1:
            asked.append(Question("shape", f"what shape is the {thing.colour} thing?", thing.shape))
    asked += [Question("count", "how many shapes are there?", str(len(scene.things)))] * len(scene.things)
    absent = str(rng.choice([colour for colour in COLOURS if colour not in by_colour]))
    asked += [
        Question("count", f"how many {colour} shapes are there?", str(by_colour[colour]))
        for colour in (*by_colour, absent)
    ]
    asked += [Question("count", f"how many {shape}s are there?", str(by_shape[shape])) for shape in SHAPES]
    for one, other in permutations(scene.things, 2):
        if PLACES[one.place][0] != PLACES[other.place][0]:
            first = min(one, other, key=lambda thing: PLACES[thing.place][0])
            phrases = [f"the {thing.colour} {thing.shape}" for thing in (one, other)]
            asked.append(
                Question(
                    "left", f"which is further left, {phrases[0]} or {phrases[1]}?", f"the {first.colour} {first.shape}"
                ),
            )
    return asked


def word_questions(word: Word) -> list[Question]:
    """Every question about a written word."""
    return [
        Question("read", "what does the word say?", word.text),
        Question("colour", "what color is the word?", word.ink),
        Question("colour", "what color is the background?", word.background),
        Question("caption", "describe the picture.", word.caption),
    ]


def draw_scene(rng: np.random.Generator, held: bool = False) -> Scene:
    """A random scene: one thing anywhere, a left and right pair, or two to four in corners; no two of one colour and
    shape.

    The scene is among the held-out ones exactly if `held` is true.
    """
    while True:
        layout = rng.choice(["one", "pair", "corners"], p=[0.25, 0.35, 0.4])
        if layout == "one":
            places = [str(rng.choice(list(POSITIONS)))]
        elif layout == "pair":
            places = list(SIDES)
        else:
            # Corners stay in reading order, so that a caption lists them in the one right order.
            places = [CORNERS[i] for i in sorted(rng.permutation(len(CORNERS))[: rng.integers(2, 5)])]
        looks = rng.permutation(len(COLOURS) * len(SHAPES))[: len(places)]
        things = tuple(
            Thing(str(rng.choice(list(SIZES))), list(COLOURS)[look // len(SHAPES)], SHAPES[look % len(SHAPES)], place)
            for look, place in zip(looks, places, strict=True)
        )
        scene = Scene(str(rng.choice(list(BACKGROUNDS))), things)
        if held_out(scene.caption) == held:
            return scene


def draw_word(rng: np.random.Generator, held: bool = False) -> Word:
    """A random word to write: a held-out one of `WORDS` if `held`, else one that is not held out or, mostly, random
    letters.
    """
    while True:
        invented = not held and rng.random() < 0.8
        text = "".join(rng.choice(list(LETTERS), rng.integers(3, 5))) if invented else str(rng.choice(WORDS))
        if held_out(text) == held:
            background = str(rng.choice(list(BACKGROUNDS)))
            return Word(text, str(rng.choice(INKS[background])), background)


def render_word(word: Word, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Write a word in capitals across the middle: uint8 RGB [128, 128, 3]. The whole word is off its place by 3 pixels
    at most.
    """
    canvas = np.full((128, 128, 3), BACKGROUNDS[word.background], np.uint8)
    ink = (COLOURS | BACKGROUNDS)[word.ink]
    dx, dy = (int(shift) for shift in rng.integers(-3, 4, 2))
    for i, letter in enumerate(word.text.upper()):
        (width, height), _ = cv2.getTextSize(letter, cv2.FONT_HERSHEY_SIMPLEX, 1.35, 3)
        origin = (word.column + i * CELL + (CELL - width) // 2 + dx, 64 + height // 2 + dy)
        cv2.putText(canvas, letter, origin, cv2.FONT_HERSHEY_SIMPLEX, 1.35, ink, 3, cv2.LINE_AA)
    return canvas


def test_questions(count: int = 1000, seed: int = 0, held: bool = True, kinds: Sequence[str] = KINDS) -> list[Case]:
    """Held-out questions to score a model with, or others: every kind as often, each about its own scene or word."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    while len(cases) < count:
        kind = kinds[len(cases) % len(kinds)]
        if kind == "read":
            word = draw_word(rng, held=held)
            picture, questions = render_word(word, rng), word_questions(word)
        else:
            scene = draw_scene(rng, held=held)
            picture, questions = render(scene, rng), scene_questions(scene, rng)
        fitting = [question for question in questions if question.kind == kind]
        if fitting:  # not every scene has two things of which one is further left
            chosen = fitting[rng.integers(len(fitting))]
            cases.append(Case(picture, chosen.text, chosen.answer, kind))
    return cases
