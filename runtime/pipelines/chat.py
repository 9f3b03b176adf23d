"""Conversations about pictures with a vision-language model of LLaVA's kind (Liu et al. 2023), or with a language model
alone.

The submodels that a chat bundle has, and what this pipeline calls them with:

    vision_encoder   pixel_values float32 [tiles, 3, height, width] -> image_features float32 [tiles, patches, hidden]
                     (or the input of a further submodel that gives the features, such as BLIP-2's qformer)
    token_embedding  input_ids int64 [1, sequence] -> inputs_embeds float32 [1, sequence, hidden]
    decoder          inputs_embeds, attention_mask int64 [1, total], position_ids int64 [1, sequence] -> logits float32
                     [1, 1, vocab]
    draft            guesses of the next tokens, where a bundle has it (`runtime.language.drafting`)

The decoder gives the logits of the last position only, and keeps keys and values in the call's slot. The prompt has one
placeholder token per picture, which is repeated once for each position that the picture takes, and the picture's
features take the place of those tokens' embeddings (`runtime.language.layout`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import ValidationError

from runtime.errors import BundleError, ContextLengthExceeded, InvalidInput
from runtime.kept import Kept
from runtime.language.answering import Answer, Choice, continued, repeated
from runtime.language.beams import BeamSearch, search
from runtime.language.calling import called
from runtime.language.config import ChatConfig
from runtime.language.constraint import Constraint, Constraints
from runtime.language.decoder import Conversation, Step, embed, prefill
from runtime.language.drafting import Draft
from runtime.language.guessing import Guessing, Lookup
from runtime.language.logprobs import Logprobs, Pieces
from runtime.language.overflow import slid
from runtime.language.prefixes import Prefixes
from runtime.language.processors import Scores
from runtime.language.sampling import Bounds
from runtime.language.text import PROMPTS, Message, captioned
from runtime.language.vision import Prompt, Vision
from runtime.pipeline import Example, ModelPipeline, Pipeline, Room
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from runtime.vision.images import Picture


class ChatPipeline(ModelPipeline):
    """Answers conversations with the submodels of one bundle.

    Made from the folder of the model's files and `Manifest.config`. Raises BundleError when settings or files do not
    fit.
    """

    name: ClassVar[str] = "chat"
    task: ClassVar[str] = ChatRequest.task
    settings: ClassVar[type[ChatConfig]] = ChatConfig

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> Self:
        """The same as making one."""
        return cls(root, config)

    def __init__(self, root: Path, config: Mapping[str, Any]) -> None:
        try:
            self.config = self.settings.model_validate(dict(config))
        except ValidationError as error:
            raise BundleError(f"the chat settings cannot be read: {error}") from None
        self.text = PROMPTS[self.config.prompt](root / "tokenizer", self.config.image_token_id)
        self.text.require_below(self.config.vocab_size)
        self.vision = Vision.open(root, self.config)
        self.prefixes, self.pieces = Prefixes(), Pieces(self.text.tokenizer)
        self.constraints = Constraints(self.text.tokenizer, self.config.vocab_size, self.config.eos_token_ids)

    @property
    def origins(self) -> Mapping[str, str]:
        """What makes each input of the submodels."""
        seen = self.vision.origins if self.vision else {}
        return {**seen, "input_ids": str(self.text.file), "inputs_embeds": "token_embedding"}

    def examples(self) -> Iterator[Example]:
        """Requests that try the model's files."""
        picture = np.zeros((24, 36, 3), np.uint8)
        shown: tuple[str | Picture, ...] = (picture, "x") if self.vision else ("x",)
        question, answer = Message("user", ("x",)), Message("assistant", ("x",))

        def example(what: str, *messages: Message, optional: bool = False) -> Example:
            return Example(what, ChatRequest(messages, max_tokens=1, seed=0), optional)

        yield example("a question", question)
        if self.config.draft:
            drawn = ChatRequest((question,), 4, temperature=1.0, top_k=0, top_p=1.0, seed=0, draft_tokens=2)
            yield Example("guesses of the draft", drawn)  # drawn, so that an end token is not all that it says
        if self.vision:
            yield example("a picture", Message("user", shown))
            yield example("a picture behind the text", Message("user", ("x", picture)), optional=True)
            yield example("two pictures", Message("user", (picture, *shown)), optional=True)
        yield example("two turns", Message("user", shown), answer, question, optional=True)
        yield example("a system message", Message("system", ("x",)), question, optional=True)

    def remember(self, room: Room) -> None:
        if self.vision:
            self.vision.seen = Kept(room.features)
        self.prefixes = Prefixes(room)

    def prepare(self) -> None:
        self.constraints.prepare()

    def __call__(self, request: ChatRequest, conversation: Conversation | None = None) -> Pipeline:
        """The generator that answers: for each answer TextDelta events, then Finished, whose completion tokens count
        the end token.

        Answers of several beams come as one TextDelta each, when the search is over. Everything that can be wrong with
        a request raises here or before the generator's first call: InvalidInput naming the field, ContextLengthExceeded
        with the counts.
        """
        sampling, beams = request.sampling(self.config.defaults), request.search(self.config.defaults)
        if request.draft_tokens and not self.config.draft:
            raise InvalidInput("draft_tokens", "needs a draft, which this model was built without: leave it out")
        stops = (*request.stop, *self.config.defaults.stop)
        wanted = request.count(self.config.defaults)
        count = wanted if sampling.temperature or beams.count > 1 else 1
        answers = [Answer(self.text.tokenizer, stops, number) for number in range(count)]
        constraint = self._constraint(request)
        prompt = self.fitted(request)
        start = len(self.begin(prompt))
        bounds = Bounds(start, start + self._room(prompt, request), self.config.eos_token_ids)
        conversation = conversation or Conversation()
        if beams.count == 1:
            rngs = [np.random.default_rng(None if request.seed is None else request.seed + n) for n in range(count)]
            choices = [Choice(sampling, bounds, rng, constraint and constraint.fork()) for rng in rngs]
            drawn = self._draw(request, prompt, choices, answers, conversation)
            if request.tools is not None:
                drawn = called(drawn, self.text.call_form())
            return drawn if count == wanted else repeated(drawn, wanted)
        state = BeamSearch(self.begin(prompt), bounds, sampling, beams, answers[0].stops)
        return self._search(prompt, state, answers, conversation)

    def _constraint(self, request: ChatRequest) -> Constraint | None:
        """The form of every answer, None where it is free. Raises InvalidInput."""
        if request.tools is not None:
            return self.constraints.calls(self.text.call_form(), request.tools.callable, request.tools.must)
        return None if request.grammar is None else self.constraints.open(request.grammar)

    def fitted(self, request: ChatRequest) -> Prompt:
        """The tokens of a conversation, without its oldest turns where the request lets them go and the context has no
        room for them and the answer.
        """
        if request.context_overflow != "slide":
            return self.prompt(request)
        prompts = dict[int, Prompt]()

        def prompt(messages: Sequence[Message]) -> Prompt:
            """Made once for each number of messages."""
            count = len(messages)
            if count not in prompts:
                made = self.prompt(replace(request, messages=tuple(messages)))
                prompts[count] = replace(made, left_out=len(request.messages) - count)
            return prompts[count]

        def fits(messages: Sequence[Message]) -> bool:
            try:
                found = prompt(messages)
            except ContextLengthExceeded:  # of an encoder that reads the texts, too
                return False
            return found.length + self._wanted(found, request) <= self.config.context_length

        return prompt(slid(request.messages, fits))

    def prompt(self, request: ChatRequest) -> Prompt:
        """The tokens of a conversation. Raises InvalidInput naming the message at fault."""
        if request.images and self.vision is None:
            raise InvalidInput("messages", "show pictures, but the model has no vision: send text only")
        if self.vision:
            self.vision.check(request.images)
        if request.picture_tokens:
            self._check_pruned()
        messages = request.messages if request.raw else captioned(request.messages, self.config.caption)
        tools = [tool.spec for tool in request.tools.tools] if request.tools else ()
        ids = self.text.raw(messages[0]) if request.raw else self.text.encode(messages, tools)
        bos = self.config.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return self.vision.prompt(ids, messages, request.picture_tokens) if self.vision else Prompt(ids, ids, [])

    def _check_pruned(self) -> None:
        """Raise InvalidInput where pictures cannot lose positions."""
        if self.vision is None:
            raise InvalidInput("picture_tokens", "is of pictures, and the model has no vision: leave it out")
        self.vision.check_pruned()

    def begin(self, prompt: Prompt) -> list[int]:
        """The tokens of the decoder that the answer follows."""
        return list(prompt.ids)

    def _wanted(self, prompt: Prompt, request: ChatRequest) -> int:
        """Positions of the context that the answer to a prompt should have."""
        return self.config.defaults.longest(prompt.length) if request.max_tokens is None else request.max_tokens

    def _room(self, prompt: Prompt, request: ChatRequest) -> int:
        """The most tokens of the answer. Raises ContextLengthExceeded."""
        room = self.config.context_length - prompt.length
        max_tokens = self._wanted(prompt, request)
        if request.max_tokens is None:
            max_tokens = max(room, 1) if request.fills_context else min(max_tokens, max(room, 1))
        if max_tokens > room:
            raise ContextLengthExceeded(
                "messages" if room < 1 else "max_tokens",
                f"the prompt has {prompt.length} tokens ({prompt.seen + prompt.pruned} of them for "
                f"{len(prompt.images)} pictures{', which count whole' * bool(prompt.pruned)}) and the answer may have "
                f"{max_tokens}, the model's context is {self.config.context_length}: shorten the one or the other",
            )
        return max_tokens

    def _draw(
        self, request: ChatRequest, prompt: Prompt, choices: Sequence[Choice], answers: Sequence[Answer],
        conversation: Conversation,
    ) -> Pipeline:  # fmt: skip
        """Choose the tokens of one answer after the other. Several go on in copies of the conversation, which then
        keeps the prompt alone.
        """
        with self.prefixes.keeping(conversation):
            logits = yield from self._prefill(prompt, conversation)
            lookup = self._lookup(request, prompt)
            draft = Draft(request.draft_tokens, self._never) if request.draft_tokens else None
            for answer, choice in zip(answers, choices, strict=True):
                held = conversation if len(answers) == 1 else conversation.fork()
                logprobs, guessing = (
                    Logprobs(self.pieces, request.logprobs),
                    Guessing(held, request.guesses, lookup.fork(), draft),
                )
                tokens = yield from continued(self.begin(prompt), logits, choice, logprobs, answer, guessing)
                complete = choice.complete or answer.stopped or tokens[-1] in choice.bounds.ends
                end = _finished(prompt, tokens, complete, answer, conversation.reused)
                yield replace(end, guessed_tokens=guessing.guessed, accepted_tokens=guessing.accepted)

    def _lookup(self, request: ChatRequest, prompt: Prompt) -> Lookup:
        """Where the tokens of answers are guessed from; nothing where none are."""
        if not request.guesses:
            return Lookup(())
        predicted = self.text.tokenizer.encode(request.prediction, add_special_tokens=False).ids
        return Lookup(prompt.ids, self._never, predicted)

    @property
    def _never(self) -> tuple[int, ...]:
        """Tokens that are not guessed: no answer has them, or none goes on behind them."""
        pictures = self.config.image_token_id
        return (*self.config.eos_token_ids, *(() if pictures is None else (pictures,)))

    def _search(
        self, prompt: Prompt, state: BeamSearch, answers: Sequence[Answer], conversation: Conversation
    ) -> Pipeline:
        """Find the likeliest answers of several beams, then spell them."""
        with self.prefixes.keeping(conversation):
            logits = yield from self._prefill(prompt, conversation)
            found = yield from search(state, conversation, logits)
        for answer, tokens in zip(answers, found, strict=False):  # as many are found as there are beams
            text = "".join([answer.push(token) for token in tokens if token not in state.bounds.ends])
            if text := text + answer.flush():
                yield TextDelta(text, answer.number, len(tokens))
            complete = answer.stopped or tokens[-1] in state.bounds.ends
            yield _finished(prompt, tokens, complete, answer, conversation.reused)

    def _prefill(self, prompt: Prompt, conversation: Conversation) -> Step[Scores]:
        """Bring the decoder to the end of the prompt, leaving out what the conversation holds; the logits [vocab] that
        follow.
        """
        if not conversation.held:
            self.prefixes.lend(conversation, prompt.keys)
        shared = conversation.shared(prompt.keys[:-1])  # the last token is always run: its logits are needed
        conversation.reused = shared
        embeds = yield from embed(prompt.ids[shared:])
        places = np.arange(shared, len(prompt.ids), dtype=np.int64)
        if self.vision:
            places = yield from self.vision.insert(prompt, shared, embeds)
        chunk = self.config.prefill_chunk
        return (yield from prefill(embeds, prompt.keys[shared:], places, conversation, shared, chunk))


def _finished(prompt: Prompt, tokens: Sequence[int], complete: bool, answer: Answer, reused: int) -> Finished:
    reason = "stop" if complete else "length"
    return Finished(reason, len(prompt.ids), len(tokens), prompt.left_out, answer.number, reused)
