"""A decoder's calls, and what it holds of a sequence. Of the device side, this file alone names its tensors and those
of the token embedding.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.signature import Array
from runtime.engine import Slot
from runtime.language.processors import Scores
from runtime.pipeline import Call, Event, Outputs

T = TypeVar("T")
Step = Generator[Call | Event, Outputs | None, T]
"""A part of a pipeline that results in a T."""
Places = NDArray[np.int64]
"""[sequence]: the number of each position, which tells the decoder where it stands among the others."""
HIDDEN: Final = "hidden_states"
"""What the logits are computed of, float32 [batch, 1, hidden]: an output of decoders with a draft, and its input."""


@dataclass
class Conversation:
    """What the decoder already holds of a conversation: pass the same one for each turn, and only what is new is
    computed.

    `held` identifies the positions in the slot: token ids, and for a picture's positions a number made from its content
    (see `runtime.language.vision`). A turn that shares no beginning with the one before simply starts anew. One request
    at a time may use it. `given` are further inputs of every call, such as the keys and values of an encoder. The
    next call first copies the slot `origin`. `reused` positions of the last prompt were held already.
    `pruned` positions of its pictures were left out: what follows it has the numbers that it has behind all of them.
    `hidden` [last, hidden] are the states of the positions that the last call gave logits of, where the decoder gives
    them.
    """

    slot: Slot = field(default_factory=Slot)
    held: list[int] = field(default_factory=list)
    given: Mapping[str, Array] = field(default_factory=dict)
    origin: Slot | None = None
    reused: int = 0
    pruned: int = 0
    hidden: Array | None = None

    def shared(self, keys: Sequence[int]) -> int:
        """How many positions at the beginning are the same."""
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.held, keys, strict=False)))

    def fork(self) -> Conversation:
        """A copy. It is made by its first call, before which this conversation must not go on."""
        held = list(self.held)
        return Conversation(Slot(), held, self.given, self.slot, pruned=self.pruned, hidden=self.hidden)


def run(call: Call) -> Step[Outputs]:
    outputs = yield call
    assert outputs is not None, "a driver answers a call with its outputs"
    return outputs


def embed(ids: Sequence[int]) -> Step[Array]:
    """Embeddings [1, sequence, hidden] of tokens."""
    outputs = yield from run(Call("token_embedding", {"input_ids": np.array([ids], np.int64)}))
    return outputs["inputs_embeds"]


def decode(
    embeds: Array, keys: Sequence[int], conversation: Conversation, keep: int | None = None, last: int = 1,
    places: Places | None = None,
) -> Step[Scores]:  # fmt: skip
    """Feed embeddings [1, sequence, hidden] behind what the conversation holds, of which the slot first forgets all but
    `keep` positions; the logits [last, vocab] of the last ones. `places` are the numbers of these positions, by default
    those that follow.
    """
    past = len(conversation.held)
    total = past + len(keys)
    if places is None:
        places = np.arange(past, total, dtype=np.int64) + conversation.pruned
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": places[None],
        **conversation.given,
    }
    outputs = yield from run(Call("decoder", inputs, conversation.slot, keep, conversation.origin, last))
    # Only now: if the call was abandoned, the next turn trims the slot to what is known.
    conversation.held.extend(keys)
    conversation.origin = None
    conversation.hidden = outputs[HIDDEN][0, -last:] if HIDDEN in outputs else None
    return np.asarray(outputs["logits"][0, -last:], np.float32)


def decode_token(token: int, conversation: Conversation) -> Step[Scores]:
    """`decode` of one token; the logits [vocab] behind it."""
    logits = yield from decode_tokens([token], conversation)
    behind: Scores = logits[0]
    return behind


def decode_tokens(tokens: Sequence[int], conversation: Conversation, keep: int | None = None) -> Step[Scores]:
    """`decode` of tokens; the logits [tokens, vocab] behind each of them."""
    embeds = yield from embed(tokens)
    return (yield from decode(embeds, tokens, conversation, keep, len(tokens)))


def prefill(
    embeds: Array, keys: Sequence[int], places: Places, conversation: Conversation, shared: int, chunk: int
) -> Step[Scores]:
    """Bring the decoder from the first `shared` positions of what the conversation holds to the end of these, whose
    numbers are `places`, in calls of at most `chunk` (0: one call).
    """
    if not shared:
        conversation.slot = Slot()
    conversation.held, keep = conversation.held[:shared], shared or None
    conversation.pruned = int(places[-1]) + 1 - (shared + len(keys))
    for start in range(0, len(keys), chunk or len(keys)):
        piece = slice(start, start + (chunk or len(keys)))
        logits = yield from decode(embeds[:, piece], keys[piece], conversation, keep, places=places[piece])
        keep = None
    behind: Scores = logits[0]
    return behind
