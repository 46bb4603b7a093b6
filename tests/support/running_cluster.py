"""What tests ask of a running cluster and of its processes."""

from __future__ import annotations

import os
import urllib.request

import psutil
from prometheus_client.parser import text_string_to_metric_families

from deployments.commands.client import Client
from deployments.start.lifecycle import Running
from protos.briolette.v1.inference_pb2 import Message, Sampling

QUESTION = [Message(role="user", content="What is the capital of Norway?")]


def session_pids(running: Running) -> set[int]:
    """Every process of the cluster but zombies."""
    pids = set()
    for process in psutil.process_iter(["status"]):
        try:
            if os.getsid(process.pid) == running.pid and process.info["status"] != "zombie":
                pids.add(process.pid)
        except ProcessLookupError:
            pass
    return pids


def name_of(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def answer(client: Client, max_tokens: int = 48) -> list[int]:
    pieces = client.chat(QUESTION, greedy(max_tokens))
    return [token for piece in pieces for token in piece.token_ids]


def greedy(max_tokens: int) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def metric(port: int, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        families = text_string_to_metric_families(page.read().decode())
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"briolette_{name}" and labels.items() <= sample.labels.items()
    )
