"""Loads of openvino-genai's continuous batching, on optimum-intel's export of a LLaVA checkpoint, in this process."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from profiles.asked import EDGE
from profiles.peers.inside import Job, fitting_words, hello
from profiles.protocol import Channel, Metric
from profiles.serving.load import Load, observe

CACHE = 4
"""Gigabytes of its cache of keys and values."""


class Batching:
    """The pipeline, a thread that steps it while there are requests, and those who wait for their tokens."""

    def __init__(self, job: Job) -> None:
        import openvino_genai

        self._library: Any = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU")
        self._new, self._pictures = job.sizes["new_tokens"], bool(job.sizes.get("pictures"))
        self._words = fitting_words(self.length, job.sizes["prompt_tokens"])
        self.prompt_tokens = self.length(self._words)
        self._changed, self._waiting = threading.Condition(), 0
        threading.Thread(target=self._drive, daemon=True).start()

    def length(self, words: int) -> int:
        """Tokens of the prompt of a text of so many words."""
        tokenizer = self._pipeline.get_tokenizer()
        messages = [{"role": "user", "content": " ".join(["a"] * words)}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return int(tokenizer.encode(text).input_ids.shape[1])

    def _drive(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            else:
                time.sleep(0.001)
            with self._changed:
                self._changed.notify_all()

    def _added(self, number: int) -> Any:
        """A request that begins with its number, about a picture of its own where pictures are measured."""
        import numpy as np
        import openvino

        config = self._library.GenerationConfig(max_new_tokens=self._new, do_sample=False)
        text = " ".join([str(number)] + ["a"] * self._words)
        if not self._pictures:
            return self._pipeline.add_request(number, text, config)
        picture = np.random.default_rng(number).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
        return self._pipeline.add_request(number, text, [openvino.Tensor(picture)], config)

    def send(self, number: int, output: Callable[[], None]) -> float:
        """Answer the request of a number; how many tokens that has."""
        running = self._library.GenerationStatus.RUNNING
        handle = self._added(number)
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
        tokens = 0
        while handle.get_status() == running or handle.can_read():
            with self._changed:
                self._changed.wait_for(lambda: handle.can_read() or handle.get_status() != running)
            while handle.can_read():
                tokens += sum(len(one.generated_ids) for one in handle.read().values())
                output()
        with self._changed:
            self._waiting -= 1
        return tokens


def main() -> None:
    """Load it, then answer loads until the input ends."""
    channel = Channel()
    start = time.perf_counter()
    job = Job(**json.loads(sys.argv[1]))
    try:
        batching = Batching(job)
        sizes: dict[str, int | float | str] = {**job.sizes, "prompt_tokens": batching.prompt_tokens}
        metrics = {"served_throughput": Metric(unit="tokens/s", settings=sizes)}
        packages = ("openvino-genai", "openvino", "optimum-intel")
        described = hello(packages, job, "openvino", "int4", time.perf_counter() - start, metrics)
    except Exception as error:  # the driver shows it
        channel.fail(error)
        sys.exit(1)
    numbers = itertools.count()

    def measure(line: str) -> Mapping[str, object]:
        return observe(Load.parse(line), batching.send, numbers)

    channel.answer(described, measure)


if __name__ == "__main__":
    main()
