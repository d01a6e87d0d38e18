"""``python -m bench loops``: the three loops, upstream beside fastprob, seed by seed.

Eager first, then with policies and losses compiled, upstream compiled beside fastprob compiled.
Both sides of a seed take turns, iteration by iteration, so that they meet the same machine; each
keeps its own state of torch's generator. On a CPU in eager mode both draw the same noise, so the
first iterations must agree; no speed is printed for a loop where they do not.

``--mujoco`` runs PPO on HalfCheetah-v5 for a few iterations in their place, for its speed: it needs
``gymnasium[mujoco]``, and has a result file of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import plot, results
from bench.console import make_console, make_progress, make_table
from bench.loops import ppo_continuous, ppo_discrete, sac
from bench.loops.common import NO_GRAPHS, Flags, Run
from bench.timing import Quantiles

SIDES = ("upstream", "fastprob")
# Compiling takes half a minute a run, and speed differs less between seeds than returns do.
SEEDS, COMPILED_SEEDS = 3, 1
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
        same: how far the first mean returns may be apart where both sides draw the same noise,
            as a part of them; None where rounding alone moves them by as much as other noise does.
    """

    name: str
    train: Callable[[Any, Flags], Iterator[Run]]
    settings: Any
    goal: float
    short: dict[str, Any]
    same: float | None = SAME

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


# Not for its return, which takes a million steps to learn. An episode is chaotic: the first ones of
# the two sides, of 1,000 steps with the same noise, end 4% to 7% apart.
MUJOCO: dict[str, Loop] = {
    name: Loop(
        name,
        ppo_continuous.train,
        replace(ppo_continuous.CHEETAH, distribution=distribution, iterations=8, episodes=4),
        -math.inf,
        {**_PPO, "envs": 2, "minibatch": 256},
        same=None,
    )
    for distribution in ppo_continuous.DISTRIBUTIONS
    for name in [f"halfcheetah_{distribution.lower()}"]
}


@dataclass
class Compared:
    """One loop's runs in one form, by side, seed by seed.

    Attributes:
        loop: the loop.
        flags: how it was run; side and seed are those of each run.
        runs: by side.
        problems: the checks that were not passed.
        missing: the sides that did not run, and why.
    """

    loop: Loop
    flags: Flags
    runs: dict[str, list[Run]]
    problems: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def rate(self, side: str, part: str) -> Quantiles:
        """Steps per second of a part, over seeds; of CPU time on a CPU."""
        return Quantiles.of([_rates(run)[part] for run in self.runs[side]])

    @property
    def sides(self) -> list[str]:
        """Those that ran."""
        return [side for side in SIDES if side not in self.missing]


def _rates(run: Run) -> dict[str, float]:
    return run.cpu_steps_per_second if run.flags.device == "cpu" else run.steps_per_second


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where sides disagree or a goal is missed, else 0."""
    known = MUJOCO if args.mujoco else LOOPS
    unknown = sorted(set(args.loop or ()) - known.keys())
    if unknown:
        print(f"unknown loop {', '.join(unknown)}; expected one of {', '.join(known)}")
        return 2
    missing = [name for name in ("mujoco", "imageio") if importlib.util.find_spec(name) is None]
    if args.mujoco and missing:
        print(f"--mujoco needs {' and '.join(missing)}: pip install 'gymnasium[mujoco]'")
        return 2
    device = results.pick_device(args.device)
    if device is None:
        print("--device cuda: no GPU here")
        return 2
    if args.cudagraphs and device == "cpu":
        print(NO_GRAPHS.format(device=device))
        return 2
    torch.set_num_threads(args.threads)
    loops = [known[name] for name in args.loop or known]
    cut = args.quick or args.loop or args.seeds or args.compile or args.eager or args.cudagraphs
    folder = args.out or (None if cut else results.default_folder(device))
    if args.quick:
        loops = [loop.shortened() for loop in loops]
    forms = []
    for flags, seeds in (
        (Flags(cudagraphs=args.cudagraphs, device=device), SEEDS),
        (Flags(compile=True, cudagraphs=args.cudagraphs, device=device), COMPILED_SEEDS),
    ):
        # Alone where it is asked for; without --quick and --cudagraphs both.
        both = not (args.quick or args.cudagraphs or args.eager or args.compile or args.mujoco)
        if both or flags.compile == args.compile:
            count = args.seeds or (1 if args.quick or args.mujoco else seeds)
            forms.append((flags, range(args.seed, args.seed + count)))
    return report(loops, forms, folder, "loops-mujoco" if args.mujoco else "loops")


def report(
    loops: list[Loop],
    forms: Sequence[tuple[Flags, Sequence[int]]],
    folder: Path | None,
    name: str = "loops",
) -> int:
    """Runs the loops, prints the tables, and writes a JSON and a PNG.

    Args:
        loops: each is run in every form.
        forms: flags, and the seeds to run with them.
        folder: of the files; None for none.
        name: of the files.

    Returns:
        1 where a check failed, else 0.
    """
    console = make_console()
    compared = []
    with make_progress(console) as progress:
        iterations = sum(loop.settings.iterations + 1 for loop in loops)
        task = progress.add_task("loops", total=2 * iterations * sum(len(s) for _, s in forms))
        for flags, seeds in forms:
            console.print(
                f"Training loops, {len(seeds)} seed(s) a side, {flags.form}, {flags.device}"
            )
            for loop in loops:
                compared.append(_compare(loop, seeds, flags, progress, task))
                for runs in compared[-1].runs.values():
                    for done in runs:
                        console.print(str(done))
                for side, why in compared[-1].missing.items():
                    console.print(f"not run: {loop.name}, {side}, {flags.form}: {why}")
    for flags, _ in forms:
        print_table(console, [item for item in compared if item.flags == flags])
    problems = [f"{c.loop.name}, {c.flags.form}: {p}" for c in compared for p in c.problems]
    for problem in problems:
        console.print(f"[red]FAILED[/] {problem}")
    if folder is not None:
        path = results.write(folder / f"{name}.json", as_json(compared, forms[0][0].device))
        console.print(f"written: {results.shown(path)}")
        curves = {_title(c): c for c in compared}
        try:
            shown = plot.loop_curves(
                folder / f"{name}.png",
                {
                    title: {
                        side: [(r.steps, r.returns) for r in runs] for side, runs in c.runs.items()
                    }
                    for title, c in curves.items()
                },
                {title: c.loop.goal for title, c in curves.items()},
            )
        except ModuleNotFoundError as error:
            console.print(f"no curves: {error}")
        else:
            console.print(f"written: {results.shown(shown)}")
    return 1 if problems else 0


def _title(item: Compared) -> str:
    return item.loop.name if item.flags.form == "eager" else f"{item.loop.name}, {item.flags.form}"


def _compare(loop: Loop, seeds: Sequence[int], flags: Flags, progress: Any, task: Any) -> Compared:
    compared = Compared(loop, flags, {side: [] for side in SIDES})
    for seed in seeds:
        if flags.compile:
            # All runs share one code object, recompiled 8 times at most.
            torch.compiler.reset()
        steps, last, state = {}, {}, {}
        spent = dict.fromkeys(SIDES, 0.0)
        for side in compared.sides:
            steps[side] = loop.train(loop.settings, replace(flags, impl=side, seed=seed))
        turn, active = 0, set(compared.sides)
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
                except Exception as error:
                    # What a compiler or a capture gives up on is said, and the other side goes on.
                    if flags.form == "eager":
                        raise
                    compared.missing[side] = _why(error)
                    compared.runs[side].clear()
                    last.pop(side, None)
                    active.discard(side)
                    continue
                spent[side] += time.perf_counter() - begin
                state[side] = _get_rng(flags.device)
                shown = f"{last[side].returns[-1]:.0f}" if last[side].returns else "..."
                text = f"{loop.name}, seed {seed}, {side}: {shown}"
                progress.update(task, advance=1, description=text)
            turn += 1
        for side, run in last.items():
            # Without the other side's turns.
            run.total_seconds = spent[side]
            compared.runs[side].append(run)
        compared.problems += check(loop, last, flags)
    if "fastprob" in compared.missing:
        compared.problems.append(f"fastprob did not run: {compared.missing['fastprob']}")
    return compared


def _why(error: Exception) -> str:
    """One line: Dynamo's messages have a dozen, of which the one that says why is in the middle."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("Explanation: ")), "".join(lines[:1]))
    return f"{type(error).__name__}: {said.removeprefix('Explanation: ')}"[:400]


