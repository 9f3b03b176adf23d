"""How the tokens of an answer are chosen: the rules of a model's generation_config.json and the values of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from runtime import limits
from runtime.bundle.manifest import Frozen
from runtime.errors import InvalidInput

Token = Annotated[int, Field(ge=0)]
Tokens = tuple[Token, ...]
Share = Annotated[float, Field(ge=0, le=1)]
EarlyStopping = bool | Literal["never"]


class Rules(Frozen):
    """What a model's generation_config.json rules besides what a request can choose; `min_p` is both, the default of
    requests. Names are the file's; the defaults change nothing.

    Forbidden or preferred tokens hold for every answer, the shares (`min_p`, `typical_p`, `epsilon_cutoff`,
    `eta_cutoff`, `top_h`) where tokens are drawn. Lengths are in tokens; `min_length` counts the prompt.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    sequence_bias: tuple[tuple[Annotated[Tokens, Field(min_length=1)], float], ...] = ()
    """Added to the score of each sequence's last token where the others stand before it."""
    bad_words_ids: tuple[Annotated[Tokens, Field(min_length=1)], ...] = ()
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    min_length: int = Field(default=0, ge=0)
    min_new_tokens: int = Field(default=0, ge=0)
    forced_bos_token_id: Token | None = None
    """The token behind a prompt of one token."""
    forced_eos_token_id: Annotated[Tokens, BeforeValidator(lambda one: (one,) if isinstance(one, int) else one)] = ()
    """One of them is the last token that the length allows."""
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """Behind that many tokens, the end becomes likelier by that factor, token by token."""
    suppress_tokens: Tokens = ()
    begin_suppress_tokens: Tokens = ()
    min_p: Share = 0.0
    top_h: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    epsilon_cutoff: Share = 0.0
    eta_cutoff: Share = 0.0


NO_RULES: Final = Rules()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises InvalidInput naming the value that is out of range.

    `temperature` 0 is greedy: the best token, top-k and top-p aside. `top_k` 0 and `top_p` 1 leave the candidates as
    they are. `repetition_penalty` above 1 makes tokens of the prompt and the answer so far less likely (Keskar et al.
    2019, CTRL). The score of a token that is in the answer so far is lowered by `presence_penalty`, and by
    `frequency_penalty` for each time that it is there, as in OpenAI's API.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    rules: Rules = NO_RULES
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= limits.TEMPERATURE.most:
            raise InvalidInput(
                "temperature", f"is {self.temperature}, expected 0 (greedy) or 0.01 to {limits.TEMPERATURE.most}"
            )
        if self.top_k < 0:
            raise InvalidInput("top_k", f"is {self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InvalidInput("top_p", f"is {self.top_p}, expected more than 0 and at most 1")
        if not 0.01 <= self.repetition_penalty <= limits.PENALTY.most:
            most = limits.PENALTY.most
            raise InvalidInput(
                "repetition_penalty", f"is {self.repetition_penalty}, expected 0.01 to {most} (1 is no penalty)"
            )
        limits.COUNT_PENALTY.number("frequency_penalty", self.frequency_penalty)
        limits.COUNT_PENALTY.number("presence_penalty", self.presence_penalty)


@dataclass(frozen=True)
class Beams:
    """`count` beams. A finished answer's score is the logarithm of its probability / its tokens ** `length_penalty`.

    `early_stopping` True ends the search as soon as `count` answers are finished, False when the best beam of the
    present length can no longer improve them, "never" when no beam of any length can. `renormalize` makes
    probabilities of the scores again behind the rules. Raises InvalidInput naming the value that is out of range.
    """

    count: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    renormalize: bool = False

    def __post_init__(self) -> None:
        limits.BEAMS.number("beams", self.count)
        limits.LENGTH_PENALTY.number("length_penalty", self.length_penalty)


@dataclass(frozen=True)
class Bounds:
    """Where an answer begins and ends: the tokens of its prompt, the most tokens of prompt and answer together, and the
    end tokens.
    """

    prompt: int = 0
    longest: int = 0
    ends: tuple[int, ...] = ()


UNBOUNDED: Final = Bounds()
