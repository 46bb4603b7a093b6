"""What `briolette verify` shows: a table of the cases, a line for each problem, the conclusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from deployments.verify.verify import Comparison, Report, Verdict

Results = Mapping[str, Sequence[Verdict]]  # by the case's name, a verdict for each prompt


def print_report(console: Console, report: Report) -> None:
    """All that there is to see of a verification."""
    console.print(verify_table(report.verdicts))
    for line in problems(report.verdicts, lambda token_id: report.tokenizer.decode([token_id])):
        console.print(line, markup=False)
    console.print(conclusion(report.verdicts), style="green" if report.is_equal else "red")


def verify_table(results: Results) -> Table:
    """A row for each case: sums over its prompts, and the largest differences."""
    table = Table(box=SIMPLE)
    table.add_column("", no_wrap=True)
    for column in ("prompts", "tokens", "warm", "memory", "Redis", "gap"):
        table.add_column(column, justify="right")
    for name, verdicts in results.items():
        gaps = [c.smallest_gap for v in verdicts for c in v.comparisons]
        table.add_row(
            name,
            str(len(verdicts)),
            f"{sum(verdict.num_prompt_tokens for verdict in verdicts):,}",
            f"{sum(verdict.num_warm_tokens for verdict in verdicts):,}",
            _cell(verdicts, [v.memory for v in verdicts], [v.filling for v in verdicts]),
            _cell(verdicts, [v.redis for v in verdicts]),
            _number(min((gap for gap in gaps if gap is not None), default=None)),
        )
    return table


def problems(results: Results, decode: Callable[[int], str]) -> Iterator[str]:
    """A line for each answer that wasn't warm, or wasn't the cold one."""
    for name, verdicts in results.items():
        for number, verdict in enumerate(verdicts, 1):
            where = f"{name}, prompt {number}"
            warm = {"memory": verdict.memory, "Redis": verdict.redis}
            for tier, comparison in warm.items():
                if comparison.num_cached_tokens != verdict.num_warm_tokens:
                    yield (
                        f"{where}: {comparison.num_cached_tokens} of {verdict.num_warm_tokens} "
                        f"tokens came from {tier}, so that nothing is shown for the others."
                    )
            for tier, comparison in {"memory, half warm": verdict.filling, **warm}.items():
                if not comparison.is_equal:
                    yield f"{where}, from {tier}: {_describe(comparison, decode)}"


def conclusion(results: Results) -> str:
    """One sentence on all prompts."""
    verdicts = [verdict for of_case in results.values() for verdict in of_case]
    num_rows = sum(verdict.num_tokens for verdict in verdicts)
    asked = f"{len(verdicts)} prompts, {num_rows} tokens of answers"
    differing = sum(not verdict.is_equal for verdict in verdicts)
    if differing:
        return f"Different: {differing} of {asked}; see above."
    if not all(verdict.is_warm for verdict in verdicts):
        return "Nothing differs, but not all answers were warm; see above."
    return (
        f"Equal: {asked}; every bit of their logits is the same cold, from memory and from Redis."
    )


def _describe(comparison: Comparison, decode: Callable[[int], str]) -> str:
    text = f"logits differ by up to {comparison.largest_difference:.2g} "
    text += f"in {comparison.num_unequal} rows (smallest gap between the two best tokens there "
    text += f"{_number(comparison.smallest_gap)})"
    if comparison.first_token is None:
        return f"{text}; the tokens are the same."
    index, cold, warm = comparison.first_token
    return f"{text}; token {index + 1} is {decode(warm)!r} instead of {decode(cold)!r}."


def _cell(
    verdicts: Sequence[Verdict], warm: Sequence[Comparison], others: Sequence[Comparison] = ()
) -> str:
    found = sum(comparison.num_cached_tokens for comparison in warm)
    if found != sum(verdict.num_warm_tokens for verdict in verdicts):
        return f"only {found:,} warm"
    comparisons = [*warm, *others]
    if all(comparison.is_equal for comparison in comparisons):
        return "equal"
    largest = f"{max(c.largest_difference for c in comparisons):.2g}"
    has_tokens = any(comparison.first_token is not None for comparison in comparisons)
    return f"{largest}, tokens too" if has_tokens else largest


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
