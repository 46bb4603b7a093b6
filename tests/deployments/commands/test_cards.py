"""What the command line shows: a start's progress, and the numbers of a demo."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deployments.commands.cards import Answer, StartDisplay, demo_card, status_card
from protos.briolette.v1.admin_pb2 import ClusterStatus, EngineLoad, ExpertCalls, ExpertHost, Part


def rendered(card: object) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(card)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def status() -> ClusterStatus:
    """Two hosts, of which one isn't linked and has no native kernels."""
    hosts = [
        ExpertHost(
            host_id="host0",
            part=Part(pid=12, device="cpu", metrics_port=9, kernels="native"),
            group_ids=[0, 2],
            link="shm",
        ),
        ExpertHost(
            host_id="host1", part=Part(pid=13, device="cpu", kernels="PyTorch"), group_ids=[1, 3]
        ),
    ]
    calls = ExpertCalls(num_calls=1200, p50_s=2e-4, p99_s=3e-3, num_retries=1, hidden_share=0.25)
    return ClusterStatus(
        ready=True,
        model="[demo]",
        kind="gemma4_text",
        experts="16 experts",
        context_tokens=32768,
        gateway=Part(pid=10, device="cpu", metrics_port=9464),
        decoder=Part(pid=11, device="cpu", kernels="native"),
        expert_hosts=hosts,
        expert_calls=calls,
        load=EngineLoad(num_waiting=2, num_running=3),
    )


def rows_of(card: str) -> dict[str, str]:
    """The rows by their first column."""
    lines = [line.strip("│ \n") for line in card.splitlines()[1:-1]]
    return {name: rest for name, _, rest in (line.partition("  ") for line in lines)}


def test_the_card_of_a_demo() -> None:
    answers = [Answer(11, 0.050, 1.050), Answer(31, 0.070, 2.070), Answer(1, 0.060, 0.060)]
    card = rendered(demo_card(status(), answers))
    assert "Briolette: [demo]" in card
    rows = {name: rest.strip() for name, rest in rows_of(card).items()}
    assert rows["TTFT"] == "60 ms median, 70 ms most"
    assert rows["tokens/s"] == "13.3 for one conversation"  # 40 tokens after the first, in 3 s
    assert rows["expert calls"] == "1,200; p50 200 µs, p99 3000 µs; 1 retried"
    assert rows["hidden"] == "25% of the hosts' time, behind the decoder's work"
    assert rows["kernels"] == "PyTorch, native"
    assert rows["experts 0,2"] == "host0, pid 12 on cpu over shm, /metrics on 9"
    assert rows["experts 1,3"] == "host1, pid 13 on cpu link down"


def test_the_card_of_the_status() -> None:
    unready = status()
    unready.ready, unready.reason = False, "No expert host is alive for groups 1, 3."
    base_url = "http://127.0.0.1:8080/v1"
    card = rendered(status_card(unready, "127.0.0.1:50051", 0.0, base_url))
    assert "[demo], not serving: No expert host is alive for groups 1, 3." in card
    assert rows_of(card)["queue"].strip() == "2 waiting, 3 running"
    assert rows_of(card)["OpenAI's API"].strip() == base_url


def test_an_answer_of_one_token_has_no_rate() -> None:
    assert Answer(1, 0.5, 0.5).tokens_per_s == 0.0
    assert Answer(5, 0.5, 2.5).tokens_per_s == pytest.approx(2.0)


def start(is_terminal: bool) -> str:
    """What a start shows."""
    console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal)
    with StartDisplay(console) as display:
        display.show({"phase": "Checking [the] model"})
        display.show({"phase": "Starting the parts"})
        display.show({"parts": {"decoder": 0.5}})
        display.show({"parts": {"decoder": 1.0, "host0": 0.25}})
        display.show({"serving": "127.0.0.1:50051"})
        bars = {task.description: task.completed for task in display._progress.tasks}
    assert bars["Loading decoder"] == 1.0 and bars["Loading host0"] == 0.25
    assert bars["Checking [the] model"] == 1.0 and bars["Starting the parts"] == 0.0
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_start_shows_its_phases_as_lines_where_there_is_no_terminal() -> None:
    said = start(is_terminal=False)
    assert "Checking [the] model ...\nStarting the parts ...\n" in said


def test_a_start_shows_bars_on_a_terminal() -> None:
    said = start(is_terminal=True)
    assert "Loading decoder" in said and "..." not in said
