"""Guesses of an answer's next tokens, verified in one call of the decoder (Leviathan et al. 2023, arXiv:2211.17192).

A call takes a token and guesses of those behind it, and gives the logits behind each. The answer's tokens are chosen of
these logits one by one, as they are without guesses, from the same random numbers, and as long as the one that is
chosen is the one that was guessed, the next logits are there already. So the answer is the same one, token for token:
for a guess that is certain, rejection sampling accepts exactly where a token drawn by itself is the guess.

Prompt lookup guesses what followed the last tokens where they stood before, in the prompt or in the answer (Yang et al.
2023, arXiv:2304.04487, "inference with reference"). The draft of a bundle guesses by what it learned: before the
lookup, which is wrong more often, but not while text is repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Final

from runtime.language.decoder import Conversation, Step, decode_tokens
from runtime.language.drafting import Draft
from runtime.language.processors import Scores

SIZES: Final = (4, 3, 2)
"""Numbers of last tokens that are looked up, the surest first."""


class Lookup:
    """The tokens of a prompt and its answer so far, by what stands before them. The answer is expected to be like
    `prediction`. Nothing is guessed from a token of `never` on: no answer has it, or none goes on behind it.
    `repeats` says that text is being repeated, as far as is known.
    """

    def __init__(self, tokens: Sequence[int], never: Collection[int] = (), prediction: Sequence[int] = ()) -> None:
        self._tokens, self._never, self.repeats = list[int](), never, bool(prediction)
        self._behind = dict[tuple[int, ...], int]()
        """Where the tokens go on behind the last place of each few of them."""
        self._followed: int | None = None
        """Where they go on at the place that the answer repeats."""
        before = tokens[-max(SIZES) :] if prediction else ()
        for token in (*before, *prediction, *tokens):
            self.push(token)

    def fork(self) -> Lookup:
        """One for another answer, which begins where this one is."""
        made = Lookup((), self._never)
        made._tokens, made._behind, made.repeats = self._tokens.copy(), self._behind.copy(), self.repeats
        return made

    def push(self, token: int) -> None:
        """Go on with a token. What ends in the one before it is followed by this one."""
        place = len(self._tokens)
        if self._followed is not None:
            self._followed = self._followed + 1 if self._tokens[self._followed] == token else None
        for size in SIZES:
            if size <= place:
                self._behind[tuple(self._tokens[-size:])] = place
        self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """At most so many tokens; none where the last ones are new. What repeats itself is expected to go on so."""
        if self._followed is None:
            places = (self._behind.get(tuple(self._tokens[-size:])) for size in SIZES)
            self._followed = next((found for found in places if found is not None), None)
        if self._followed is None:
            return []
        guesses, held = list[int](), len(self._tokens)
        for at in range(self._followed, self._followed + count):
            guesses.append(self._tokens[at] if at < held else guesses[at - held])
        return list(takewhile(lambda token: token not in self._never, guesses))


class Guessing:
    """Feeds the tokens of one answer to the decoder, with at most `count` guesses of the lookup each, or with those of
    the draft. `guessed` counts the guesses, `accepted` those that spared a call.
    """

    def __init__(self, conversation: Conversation, count: int, lookup: Lookup, draft: Draft | None = None) -> None:
        self._conversation, self._count, self._lookup, self._draft = conversation, count, lookup, draft
        self._looked_up = False
        """Whether the last guesses were the lookup's."""
        self._place = 0
        """The position of the decoder's last call that the next token is chosen behind."""
        self._ahead = deque[tuple[int, Scores]]()
        """The guesses behind the tokens so far, with the logits behind each."""
        self.guessed = self.accepted = 0

    def feed(self, token: int, room: int) -> Step[Scores]:
        """The logits [vocab] behind the answer's next token, which at most `room` more tokens follow."""
        if self._count:
            self._lookup.push(token)
        if self._ahead and self._ahead[0][0] == token:
            self.accepted += 1
            self._place += 1
            return self._ahead.popleft()[1]
        if self._looked_up:
            self._lookup.repeats = not self._ahead
        keep = self.forget()
        guesses = yield from self._guesses(token, room - 1)
        logits = yield from decode_tokens([token, *guesses], self._conversation, keep)
        self.guessed, self._place = self.guessed + len(guesses), 0
        self._ahead.extend(zip(guesses, logits[1:], strict=True))
        behind: Scores = logits[0]
        return behind

    def _guesses(self, token: int, room: int) -> Step[list[int]]:
        """Those of the lookup where its last ones were all right, else of the draft, else of the lookup."""
        found, drafted = self._lookup.guess(min(self._count, room)) if self._count else [], list[int]()
        if self._draft is not None and not (found and self._lookup.repeats):
            hidden = self._conversation.hidden
            assert hidden is not None, "the decoder of a bundle with a draft gives its hidden states"
            drafted = yield from self._draft.guess(token, hidden[self._place], room)
        self._looked_up = bool(found) and not drafted
        return drafted or found

    def forget(self) -> int | None:
        """Take guesses that were not accepted out of what the conversation holds. The number of positions that are
        left, for the decoder's next call; None where nothing was taken out.
        """
        if not self._ahead:
            return None
        del self._conversation.held[-len(self._ahead) :]
        self._ahead.clear()
        return len(self._conversation.held)
