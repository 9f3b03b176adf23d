"""Answers of a given form beside free ones, by the sample and in the same runs of its engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from runtime.bundle.signature import Array
from runtime.language.grammar import Grammar
from runtime.language.text import Message
from runtime.pipeline import Event, drive
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.chat import ChatRequest, Finished, TextDelta
from tests.serving.host.test_scheduler import square, together

SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-vlm"
COLOUR = {"enum": ["red", "green", "blue", "yellow"]}
SCHEMAS = (
    {"type": "object", "properties": {"is": COLOUR}, "required": ["is"], "additionalProperties": False},
    {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 20}, "é": {"const": "é"}},
        "required": ["n", "é"], "additionalProperties": False},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{3,6} square$"}]},
)  # fmt: skip


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def chat(vlm_bundle: Path, request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    model = load_model(vlm_bundle, request.param)
    yield model
    model.close()


def asked(seed: int, words: str = "Which colour has the square?") -> ChatRequest:
    content: tuple[str | Array, ...] = (square(seed), words)
    return ChatRequest((Message("user", content),), max_tokens=24, temperature=0.0)


def said(events: list[Event]) -> list[tuple[str, str]]:
    """Each answer's text and why it ended."""
    deltas = [event for event in events if isinstance(event, TextDelta)]
    ends = [event for event in events if isinstance(event, Finished)]
    return [("".join(one.text for one in deltas if one.answer == end.answer), end.reason) for end in ends]


def test_answers_of_a_form_and_free_ones_in_the_same_runs(chat: LoadedModel) -> None:
    """Each as it is alone; those of a form are values of their schemas."""
    formed = [
        replace(asked(number), max_tokens=300, frequency_penalty=1.0, grammar=Grammar.schema(schema))
        for number, schema in enumerate(SCHEMAS)
    ]
    drawn = replace(formed[0], temperature=1.5, seed=7, answers=2)
    requests = [*formed, drawn, asked(4), replace(asked(5), logprobs=2)]
    found = [said(events) for events in together(chat, *map(chat.pipeline, requests))]
    for request, answers in zip(requests, found, strict=True):
        assert answers == said(list(drive(chat.pipeline(request), chat.engines)))
    for schema, answers in zip((*SCHEMAS, SCHEMAS[0]), found, strict=False):
        for text, reason in answers:
            assert reason == "stop" and not list(Draft202012Validator(schema).iter_errors(json.loads(text))), text
    assert len(found[3]) == 2 and all(text for text, _ in found[4] + found[5])


def test_the_log_probabilities_of_the_sample_equal_transformers(chat: LoadedModel) -> None:
    if chat.target != "onnxruntime":  # OpenVINO may compute in bfloat16
        return
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    request = replace(asked(3, "Describe the picture."), logprobs=20)
    events = list(drive(chat.pipeline(request), chat.engines))
    found = [one for event in events if isinstance(event, TextDelta) for one in event.logprobs]
    prompt = chat.pipeline.prompt(request).ids
    picture = np.asarray(request.messages[0].images[0], np.uint8)
    pixels = AutoProcessor.from_pretrained(SAMPLE).image_processor(Image.fromarray(picture), return_tensors="pt")
    model = LlavaForConditionalGeneration.from_pretrained(SAMPLE, dtype=torch.float32).eval()
    ids = torch.tensor([[*prompt, *(one.id for one in found)]])
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=pixels["pixel_values"], attention_mask=torch.ones_like(ids)).logits
    wanted = torch.log_softmax(logits[0, len(prompt) - 1 :].float(), -1)
    assert len(found) > 5
    for one, scores in zip(found, wanted, strict=False):
        np.testing.assert_allclose(one.logprob, float(scores[one.id]), atol=1e-4)
        best = scores[[top.id for top in one.top]].numpy()
        np.testing.assert_allclose([top.logprob for top in one.top], best, atol=1e-4)
        np.testing.assert_allclose(best, scores.topk(20).values.numpy(), atol=1e-4)
