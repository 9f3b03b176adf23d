"""Comparison of models that answer: the same questions greedily, then tokens and their probabilities."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from calibration.observe.metrics import kl_divergence, perplexity, token_agreement
from calibration.requests.pictures import DRAWN, HELD_OUT, photograph
from calibration.requests.tasks.chat import TASK as REQUESTS
from calibration.requests.tasks.chat import question
from export.report.measured import ComparedByName, Floor, Measure, Measured
from export.report.pictures import data_uri
from export.report.pictures import stored as picture_of
from export.report.running import MAX_TOKENS, run
from export.task import FOLDER, SEED, Comparison, Effort, Pictures, SpeedEffort
from runtime.bundle.manifest import Bundle, Inside
from runtime.bundle.signature import Port
from runtime.engine import Slot
from runtime.errors import EngineError
from runtime.language.text import Message
from runtime.pipeline import Call, Outputs, Pipeline, run_call
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel
from runtime.tasks.chat import ChatRequest, Finished
from runtime.vision.images import decoded

QUESTIONS: Final = (
    "What is shown here?",
    "Which words can be read?",
    "Name three colors in the picture.",
    "How many objects are in the foreground?",
    "Is it day or night? Answer with one word.",
    "Describe the picture for somebody who cannot see it.",
    "Que voit-on sur cette image?",
    "What is on the left side?",
)
"""Questions for any model, written for this package."""
TIMED: Final = "describe the picture."
EDGE: Final = 128
"""Edge in pixels of the picture of the timed question; every model resizes it to its own."""
AGREEMENT: Final = Measure(
    name="next_token_agreement", title="Agreement on the next token", of="agreement on the next token"
)


class AnswerQuality(Measured):
    """One question answered greedily by both models.

    `token_agreement` compares the two answers position by position. For the other figures the quantized model gets the
    reference's answer token by token (teacher forcing), so that each of its `tokens` is judged alone:
    `next_token_agreement` is the share of tokens that the quantized model would have chosen too, `kl_divergence` the
    mean Kullback-Leibler divergence in nats, and the perplexities are those of the reference's answer to either model.
    """

    question: str
    picture: Inside | None
    reference: str
    quantized: str
    tokens: int = Field(ge=1)
    token_agreement: float
    next_token_agreement: float
    kl_divergence: float
    reference_perplexity: float = Field(ge=1)
    quantized_perplexity: float = Field(ge=1)


def mean(answers: Sequence[AnswerQuality], name: str) -> float:
    """The mean of a figure of `AnswerQuality` over all tokens."""
    return sum(answer.tokens * float(getattr(answer, name)) for answer in answers) / tokens_of(answers)


def whole_text(answers: Sequence[AnswerQuality], name: str) -> float:
    """A perplexity of `AnswerQuality` over all answers as one text."""
    return math.exp(sum(answer.tokens * math.log(getattr(answer, name)) for answer in answers) / tokens_of(answers))


def perplexity_change(answers: Sequence[AnswerQuality]) -> float:
    """The quantized model's perplexity of the reference's answers, as one text, over the reference's own."""
    return whole_text(answers, "quantized_perplexity") / whole_text(answers, "reference_perplexity")


def tokens_of(answers: Sequence[AnswerQuality]) -> int:
    """Tokens of all the reference's answers."""
    return sum(answer.tokens for answer in answers)


