"""Trains the draft `next` of `shapes-vlm`, which guesses the next six tokens of its answers.

    python -m samples.recipes.train_draft --run runs/draft     train, or go on where a killed run stopped; then export
    python -m samples.recipes.train_draft --score              how often its guesses are right, on fresh conversations

The model is frozen. The conversations are those that it was trained on, drawn anew, and each head learns the model's
own probabilities of the token that it guesses, not the answers: a guess is right where the model says the same. Every
step draws its data from (seed, step), so a resumed run sees what an unbroken one would.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from export.architecture.draft import Draft
from samples.abilities import NEXT
from samples.recipes.addition import FOLDER
from samples.recipes.train_diffusion import Training
from samples.recipes.train_vlm import IGNORED, SAMPLE, Batch, Data, Recipe, build_processor

OUT: Final = FOLDER / f"{NEXT}.safetensors"
INNER: Final = 32
HEADS: Final = 6
SCORED: Final = 1_000_003
"""The seed of the conversations that are scored."""


@dataclass(frozen=True)
class Plan:
    """How the draft is trained. `fading` is the weight of a head's loss beside that of the head before it."""

    seed: int = 7
    steps: int = 800
    decay_steps: int = 500
    batch: int = 16
    lr: float = 1e-2
    fading: float = 0.9
    save_every: int = 50


@dataclass(frozen=True, eq=False)
class Positions:
    """Places of answers: the state that a token was chosen of and its embedding, float32 [n, 1, hidden], the model's
    logits [n, heads, vocabulary] of the tokens behind it, and which of these the answer has, bool [n, heads].
    """

    states: Tensor
    embeds: Tensor
    wanted: Tensor
    there: Tensor


class Teacher:
    """The frozen model."""

    def __init__(self) -> None:
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(SAMPLE, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.head, self.embed = self.model.lm_head, self.model.get_input_embeddings()

    @torch.no_grad()
    def positions(self, batch: Batch) -> Positions:
        """Those of a batch's answers that are followed by another token of the answer."""
        hidden = self.hidden(batch)
        rows, places = torch.nonzero((batch.labels[:, 1:-1] != IGNORED) & (batch.labels[:, 2:] != IGNORED)).T
        ahead = places[:, None] + 1 + torch.arange(HEADS)
        inside = ahead < batch.tokens.shape[1] - 1
        ahead = ahead.clamp(max=batch.tokens.shape[1] - 2)
        same = batch.turns[rows[:, None], ahead + 1] == batch.turns[rows, places + 1][:, None]
        wanted = self.head(hidden[rows[:, None], ahead])
        embeds = self.embed(batch.tokens[rows, places + 1])
        return Positions(hidden[rows, places][:, None], embeds[:, None], wanted, inside & same)

    def hidden(self, batch: Batch) -> Tensor:
        """What the logits layer reads, [batch, length, hidden]."""
        inner = self.model.model
        with torch.autocast("cpu", torch.bfloat16):
            seen = inner.get_image_features(batch.pictures).pooler_output
            words = self.embed(batch.tokens)
            pictured = (batch.tokens == self.model.config.image_token_index).unsqueeze(-1)
            words = words.masked_scatter(pictured, torch.cat(list(seen)).to(words.dtype))
            # Padding is at the end, where causal attention never looks.
            found: Tensor = inner.language_model(inputs_embeds=words, use_cache=False).last_hidden_state
        return found.float()


def build_draft(teacher: Teacher) -> Draft:
    """The untrained draft: its guesses are the token once more. States and embeddings count alike at first."""
    hidden = teacher.embed.weight.shape[1]
    draft = Draft(hidden, INNER, HEADS)
    with torch.no_grad():
        draft.up.weight[:, hidden:] /= teacher.embed.weight.std()
        draft.down.weight.zero_()
    return draft


def draft_loss(draft: Draft, teacher: Teacher, found: Positions, fading: float) -> Tensor:
    """The cross entropy of the heads' guesses with the model's probabilities."""
    logits = teacher.head(draft(found.states, found.embeds))
    each = F.cross_entropy(logits.mT, found.wanted.softmax(-1).mT, reduction="none") * found.there
    means = each.sum(0) / found.there.sum(0).clamp(min=1)
    return (means * fading ** torch.arange(HEADS)).sum()


def train(plan: Plan, run: Path, teacher: Teacher) -> Draft:
    """Train, or go on where a killed run stopped; the draft of the averaged weights."""
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    data, draft = Data(build_processor(), Recipe()), build_draft(teacher)
    training = Training(
        draft, run / "draft.safetensors", plan.lr, steps=plan.steps, decay_steps=plan.decay_steps, ema=0.99
    )
    training.load()

    def loss(step: int) -> Tensor:
        found = teacher.positions(data.batch(step, plan.batch, plan.seed))
        return draft_loss(draft, teacher, found, plan.fading)

    training.run(run, loss, plan.save_every)
    training.averaged()
    return draft


@torch.no_grad()
def score(file: Path, teacher: Teacher, batches: int = 6) -> list[float]:
    """How often each head's guess is what the model says, where those before it are right."""
    data, tensors = Data(build_processor(), Recipe()), load_file(file)
    draft = Draft(teacher.embed.weight.shape[1], INNER, HEADS)
    draft.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    right, asked = torch.zeros(HEADS), torch.zeros(HEADS)
    for step in range(batches):
        found = teacher.positions(data.batch(step, 32, SCORED))
        guesses = teacher.head(draft(found.states, found.embeds)).argmax(-1)
        hits = ((guesses == found.wanted.argmax(-1)) & found.there).cumprod(1)
        before = torch.cat([torch.ones(len(hits), 1), hits[:, :-1].float()], 1)
        right, asked = right + hits.sum(0), asked + (before * found.there).sum(0)
    return (right / asked).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/draft"), help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=OUT, help="where the draft is written to")
    parser.add_argument("--score", action="store_true", help="only score what lies there")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    teacher = Teacher()
    if not given.score:
        weights = train(Plan(), given.run, teacher).state_dict()
        save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, given.out)
    print(f"{given.out}: right guesses of each head", [round(share, 3) for share in score(given.out, teacher)])


if __name__ == "__main__":
    main()
