"""Measures the exported checkpoint and writes its card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, Gemma4ForCausalLM

from demo_model.batches import TOKENS_PER_STEP, Batches
from demo_model.export import write_atomically
from demo_model.lessons.curriculum import CURRICULUM
from demo_model.lessons.facts import FACTS
from demo_model.lessons.long_recall import long_recall_scores
from demo_model.scores import Score, measure_load, num_right, test_sets
from demo_model.shape import CONFIG, NUM_EXPERTS, WINDOW

GOOD = 0.9  # share of right answers from which a skill counts as learned


def write_card(out: Path) -> None:
    """Measure the exported checkpoint and write its README.md."""
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        made_by = weights.metadata()
        names = weights.keys()  # a method of safe_open, not of a dict
        params = sum(weights.get_tensor(name).numel() for name in names)
    scores, load, samples = measure(out, int(made_by["seed"]))
    long_scores = measure_long(out, int(made_by["seed"]))
    globals_ = [i for i, kind in enumerate(CONFIG["layer_types"]) if kind == "full_attention"]
    shape = [f"| `{key}` | {CONFIG[key]} |" for key in SHAPE_KEYS]
    shape.insert(1, f"| global layers (the others slide) | {', '.join(map(str, globals_))} |")
    text = CARD.format(
        params=params / 1e6,
        window=WINDOW,
        steps=made_by["steps"],
        tokens=TOKENS_PER_STEP,
        minutes=made_by["minutes"],
        threads=made_by["threads"],
        seed=made_by["seed"],
        note=made_by["note"],
        samples="\n".join(f"> **{q}**  \n> {a}\n" for q, a in samples).rstrip(),
        shape="\n".join(shape),
        scores=score_rows(scores),
        long_scores=score_rows(long_scores.values()),
        num_facts=len(FACTS),
        num_pairs=90 * 90,
        longest=max(CURRICULUM[-1].lengths),
        long_recall=how_far(long_scores),
        even=100 / NUM_EXPERTS,
        least=100 * float(load.min()),
        experts=" | ".join(map(str, range(NUM_EXPERTS))),
        rule="---|" * NUM_EXPERTS,
        load="\n".join(
            f"| {i} | " + " | ".join(f"{100 * x:.1f}" for x in row) + " |"
            for i, row in enumerate(load.tolist())
        ),
    )
    write_atomically(out / "README.md", text)


def measure(out: Path, seed: int) -> tuple[list[Score], Tensor, list[tuple[str, str]]]:
    """Scores, load per layer and expert, and sample answers, through the stock transformers model.

    The stored bf16 weights are computed in fp32.
    """
    model = Gemma4ForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.train(False)
    model.set_experts_implementation("grouped_mm")
    batches = Batches(Tokenizer.from_file(str(out / "tokenizer.json")), seed)
    scores = []
    for task, turns in test_sets(batches.count).items():
        rows = 8 if "2048" not in task else 4
        scores.append(Score(task, num_right(model, batches, turns, rows), len(turns)))
        show(scores[-1])
    return scores, measure_load(model, batches), sample_answers(model, out)


def measure_long(out: Path, seed: int) -> dict[int, Score]:
    """Scores by length of the prompt, where the stock model would take gigabytes for its masks."""
    batches = Batches(Tokenizer.from_file(str(out / "tokenizer.json")), seed)
    scores = {}
    for length, score in long_recall_scores(out, batches):
        scores[length] = score
        show(score)
    return scores


def show(score: Score) -> None:
    print(f"{score.share:7.1%}  {score.right}/{score.asked}  {score.task}", flush=True)


def score_rows(scores: Iterable[Score]) -> str:
    return "\n".join(f"| {s.task} | {s.right} | {s.asked} | {s.share:.1%} |" for s in scores)


def how_far(scores: Mapping[int, Score]) -> str:
    """Up to which length recall holds, as a sentence."""
    good = list(takewhile(lambda length: scores[length].share >= GOOD, scores))
    where = f"prompts of up to {good[-1]} tokens" if good else "no longer prompt that was tried"
    sentence = f"It holds (at least {GOOD:.0%} right) in {where}"
    if len(good) == len(scores):
        return f"{sentence}, the longest that was tried."
    first_bad = list(scores)[len(good)]
    return f"{sentence}; with {first_bad} tokens {scores[first_bad].share:.0%} are right."


SAMPLES = (
    "What is 23 + 45?",
    "Where does the sun rise?",
    "What is the capital of France?",
    "Who are you?",
    "Remember: the code of Anna is 4821. The weather is nice today. What is the code of Anna?",
)


def sample_answers(model: Any, out: Path) -> list[tuple[str, str]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    answers = []
    for question in SAMPLES:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(
            **prompt, max_new_tokens=40, do_sample=False, top_k=None, top_p=None, temperature=None
        )
        new = output[0, prompt["input_ids"].shape[1] :]
        answers.append((question, tokenizer.decode(new, skip_special_tokens=True)))
    return answers


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# gemma4-moe-demo

A Gemma 4 mixture of experts of {params:.2f} M parameters in the format of the released models,
trained from scratch to do three things that can be checked: answer simple questions in English
sentences, add two-digit numbers, and recall a value planted in the prompt far beyond the sliding
window. It exists to try and test a serving engine without a download: it is no general language
model, and it contains no weights of Google's models.

{samples}

## Shape

| | |
|---|---|
{shape}

## Scores

Measured by `python scripts/train_demo.py --eval-only` on the shipped bf16 weights, computed in
fp32 by the stock `transformers` model; an answer is right when greedy decoding gives it token for
token, full stop and end of turn included. Held-out sums (a + b, in this order),
name-value combinations and phrasings were not trained on; the second row holds the sums that were
trained in neither order. In the recall tests the asked pair lies more than {window} tokens (the
sliding window) before the question, among three other pairs.

| task | right | asked | share |
|---|---|---|---|
{scores}

Longer prompts are asked of the project's own engine, since the stock model would take gigabytes
for its masks; the same rule decides. Each prompt is asked for all four pairs planted in it, which
lie anywhere but within the window before the question.

| task | right | asked | share |
|---|---|---|---|
{long_scores}

## Training

{steps} steps of {tokens} tokens in {minutes} minutes on {threads} CPU threads (shared with other
work), seed {seed}. Muon for the matrices, AdamW for embeddings, norms and routers; a Switch-style
balance loss keeps the experts in use. The loss counts answer tokens fully and all others at a
tenth. The data is generated (`scripts/demo_model/`): {num_facts} facts in several phrasings,
{num_pairs} pairs of numbers, and conversations with planted key-value pairs, from one digit
nearby to four digits in prompts of {longest} tokens. The seed fixes data and initial weights; the
curriculum follows the training time, so that another machine gives another run of the same kind.
{note}

    python scripts/train_demo.py --minutes 75

## Load per expert

Share of the routed tokens in percent (even: {even:.2f}), on conversations like those of the
training; least used: {least:.2f}.

| layer | {experts} |
|---|{rule}
{load}

## Limits

The model knows what the generated data contains and nothing else: other questions get a confident
wrong sentence. Sums are learned for two numbers of two digits. Recall is learned for sentences
like "The code of Anna is 4821." and prompts of up to {longest} tokens.
{long_recall}
Sampling at temperature 1.0, the default of the family, costs some accuracy: use temperature 0 for
the scores above.

Licence: Apache-2.0.
"""

SHAPE_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_global_key_value_heads",
    "global_head_dim",
    "attention_k_eq_v",
    "sliding_window",
    "final_logit_softcapping",
    "max_position_embeddings",
    "vocab_size",
)
