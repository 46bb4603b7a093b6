"""The training run: its steps and its state on disk."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import Gemma4ForCausalLM

from demo_model.batches import Batches
from demo_model.router_watch import RouterWatch
from demo_model.scores import quick_scores

SAVE_EVERY_S = 240


@dataclass
class Run:
    """A training run on disk: everything `--resume` needs."""

    model: Gemma4ForCausalLM
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    work: Path
    seed: int
    note: str = ""  # for the card
    step: int = 0
    seconds: float = 0.0

    def save(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.seed,
            "tokenizer": self.batches.tokenizer.to_str(),
        }
        torch.save(state, self.work / "state.tmp")
        os.replace(self.work / "state.tmp", self.work / "state.pt")

    def load(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.seed = state["step"], state["seconds"], state["seed"]
        self.batches = Batches(Tokenizer.from_str(state["tokenizer"]), self.seed)


def train(run: Run, minutes: float) -> None:
    """Until the time is over or a signal comes; the state on disk is at most minutes old."""
    watch = RouterWatch()
    watch.attach(run.model)
    started, before, last_save = time.monotonic(), run.seconds, time.monotonic()
    mean_loss = 0.0
    run.model.train()
    stop = stop_on_signal()
    while run.seconds < minutes * 60 and not stop.is_set():
        progress = run.seconds / (minutes * 60)
        loss, balance = train_step(run, watch, progress)
        mean_loss = loss if not mean_loss else 0.95 * mean_loss + 0.05 * loss
        run.step += 1
        run.seconds = before + time.monotonic() - started
        if run.step % 25 == 0:
            print(
                f"step {run.step} {run.seconds / 60:.1f} min loss {mean_loss:.3f} "
                f"balance {balance:.3f} least load {float(watch.load().min()):.4f}",
                flush=True,
            )
        if time.monotonic() - last_save > SAVE_EVERY_S:
            run.save()
            run.model.train(False)
            print("  ", json.dumps(quick_scores(run.model, run.batches)), flush=True)
            run.model.train()
            last_save = time.monotonic()
    run.save()


def train_step(run: Run, watch: RouterWatch, progress: float) -> tuple[float, float]:
    """One optimizer step; returns the weighted loss and the balance loss."""
    ids, weights = run.batches.step(run.step, progress)
    watch.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = run.model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = (loss * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    balance = watch.balance_loss()
    torch.autograd.backward(loss + 0.01 * balance)
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    scale = learning_rate(run.step, progress)
    for optimizer, peak in zip(run.optimizers, (0.02, 3e-3), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach()), float(balance.detach())


def learning_rate(step: int, progress: float) -> float:
    """Warm up, hold, then fall linearly over the last fifth of the time."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1.0 - progress) / 0.2))


def stop_on_signal() -> threading.Event:
    """Set by Ctrl-C or a termination: the run saves its state after the current step and ends."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop
