"""``python -m bench calls``: single module calls, upstream beside fastprob, in one run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import results
from bench.cases import CASES, LARGE, TARGETS, Case, Shape, Sides, Target
from bench.console import make_console, make_progress
from bench.gate import WrongResult, verify
from bench.implementations import implementation
from bench.timing import Quantiles, Timings, interleave, ratio

# Seconds for one case at one shape, with a target and without; at the large shape a round takes
# 0.1 s and the ratio's median needs three times as long. Upstream against itself (--null) is then
# off 1 by 1% at most where a target is set.
TARGET_S, INFORMATION_S, QUICK_S = 2.5, 1.2, 0.25
LARGE_FACTOR = 3


@dataclass(frozen=True)
class Row:
    """The timings of one case at one shape, and who was refused."""

    case: Case
    shape: Shape
    timings: dict[str, Timings]
    refused: dict[str, str]


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where a provider's result was wrong, else 0."""
    unknown = set(args.case or ()) - CASES.keys()
    if unknown:
        print(f"unknown case {', '.join(sorted(unknown))}; expected one of {', '.join(CASES)}")
        return 2
    torch.set_num_threads(args.threads)
    console = make_console()
    console.print(
        f"Single calls, {args.threads} thread(s), no grad unless 'fwd+bwd'. CPU time in µs, p50"
        " over interleaved rounds;\nratios are taken round by round."
    )
    fast = "upstream" if args.null else "fastprob"
    sides = {"upstream": implementation("upstream"), "fastprob": implementation(fast)}
    cases = [CASES[name] for name in args.case or CASES]
    if args.quick and not args.case:
        cases = [case for case in cases if case.quick]
    clock = time.thread_time_ns if args.threads == 1 else time.perf_counter_ns
    rows = measure(cases, sides, quick=args.quick, console=console, clock=clock)
    judged = judge(rows)
    print_targets(console, judged)
    print_information(console, rows)
    refusals = [(row, why) for row in rows for why in row.refused.values()]
    for row, why in refusals:
        console.print(f"[red]wrong result, not timed:[/] {_at(row.case.name, row.shape)}: {why}")
    folder = args.out
    if folder is None and not (args.quick or args.null or args.case):
        folder = results.default_folder()
    if folder is not None:
        path = results.write(folder / "calls.json", as_json(rows, judged))
        console.print(f"written: {results.shown(path)}")
    return 1 if refusals else 0


def measure(
    cases: list[Case],
    sides: Sides,
    *,
    quick: bool,
    console: Console,
    clock: Callable[[], int],
) -> list[Row]:
    """Checks, then times, every case at each of its shapes; with ``quick`` at the first."""
    plan = [(case, shape) for case in cases for shape in case.shapes[: 1 if quick else None]]
    rows = []
    with make_progress(console) as progress:
        task = progress.add_task("calls", total=len(plan))
        for case, shape in plan:
            progress.update(task, description=_at(case.name, shape))
            rows.append(_measure_one(case, shape, sides, quick, clock))
            progress.advance(task)
    return rows


def _measure_one(
    case: Case, shape: Shape, sides: Sides, quick: bool, clock: Callable[[], int]
) -> Row:
    problem = case.build(sides, shape)
    calls, refused = {}, {}
    with torch.set_grad_enabled(problem.grad):
        for name, make in problem.makers.items():
            if quick and name == "compiled":
                continue
            provider = make()
            try:
                verify(problem, provider, name)
            except WrongResult as error:
                refused[name] = str(error)
                continue
            calls[name] = provider.call
            # The first calls fill caches and, under torch.compile, guard on the written entries.
            for _ in range(5):
                provider.call()
        targeted = any(t.case == case.name and shape in t.bounds for t in TARGETS)
        budget = QUICK_S if quick else TARGET_S if targeted else INFORMATION_S
        if shape == LARGE:
            budget *= LARGE_FACTOR
        timings = interleave(calls, budget_s=budget, clock=clock)
    return Row(case, shape, timings, refused)


