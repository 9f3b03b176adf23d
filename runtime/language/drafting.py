"""Guesses of an answer's next tokens by a small trained network, the draft of a bundle (Cai et al. 2024, Medusa,
arXiv:2401.10774).

    draft   hidden_states float32 [batch, 1, hidden], inputs_embeds float32 [batch, 1, hidden]
            -> logits float32 [batch, heads, vocab]

It is given the hidden state that the decoder chose a token behind, and that token: one call gives logits of as many
tokens behind it as the draft has heads. The decoder of such a bundle gives `hidden_states` beside its logits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np

from runtime.bundle.signature import Array
from runtime.language.decoder import HIDDEN, Step, embed, run
from runtime.language.processors import Scores, softmax
from runtime.pipeline import Call

SUBMODEL: Final = "draft"
"""The name of the network in a bundle."""
LEAST: Final = 0.3
"""How likely guesses are together by the draft's own account, at least: see docs/decisions/0046-a-trained-draft.md."""


@dataclass(frozen=True)
class Draft:
    """The draft of a bundle for an answer: at most `count` guesses at a time, none of `never` and none behind it."""

    count: int
    never: Collection[int] = ()

    def guess(self, token: int, hidden: Array, room: int) -> Step[list[int]]:
        """At most `room` tokens that follow `token`, which was chosen behind a position of the decoder with the state
        `hidden` [hidden].
        """
        count = min(self.count, room)
        if count < 1:
            return []
        embeds = yield from embed([token])
        inputs = {HIDDEN: np.ascontiguousarray(hidden[None, None]), "inputs_embeds": embeds}
        outputs = yield from run(Call(SUBMODEL, inputs))
        return self.sure(np.asarray(outputs["logits"][0, :count], np.float32))

    def sure(self, logits: Scores) -> list[int]:
        """The likeliest token of each head [heads, vocab], as long as all of them together are likely enough."""
        guesses, likely = list[int](), 1.0
        for row in logits:
            shares = softmax(row)
            best = int(shares.argmax())
            likely *= float(shares[best])
            if best in self.never or not likely >= LEAST:
                break
            guesses.append(best)
        return guesses
