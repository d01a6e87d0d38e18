"""``python -m bench calls``: single module calls, upstream beside fastprob, in one run."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import providers, results
from bench.cases import CASES, HUGE, LARGE, TARGETS, Case, Shape, Target
from bench.console import make_console, make_progress, make_table
from bench.gate import WrongResult, verify
from bench.implementations import implementation
from bench.problems import Sides
from bench.timing import CpuMeter, CudaMeter, Quantiles, Timings, interleave, ratio

# Seconds for one case at one shape: with a target, with none, and with none and two eager
# providers alone; at the large shapes a round takes 0.1 s and the ratio's median needs three times
# as long. Upstream against itself (--null) is then off 1 by 1% at most where a target is set.
TARGET_S, INFORMATION_S, GRID_S, QUICK_S = 2.5, 1.2, 0.4, 0.25
LARGE_FACTOR = 3


@dataclass(frozen=True)
class Row:
    """The timings of one case at one shape, who was wrong, and who is missing and why."""

    case: Case
    shape: Shape
    timings: dict[str, Timings]
    refused: dict[str, str]
    missing: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What a run of ``calls`` measures.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        quick: short, at the first shape of each case, nothing compiled.
        only: the providers that are timed; None for all of each case.
        shapes: those that are measured; None for all of each case.
        limit_s: no further case is begun after this many seconds.
    """

    device: str = "cpu"
    quick: bool = False
    only: Sequence[str] | None = None
    shapes: Sequence[Shape] | None = None
    limit_s: float = math.inf

    def at(self, case: Case) -> list[Shape]:
        """The shapes at which a case is measured."""
        shapes = [s for s in case.at(self.device) if self.shapes is None or s in self.shapes]
        return shapes[:1] if self.quick else shapes

    def names(self, case: Case, shape: Shape) -> list[str]:
        """The providers that are timed."""
        names = list(case.providers(self.device, shape))
        # Last of all: a capture that fails, as that of upstream's projection does, may leave the
        # device in a state that the next provider would be blamed for.
        if "upstream graph" in names:
            names.append(names.pop(names.index("upstream graph")))
        if self.quick and self.only is None:
            return [name for name in names if name in (*providers.SIDES, providers.HAND)]
        return [name for name in names if self.only is None or name in self.only]


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where a provider's result was wrong, else 0."""
    for what, given, known in (
        ("case", args.case, CASES),
        ("provider", args.provider, providers.NAMES),
    ):
        unknown = sorted(set(given or ()) - set(known))
        if unknown:
            print(f"unknown {what} {', '.join(unknown)}; expected one of {', '.join(known)}")
            return 2
    device = results.pick_device(args.device)
    if device is None:
        print("--device cuda: no GPU here")
        return 2
    torch.set_num_threads(args.threads)
    limit = math.inf if args.limit is None else args.limit
    plan = Plan(device, args.quick, args.provider, args.shape, limit)
    cases = [CASES[name] for name in args.case or CASES]
    if args.quick and not args.case:
        cases = [case for case in cases if case.quick]
    cut = args.quick or args.null or args.case or args.provider or args.shape or args.limit
    folder = args.out or (None if cut else results.default_folder(device))
    return report(cases, plan, args.null, folder, args.threads)


def report(
    cases: list[Case], plan: Plan, null: bool = False, folder: Path | None = None, threads: int = 1
) -> int:
    """Measures, prints the tables, and writes ``calls.json`` where a folder is given."""
    console = make_console()
    cpu = plan.device == "cpu"
    what = f"CPU time, {threads} thread(s)" if cpu else "at the clock, calls back to back"
    console.print(
        f"Single calls, no grad unless 'fwd+bwd'. µs a call, {what}, p50 over interleaved rounds;\n"
        "ratios are taken round by round."
    )
    fast = "upstream" if null else "fastprob"
    sides = {"upstream": implementation("upstream"), "fastprob": implementation(fast)}
    rows = measure(cases, sides, plan, console, threads)
    judged = judge(rows, plan.device)
    print_slower(console, slower(rows))
    print_targets(console, judged)
    print_information(console, rows)
    if not cpu:
        print_device(console, rows)
    for row in rows:
        for name, why in row.missing.items():
            console.print(f"not timed: {_at(row.case.name, row.shape)}, {name}: {why}")
        for why in row.refused.values():
            at = _at(row.case.name, row.shape)
            console.print(f"[red]wrong result, not timed:[/] {at}: {why}")
    if folder is not None:
        path = results.write(folder / "calls.json", as_json(rows, judged, plan.device))
        console.print(f"written: {results.shown(path)}")
    return 1 if any(row.refused for row in rows) else 0


