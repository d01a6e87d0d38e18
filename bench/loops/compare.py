"""``python -m bench loops``: the three loops, upstream beside fastprob, seed by seed.

Both sides of a seed take turns, iteration by iteration, so that they meet the same machine; each
keeps its own state of torch's generator. On a CPU in eager mode both draw the same noise, so the
first iterations must agree; no speed is printed for a loop where they do not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import plot, results
from bench.console import make_console, make_progress, make_table
from bench.loops import ppo_continuous, ppo_discrete, sac
from bench.loops.common import Flags, Run

SIDES = ("upstream", "fastprob")
SEEDS = 3
# Mean returns of the first iteration, same noise: rounding moves an episode's return by 1e-3 of it
# at most, since a pendulum is pushed for 200 steps only; another noise moves it by 1e-1.
SAME = 1e-2


@dataclass(frozen=True)
class Loop:
    """One loop in one variant.

    Attributes:
        name: on the command line and in results.
        train: yields the run after each iteration.
        settings: the hyper-parameters.
        goal: the least mean return of the evaluation.
        short: what ``--quick`` changes in the settings.
    """

    name: str
    train: Callable[[Any, Flags], Iterator[Run]]
    settings: Any
    goal: float
    short: dict[str, Any]

    def shortened(self) -> Loop:
        """The loop as ``--quick`` runs it."""
        return replace(self, settings=replace(self.settings, **self.short), goal=-math.inf)


_PPO = {"iterations": 2, "epochs": 1, "burn_in": 1, "episodes": 2}
LOOPS: dict[str, Loop] = {
    loop.name: loop
    for loop in (
        *(
            Loop(
                f"ppo_{distribution.lower()}",
                ppo_continuous.train,
                ppo_continuous.Settings(distribution=distribution),
                -250.0,
                {**_PPO, "envs": 4, "minibatch": 400},
            )
            for distribution in ppo_continuous.DISTRIBUTIONS
        ),
        *(
            Loop(
                "ppo_masked" if masked else "ppo_categorical",
                ppo_discrete.train,
                ppo_discrete.Settings(masked=masked),
                475.0,
                {**_PPO, "envs": 4, "minibatch": 256},
            )
            for masked in (False, True)
        ),
        Loop(
            "sac",
            sac.train,
            sac.Settings(),
            -250.0,
            {"iterations": 9, "random": 2, "burn_in": 3, "episodes": 2, "updates": 1},
        ),
    )
}


@dataclass
class Compared:
    """One loop's runs, by side, seed by seed, and the checks that they passed or not."""

    loop: Loop
    runs: dict[str, list[Run]]
    problems: list[str]

    def rate(self, side: str, part: str) -> float:
        """Steps per second of a part, median over seeds; of CPU time on a CPU."""
        return statistics.median(_rates(run)[part] for run in self.runs[side])


