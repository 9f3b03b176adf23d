"""What a model's generation_config.json means here. Each setting of transformers' GenerationConfig is read, has no
effect on an answer, is reported as a note, or is refused: `SETTINGS` says which and why, and what it does not name is
reported.

https://huggingface.co/docs/transformers/main_classes/text_generation
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from export.checkpoint.source import read_json
from runtime.errors import SourceError, UnsupportedModel
from runtime.language.sampling import EarlyStopping, Rules
from runtime.limits import ANSWERS, BEAMS, LENGTH_PENALTY, STOP, STOPS
from runtime.tasks.chat import ChatDefaults

FILE: Final = "generation_config.json"
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Use:
    """What is done with a setting, and why. Values in `neutral` need no word: nothing would be done with them there
    either.
    """

    what: Literal["read", "no effect", "reported", "refused"]
    why: str = ""
    neutral: tuple[object, ...] = (None,)


READ: Final = Use("read")
_SPEED: Final = Use("no effect", "makes answers faster, not others")
_CACHE: Final = Use("no effect", "says where keys and values are kept")
_OUTPUT: Final = Use("no effect", "says what the library returns besides the answer")
_ORIGIN: Final = Use("no effect", "says where the file is from")
_ENCODER: Final = Use("no effect", "is for models with an encoder")

SETTINGS: Final[Mapping[str, Use]] = {
    **dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"), READ),
    **dict.fromkeys(("max_new_tokens", "max_length", "eos_token_id", "stop_strings"), READ),
    **dict.fromkeys(Rules.model_fields, READ),
    **dict.fromkeys(("num_beams", "length_penalty", "early_stopping", "renormalize_logits"), READ),
    "num_return_sequences": READ,
    "num_beam_groups": Use("reported", "beams are searched as one group", (None, 1)),
    "diversity_penalty": Use("reported", "beams are searched as one group", (None, 0)),
    "max_time": Use("reported", "answers end by their length or by the deadline of a request"),
    "cache_implementation": Use(
        "reported", "keys and values are kept as the engine keeps them",
        (None, "dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window"),
    ),
    "guidance_scale": Use("refused", "answers guided by a second prompt are not made here", (None, 1)),
    "watermarking_config": Use("refused", "answers are not marked here"),
    "token_healing": Use("refused", "the end of a prompt is never spelled anew here", (None, False)),
    "penalty_alpha": Use("refused", "there is no contrastive search here", (None, 0)),
    "dola_layers": Use("refused", "layers are not contrasted here"),
    "constraints": Use("refused", "no words can be forced into an answer here"),
    "force_words_ids": Use("refused", "no words can be forced into an answer here"),
    "encoder_repetition_penalty": Use("refused", "there is no reward for words of the prompt here", (None, 1)),
    "encoder_no_repeat_ngram_size": Use("refused", "words of the prompt cannot be forbidden here", (None, 0)),
    "low_memory": Use("no effect", "says how beams are computed, not which"),
    "pad_token_id": Use("no effect", "rows are not padded"),
    "bos_token_id": Use("no effect", "a prompt begins as the tokenizer and the chat template say"),
    "decoder_start_token_id": _ENCODER,
    **dict.fromkeys(("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size"), _CACHE),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits",
        "return_dict_in_generate"), _OUTPUT),
    **dict.fromkeys(
        (
            "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
            "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
            "target_lookbehind",
            "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
            "continuous_batching_config",
        ),
        _SPEED,
    ),
    **dict.fromkeys(("_from_model_config", "_commit_hash", "transformers_version"), _ORIGIN),
}  # fmt: skip


class _Values(BaseModel):
    """The settings that a request can choose instead, and where an answer ends. Defaults are transformers'."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)
    do_sample: bool = False
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_k: int = Field(default=50, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    max_new_tokens: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    eos_token_id: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    stop_strings: str | tuple[str, ...] = ()
    num_beams: int = Field(default=1, ge=1, le=BEAMS.most)
    length_penalty: float = Field(default=1.0, ge=LENGTH_PENALTY.least, le=LENGTH_PENALTY.most)
    early_stopping: EarlyStopping = False
    renormalize_logits: bool = False
    num_return_sequences: int = Field(default=1, ge=1, le=ANSWERS.most)


@dataclass(frozen=True)
class Generation:
    """The defaults of requests, the tokens that end an answer, and a sentence on each setting that is not followed."""

    defaults: ChatDefaults
    ends: tuple[int, ...]
    notes: tuple[str, ...]


def read_generation(root: Path, config: Mapping[str, Any], vocabulary: int) -> Generation:
    """From the checkpoint at `root`, whose config.json is `config` and whose tokens are below `vocabulary`.

    Without the file, transformers takes the settings of config.json. Raises SourceError naming a value that no model
    can have, and UnsupportedModel naming a setting that is not followed here and changes what is answered.
    """
    file = root / FILE
    found = read_json(file) if file.is_file() else _of_config(config)
    file = file if file.is_file() else root / "config.json"
    notes = list(_unfollowed(file, found))
    given = {name: value for name, value in found.items() if value is not None}
    values = _parse(file, _Values, given)
    rules = _parse(file, Rules, given)
    if values.do_sample and values.temperature < 0.01:
        raise SourceError(
            f"{file}: temperature is {values.temperature} with do_sample true, expected 0.01 or more: for the best "
            "token each time, write "
            "do_sample false"
        )
    _require_tokens(file, rules, vocabulary)
    try:
        GenerationConfig.from_dict(dict(given))
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{file}: transformers refuses these settings: {' '.join(str(error).split())}. Correct the file"
        ) from None
    ends = (values.eos_token_id,) if isinstance(values.eos_token_id, int) else values.eos_token_id or ()
    ends = tuple(token for token in ends if token < vocabulary)  # others are never chosen
    if values.do_sample and values.num_beams > 1:
        notes.append(
            f"{file.name} has num_beams {values.num_beams} with do_sample: answers are drawn from one beam, and "
            "several are searched only with temperature 0"
        )
    if not ends:
        notes.append(f"{file.name} names no end token (eos_token_id): answers go on until their longest")
    stops = (values.stop_strings,) if isinstance(values.stop_strings, str) else values.stop_strings
    if len(stops) > STOPS.most or not all(0 < len(stop) <= STOP.most for stop in stops):
        raise SourceError(
            f"{file}: stop_strings has {len(stops)} strings, expected at most {STOPS.most} of 1 to {STOP.most} "
            "characters. Correct the file"
        )
    defaults = ChatDefaults(
        max_tokens=values.max_new_tokens or ChatDefaults().max_tokens,
        max_length=0 if values.max_new_tokens else values.max_length or 0,
        temperature=values.temperature if values.do_sample else 0.0,
        top_k=values.top_k,
        top_p=values.top_p,
        repetition_penalty=values.repetition_penalty,
        stop=stops,
        rules=rules,
        beams=1 if values.do_sample else values.num_beams,
        length_penalty=values.length_penalty,
        early_stopping=values.early_stopping,
        renormalize=values.renormalize_logits,
        answers=values.num_return_sequences,
    )
    return Generation(defaults, ends, tuple(notes))


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that config.json has, of the whole model or else of its language model."""
    sources = config.get("text_config") or {}, config
    return {name: source[name] for source in sources for name in SETTINGS if source.get(name) is not None}


def _unfollowed(file: Path, found: Mapping[str, Any]) -> Iterable[str]:
    """A note on each setting that is reported. Raises UnsupportedModel for one that is refused."""
    for name, value in found.items():
        use = SETTINGS.get(name)
        if use is None:
            yield f"{file.name} has {name}, which is no setting of generation that transformers has: nothing reads it"
        elif use.what in ("reported", "refused") and not any(value is one or value == one for one in use.neutral):
            if use.what == "refused":
                raise UnsupportedModel(
                    f"{file}: {name} is {json.dumps(value)[:80]}, and {use.why}: a model that needs it cannot be "
                    "built. To get answers "
                    f"without it, remove {name} from the file"
                )
            yield f"{file.name} has {name} {json.dumps(value)[:80]}: {use.why}"


def _parse(file: Path, kind: type[M], given: Mapping[str, Any]) -> M:
    known = {name: value for name, value in given.items() if name in kind.model_fields}
    try:
        return kind.model_validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        faults = {str(fault["loc"][0]): fault["msg"] for fault in error.errors()}
        reasons = "; ".join(f"{name} is {json.dumps(known[name])[:80]}: {message}" for name, message in faults.items())
        raise SourceError(f"{file}: {reasons}. Correct the file, or remove the setting") from None


def _require_tokens(file: Path, rules: Rules, vocabulary: int) -> None:
    """Raises SourceError for rules about tokens that the model does not have: transformers fails on them, too."""
    named = {
        "sequence_bias": [token for tokens, _ in rules.sequence_bias for token in tokens],
        "bad_words_ids": [token for tokens in rules.bad_words_ids for token in tokens],
        "forced_bos_token_id": [] if rules.forced_bos_token_id is None else [rules.forced_bos_token_id],
        "forced_eos_token_id": list(rules.forced_eos_token_id),
    }
    for name, tokens in named.items():
        if max(tokens, default=0) >= vocabulary:
            raise SourceError(
                f"{file}: {name} names token {max(tokens)}, expected ids below {vocabulary} (vocab_size). Correct the "
                "file"
            )