def _get_rng(device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None


def _set_rng(state: tuple[torch.Tensor, torch.Tensor | None], device: str) -> None:
    torch.set_rng_state(state[0])
    if device == "cuda":
        torch.cuda.set_rng_state(state[1])


def check(loop: Loop, runs: dict[str, Run], flags: Flags) -> list[str]:
    """What is wrong with the runs of a seed.

    Their first mean returns must agree where both draw the same noise, and each must reach the
    goal of the loop.
    """
    problems = []
    same_noise = flags.device == "cpu" and not flags.compile and loop.same is not None
    if same_noise and len(runs) == len(SIDES):
        first = [runs[side].returns[0] for side in SIDES]
        if not math.isclose(*first, rel_tol=loop.same):
            problems.append(
                f"seed {runs[SIDES[0]].flags.seed}: first mean returns {first[0]:.2f} upstream and"
                f" {first[1]:.2f} with fastprob; the same noise was drawn"
            )
    for side, run in runs.items():
        if not run.final >= loop.goal:
            problems.append(
                f"{side}, seed {run.flags.seed}: return {run.final:.0f}; the goal is {loop.goal:g}"
            )
    return problems


def print_table(console: Any, compared: list[Compared]) -> None:
    """Prints speeds and returns of the loops in one form."""
    form = compared[0].flags.form
    columns = ("upstream", "fastprob", "fastprob ÷ upstream")
    table = make_table(f"Steps per second, {form}, median over seeds", ("loop", "part"), columns)
    for item in compared:
        if any("same noise" in problem for problem in item.problems):
            table.add_row(item.loop.name, "[red]wrong[/]", "", "", "")
            continue
        for part in ("collection", "update"):
            rates = {side: item.rate(side, part).p50 for side in item.sides}
            cells = [f"{rates[side]:,.0f}" if side in rates else "" for side in SIDES]
            both = len(rates) == len(SIDES)
            cells.append(f"{rates['fastprob'] / rates['upstream']:.2f}" if both else "")
            table.add_row(item.loop.name, part, *cells)
    console.print(table)
    table = make_table(f"Returns of the seeds, {form}", ("loop",), (*SIDES, "goal"))
    for item in compared:
        finals = [" ".join(f"{run.final:.0f}" for run in item.runs[side]) for side in SIDES]
        goal = f"≥ {item.loop.goal:g}" if math.isfinite(item.loop.goal) else ""
        table.add_row(item.loop.name, *finals, goal)
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
                "form": item.flags.form,
                "env": item.loop.settings.env,
                "goal": item.loop.goal if math.isfinite(item.loop.goal) else None,
                "problems": item.problems,
                "missing": item.missing,
                "steps_per_second": {
                    side: {
                        part: item.rate(side, part).as_dict(1)
                        for part in _rates(item.runs[side][0])
                    }
                    for side in item.sides
                },
                "runs": {side: [r.as_dict() for r in runs] for side, runs in item.runs.items()},
            }
            for item in compared
        ],
    }
