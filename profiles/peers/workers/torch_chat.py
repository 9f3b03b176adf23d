"""transformers in PyTorch on a vision-language checkpoint: seconds to the first token about a new picture, prompt
tokens and new tokens a second.

Options: `precision` is float32 or bfloat16; `compiled` runs it through torch.compile.
"""

from __future__ import annotations

import time
from typing import Any

from profiles.asked import EDGE, QUESTION
from profiles.peers.inside import Job, Loaded, fitting_words, text_metrics, threads, timed, work
from profiles.protocol import Metric


def load(job: Job) -> Loaded:
    """The checkpoint itself, with its own processor."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(threads())
    precision = getattr(torch, job.options["precision"])
    model = AutoModelForImageTextToText.from_pretrained(job.model, dtype=precision).eval()
    if job.options.get("compiled"):
        model.forward = torch.compile(model.forward)
    processor = AutoProcessor.from_pretrained(job.model)
    rng = np.random.default_rng(0)

    def inputs(text: str, picture: Any = None) -> Any:
        parts = [{"type": "text", "text": text}]
        turn = {"role": "user", "content": [{"type": "image"}, *parts] if picture is not None else parts}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
        return processor(images=picture, text=prompt, return_tensors="pt").to(dtype=precision)

    def answer(asked: Any, tokens: int, **more: Any) -> None:
        with torch.inference_mode():
            model.generate(**asked, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **more)

    def length(words: int) -> int:
        return int(inputs(" ".join(["a"] * words))["input_ids"].shape[1])

    words, new = fitting_words(length, job.sizes["prompt_tokens"]), job.sizes["new_tokens"]
    asked, reached = inputs(" ".join(["a"] * words)), length(words)

    def decode() -> float:
        times = Times()
        answer(asked, new, streamer=times)
        return (new - 1) / (times.seen[-1] - times.seen[-new])

    def first_token() -> float:
        picture = Image.fromarray(rng.integers(0, 256, (EDGE, EDGE, 3), np.uint8))
        return timed(lambda: answer(inputs(QUESTION, picture), 1))

    metrics = {"first_token": Metric(unit="s"), **text_metrics(reached, new)}
    prefill = lambda: reached / timed(lambda: answer(asked, 1))  # noqa: E731
    return metrics, {"first_token": first_token, "prefill": prefill, "decode": decode}


class Times:
    """When each token came: what `generate` calls a streamer."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, value: Any) -> None:
        """A token, and first of all the prompt."""
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        """The end of the answer."""


if __name__ == "__main__":
    work(("transformers", "torch"), load, "torch")
