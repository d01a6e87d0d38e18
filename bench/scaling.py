"""``python -m bench scaling``: cost over the batch size, and over the width of a row.

Upstream beside fastprob in eager mode, and the memory roof: a copy of the bytes that a call must
read and write, timed in the same rounds. On a GPU upstream compiled and fastprob's graph as well.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
# Rows of 8 numbers, 1 to 4M, and 256 rows of 1 to 32,768; that is a large vocabulary of actions.
ROWS = tuple(4**n for n in range(12))
WIDTHS = tuple(8**n for n in range(6))
WIDTH, HEIGHT = 8, 256
# On a CPU, where a point of 4M rows takes half a minute: every second size, and the largest.
CPU_ROWS = (*ROWS[::2], ROWS[-1])
QUICK_ROWS, QUICK_WIDTHS = (1, 256), (1, 64)
BUDGET_S = 0.3
# Small points come first; one that would begin later than this is left out, and said.
LIMIT_S = 400.0
# A provider and its check in float64 hold at most so many times the bytes of one parameter: 36 were
# seen, for 4.9 GB at 4M x 8.
HELD = 40


@dataclass(frozen=True)
class Point:
    """The timings at one shape, who was wrong, and who is missing and why."""

    family: str
    axis: str
    shape: Shape
    timings: dict[str, Timings]
    refused: dict[str, str]
    missing: dict[str, str]

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
    made: dict[Any, Point] = {}
    order = list(plan(device, quick))
    todo = sorted(order, key=lambda item: item[2][0] * item[2][1])
    begin = time.perf_counter()
    with make_progress(console) as progress:
        task = progress.add_task("scaling", total=len(todo))
        for i, (family, axis, shape) in enumerate(todo):
            if time.perf_counter() - begin > LIMIT_S:
                left = ", ".join(f"{name} {s[0]}x{s[1]}" for name, _, s in todo[i:])
                console.print(f"left out after {LIMIT_S:.0f} s: {left}")
                break
            progress.update(task, description=f"{family} {shape[0]}x{shape[1]}")
            made[todo[i]] = _measure(family, axis, shape, device, quick, threads)
            progress.advance(task)
    points = [made[item] for item in order if item in made]
    print_table(console, points)
    refused = [(p, why) for p in points for why in p.refused.values()]
    for point in points:
        at = f"{point.family} {point.shape[0]}x{point.shape[1]}"
        for name, why in point.missing.items():
            console.print(f"not timed: {at}, {name}: {why}")
        for why in point.refused.values():
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
    names = list(providers.SIDES)
    if device != "cpu":
        names += ["upstream compiled", "fastprob graph"]
    reason = too_large(shape, free_bytes(device))
    if reason is not None:
        return Point(family, axis, shape, {}, {}, dict.fromkeys(names, reason))
    sides = {side: implementation(side) for side in providers.SIDES}
    problem = sampling(FAMILIES[family])(sides, shape, device)
    # Once for both: the reference in float64 takes 5 s at 4M x 8.
    problem = replace(problem, expected=functools.cache(problem.expected))
    providers.fresh_compiler()
    calls: dict[str, Any] = {}
    refused, missing, written = {}, {}, 0
    with torch.no_grad():
        for name in names:
            try:
                provider = problem.makers[name]()
                verify(problem, provider, name)
            except WrongResult as error:
                refused[name] = str(error)
                continue
            except (providers.Missing, RuntimeError, MemoryError) as error:
                # torch's errors of memory are RuntimeErrors.
                missing[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
                continue
            out = provider.read(provider.call())
            written = sum(value.numel() * value.element_size() for value in out.values())
            if name not in providers.SIDES:
                providers.warm_up(provider)
            calls[name] = provider.call
        # The references are held no longer: two of them are 0.6 GB at 4M x 8.
        problem = replace(problem, expected=lambda seed: {})
        calls[providers.ROOF] = providers.copy_roof(problem.moved + written, device)
        timings = interleave(
            calls,
            budget_s=BUDGET_S / (10 if quick else 1),
            min_rounds=5,
            meter=CpuMeter(clock_of(threads)) if device == "cpu" else CudaMeter(),
        )
    return Point(family, axis, shape, timings, refused, missing)


def too_large(shape: Shape, free: float) -> str | None:
    """Why a shape does not fit into so many bytes, None where it does."""
    need = HELD * 4 * shape[0] * shape[1]
    if need <= free:
        return None
    return f"needs about {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"


def free_bytes(device: str) -> float:
    """The memory that is free on a device; infinite where the system does not say."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * float(kilobytes)


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
                "missing": point.missing,
            }
            for point in points
        ],
    }
