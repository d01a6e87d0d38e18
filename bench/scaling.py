"""``python -m bench scaling``: cost over the batch size, and over the width of a row.

Upstream beside fastprob in eager mode, and the memory roof: a copy of the bytes that a call must
read and write. On a GPU upstream compiled and fastprob's graph as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import plot, providers, results
from bench.calls import clock_of
from bench.cases import FAMILIES
from bench.console import make_console, make_progress, make_table
from bench.gate import WrongResult, verify
from bench.implementations import implementation
from bench.problems import Shape, sampling
from bench.timing import CpuMeter, CudaMeter, Timings, interleave

FAMILY_NAMES = ("normal", "tanh_normal", "categorical")
# Rows of 8 numbers, and 256 rows of so many; a row of 32,768 is a large vocabulary of actions.
ROWS = tuple(4**n for n in range(12))
WIDTHS = tuple(8**n for n in range(6))
WIDTH, HEIGHT = 8, 256
# On a CPU: upstream's TanhNormal takes 0.4 s at 1M x 8, and a quarter of an hour at 4M in all.
CPU_ROWS = ROWS[:-1:2]
QUICK_ROWS, QUICK_WIDTHS = (1, 256), (1, 64)
BUDGET_S = 0.3


@dataclass(frozen=True)
class Point:
    """The timings at one shape."""

    family: str
    axis: str
    shape: Shape
    timings: dict[str, Timings]
    refused: dict[str, str]

    @property
    def at(self) -> int:
        """Where on the axis."""
        return self.shape[0 if self.axis == "rows" else 1]


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where a provider's result was wrong, else 0."""
    device = results.pick_device(args.device)
    if device is None:
        print("--device cuda: no GPU here")
        return 2
    torch.set_num_threads(args.threads)
    folder = args.out or (None if args.quick else results.default_folder(device))
    return report(device, args.quick, args.threads, folder)


def plan(device: str, quick: bool) -> Iterator[tuple[str, str, Shape]]:
    """Yields family, axis and shape of each point."""
    rows = QUICK_ROWS if quick else CPU_ROWS if device == "cpu" else ROWS
    for family in FAMILY_NAMES:
        for count in rows:
            yield family, "rows", (count, WIDTH)
        for width in QUICK_WIDTHS if quick else WIDTHS:
            # A choice among one is none: upstream's own draw is the only thing that could differ.
            if (family, width) != ("categorical", 1):
                yield family, "width", (HEIGHT, width)


def report(device: str, quick: bool, threads: int, folder: Path | None) -> int:
    """Measures, prints the table, and writes ``scaling.json`` and ``scaling.png``."""
    console = make_console()
    points = []
    todo = list(plan(device, quick))
    with make_progress(console) as progress:
        task = progress.add_task("scaling", total=len(todo))
        for family, axis, shape in todo:
            progress.update(task, description=f"{family} {shape[0]}x{shape[1]}")
            points.append(_measure(family, axis, shape, device, quick, threads))
            progress.advance(task)
    print_table(console, points)
    refused = [(p, why) for p in points for why in p.refused.values()]
    for point, why in refused:
        at = f"{point.family} {point.shape[0]}x{point.shape[1]}"
        console.print(f"[red]wrong result, not timed:[/] {at}: {why}")
    if folder is not None:
        payload = as_json(points, device)
        console.print(f"written: {results.shown(results.write(folder / 'scaling.json', payload))}")
        try:
            shown = plot.scaling_curves(folder / "scaling.png", payload["points"])
        except ModuleNotFoundError as error:
            console.print(f"no plot: {error}")
        else:
            console.print(f"written: {results.shown(shown)}")
    return 1 if refused else 0


def _measure(family: str, axis: str, shape: Shape, device: str, quick: bool, threads: int) -> Point:
    sides = {side: implementation(side) for side in providers.SIDES}
    problem = sampling(FAMILIES[family])(sides, shape, device)
    names = list(providers.SIDES)
    if device != "cpu":
        names += ["upstream compiled", "fastprob graph"]
    providers.fresh_compiler()
    calls, refused, written = {}, {}, 0
    with torch.no_grad():
        for name in names:
            try:
                provider = problem.makers[name]()
                verify(problem, provider, name)
            except WrongResult as error:
                refused[name] = str(error)
                continue
            except (providers.Missing, RuntimeError):
                # Said by `calls`; here a curve is missing.
                continue
            out = provider.read(provider.call())
            written = sum(value.numel() * value.element_size() for value in out.values())
            if name not in providers.SIDES:
                providers.warm_up(provider)
            calls[name] = provider.call
        calls[providers.ROOF] = providers.copy_roof(problem.moved + written, device)
        timings = interleave(
            calls,
            budget_s=BUDGET_S / (10 if quick else 1),
            min_rounds=5,
            meter=CpuMeter(clock_of(threads)) if device == "cpu" else CudaMeter(),
        )
    return Point(family, axis, shape, timings, refused)


def print_table(console: Any, points: list[Point]) -> None:
    """Prints the p50 of each provider at each point."""
    names = [n for n in providers.NAMES if any(n in point.timings for point in points)]
    table = make_table(
        "µs a call, random value and score", ("family", "shape"), (*names, "upstream ÷ fastprob")
    )
    for point in points:
        p50 = {name: timing.quantiles.p50 for name, timing in point.timings.items()}
        cells = [f"{p50[name]:.1f}" if name in p50 else "" for name in names]
        both = set(providers.SIDES) <= p50.keys()
        cells.append(f"{p50['upstream'] / p50['fastprob']:.2f}" if both else "")
        table.add_row(point.family, f"{point.shape[0]}x{point.shape[1]}", *cells)
    console.print(table)


def as_json(points: list[Point], device: str) -> dict[str, Any]:
    """Returns everything that was measured."""
    return {
        "environment": results.environment(device),
        "unit": "microseconds per call" + (" of CPU time" if device == "cpu" else ""),
        "points": [
            {
                "family": point.family,
                "axis": point.axis,
                "shape": list(point.shape),
                "at": point.at,
                "providers": {name: timing.as_dict() for name, timing in point.timings.items()},
                "refused": point.refused,
            }
            for point in points
        ],
    }
