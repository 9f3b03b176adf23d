"""Trains the sample BLIP-2 `shapes-blip2`: a small vision transformer, Q-Former and OPT that writes captions of scenes
and answers questions about them.

    python -m samples.recipes.train_blip2 --run runs/blip2           train, or go on where a killed run stopped; then
                                                                     export
    python -m samples.recipes.train_blip2 --run runs/blip2 --export  export the best weights so far
    python -m samples.recipes.train_blip2 --score samples/shapes-blip2

The prompts are those of the published BLIP-2: nothing for a caption, "Question: ... Answer:" for an answer. One
training sequence is one picture and several prompts with their answers; each sees the picture and itself alone, as if
it were the only one. Loop, checkpoints and the two fading losses are those of `train_vlm`, with queries in place of
patches: the language model's input of each query lies close to the words for what its part of the picture shows. A
third, of the same weight, keeps each query's attention on its part of the picture; without it, which query sees what
has to be found by chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    GenerationConfig,
)

from samples.recipes import train_vlm
from samples.recipes.train_vlm import EDGE, GRID, IGNORED, SPECIALS, Batch, Row, build_tokenizer, facts_of
from samples.world.questions import SCENE_KINDS, Question, blip2_prompt
from samples.world.questions import test_questions as score_questions
from samples.world.scoring import score_answer

SAMPLE: Final = Path(__file__).parents[1] / "shapes-blip2"
SIDE: Final = 4
QUERIES: Final = SIDE * SIDE
"""Each query is for one square of the picture, row by row."""
PROMPT_WORDS: Final = ("Question", "ĠQuestion", "Answer", "ĠAnswer")
VOCABULARY: Final = 416
CONFIG: Final[dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 3, "num_attention_heads": 5,
        "image_size": EDGE, "patch_size": EDGE // GRID, "qkv_bias": True,
    },
    "qformer_config": {
        "hidden_size": 160, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 5,
        "encoder_hidden_size": 160, "cross_attention_frequency": 2, "vocab_size": 32, "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "text_config": {
        "model_type": "opt", "hidden_size": 160, "word_embed_proj_dim": 160, "ffn_dim": 480, "num_hidden_layers": 4,
        "num_attention_heads": 5, "max_position_embeddings": 128, "vocab_size": VOCABULARY, "dropout": 0.0,
        "bos_token_id": SPECIALS.index("<s>"), "eos_token_id": SPECIALS.index("</s>"),
        "pad_token_id": SPECIALS.index("<pad>"),
    },
    "num_query_tokens": QUERIES,
    "image_token_index": SPECIALS.index("<image>"),
}  # fmt: skip
"""The sizes, a tenth of the published model's width."""


@dataclass(frozen=True)
class Recipe(train_vlm.Recipe):
    """As of `train_vlm`, with shorter sequences and smaller batches. The weights that lie in the folder are those of
    step 3250, the best so far when the training was stopped at step 3900.
    """

    pictures: int = 128_000
    batch: int = 16
    length: int = 160


def build_processor() -> Blip2Processor:
    pictures = BlipImageProcessorPil(size={"height": EDGE, "width": EDGE})
    return Blip2Processor(pictures, build_tokenizer(PROMPT_WORDS), num_query_tokens=QUERIES)


def build_model() -> Blip2ForConditionalGeneration:
    """The untrained model."""
    model = Blip2ForConditionalGeneration(Blip2Config.from_dict(CONFIG))
    torch.nn.init.normal_(model.query_tokens, std=0.5)  # equal queries would learn equal things
    text = CONFIG["text_config"]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: text[name] for name in names}, max_new_tokens=64)
    return model


class Data(train_vlm.Data):
    """Conversations whose turns do not see each other."""

    def prompt(self, question: Question, rng: np.random.Generator, first: bool) -> list[int]:
        asked = train_vlm.rephrase(question.text, rng)
        return [*[self.image] * (QUERIES * first), self.start, *self.encode(blip2_prompt(question.kind, asked))]

    def row(self, rng: np.random.Generator) -> Row:
        row = Row([], [], [], [], [], [])
        self.show(row, rng, word=False, end=self.recipe.length)
        row.patches = [query_classes(row.patches[0])]
        return row

    def point(self, prompt: list[int], start: int, patches: NDArray[np.int64], first: int) -> dict[int, list[int]]:
        return super().point(prompt, start, query_classes(patches), first)


