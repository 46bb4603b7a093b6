"""The peers, each as good as it gets here: transformers' generate and llama.cpp's server."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.lib.gguf_writer import write_gguf
from bench.lib.models import BenchModel, bench_cache_dir
from bench.lib.timing import Timing


class NotMeasured(Exception):
    """A peer can't run here; the sentence says why."""


class Transformers:
    """`generate` on one static batch, fp32; the fastest of its expert implementations.

    Which one that is depends on the batch, so it is tried once for each number of streams. The
    prompts are equally long: no stream pays for padding.
    """

    name = "transformers, static batch"

    def __init__(self, model: BenchModel, num_threads: int) -> None:
        from transformers import Gemma4ForCausalLM

        torch.set_num_threads(num_threads)
        self._model: Any = Gemma4ForCausalLM.from_pretrained(model.model_dir, dtype=torch.float32)
        self._model.eval()
        self._best: dict[int, str] = {}

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        num_streams = len(prompts)
        if num_streams not in self._best:
            self._best[num_streams] = try_experts(self._model, prompts)
        self._model.set_experts_implementation(self._best[num_streams])
        return generate_timed(self._model, prompts, num_tokens)

    def close(self) -> None:
        del self._model


class OneAtATime(Transformers):
    """`generate` for each prompt, one call after the other: a plain server around `generate`.

    `generate` takes in no request while it runs, and prompts of users don't come at once or equally
    long, so without a batcher of its own such a server answers like this.
    """

    name = "transformers, one at a time"

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        token_times: list[list[float]] = []
        begin_s = 0.0
        for prompt in prompts:
            timing = super().generate([prompt], num_tokens)
            token_times.append([begin_s + time_s for time_s in timing.token_times[0]])
            begin_s += timing.total_s
        return Timing(token_times)


def try_experts(model: Any, prompts: list[list[int]]) -> str:
    """Set transformers' expert implementation that is fastest for these prompts; its name."""
    # batched_mm copies an expert's weights for each token: hopeless in a wide prefill.
    names = ["eager", "grouped_mm"] + (["batched_mm"] if len(prompts) == 1 else [])
    seconds = {}
    for name in names:
        model.set_experts_implementation(name)
        generate_timed(model, prompts, 2)
        seconds[name] = generate_timed(model, prompts, 8).total_s
    best = min(seconds, key=seconds.__getitem__)
    model.set_experts_implementation(best)
    return best


@torch.inference_mode()
def generate_timed(model: Any, prompts: list[list[int]], num_tokens: int) -> Timing:
    """transformers' `generate` on equally long prompts, greedy, past end-of-sequence tokens."""
    times: list[float] = []
    input_ids = torch.tensor(prompts, device=model.device)
    goes_on = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)

    def note(*args: Any, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion that only looks at the clock: it is asked after each token."""
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        return goes_on

    started = time.perf_counter()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        stopping_criteria=[note],
    )
    return Timing([times] * len(prompts))


class LlamaCpp:
    """llama.cpp's server with a slot for each stream, in-process through the wheel `xllamacpp`.

    Its own defaults but for the threads (an fp16 KV cache and flash attention are faster for it).
    Answers aren't streamed, which spares it the Python callbacks: the server itself reports the
    time of the prompt and of the tokens.
    """

    name = "llama.cpp"

    def __init__(self, model: BenchModel, num_threads: int) -> None:
        """Raises NotMeasured where the wheel is missing or can't load the model."""
        try:
            import xllamacpp
        except ImportError:
            raise NotMeasured("xllamacpp is not installed: pip install '.[bench]'") from None
        self._xllamacpp: Any = xllamacpp
        self._num_threads = num_threads
        try:
            self._path = gguf_of(model)
        except (ImportError, NotImplementedError) as error:
            raise NotMeasured(str(error)) from None
        self._server: Any = None
        self._num_slots = 0

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        self._start(len(prompts), len(prompts[0]) + num_tokens)
        token_times: list[list[float]] = [[] for _ in prompts]

        def ask(stream: int) -> None:
            answer = self._server.handle_completions(
                {
                    "prompt": prompts[stream],
                    "n_predict": num_tokens,
                    "temperature": 0.0,
                    "ignore_eos": True,
                    "cache_prompt": False,
                }
            )
            end_s = time.perf_counter() - started
            token_times[stream] = _token_times(answer["timings"], end_s, num_tokens)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Timing(token_times)

    def close(self) -> None:
        self._server = None

    def make_server(self, num_slots: int, num_tokens: int, **params: Any) -> Any:
        """A server with slots for so many tokens each; `params` are fields of its CommonParams.

        Raises NotMeasured when it can't load the model.
        """
        common = self._xllamacpp.CommonParams()
        common.model.path = str(self._path)
        common.n_parallel = num_slots
        common.n_ctx = num_slots * (num_tokens + 64)
        common.cpuparams.n_threads = self._num_threads
        common.cpuparams_batch.n_threads = self._num_threads
        common.verbosity = -1
        for name, value in params.items():
            setattr(common, name, value)
        try:
            return self._xllamacpp.Server(common)
        except Exception as error:  # the binding raises whatever llama.cpp throws
            raise NotMeasured(f"llama.cpp can't load the model: {error}") from None

    def _start(self, num_slots: int, num_tokens: int) -> None:
        """A server with exactly as many slots as there are streams."""
        if num_slots == self._num_slots and self._server is not None:
            return
        self._server = None
        self._server = self.make_server(num_slots, num_tokens)
        self._num_slots = num_slots


def gguf_of(model: BenchModel) -> Path:
    """The model as GGUF in the bench's cache folder, written once per version of the weights."""
    stamp = int((model.model_dir / "model.safetensors").stat().st_mtime)
    return write_gguf(model.model_dir, bench_cache_dir() / f"{model.name}-{stamp}.gguf")


def _token_times(timings: Any, end_s: float, num_tokens: int) -> list[float]:
    """Even steps from the first token to the last, as the server's own clock gives them."""
    assert timings["predicted_n"] == num_tokens, "the server stopped early"
    decode_s = timings["predicted_ms"] / 1e3
    first_s = end_s - decode_s
    return [first_s + decode_s * step / max(1, num_tokens - 1) for step in range(num_tokens)]
