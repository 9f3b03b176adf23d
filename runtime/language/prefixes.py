"""Beginnings of conversations that a decoder has read before: system prompts, pictures, earlier turns.

They are found by their content, so any request may continue one, from whatever connection it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Final

from runtime.kept import Kept
from runtime.language.decoder import Conversation
from runtime.pipeline import Room

SHORTEST: Final = 16
"""Positions of the shortest beginning that is worth a copy."""
SHARE: Final = 8
"""A beginning of less than one part in 8 of what is held is not worth a copy of it all."""


class Prefixes:
    """What the decoder holds of conversations that ended, within the memory of a `Room`. What one conversation shares
    with another is counted for both.
    """

    def __init__(self, room: Room | None = None) -> None:
        room = room or Room()
        self._position = room.position
        self._kept = Kept[int, tuple[int, Conversation]](room.prefixes if room.position else 0)
        self._numbers = count()

    def lend(self, conversation: Conversation, keys: Sequence[int]) -> None:
        """Let an empty conversation continue the kept one that shares the longest beginning with `keys`, if one does.

        `keys` identify the positions of a prompt, see `Conversation`.
        """
        held = self._kept.values()
        shared, (number, best) = max(
            ((other.shared(keys), (number, other)) for number, other in held), key=lambda each: each[0],
            default=(0, (0, conversation)),
        )  # fmt: skip
        if shared < SHORTEST or shared * SHARE < len(best.held):
            return
        self._kept.get(number)  # it was used
        copy = best.fork()
        conversation.slot, conversation.held, conversation.origin = copy.slot, copy.held, copy.origin

    @contextmanager
    def keeping(self, conversation: Conversation) -> Iterator[None]:
        """Keep the conversation at the end of a block, also when the block is left early, as a stopped answer is."""
        try:
            yield
        finally:
            self.keep(conversation)

    def keep(self, conversation: Conversation) -> None:
        """Hold a conversation, which must not go on afterwards, in place of those that are its beginning."""
        if not self._kept.most or conversation.origin is not None or len(conversation.held) < SHORTEST:
            return
        for number, other in self._kept.values():
            if conversation.shared(other.held) == len(other.held):
                self._kept.discard(number)
        number = next(self._numbers)
        self._kept.put(number, (number, conversation), len(conversation.held) * self._position)