def query_classes(patches: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the square of each query [16] shows, from the classes of its patches [64]: no two things share a square."""
    patch = GRID // SIDE
    classes: NDArray[np.int64] = patches.reshape(SIDE, patch, SIDE, patch).max(axis=(1, 3)).ravel()
    return classes


class Trainee(train_vlm.Trainee):
    """The model as it is trained."""

    squares: Tensor
    """The patches of each query's square: bool [queries, 1 + patches]."""

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor) -> None:
        super().__init__(model, processor)
        places = np.arange(QUERIES).reshape(SIDE, SIDE).repeat(GRID // SIDE, 0).repeat(GRID // SIDE, 1).ravel()
        squares = torch.from_numpy(places) == torch.arange(QUERIES).unsqueeze(1)
        self.register_buffer("squares", F.pad(squares, (1, 0)), persistent=False)
        crossing = model.qformer.encoder.layer[0].crossattention.attention
        crossing.register_forward_hook(lambda _module, _inputs, outputs: self.seen.update(crossing=outputs[1]))

    def layers(self, model: Any) -> Any:
        return model.language_model.model.decoder.layers

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        seen = model.vision_model(batch.pictures).last_hidden_state
        queries = model.query_tokens.expand(len(seen), -1, -1)
        features = model.language_projection(model.qformer(queries, encoder_hidden_states=seen).last_hidden_state)
        words = model.get_input_embeddings()(batch.tokens[:, QUERIES:])
        embeds = torch.cat([features.to(words.dtype), words], 1)
        mask, positions = turns_apart(batch.tokens)
        decoder = model.language_model.model.decoder
        hidden = decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        predicting = batch.labels[:, 1:] != IGNORED
        patch_loss = self.naming_loss(features.flatten(0, 1), self.named[batch.patches.flatten()])
        crossing = (self.seen["crossing"].float() * self.squares.unsqueeze(0).unsqueeze(0)).sum(-1)
        pictured = batch.tokens == SPECIALS.index("<image>")
        point_loss = self.pointer_loss(batch, pictured) - (crossing + 1e-4).log().mean()
        return model.language_model.lm_head(hidden[:, :-1][predicting]).float(), patch_loss, point_loss


def turns_apart(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The attention mask [batch, 1, length, length], added to the scores, and the positions [batch, length] of
    sequences in which every turn begins with <s> and sees the picture and itself.
    """
    starts = tokens == SPECIALS.index("<s>")
    turns, place = starts.cumsum(1), torch.arange(tokens.shape[1])
    seen = (turns.unsqueeze(2) == turns.unsqueeze(1)) | (turns == 0).unsqueeze(1)
    seen &= place.unsqueeze(1) >= place
    began = torch.where(starts, place - QUERIES, 0).cummax(1).values
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return mask.unsqueeze(1), place - began


def open_training(recipe: Recipe, start: Path | None) -> tuple[Trainee, Trainee, Data]:
    """As of `train_vlm`."""
    torch.manual_seed(recipe.seed)
    processor, model = build_processor(), build_model()
    if start and start.joinpath("model.safetensors").exists():
        model = Blip2ForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    return Trainee(model, processor), Trainee(build_model(), processor), Data(processor, recipe)


def export(run: Path, out: Path) -> None:
    """Write the best weights of a run as an fp16 checkpoint that `from_pretrained` loads unchanged."""
    model = build_model()
    model.load_state_dict(load_file(run / "best.safetensors"))
    model.half().save_pretrained(out)
    build_processor().save_pretrained(out)
    print(f"{out}: {facts_of(run / 'best.safetensors')}")


def answer(model: Any, processor: Any, pictures: Iterable[NDArray[np.uint8]], texts: Iterable[str]) -> list[str]:
    """Greedy answers to one prompt per picture."""
    inputs = processor(images=list(pictures), text=list(texts), padding=True, return_tensors="pt")
    with torch.inference_mode():
        # the model hands its language model no other settings than those of the call
        tokens = model.generate(**inputs, generation_config=model.generation_config, do_sample=False)
    return list(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def score(directory: Path, count: int = 1000) -> None:
    """Print how many of the held-out questions plain transformers answers right in fp32, by kind."""
    model = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = Blip2Processor.from_pretrained(directory)
    cases = score_questions(count, kinds=SCENE_KINDS)
    right: Counter[str] = Counter()
    for i in range(0, len(cases), 50):
        some = cases[i : i + 50]
        texts = [blip2_prompt(case.kind, case.question) for case in some]
        for case, said in zip(some, answer(model, processor, [case.picture for case in some], texts), strict=True):
            right[case.kind] += score_answer(said, case.answer)
    train_vlm.print_scores(right, Counter(case.kind for case in cases))


def main() -> None:
    train_vlm.run_command(__doc__, "runs/blip2", SAMPLE, Recipe, open_training, export, score)


if __name__ == "__main__":
    main()
