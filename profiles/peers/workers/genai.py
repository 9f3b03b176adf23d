"""openvino-genai on optimum-intel's export of a LLaVA checkpoint: seconds to the first token about a new picture and of
the next turn about it, prompt tokens and new tokens a second.
"""

from __future__ import annotations

import itertools
from typing import Any

from profiles.asked import EDGE
from profiles.peers.inside import Job, Loaded, fitting_words, text_metrics, timed, work
from profiles.protocol import Metric

QUESTION = 6
"""Words of the question about a picture, as long as ours."""
ANSWER = 4
"""Tokens of the answer between two turns, about as many as ours."""


def load(job: Job) -> Loaded:
    """The pipeline as it comes: its own precision of cache and activations."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.VLMPipeline(job.model, "CPU")
    rng = np.random.default_rng(0)
    # Its cache of prompt beginnings would spare the prefill of a prompt it has seen: each run begins with another
    # letter.
    letters = itertools.cycle("abcdefghijklmnopqrstuvwxyz")

    def run(words: int, tokens: int, **more: Any) -> Any:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True, do_sample=False
        )
        text = " ".join([next(letters)] + ["a"] * (words - 1))
        return pipeline.generate(text, generation_config=config, **more).perf_metrics

    def length(words: int) -> int:
        return int(run(words, 1).get_num_input_tokens())

    words = fitting_words(length, job.sizes["prompt_tokens"])
    reached, new = length(words), job.sizes["new_tokens"]

    def decode() -> float:
        return float(1000 / run(words, new).get_tpot().mean)  # milliseconds of a token behind the first

    def first_token() -> float:
        picture = openvino.Tensor(rng.integers(0, 256, (EDGE, EDGE, 3), np.uint8))
        return timed(lambda: run(QUESTION, 1, images=[picture]))

    def follow_up() -> float:
        picture = openvino.Tensor(rng.integers(0, 256, (EDGE, EDGE, 3), np.uint8))
        pipeline.start_chat()
        try:
            run(QUESTION, ANSWER, images=[picture])
            return timed(lambda: run(QUESTION, 1))
        finally:
            pipeline.finish_chat()

    metrics = {"first_token": Metric(unit="s"), "follow_up": Metric(unit="s"), **text_metrics(reached, new)}
    prefill = lambda: reached / timed(lambda: run(words, 1))  # noqa: E731
    return metrics, {"first_token": first_token, "follow_up": follow_up, "prefill": prefill, "decode": decode}


if __name__ == "__main__":
    work(("openvino-genai", "openvino", "optimum-intel"), load, "openvino")