class ChatComparison(Comparison):
    """Models that answer in text."""

    name = "chat"
    stored = "answers"
    result = AnswerQuality
    noun = "question"
    measure = AGREEMENT
    floors = (
        Floor(
            quant="int8",
            measure=AGREEMENT,
            least=0.95,
            reason="Noise on the logits that left 96 % cost shapes-vlm 17 of 96 right answers.",
        ),
        Floor(
            quant="int4",
            measure=AGREEMENT,
            least=0.85,
            reason="Lower than at int8, since 4 bits may swap two tokens that are about as likely.",
        ),
    )

    def wanted(self, effort: Effort) -> int:
        return effort.questions

    def general(self) -> Iterator[ChatRequest]:
        """Questions about photographs that calibration never uses and about drawn pictures, in turn."""
        for i in count():
            turn = i // 2
            drawn = DRAWN[turn % len(DRAWN)](np.random.default_rng(SEED + i)) if i % 2 else None
            picture = photograph(HELD_OUT[turn % len(HELD_OUT)]) if drawn is None else drawn
            yield question(picture, QUESTIONS[i % len(QUESTIONS)])

    def comparing(self, request: ChatRequest, number: int, effort: Effort) -> ChatRequest:
        return replace(request, max_tokens=MAX_TOKENS, temperature=0.0, repetition_penalty=1.0, beams=1)

    def compare(
        self,
        number: int,
        request: ChatRequest,
        quantized: LoadedModel,
        reference: LoadedModel,
        pictures: Pictures,
        compared: ComparedByName,
    ) -> AnswerQuality:
        """Run one question on both models, and again on the quantized one with the reference's tokens where it chose
        others.
        """
        wanted, free = _Decoding(reference), _Decoding(quantized)
        first, second = run(reference, request, wanted), run(quantized, request, free)
        prompt = wanted.start(first.one(Finished).completion_tokens)
        logits, others = wanted.logits(prompt), free.logits(prompt)
        tokens, chosen = ([int(token) for token in one.argmax(axis=1)] for one in (logits, others))
        if chosen != tokens:
            forced = _Decoding(quantized, tokens, prompt)
            run(quantized, request, forced)
            others = forced.logits(prompt)
        _replay(wanted.calls, quantized, compared)
        shown = request.images
        path = f"{FOLDER}/question-{number}.png" if shown else None
        if path:
            pictures[path] = decoded(shown[0])
        return AnswerQuality(
            question=" ".join(part for part in request.messages[-1].content if isinstance(part, str)),
            picture=path,
            reference=REQUESTS.result(first.events).strip(),
            quantized=REQUESTS.result(second.events).strip(),
            tokens=len(tokens),
            token_agreement=token_agreement(tokens, chosen),
            next_token_agreement=token_agreement(tokens, [int(token) for token in others.argmax(axis=1)]),
            kl_divergence=kl_divergence(logits, others),
            reference_perplexity=perplexity(logits, tokens),
            quantized_perplexity=perplexity(others, tokens),
        )

    def figure(self, results: Sequence[AnswerQuality]) -> float:
        return mean(results, "next_token_agreement")

    def summary(self, results: Sequence[AnswerQuality]) -> dict[str, float]:
        """Means of the tokens."""
        means = {name: mean(results, name) for name in ("token_agreement", "kl_divergence")}
        return means | {"perplexity_change": perplexity_change(results)}

    def shown(self, bundle: Bundle, results: Sequence[AnswerQuality]) -> dict[str, Any]:
        return {
            "answers": [(one, data_uri(picture_of(bundle, one.picture)) if one.picture else None) for one in results],
            "tokens": tokens_of(results),
            "over_tokens": partial(mean, results),
            "over_text": partial(whole_text, results),
            "perplexity_change": perplexity_change(results),
        }

    def timed(self, model: LoadedModel, effort: SpeedEffort) -> tuple[Pipeline, str]:
        """An answer of a fixed number of tokens: no token ends it."""
        endless = copy.copy(model.pipeline)
        assert isinstance(endless, ChatPipeline), "a model that chats has this pipeline"
        endless.config = endless.config.model_copy(update={"eos_token_ids": ()})
        picture = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
        content = (picture, TIMED) if endless.config.has_vision else (TIMED,)
        request = ChatRequest((Message("user", content),), max_tokens=effort.tokens, temperature=0.0, beams=1)
        return endless(request), f"answer, {effort.tokens} tokens"


@dataclass
class _Decoding:
    """Records the decoder calls of one answer. With `forced`, it changes the logits so that the pipeline chooses these
    tokens.

    `prompt` is the number of positions before the answer, needed with `forced`.
    """

    model: LoadedModel
    forced: Sequence[int] = ()
    prompt: int = 0
    calls: list[tuple[Call, Outputs]] = field(default_factory=list)

    def __call__(self, call: Call, outputs: Outputs) -> Outputs:
        if call.slot is None:
            return outputs
        name = self._port(call).logits
        if not np.isfinite(outputs[name]).all():
            raise EngineError(
                f"{call.submodel} gave NaN or infinite logits, expected finite ones: verify the bundle, or build with "
                "a higher precision"
            )
        copied = replace(call, inputs={name: np.array(array) for name, array in call.inputs.items()})
        self.calls.append((copied, dict(outputs)))
        place = self._length(call) - self.prompt
        if not self.forced or place < 0:
            return outputs
        certain = np.full_like(outputs[name], -1)
        certain[..., self.forced[place]] = 1
        return {**outputs, name: certain}

    def start(self, tokens: int) -> int:
        """Positions before an answer of so many tokens, the last of which the decoder does not get."""
        return self._length(self.calls[-1][0]) - tokens + 1

    def logits(self, prompt: int) -> NDArray[np.float32]:
        """The logits [tokens, vocab] that each token of the answer was chosen from."""
        return np.stack(
            [
                np.asarray(outputs[self._port(call).logits][0, -1], np.float32)
                for call, outputs in self.calls
                if self._length(call) >= prompt
            ]
        )

    def _length(self, call: Call) -> int:
        """Positions that the decoder holds after a call."""
        return int(call.inputs[self._port(call).mask].shape[1])

    def _port(self, call: Call) -> Port:
        return self.model.engines[call.submodel].submodel.signature.decoder


def _replay(calls: Iterable[tuple[Call, Outputs]], quantized: LoadedModel, compared: ComparedByName) -> None:
    """Repeat the reference's calls of submodels with states on the quantized ones, in the same order, in slots of their
    own.
    """
    slots: dict[int, Slot] = {}
    for call, outputs in calls:
        slot = slots.setdefault(id(call.slot), Slot())
        compared[call.submodel].add(call.submodel, outputs, run_call(quantized.engines, replace(call, slot=slot)))


TASK: Final = ChatComparison()