@dataclass(frozen=True)
class Judged:
    """A target at a shape with the ratio that was measured."""

    target: Target
    shape: Shape
    row: Row
    ratio: Quantiles

    @property
    def met(self) -> bool:
        return self.target.met(self.ratio.p50, self.shape)


def judge(rows: list[Row]) -> list[Judged]:
    """Compares the rows with the targets that name them."""
    judged = []
    for target in TARGETS:
        for row in rows:
            both = {target.numerator, target.denominator} <= row.timings.keys()
            if row.case.name == target.case and row.shape in target.bounds and both:
                quotient = ratio(row.timings[target.numerator], row.timings[target.denominator])
                judged.append(Judged(target, row.shape, row, quotient))
    return judged


def print_targets(console: Console, judged: list[Judged]) -> None:
    """Prints the table of targets."""
    table = Table(title="Targets", title_justify="left")
    for name in ("comparison", "shape"):
        table.add_column(name)
    for name in ("first, µs", "second, µs", "ratio", "p20 … p80", "target", ""):
        table.add_column(name, justify="right")
    for item in judged:
        target, timings = item.target, item.row.timings
        table.add_row(
            f"{item.row.case.title}: {target.numerator} ÷ {target.denominator}",
            _times(item.shape),
            _us(timings[target.numerator].quantiles.p50),
            _us(timings[target.denominator].quantiles.p50),
            f"{item.ratio.p50:.2f}",
            f"{item.ratio.p20:.2f} … {item.ratio.p80:.2f}",
            f"{target.sign} {target.bounds[item.shape]:g}",
            "[green]met[/]" if item.met else "[red]missed[/]",
        )
    console.print(table)
    missed = [item for item in judged if not item.met]
    console.print(f"{len(judged) - len(missed)} of {len(judged)} targets met")


def print_information(console: Console, rows: list[Row]) -> None:
    """Prints every case; those where fastprob is not the faster of the two come first."""
    table = Table(title="All cases", title_justify="left")
    for name in ("case", "shape"):
        table.add_column(name)
    names = ("upstream", "compiled", "fastprob", "hand")
    for name in (*names, "upstream ÷ fastprob"):
        table.add_column(name, justify="right")

    def speedup(row: Row) -> float:
        if {"upstream", "fastprob"} <= row.timings.keys():
            return ratio(row.timings["upstream"], row.timings["fastprob"]).p50
        return float("nan")

    for row in sorted(rows, key=lambda row: speedup(row) > 1):
        gain = speedup(row)
        cells = [
            "[red]wrong[/]"
            if name in row.refused
            else _us(row.timings[name].quantiles.p50)
            if name in row.timings
            else ""
            for name in names
        ]
        colour = "green" if gain > 1 else "red"
        table.add_row(row.case.title, _times(row.shape), *cells, f"[{colour}]{gain:.2f}[/]")
    console.print(table)


def as_json(rows: list[Row], judged: list[Judged]) -> dict[str, Any]:
    """Returns everything that was measured, refusals included."""
    return {
        "environment": results.environment(),
        "unit": "microseconds of CPU time per call",
        "targets": [
            {
                "case": item.target.case,
                "shape": list(item.shape),
                "numerator": item.target.numerator,
                "denominator": item.target.denominator,
                "ratio": item.ratio.as_dict(),
                "target": f"{item.target.sign} {item.target.bounds[item.shape]:g}",
                "met": item.met,
            }
            for item in judged
        ],
        "results": [
            {
                "case": row.case.name,
                "title": row.case.title,
                "shape": list(row.shape),
                "providers": {
                    name: {
                        **timing.quantiles.as_dict(),
                        "rounds": len(timing.us),
                        "inner": timing.inner,
                    }
                    for name, timing in row.timings.items()
                },
                "ratios_to_fastprob": {
                    name: ratio(timing, row.timings["fastprob"]).as_dict()
                    for name, timing in row.timings.items()
                    if "fastprob" in row.timings and name != "fastprob"
                },
                "refused": row.refused,
            }
            for row in rows
        ],
    }


def _times(shape: Shape) -> str:
    return "x".join(str(size) for size in shape)


def _at(name: str, shape: Shape) -> str:
    return f"{name} {_times(shape)}"


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