def _rates(run: Run) -> dict[str, float]:
    return run.cpu_steps_per_second if run.flags.device == "cpu" else run.steps_per_second


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where sides disagree or a goal is missed, else 0."""
    unknown = sorted(set(args.loop or ()) - LOOPS.keys())
    if unknown:
        print(f"unknown loop {', '.join(unknown)}; expected one of {', '.join(LOOPS)}")
        return 2
    device = results.pick_device(args.device)
    if device is None:
        print("--device cuda: no GPU here")
        return 2
    torch.set_num_threads(args.threads)
    loops = [LOOPS[name] for name in args.loop or LOOPS]
    seeds = range(args.seed, args.seed + (args.seeds or (1 if args.quick else SEEDS)))
    flags = Flags(compile=args.compile, cudagraphs=args.cudagraphs, device=device)
    cut = args.quick or args.loop or args.seeds or args.compile or args.cudagraphs
    folder = args.out or (None if cut else results.default_folder(device))
    if args.quick:
        loops = [loop.shortened() for loop in loops]
    return report(loops, seeds, flags, folder)


def report(loops: list[Loop], seeds: Sequence[int], flags: Flags, folder: Path | None) -> int:
    """Runs the loops, prints the table, and writes ``loops.json`` and ``loops.png``."""
    console = make_console()
    how = ["compiled"] * flags.compile + ["CUDA graphs"] * flags.cudagraphs or ["eager"]
    console.print(f"Training loops, {len(seeds)} seed(s) a side, {', '.join(how)}, {flags.device}")
    if flags.cudagraphs and flags.device == "cpu":
        console.print("no GPU: policies and updates run as they are in place of CUDA graphs")
    compared = []
    with make_progress(console) as progress:
        task = progress.add_task(
            "loops",
            total=sum(2 * len(seeds) * (loop.settings.iterations + 1) for loop in loops),
        )
        for loop in loops:
            compared.append(_compare(loop, seeds, flags, progress, task))
            for runs in compared[-1].runs.values():
                for done in runs:
                    console.print(str(done))
    print_table(console, compared)
    problems = [f"{c.loop.name}: {problem}" for c in compared for problem in c.problems]
    for problem in problems:
        console.print(f"[red]FAILED[/] {problem}")
    if folder is not None:
        path = results.write(folder / "loops.json", as_json(compared, flags.device))
        console.print(f"written: {results.shown(path)}")
        try:
            shown = plot.loop_curves(
                folder / "loops.png",
                {
                    c.loop.name: {
                        side: [(r.steps, r.returns) for r in runs] for side, runs in c.runs.items()
                    }
                    for c in compared
                },
                {c.loop.name: c.loop.goal for c in compared},
            )
        except ModuleNotFoundError as error:
            console.print(f"no curves: {error}")
        else:
            console.print(f"written: {results.shown(shown)}")
    return 1 if problems else 0


def _compare(loop: Loop, seeds: Sequence[int], flags: Flags, progress: Any, task: Any) -> Compared:
    compared = Compared(loop, {side: [] for side in SIDES}, [])
    for seed in seeds:
        steps, last, state = {}, {}, {}
        spent = dict.fromkeys(SIDES, 0.0)
        for side in SIDES:
            steps[side] = loop.train(loop.settings, replace(flags, impl=side, seed=seed))
        turn, active = 0, set(SIDES)
        while active:
            # The second in a turn finds warmer caches, so they swap.
            for side in sorted(active, reverse=bool(turn % 2)):
                if side in state:
                    _set_rng(state[side], flags.device)
                begin = time.perf_counter()
                try:
                    last[side] = next(steps[side])
                except StopIteration:
                    active.discard(side)
                    continue
                spent[side] += time.perf_counter() - begin
                state[side] = _get_rng(flags.device)
                shown = f"{last[side].returns[-1]:.0f}" if last[side].returns else "..."
                text = f"{loop.name}, seed {seed}, {side}: {shown}"
                progress.update(task, advance=1, description=text)
            turn += 1
        for side in SIDES:
            # Without the other side's turns.
            last[side].total_seconds = spent[side]
            compared.runs[side].append(last[side])
        compared.problems += check(loop, last, flags)
    return compared


def _get_rng(device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None


def _set_rng(state: tuple[torch.Tensor, torch.Tensor | None], device: str) -> None:
    torch.set_rng_state(state[0])
    if device == "cuda":
        torch.cuda.set_rng_state(state[1])


def check(loop: Loop, runs: dict[str, Run], flags: Flags) -> list[str]:
    """What is wrong with the two runs of a seed.

    Their first mean returns must agree where both draw the same noise, and each must reach the
    goal of the loop.
    """
    problems = []
    same_noise = flags.device == "cpu" and not flags.compile
    first = [runs[side].returns[0] for side in SIDES]
    if same_noise and not math.isclose(*first, rel_tol=SAME):
        problems.append(
            f"seed {runs[SIDES[0]].flags.seed}: first mean returns {first[0]:.2f} upstream and"
            f" {first[1]:.2f} with fastprob; the same noise was drawn"
        )
    for side in SIDES:
        if not runs[side].final >= loop.goal:
            problems.append(
                f"{side}, seed {runs[side].flags.seed}: return {runs[side].final:.0f}; the goal is"
                f" {loop.goal:g}"
            )
    return problems


def print_table(console: Any, compared: list[Compared]) -> None:
    """Prints speeds and returns."""
    columns = ("upstream", "fastprob", "fastprob ÷ upstream")
    table = make_table("Steps per second, median over seeds", ("loop", "part"), columns)
    for item in compared:
        if any("same noise" in problem for problem in item.problems):
            table.add_row(item.loop.name, "[red]wrong[/]", "", "", "")
            continue
        for part in ("collection", "update"):
            rates = [item.rate(side, part) for side in SIDES]
            quotient = f"{rates[1] / rates[0]:.2f}"
            table.add_row(item.loop.name, part, *(f"{rate:,.0f}" for rate in rates), quotient)
    console.print(table)
    table = make_table("Returns of the seeds", ("loop",), (*SIDES, "goal"))
    for item in compared:
        finals = [" ".join(f"{run.final:.0f}" for run in item.runs[side]) for side in SIDES]
        table.add_row(item.loop.name, *finals, f"≥ {item.loop.goal:g}")
    console.print(table)


def as_json(compared: list[Compared], device: str) -> dict[str, Any]:
    """Returns everything that was measured and checked."""
    return {
        "environment": results.environment(device),
        "unit": "steps per second of "
        + ("CPU time; at the clock in the runs" if device == "cpu" else "time at the clock"),
        "loops": [
            {
                "loop": item.loop.name,
                "env": item.loop.settings.env,
                "goal": item.loop.goal if math.isfinite(item.loop.goal) else None,
                "problems": item.problems,
                "steps_per_second": {
                    side: {part: round(item.rate(side, part), 1) for part in _rates(runs[0])}
                    for side, runs in item.runs.items()
                },
                "runs": {side: [r.as_dict() for r in runs] for side, runs in item.runs.items()},
            }
            for item in compared
        ],
    }
