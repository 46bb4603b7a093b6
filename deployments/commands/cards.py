"""What the command line shows: the progress of a start, the cluster, the numbers of a demo."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from protos.briolette.v1.admin_pb2 import ClusterStatus, ExpertHost, KvStore
from protos.briolette.v1.inference_pb2 import Generation


class StartDisplay:
    """A line for what happens now, and a bar for each part that loads weights."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._console = console
        self._phase: TaskID | None = None
        self._bars: dict[str, TaskID] = {}

    def show(self, progress: dict[str, Any]) -> None:
        """Show one report, as `deployments.start.lifecycle.start` passes it to `on_progress`."""
        if "phase" in progress:
            if not self._console.is_terminal:
                self._console.print(f"{progress['phase']} ...", markup=False)
            self._end_phase()
            self._phase = self._progress.add_task(progress["phase"], total=None)
        if "warning" in progress:
            self._console.print(progress["warning"], style="yellow", markup=False)
        for part, done in progress.get("parts", {}).items():
            if part not in self._bars:
                self._bars[part] = self._progress.add_task(f"Loading {part}", total=1.0)
            self._progress.update(self._bars[part], completed=done)

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._progress.update(self._phase, total=1.0, completed=1.0)

    def __enter__(self) -> StartDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@dataclass(slots=True)
class Answer:
    """One answer as a client saw it."""

    num_tokens: int
    ttft_s: float
    total_s: float

    @staticmethod
    def of(last: Generation, num_tokens: int) -> Answer:
        return Answer(num_tokens, last.timings.ttft_s, last.timings.total_s)

    @property
    def tokens_per_s(self) -> float:
        """After the first token; 0 where there is only one."""
        seconds = self.total_s - self.ttft_s
        return (self.num_tokens - 1) / seconds if seconds > 0 else 0.0


def status_card(
    status: ClusterStatus, address: str, started: float, base_url: str | None = None
) -> Panel:
    """Where everything runs and how busy it is."""
    rows = _grid()
    rows.add_row("listens on", f"{address} (gRPC), up for {_span(time.time() - started)}")
    if base_url is not None:
        rows.add_row("OpenAI's API", base_url)
    _add_parts(rows, status)
    load = status.load
    rows.add_row("queue", f"{load.num_waiting} waiting, {load.num_running} running")
    rows.add_row("tokens/s", f"{load.decode_tokens_per_s:.1f} when last busy")
    for group in load.kv_blocks:
        rows.add_row(
            f"KV {group.group}",
            f"{group.used} of {group.total} blocks used, {group.cached} cached",
        )
    if load.prefix_queries:
        rows.add_row(
            "prefixes",
            f"{load.prefix_hits} of {load.prefix_queries} requests found one cached, "
            f"{load.cached_tokens:,} tokens",
        )
    if status.HasField("kv_store"):
        rows.add_row("store", _store(status.kv_store))
    _add_calls(rows, status)
    state = "[green]serving[/]" if status.ready else "[red]not serving[/]"
    if status.reason:
        state += f": {escape(status.reason)}"
    return Panel(rows, title=f"Briolette: {escape(status.model)}, {state}", expand=False)


def demo_card(status: ClusterStatus, answers: Sequence[Answer]) -> Panel:
    """The numbers of a conversation, and where it was computed."""
    rows = _grid()
    _add_parts(rows, status)
    ttfts = sorted(answer.ttft_s for answer in answers)
    num_tokens = sum(answer.num_tokens - 1 for answer in answers)
    seconds = sum(answer.total_s - answer.ttft_s for answer in answers)
    rows.add_row(
        "TTFT", f"{ttfts[len(ttfts) // 2] * 1e3:.0f} ms median, {ttfts[-1] * 1e3:.0f} ms most"
    )
    rows.add_row("tokens/s", f"{num_tokens / max(seconds, 1e-9):.1f} for one conversation")
    _add_calls(rows, status)
    return Panel(rows, title=f"Briolette: {escape(status.model)}", expand=False)


def _add_parts(rows: Table, status: ClusterStatus) -> None:
    rows.add_row("model", f"{status.kind}, {status.experts}, context {status.context_tokens:,}")
    rows.add_row("gateway", f"pid {status.gateway.pid}{_metrics(status.gateway.metrics_port)}")
    decoder = status.decoder
    rows.add_row(
        "attention", f"pid {decoder.pid} on {decoder.device}{_metrics(decoder.metrics_port)}"
    )
    for host in status.expert_hosts:
        rows.add_row(f"experts {_groups(host)}", _host(host))
    if not status.expert_hosts:
        rows.add_row("experts", "in the process of the attention" if status.experts else "none")
    parts = [decoder, *(host.part for host in status.expert_hosts)]
    rows.add_row("kernels", ", ".join(sorted({part.kernels for part in parts if part.kernels})))


def _add_calls(rows: Table, status: ClusterStatus) -> None:
    calls = status.expert_calls
    if calls.num_calls:
        rows.add_row(
            "expert calls",
            f"{calls.num_calls:,}; p50 {calls.p50_s * 1e6:.0f} µs, p99 {calls.p99_s * 1e6:.0f} µs; "
            f"{calls.num_retries} retried",
        )
        rows.add_row(
            "hidden", f"{calls.hidden_share:.0%} of the hosts' time, behind the decoder's work"
        )


def _store(store: KvStore) -> str:
    if not store.up:
        return f"Redis at {escape(store.address)}: [red]doesn't answer[/]"
    size = f"{store.used_bytes / 1e6:.0f} MB"
    if store.max_bytes:
        size += f" of {store.max_bytes / 1e6:.0f} MB"
    state = size if store.writable else f"{size}, [red]refuses to store more[/]"
    prefixes = f"{store.fetched} prefixes fetched, {store.recomputed} computed instead"
    return f"Redis at {escape(store.address)}: {state}, {prefixes}"


def _host(host: ExpertHost) -> str:
    if not host.part.pid:
        return f"{host.host_id}: [red]not running[/]"
    card = f" (card {host.visible_devices})" if host.visible_devices else ""
    link = f"over {host.link}" if host.link else "[red]link down[/]"
    return (
        f"{host.host_id}, pid {host.part.pid} on {host.part.device}{card} {link}"
        f"{_metrics(host.part.metrics_port)}"
    )


def _groups(host: ExpertHost) -> str:
    return ",".join(map(str, host.group_ids))


def _metrics(port: int) -> str:
    return f", /metrics on {port}" if port else ""


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    return grid


def _span(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
