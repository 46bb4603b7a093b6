"""Recall in prompts of many thousand tokens, asked of the project's own engine.

The stock model would take masks of gigabytes. A document is asked for each pair planted in it; the
engine computes it once and keeps it for the other questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from cluster.config import Config
from demo_model.batches import Batches
from demo_model.lessons.recall import recall_document
from demo_model.scores import Score
from demo_model.shape import WINDOW
from deployments.loading import ModelSource, load_engine, load_local_experts
from engine.core import EngineCore
from engine.request import SamplingParams

NUM_DOCUMENTS = {4096: 10, 8192: 10, 16384: 8, 32768: 8}  # by tokens of the prompt


def long_recall_scores(model_dir: Path, batches: Batches) -> Iterator[tuple[int, Score]]:
    """The score of each length, one by one."""
    config = Config.load(None, {"model": str(model_dir), "experts.mode": "local"})
    source = ModelSource.open(config)
    engine = load_engine(config, source, load_local_experts(config, source))
    rng = random.Random(2027)
    for length, num_documents in NUM_DOCUMENTS.items():
        task = f"recall of a four-digit value, prompt of about {length} tokens"
        score = Score(task, 0, 0)
        for _ in range(num_documents):
            document, pairs = recall_document(rng, length, 4, WINDOW, batches.count)
            for turn in (pair.turn(rng) for pair in pairs):
                score.asked += 1
                score.right += answer(engine, batches, f"{document} {turn.user}") == turn.model
        yield length, score


def answer(engine: EngineCore, batches: Batches, question: str) -> str:
    """The greedy answer, to its end of turn."""
    text = f"<bos><|turn>user\n{question}<turn|>\n<|turn>model\n"
    prompt_ids = batches.tokenizer.encode(text, add_special_tokens=False).ids
    sampling = SamplingParams(temperature=0.0, max_tokens=16)
    engine.add(request_id="question", prompt_ids=prompt_ids, sampling=sampling)
    token_ids: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            token_ids += output.new_token_ids
    return batches.tokenizer.decode(token_ids)
