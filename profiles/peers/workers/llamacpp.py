"""llama.cpp on the language decoder of a checkpoint: prompt tokens and new tokens a second, of token numbers without a
tokenizer.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

from profiles.peers.inside import Job, Loaded, text_metrics, threads, timed, work


class Decoder:
    """A loaded decoder with one sequence. Raises RuntimeError where llama.cpp refuses."""

    def __init__(self, model: str, context: int) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}: see its messages above")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, context, min(context, 512)
        settings.n_threads = settings.n_threads_batch = threads()
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context: see its messages above")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return int(self._library.llama_model_size(self._model))

    def forget(self) -> None:
        """Begin a new sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def read(self, tokens: list[int]) -> int:
        """Append tokens to the sequence; the likeliest next one."""
        import numpy as np

        values = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._library.llama_batch_get_one(values, len(tokens))
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp failed to decode: see its messages above")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def load(job: Job) -> Loaded:
    """The decoder of the only GGUF file in the export."""
    (file,) = Path(job.model).glob("*.gguf")
    length, new = job.sizes["prompt_tokens"], job.sizes["new_tokens"]
    decoder = Decoder(str(file), length + new)
    prompt = [3 + number % 200 for number in range(length)]

    def prefill() -> float:
        decoder.forget()
        return length / timed(lambda: decoder.read(prompt))

    def decode() -> float:
        decoder.forget()
        token = decoder.read(prompt)
        start = time.perf_counter()
        for _ in range(new - 1):
            token = decoder.read([token])
        return (new - 1) / (time.perf_counter() - start)

    metrics = text_metrics(length, new)
    metrics["decode"]["bytes"] = float(decoder.nbytes)
    return metrics, {"prefill": prefill, "decode": decode}


if __name__ == "__main__":
    work(("llama-cpp-python",), load, "llama.cpp", "Q4_0")
