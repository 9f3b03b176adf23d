"""Trains the sample vision-language model `shapes-vlm`: a small LLaVA that answers questions about scenes and short
words.

    python -m samples.recipes.train_vlm --run runs/vlm            train, or go on where a killed run stopped; then
                                                                  export
    python -m samples.recipes.train_vlm --run runs/vlm --export   export the best weights so far
    python -m samples.recipes.train_vlm --score samples/shapes-vlm

One training sequence is one picture and several turns about it in the chat format, so the picture is encoded once for
many answers; only the answers carry loss. Two more losses fade over the run. One asks that the projected feature of
each patch lies close to the embeddings of the words for what it shows. The other asks that a question's words for a
thing look, in the decoder's second layer, at the patches of that thing and lie close to its name: without it, finding a
thing by its look is not learnt in any time we have. Every step draws its data from (seed, step), so a resumed run sees
what an unbroken one would. A run without a checkpoint starts from the exported weights where there are some. Those were
trained while this recipe was found, with the second and third loss added on the way.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from samples.world.questions import (
    CELL,
    KINDS,
    LETTERS,
    Question,
    Word,
    draw_scene,
    draw_word,
    render_word,
    scene_questions,
    word_questions,
)
from samples.world.questions import test_questions as score_questions
from samples.world.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, render

SAMPLE: Final = Path(__file__).parents[1] / "shapes-vlm"
EDGE, PATCH = 128, 16
GRID: Final = EDGE // PATCH
SPECIALS: Final = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
VOCABULARY: Final = 512
IGNORED: Final = -100
"""The label of a token that carries no loss."""
NAMES: Final = [
    [],
    *(
        ["Ġ" + word for word in (size, colour, shape, *place.split())]
        for size, colour, shape, place in product(SIZES, COLOURS, SHAPES, PLACES)
    ),
    *([letter] for letter in LETTERS),
]
"""The tokens that name what a patch shows, by the patch's class: nothing, then the things at their places, then the
letters.
"""
SHOWN: Final = [{name.removeprefix("Ġ") for name in names} for names in NAMES]
CLASSES: Final = {tuple(name.removeprefix("Ġ") for name in names): i for i, names in enumerate(NAMES)}

CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
    {%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string
        else message['content'] -%}
    {%- if message['role'] == 'user' -%}{{ 'USER: ' }}
    {%- elif message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' }}{%- endif -%}
    {%- for part in parts if part['type'] in ('image', 'image_url') -%}{{ '<image>\\n' }}{%- endfor -%}
    {%- for part in parts if part['type'] == 'text' -%}
        {{- part['text'] | trim -}}{{- ' ' if not loop.last else '' -}}
    {%- endfor -%}
    {%- if message['role'] == 'assistant' -%}{{ '</s>' }}{%- elif message['role'] == 'system' -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""

ATTRIBUTES: Final = {"Ġ" + word + plural: word for word in (*SIZES, *COLOURS, *SHAPES) for plural in ("", "s")}
"""The tokens of a question that say which things it means, with the attribute each stands for."""

SHARES: Final = {"colour": 3, "shape": 3, "size": 5, "position": 5, "count": 5, "left": 4, "caption": 1, "read": 1}
"""How often each kind is asked about a picture that admits it, compared to the others."""


@dataclass(frozen=True)
class Recipe:
    """What a training is; two runs of one recipe and seed see the same pictures in the same order."""

    pictures: int = 250_000
    batch: int = 32
    length: int = 192
    """Tokens of a conversation, filled with as many turns as fit: room for two pictures with two short turns each."""
    rate: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.6
    """The share of the run, at its end, over which the learning rate falls to zero."""
    patch_loss: float = 1.0
    point_loss: float = 1.0
    """Weights of the losses of patches and pointers at the start; they fall to zero over the run."""
    ema: float = 0.99
    doubles: float = 0.2
    """Share of conversations that are about two pictures, mostly of words, rather than one scene."""
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.pictures // self.batch

    def rate_at(self, step: int) -> float:
        return self.rate * min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.decay * self.steps))


def vocabulary() -> list[str]:
    """Every word of the questions and answers, as the tokens they are: with and without the space before them."""
    words = set("USER ASSISTANT describe what where which how What Where Which How Describe colour Colour".split())
    words |= set(
        "is are the a an and or in on at of with to color shape shapes thing things size word say picture "
        "background".split()
    )
    words |= set(
        "there many further left right top bottom center circles squares triangles it this that image you see".split()
    )
    words |= {*COLOURS, *BACKGROUNDS, *SHAPES, *SIZES}
    return [space + word for word in sorted(words) for space in ("", " ")] + [" " + digit for digit in "0123456789"]


def build_tokenizer(more: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Whole words for the vocabulary, bytes for all else: any text survives, and a word to be read is spelled letter by
    letter. `more` are further tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word.replace(" ", "Ġ") for word in vocabulary()]
    tokens = list(dict.fromkeys((*SPECIALS, *alphabet, *words, *more)))
    assert len(tokens) <= VOCABULARY
    # Without merges, a piece is one token if it is in the vocabulary (ignore_merges) and its bytes if not.
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> LlavaForConditionalGeneration:
    """The untrained model: LLaVA 1.5 at a hundredth of its width. The tower's last layer stays unused, as in LLaVA."""
    special = {token: i for i, token in enumerate(SPECIALS)}
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=EDGE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=special["<s>"],
        eos_token_id=special["</s>"],
        pad_token_id=special["<pad>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=special["<image>"],
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=special["<s>"], eos_token_id=special["</s>"], pad_token_id=special["<pad>"], max_new_tokens=96
    )
    return model