def measure(
    cases: list[Case], sides: Sides, plan: Plan, console: Any, threads: int = 1
) -> list[Row]:
    """Checks, then times, every case at each of its shapes."""
    todo = [(case, shape) for case in cases for shape in plan.at(case)]
    rows = []
    begin = time.perf_counter()
    with make_progress(console) as progress:
        task = progress.add_task("calls", total=len(todo))
        for i, (case, shape) in enumerate(todo):
            if time.perf_counter() - begin > plan.limit_s:
                left = ", ".join(_at(case.name, shape) for case, shape in todo[i:])
                console.print(f"left out after {plan.limit_s:.0f} s: {left}")
                break
            progress.update(task, description=_at(case.name, shape))
            rows.append(_measure_one(case, shape, sides, plan, threads))
            progress.advance(task)
    return rows


def _measure_one(case: Case, shape: Shape, sides: Sides, plan: Plan, threads: int) -> Row:
    cuda = plan.device != "cpu"
    providers.fresh_compiler()
    problem = case.build({side: sides[side] for side in case.sides}, shape, plan.device)
    calls, refused, missing = {}, {}, {}
    written = 0
    names = plan.names(case, shape)
    with torch.set_grad_enabled(problem.grad):
        for name in names:
            if name == providers.ROOF:
                continue
            try:
                provider = problem.makers[name]()
                verify(problem, provider, name)
            except WrongResult as error:
                refused[name] = str(error)
                continue
            except Exception as error:
                # A graph that cannot be captured, a compiler that gives up: said, and not timed.
                missing[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
                continue
            if cuda:
                out = provider.read(provider.call())
                written = sum(value.numel() * value.element_size() for value in out.values())
                del out
            calls[name] = provider.call
            providers.warm_up(provider)
        if providers.ROOF in names and calls:
            calls[providers.ROOF] = providers.copy_roof(problem.moved + written, plan.device)
        timings = interleave(
            calls,
            budget_s=_budget(case, shape, plan, len(names)),
            meter=CudaMeter() if cuda else CpuMeter(clock_of(threads)),
        )
    return Row(case, shape, timings, refused, missing)


def clock_of(threads: int) -> Callable[[], int]:
    """CPU time of the calling thread, or the clock where there are others."""
    return time.thread_time_ns if threads == 1 else time.perf_counter_ns


def _budget(case: Case, shape: Shape, plan: Plan, count: int) -> float:
    if plan.quick:
        return QUICK_S
    targeted = any(t.case == case.name and shape in t.bounds for t in TARGETS)
    if plan.device != "cpu":
        # At the clock nothing disturbs a lent GPU, and minutes on it are counted.
        return QUICK_S * (2 if targeted else 1)
    budget = TARGET_S if targeted else GRID_S if count <= 2 else INFORMATION_S
    return budget * (LARGE_FACTOR if shape == LARGE or shape in HUGE else 1)


# ------------------------------------------------------------------------------ slower, and targets


@dataclass(frozen=True)
class Slower:
    """A provider that beat fastprob's: ``ratio`` is its time as a part of fastprob's."""

    case: str
    title: str
    shape: Shape
    ours: str
    other: str
    ratio: Quantiles


def slower(rows: Iterable[Row]) -> list[Slower]:
    """Lists where fastprob is slower than another provider: form by form, the worst first.

    Each form of fastprob is compared with upstream's same form, and fastprob in eager mode with
    every form of upstream and with the hand-written maths besides. The copy roof is a bound of the
    machine, and no provider.
    """
    found = []
    for row in rows:
        pairs = [(f"fastprob{form}", f"upstream{form}") for form in ("", *_FORMS)]
        pairs += [
            ("fastprob", other) for other in (*(f"upstream{f}" for f in _FORMS), providers.HAND)
        ]
        for ours, other in pairs:
            if {ours, other} <= row.timings.keys():
                part = ratio(row.timings[other], row.timings[ours])
                if part.p50 < 1:
                    found.append(
                        Slower(row.case.name, row.case.title, row.shape, ours, other, part)
                    )

    def order(item: Slower) -> tuple[bool, float]:
        same_form = item.ours.replace("fastprob", "upstream") == item.other
        return not same_form, item.ratio.p50

    return sorted(found, key=order)


_FORMS = (" compiled", " reduce-overhead", " graph")


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


def judge(rows: list[Row], device: str = "cpu") -> list[Judged]:
    """Compares the rows with the targets that name them."""
    judged = []
    for target in TARGETS:
        for row in rows:
            both = {target.numerator, target.denominator} <= row.timings.keys()
            here = target.device == device and row.case.name == target.case
            if here and both and row.shape in target.bounds:
                quotient = ratio(row.timings[target.numerator], row.timings[target.denominator])
                judged.append(Judged(target, row.shape, row, quotient))
    return judged


def print_slower(console: Any, found: list[Slower]) -> None:
    """Prints where fastprob is slower than another provider."""
    if not found:
        console.print("fastprob is not slower than any provider in any case.")
        return
    table = make_table(
        "Where fastprob is slower", ("case", "shape", "fastprob", "than"), ("ratio", "p20 … p80")
    )
    for item in found:
        between = f"{item.ratio.p20:.2f} … {item.ratio.p80:.2f}"
        shape = _times(item.shape)
        table.add_row(item.title, shape, item.ours, item.other, f"{item.ratio.p50:.2f}", between)
    console.print(table)


def print_targets(console: Any, judged: list[Judged]) -> None:
    """Prints the table of targets."""
    names = ("first, µs", "second, µs", "ratio", "p20 … p80", "target", "")
    table = make_table("Targets", ("comparison", "shape"), names)
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


_SHORT = {
    "upstream compiled": "compiled",
    "upstream reduce-overhead": "red.-ov.",
    "upstream graph": "graph",
    "fastprob compiled": "compiled",
    "fastprob reduce-overhead": "red.-ov.",
    "fastprob graph": "graph",
    "fastprob exported": "exported",
}


def print_information(console: Any, rows: list[Row]) -> None:
    """Prints every case; those where fastprob is not the faster of the two come first."""
    seen = {name for row in rows for name in (*row.timings, *row.refused)}
    names = [name for name in providers.NAMES if name in seen or name in providers.SIDES]
    headers = (*(_SHORT.get(name, name) for name in names), "upstream ÷ fastprob")
    table = make_table("All cases", ("case", "shape"), headers)

    def speedup(row: Row) -> float:
        if {"upstream", "fastprob"} <= row.timings.keys():
            return ratio(row.timings["upstream"], row.timings["fastprob"]).p50
        return math.nan

    for row in sorted(rows, key=lambda row: not speedup(row) <= 1):
        gain = speedup(row)
        cells = [
            "[red]wrong[/]"
            if name in row.refused
            else _us(row.timings[name].quantiles.p50)
            if name in row.timings
            else ""
            for name in names
        ]
        shown = "" if math.isnan(gain) else f"[{'green' if gain > 1 else 'red'}]{gain:.2f}[/]"
        table.add_row(row.case.title, _times(row.shape), *cells, shown)
    console.print(table)


def print_device(console: Any, rows: list[Row]) -> None:
    """Prints, for a GPU, what the host takes until a call returns, and what its kernels take."""
    table = make_table(
        "Host and device, µs a call", ("case", "shape", "provider"), ("host", "device")
    )
    for row in rows:
        for name, timing in row.timings.items():
            host, device = Quantiles.of(timing.host_us).p50, Quantiles.of(timing.device_us).p50
            table.add_row(row.case.title, _times(row.shape), name, _us(host), _us(device))
    console.print(table)


def as_json(rows: list[Row], judged: list[Judged], device: str = "cpu") -> dict[str, Any]:
    """Returns everything that was measured, refusals included."""
    return {
        "environment": results.environment(device),
        "unit": "microseconds of CPU time per call"
        if device == "cpu"
        else "microseconds per call at the clock, and of the host and the device apart",
        "slower": [
            {
                "case": item.case,
                "shape": list(item.shape),
                "fastprob": item.ours,
                "other": item.other,
                "ratio": item.ratio.as_dict(),
            }
            for item in slower(rows)
        ],
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
                "providers": {name: timing.as_dict() for name, timing in row.timings.items()},
                "ratios_to_fastprob": {
                    name: ratio(timing, row.timings["fastprob"]).as_dict()
                    for name, timing in row.timings.items()
                    if "fastprob" in row.timings and name != "fastprob"
                },
                # Of the same form: upstream compiled ÷ fastprob compiled, and so on.
                "upstream_to_fastprob": {
                    form.strip(): ratio(
                        row.timings[f"upstream{form}"], row.timings[f"fastprob{form}"]
                    ).as_dict()
                    for form in _FORMS
                    if {f"upstream{form}", f"fastprob{form}"} <= row.timings.keys()
                },
                "refused": row.refused,
                "missing": row.missing,
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
