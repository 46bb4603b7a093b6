"""`briolette usage`: what each tenant used on each day, as a table or as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protos.briolette.v1.admin_pb2 import DayUsage

COLUMNS = [field.name for field in DayUsage.DESCRIPTOR.fields]


def print_table(days: Sequence[DayUsage], console: Console) -> None:
    """A row for each tenant and day, and the sums."""
    if not days:
        console.print("Nothing was used in that time.")
        return
    head = ("day", "tenant", "requests", "tokens in", "cached", "tokens out", "prefill saved")
    table = Table(*head, box=None, padding=(0, 2, 0, 0))
    for day in days:
        table.add_row(day.day, escape(day.tenant), *_cells([day]))
    if len(days) > 1:
        table.add_row("all", "", *_cells(days))
    for column in table.columns[2:]:
        column.justify = "right"
    console.print(table)


def write_csv(days: Sequence[DayUsage], file: TextIO) -> None:
    """A line for each tenant and day under a line of names."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(day, name) for name in COLUMNS] for day in days)


def _cells(days: Sequence[DayUsage]) -> list[str]:
    names = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
    counts = [f"{sum(getattr(day, name) for day in days):,}" for name in names]
    return [*counts, f"{sum(day.saved_prefill_s for day in days):,.1f} s"]