@dataclass(frozen=True, eq=False)
class Batch:
    """Conversations as tokens [batch, length] with as many labels, kinds and turns, and their pictures in order of
    appearance: [pictures, 3, 128, 128] normalised, and what their patches show [pictures, 64].
    """

    pictures: Tensor
    patches: Tensor
    tokens: Tensor
    labels: Tensor
    kinds: Tensor
    turns: Tensor
    pointers: Tensor
    """The conversation and place [pointers, 2] of each token that names things in a question."""
    pointed: Tensor
    """What it points at, bool [pointers, length]: the patches of those things, or the first token if there are none."""


@dataclass(eq=False)
class Row:
    """One conversation: its pictures, what their patches show, and per token its label, the kind and number of its
    turn.
    """

    pictures: list[NDArray[np.uint8]]
    patches: list[NDArray[np.int64]]
    tokens: list[int]
    labels: list[int]
    kinds: list[int]
    turns: list[int]
    pointers: dict[int, list[int]] = field(default_factory=dict)


class Data:
    """Draws training batches; `processor` fixes the tokens and the normalisation."""

    def __init__(self, processor: LlavaProcessor, recipe: Recipe) -> None:
        self.recipe = recipe
        tokenizer = processor.tokenizer
        self.image, self.start, self.end, self.pad = (
            tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<s>", "</s>", "<pad>")
        )
        self.encode = lru_cache(1 << 16)(lambda text: tokenizer.encode(text, add_special_tokens=False))
        self.attributes = {tokenizer.convert_tokens_to_ids(token): word for token, word in ATTRIBUTES.items()}
        self.mean = np.array(processor.image_processor.image_mean, np.float32) * 255
        self.std = np.array(processor.image_processor.image_std, np.float32) * 255

    def batch(self, step: int, size: int, seed: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        rows = [self.row(rng) for _ in range(size)]
        length = self.recipe.length

        def padded(lists: list[list[int]], empty: int) -> Tensor:
            return torch.tensor([one + [empty] * (length - len(one)) for one in lists])

        pointers = torch.tensor([(i, place) for i, row in enumerate(rows) for place in row.pointers]).view(-1, 2)
        pointed = torch.zeros(len(pointers), length, dtype=torch.bool)
        for mask, places in zip(pointed, (places for row in rows for places in row.pointers.values()), strict=True):
            mask[places] = True
        pictures = (
            np.stack([picture for row in rows for picture in row.pictures]).astype(np.float32) - self.mean
        ) / self.std
        return Batch(
            torch.from_numpy(pictures).permute(0, 3, 1, 2),
            torch.from_numpy(np.stack([patches for row in rows for patches in row.patches])),
            padded([row.tokens for row in rows], self.pad),
            padded([row.labels for row in rows], IGNORED),
            padded([row.kinds for row in rows], IGNORED),
            padded([row.turns for row in rows], IGNORED),
            pointers,
            pointed,
        )

    def prompt(self, question: Question, rng: np.random.Generator, first: bool) -> list[int]:
        """The tokens of a question; `first` if its picture comes before it."""
        tokens: list[int] = []
        image = "<image>\n" if first else ""
        for token in (*self.encode(f"USER: {image}{rephrase(question.text, rng)}"), *self.encode(" ASSISTANT:")):
            tokens += [token] * (GRID * GRID if token == self.image else 1)
        return tokens

    def row(self, rng: np.random.Generator) -> Row:
        """A conversation: many turns about one scene, or few about each of two pictures that mostly show words."""
        row = Row([], [], [self.start], [IGNORED], [IGNORED], [IGNORED])
        if rng.random() < self.recipe.doubles:
            for end in (self.recipe.length // 2, self.recipe.length):
                self.show(row, rng, word=rng.random() < 0.85, end=end)
        else:
            self.show(row, rng, word=False, end=self.recipe.length)
        return row

    def show(self, row: Row, rng: np.random.Generator, word: bool, end: int) -> None:
        """Put one more picture before the conversation, and ask about it until there are `end` tokens."""
        if word:
            written = draw_word(rng)
            picture, questions, patches = render_word(written, rng), word_questions(written), word_patches(written)
        else:
            scene = draw_scene(rng)
            picture, questions, patches = render(scene, rng), scene_questions(scene, rng), scene_patches(scene)
        row.pictures.append(roughen(picture, rng))
        row.patches.append(patches)
        by_kind = defaultdict(list)
        for question in questions:
            by_kind[question.kind].append(question)
        # A caption answers all other questions, so it is asked less; finding a thing by its look is learnt last, so it
        # is asked more.
        kinds = [kind for kind in by_kind for _ in range(SHARES[kind])]
        chosen = [kinds[i] for i in rng.permutation(len(kinds))]
        if word:
            chosen = ["read", *chosen] if rng.random() < 0.7 else chosen
        first = -1
        asked: set[str] = set()
        for kind in chosen:
            question = by_kind[kind][rng.integers(len(by_kind[kind]))]
            if question.text in asked:  # its answer stands above: nothing to see for
                continue
            prompt = self.prompt(question, rng, first < 0)
            answer = [*self.encode(f" {question.answer}"), self.end]
            if len(row.tokens) + len(prompt) + len(answer) <= end:
                if first < 0:
                    first = len(row.tokens) + prompt.index(self.image)
                turn = max((0, *row.turns)) + 1
                row.pointers |= self.point(prompt, len(row.tokens), patches, first)
                asked.add(question.text)
                row.tokens += prompt + answer
                row.labels += [IGNORED] * len(prompt) + answer
                row.kinds += [IGNORED] * len(prompt) + [KINDS.index(kind)] * len(answer)
                row.turns += [IGNORED] * len(prompt) + [turn] * len(answer)

    def point(self, prompt: list[int], start: int, patches: NDArray[np.int64], first: int) -> dict[int, list[int]]:
        """Where each attribute in a prompt at `start` points: at the patches, from `first` on, of what it and those
        just before it name.
        """
        pointers: dict[int, list[int]] = {}
        said: set[str] = set()
        for i, token in enumerate(prompt):
            attribute = self.attributes.get(token)
            said = {*said, attribute} if attribute else set()
            if said:
                pointers[start + i] = [first + k for k, c in enumerate(patches) if said <= SHOWN[c]] or [0]
        return pointers


def rephrase(question: str, rng: np.random.Generator) -> str:
    """The question as people also type it."""
    if rng.random() < 0.1:
        question = question.replace("color", "colour")
    return question[0].upper() + question[1:] if rng.random() < 0.2 else question


def roughen(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blur, noise and a colour shift, each sometimes: pictures drawn by a diffusion model or compressed are not as
    clean as ours.
    """
    rough = picture.astype(np.float32)
    if rng.random() < 0.4:
        rough = np.asarray(cv2.GaussianBlur(rough, (0, 0), rng.uniform(0.3, 1.3)), np.float32)
    if rng.random() < 0.4:
        rough = rough * rng.uniform(0.92, 1.08, 3).astype(np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
    if rng.random() < 0.4:
        rough = rough + rng.standard_normal(rough.shape, np.float32) * np.float32(rng.uniform(1, 9))
    return rough.clip(0, 255).astype(np.uint8)


def scene_patches(scene: Scene) -> NDArray[np.int64]:
    """What each patch [64] shows, as a class of `NAMES`."""
    classes = np.zeros((GRID, GRID), np.int64)
    centres = (np.arange(GRID) + 0.5) / GRID
    for thing in scene.things:
        (x, y), reach = PLACES[thing.place], SIZES[thing.size]
        inside = (np.abs(centres - y) < reach)[:, None] & (np.abs(centres - x) < reach)[None, :]
        classes[inside] = CLASSES[thing.size, thing.colour, thing.shape, *thing.place.split()]
    return classes.ravel()


def word_patches(word: Word) -> NDArray[np.int64]:
    """Which letter each patch [64] shows part of, as a class of `NAMES`."""
    classes = np.zeros((GRID, GRID), np.int64)
    for i, letter in enumerate(word.text):
        left = (word.column + i * CELL) // PATCH
        classes[GRID // 2 - 1 : GRID // 2 + 1, left : left + CELL // PATCH] = CLASSES[(letter,)]
    return classes.ravel()


class Trainee(nn.Module):
    """The model as it is trained."""

    named: Tensor
    """Shares each patch class out over the tokens that name it: [classes, vocabulary]."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        super().__init__()
        self.model = model
        # The pointers' loss needs the weights of the attention; on a CPU at these lengths this is also faster than the
        # fused kernel.
        model.set_attn_implementation("eager")
        named = torch.zeros(len(NAMES), model.get_input_embeddings().num_embeddings)
        for row, tokens in zip(named, NAMES, strict=True):
            row[processor.tokenizer.convert_tokens_to_ids(tokens)] = 1 / max(1, len(tokens))
        self.register_buffer("named", named, persistent=False)
        # One group of heads in the second layer: the first has told each token what stands before it, the others carry
        # on what is found.
        self.seen: dict[str, Any] = {}
        second = self.layers(model)[1]
        second.self_attn.register_forward_hook(lambda _module, _inputs, outputs: self.seen.update(attention=outputs[1]))
        second.register_forward_hook(lambda _module, _inputs, outputs: self.seen.update(hidden=outputs))

    def layers(self, model: Any) -> Any:
        """The layers of the language model."""
        return model.model.language_model.layers

    def naming_loss(self, features: Tensor, named: Tensor) -> Tensor:
        """How far features [n, width] lie from the embeddings of the tokens that name them, shared out in `named` [n,
        vocabulary].
        """
        # The sum of four embeddings has a cosine of 0.5 with each, so that times 16 it outweighs the rest of the
        # vocabulary.
        close = 16 * F.normalize(features, dim=-1) @ F.normalize(self.model.get_input_embeddings().weight, dim=-1).T
        return F.cross_entropy(close.float(), named, reduction="sum") / named.sum().clamp(min=1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the tokens to predict [labels, vocabulary], and the losses of the patches and of the pointers."""
        inner = self.model.model
        tower = inner.vision_tower
        seen = tower.pre_layrnorm(tower.embeddings(batch.pictures))
        for layer in tower.encoder.layers[:-1]:  # LLaVA reads the layer before the last, so the last need not run
            seen = layer(seen, attention_mask=None)
        embed = inner.get_input_embeddings()
        words = embed(batch.tokens)
        features = inner.multi_modal_projector(seen[:, 1:]).to(words.dtype)
        pictured = (batch.tokens == self.model.config.image_token_index).unsqueeze(-1)
        words = words.masked_scatter(pictured, features)
        # Padding is at the end, where causal attention never looks: it needs no mask.
        hidden = inner.language_model(inputs_embeds=words, use_cache=False).last_hidden_state
        predicting = batch.labels[:, 1:] != IGNORED
        patch_loss = self.naming_loss(features.flatten(0, 1), self.named[batch.patches.flatten()])
        point_loss = self.pointer_loss(batch, pictured.squeeze(-1))
        return self.model.lm_head(hidden[:, :-1][predicting]).float(), patch_loss, point_loss

    def pointer_loss(self, batch: Batch, pictured: Tensor) -> Tensor:
        """How far the words for things look past them, and lie from their names; `pictured` [batch, length] are the
        places of patches.
        """
        rows, places = batch.pointers.T
        heads = self.model.config.text_config.num_attention_heads // 2
        caught = (self.seen["attention"][rows, :heads, places].float() * batch.pointed.unsqueeze(1)).sum(-1)
        classes = torch.zeros_like(batch.tokens).masked_scatter(pictured, batch.patches)
        found = torch.zeros(len(rows), len(NAMES)).scatter_add(1, classes[rows], batch.pointed.float())
        found = F.normalize(found, p=1.0, dim=-1) @ self.named
        return self.naming_loss(self.seen["hidden"][rows, places], found) - (caught + 1e-4).log().mean()


def validate(trainee: Trainee, data: Data, pictures: int = 192) -> dict[str, float]:
    """Share of answers wholly right by kind, on fresh pictures of the training's kind; greedy decoding gives the same
    answers.
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for step in range(pictures // 32):
        batch = data.batch(step, 32, seed=1_000_003)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            logits, *_ = trainee(batch)
        predicting = batch.labels != IGNORED
        hits = (logits.argmax(-1) == batch.labels[predicting]).tolist()
        turns: dict[tuple[int, int, int], bool] = {}
        rows = torch.arange(len(batch.labels)).unsqueeze(1).expand_as(batch.labels)[predicting].tolist()
        for key, hit in zip(
            zip(rows, batch.turns[predicting].tolist(), batch.kinds[predicting].tolist(), strict=True),
            hits,
            strict=True,
        ):
            turns[key] = turns.get(key, True) and hit
        for (_, _, kind), hit in turns.items():
            asked[KINDS[kind]] += 1
            right[KINDS[kind]] += hit
    return {kind: right[kind] / asked[kind] for kind in KINDS if asked[kind]}


def save(path: Path, tensors: dict[str, Tensor], **facts: float) -> None:
    """Write tensors and facts in one piece: a killed run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        fresh,
        metadata={"facts": json.dumps(facts)},
    )
    fresh.replace(path)


def facts_of(path: Path) -> dict[str, float]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["facts"]))


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")
    }


def build_optimizers(trainee: Trainee) -> list[torch.optim.Optimizer]:
    """Muon for the weights of the layers, which learn in about half the steps that AdamW needs; AdamW for all else.

    Each group also holds the names of its parameters, for checkpoints, and `scale`, its learning rate as a multiple of
    the recipe's.
    """
    named = dict(trainee.named_parameters())
    layers = {name for name, p in named.items() if p.ndim == 2 and re.search(r"\.layers?\.|project", name)}
    vectors = {name for name, p in named.items() if p.ndim < 2}

    def group(names: Iterable[str], scale: float, weight_decay: float) -> dict[str, Any]:
        ordered = sorted(names)
        return {
            "params": [named[name] for name in ordered],
            "names": ordered,
            "scale": scale,
            "weight_decay": weight_decay,
        }

    return [
        torch.optim.Muon([group(layers, 1.5, 0.05)], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [group(named.keys() - layers - vectors, 1.0, 0.05), group(vectors, 1.0, 0.0)], betas=(0.9, 0.98), fused=True
        ),
    ]


def open_training(recipe: Recipe, start: Path | None) -> tuple[Trainee, Trainee, Data]:
    """The model to train, the one of its averaged weights, and the data. The training starts from the exported weights
    in `start`, if there are any.
    """
    torch.manual_seed(recipe.seed)
    processor = build_processor()
    model = build_model()
    if start and start.joinpath("model.safetensors").exists():
        model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    return Trainee(model, processor), Trainee(build_model(), processor), Data(processor, recipe)


def states(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[tuple[dict[Any, Any], str, nn.Parameter]]:
    """Of every parameter the states that hold its own, the name of its state in a checkpoint, and itself."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                yield optimizer.state, f"state/{name}", p


def learn(recipe: Recipe, trainee: Trainee, batch: Batch, fading: float) -> tuple[float, float, float]:
    """Compute the gradients of a batch; its three losses, of which the last two count by `fading`."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, patch_loss, point_loss = trainee(batch)
    loss = F.cross_entropy(logits, batch.labels[batch.labels != IGNORED])
    total = loss + fading * (recipe.patch_loss * patch_loss + recipe.point_loss * point_loss)
    trainee.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    return loss.item(), patch_loss.item(), point_loss.item()


def train(run: Path, recipe: Recipe, minutes: float, trainee: Trainee, averaged: Trainee, data: Data) -> None:
    """Train until the recipe or the time is up; the checkpoint and the best averaged weights lie in `run`."""
    averaged.load_state_dict(trainee.state_dict())
    optimizers = build_optimizers(trainee)
    first, best = 0, 0.0
    checkpoint = run / "checkpoint.safetensors"
    if checkpoint.exists():
        tensors, facts = load_file(checkpoint), facts_of(checkpoint)
        first, best = int(facts["step"]), facts["best"]
        trainee.load_state_dict(below("model", tensors))
        averaged.load_state_dict(below("ema", tensors))
        for state, name, p in states(optimizers):
            state[p] = below(name, tensors)

    def keep(step: int) -> None:
        tensors = prefixed("model", trainee.state_dict()) | prefixed("ema", averaged.state_dict())
        for state, name, p in states(optimizers):
            tensors |= prefixed(name, state[p])
        save(checkpoint, tensors, step=step, best=best)

    began, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step) * group["scale"]
        losses.append(learn(recipe, trainee, data.batch(step, recipe.batch, recipe.seed), 1 - step / recipe.steps))
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            weight = 1 - min(recipe.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(trainee.parameters()), weight)
        done, out_of_time = step + 1, time.monotonic() - began > minutes * 60
        if done % 50 == 0:
            speed = (done - first) * recipe.batch / (time.monotonic() - began)
            mean = np.mean(losses[-50:], axis=0)
            print(
                f"step {done}/{recipe.steps} loss {mean[0]:.4f} patches {mean[1]:.4f} pointers {mean[2]:.4f} "
                f"conversations/s {speed:.1f}",
                flush=True,
            )
        if done % 250 == 0 or done == recipe.steps or out_of_time:
            scores = validate(averaged, data)
            score = float(np.mean(list(scores.values())))
            print(
                f"  {time.strftime('%H:%M:%S')} score {score:.3f} "
                + " ".join(f"{k} {v:.2f}" for k, v in scores.items()),
                flush=True,
            )
            if score >= best:
                best = score
                save(run / "best.safetensors", averaged.model.state_dict(), step=done, score=score)
            keep(done)
        if out_of_time:
            break


def export(run: Path, out: Path) -> None:
    """Write the best weights of a run as an fp16 checkpoint that `from_pretrained` loads unchanged."""
    model, processor = build_model(), build_processor()
    model.load_state_dict(load_file(run / "best.safetensors"))
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    print(f"{out}: {facts_of(run / 'best.safetensors')}")


def answer(model: Any, processor: Any, pictures: Iterable[NDArray[np.uint8]], questions: Iterable[str]) -> list[str]:
    """Greedy answers of a LLaVA checkpoint to one question per picture."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(images=list(pictures), text=prompts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False)
    return list(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def score(directory: Path, count: int = 1000) -> None:
    """Print how many of the held-out questions plain transformers answers right in fp32, by kind."""
    from samples.world.scoring import score_answer

    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(directory)
    cases = score_questions(count)
    right: Counter[str] = Counter()
    for i in range(0, len(cases), 50):
        some = cases[i : i + 50]
        answers = answer(model, processor, [case.picture for case in some], [case.question for case in some])
        for case, said in zip(some, answers, strict=True):
            right[case.kind] += score_answer(said, case.answer)
            if not score_answer(said, case.answer):
                print(f"  {case.question} {said.strip()!r}, not {case.answer!r}")
    asked = Counter(case.kind for case in cases)
    print_scores(right, asked)


def print_scores(right: Counter[str], asked: Counter[str]) -> None:
    for kind in asked:
        print(f"{kind:>10} {right[kind]:4}/{asked[kind]:<4} {right[kind] / asked[kind]:6.1%}")
    print(f"{'all':>10} {right.total():4}/{asked.total():<4} {right.total() / asked.total():6.1%}")


def run_command(
    about: str | None,
    run: str,
    out: Path,
    recipe: type[Recipe],
    open_training: Callable[[Any, Path | None], tuple[Trainee, Trainee, Data]],
    export: Callable[[Path, Path], None],
    score: Callable[[Path], None],
) -> None:
    """The command of a recipe: train and export, or only export or score."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path(run), help="folder of the run's checkpoint")
    parser.add_argument("--out", type=Path, default=out, help="where to export to")
    parser.add_argument("--pictures", type=int, default=recipe.pictures, help="how many pictures the whole run sees")
    parser.add_argument("--fresh", action="store_true", help="do not start from the exported weights")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; the next call goes on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", action="store_true", help="only export the best weights so far")
    parser.add_argument("--score", type=Path, metavar="DIR", help="only score the checkpoint in DIR")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.score:
        score(options.score)
        return
    if not options.export:
        chosen = recipe(pictures=options.pictures)
        train(options.run, chosen, options.minutes, *open_training(chosen, None if options.fresh else options.out))
    export(options.run, options.out)


def main() -> None:
    run_command(__doc__, "runs/vlm", SAMPLE, Recipe, open_training, export, score)


if __name__ == "__main__":
    main()
