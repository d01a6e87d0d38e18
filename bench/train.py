"""The main job: PPO on Pendulum-v1 with upstream's actor and with fastprob's, seed by seed."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tensordict.nn import set_composite_lp_aggregate

from bench import results
from bench.agreement import (
    Verdict,
    check_first_batch,
    check_first_step,
    check_learning,
    check_returns,
    distance,
    final_return,
    rounding_twin,
)
from bench.console import make_console, make_progress, make_table
from bench.implementations import Implementation, implementation
from bench.ppo import Settings, Trainer, first_batch

QUICK = Settings(envs=8, iterations=2, epochs=2)
SEEDS = 3
# The job ends within 4 minutes also on a machine that others are using: a third seed is left out
# where it would end later than this. Two are the least that have a spread. A run takes 16 s of
# CPU time here, and 51 s have been seen at the clock.
LIMIT_S = 225.0


def run(args: argparse.Namespace) -> int:
    """Runs the main job; returns 1 where a check failed, else 0."""
    torch.set_num_threads(args.threads)
    console = make_console()
    begin = time.perf_counter()
    settings = QUICK if args.quick else Settings()
    count = args.seeds or (1 if args.quick else SEEDS)
    seeds = range(args.seed, args.seed + count)
    sides = {
        "upstream": implementation("upstream"),
        "fastprob": implementation("upstream" if args.null else "fastprob"),
    }
    console.print(
        f"PPO on Pendulum-v1: {settings.envs} environments x {settings.steps} steps x"
        f" {settings.iterations} iterations, {count} seed(s) per actor, {args.threads} thread(s)"
    )
    deadline = begin + LIMIT_S if args.seeds is None else math.inf
    # Set explicitly: TorchRL's losses and fastprob then both name the entry "action_log_prob".
    with set_composite_lp_aggregate(False):
        runs, twin = _run_all(sides, seeds, settings, console, deadline)
    seeds = seeds[: len(runs["upstream"])]
    verdicts = judge(runs, twin, quick=args.quick)
    total = time.perf_counter() - begin
    _print(console, runs, verdicts, total)
    folder = args.out
    if folder is None and not (args.quick or args.null or args.seeds):
        folder = results.default_folder()
    if folder is not None:
        payload = as_json(runs, verdicts, seeds, settings, total, distance_of(runs, twin))
        console.print(f"written: {results.shown(results.write(folder / 'train.json', payload))}")
        from bench.plot import learning_curves

        returns = {side: [run.returns for run in per_seed] for side, per_seed in runs.items()}
        frames = settings.envs * settings.steps
        path = learning_curves(folder / "train.png", returns, frames)
        console.print(f"written: {results.shown(path)}")
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _run_all(
    sides: dict[str, Implementation],
    seeds: range,
    settings: Settings,
    console: Any,
    deadline: float,
) -> tuple[dict[str, list[Trainer]], Any]:
    """Trains with both sides, seed by seed, and collects the rounding twin's batch.

    The two sides take turns, iteration by iteration, so that both meet the same machine.
    """
    runs: dict[str, list[Trainer]] = {side: [] for side in sides}
    with make_progress(console) as progress:
        task = progress.add_task("warm-up", total=len(sides) * len(seeds) * settings.iterations)
        # The first call of anything imports and fills caches: neither side pays for it below.
        for impl in sides.values():
            first_batch(impl, seeds[0], settings)
        twin = first_batch(sides["upstream"], seeds[0], settings, rounding_twin(seeds[0]))
        longest = 0.0
        for seed in seeds:
            begin = time.perf_counter()
            if len(runs["upstream"]) >= 2 and begin + longest > deadline:
                console.print(f"seed {seed} left out: it would end after 4 minutes, today, here")
                break
            pair = {side: Trainer(impl, seed, settings) for side, impl in sides.items()}
            for iteration in range(settings.iterations):
                # The second in a turn finds warmer caches, so they swap.
                for side in sorted(pair, reverse=bool(iteration % 2)):
                    value = pair[side].iterate()
                    text = f"seed {seed}, {side}: return {value:7.0f}"
                    progress.update(task, advance=1, description=text)
            for side, done in pair.items():
                done.env.close()
                runs[side].append(done)
                shown = " ".join(f"{value:.0f}" for value in done.returns)
                console.print(f"seed {seed} {side:8}: {shown}")
            longest = max(longest, time.perf_counter() - begin)
    return runs, twin


def judge(runs: dict[str, list[Trainer]], twin: Any, *, quick: bool) -> list[Verdict]:
    """Applies every rule that the length of the job allows."""
    ours, theirs = runs["fastprob"], runs["upstream"]
    verdicts = [
        check_first_step(theirs[0].batch, ours[0].batch),
        check_first_batch(theirs[0].batch, ours[0].batch, twin),
    ]
    if not quick:
        verdicts.append(check_learning([run.returns for run in (*theirs, *ours)]))
        if len(ours) > 1:
            verdicts.append(check_returns(_finals(theirs), _finals(ours)))
    return verdicts


def distance_of(runs: dict[str, list[Trainer]], twin: Any) -> dict[str, dict[str, float]]:
    """The first batch's largest differences, of fastprob and of the rounding twin."""
    upstream = runs["upstream"][0].batch
    return {
        "fastprob": distance(upstream, runs["fastprob"][0].batch),
        "rounding twin": distance(upstream, twin),
    }


def _finals(runs: Sequence[Trainer]) -> list[float]:
    return [final_return(run.returns) for run in runs]


def _seconds(runs: Sequence[Trainer], *parts: str) -> float:
    """Median over seeds of the sum of the named parts; another process may disturb one run."""
    return statistics.median(sum(run.clock.seconds[part] for part in parts) for run in runs)


PARTS = {
    "actor, collecting": ("rollout: actor",),
    "actor, in the loss (forward)": ("update: actor",),
    "actor, both": ("rollout: actor", "update: actor"),
    "in all": ("rollout", "advantage", "update"),
}


def _print(
    console: Any, runs: dict[str, list[Trainer]], verdicts: Sequence[Verdict], total: float
) -> None:
    table = make_table(
        "CPU seconds per run, median over seeds", ("part",), (*runs, "upstream ÷ fastprob")
    )
    for part, names in PARTS.items():
        values = [_seconds(per_seed, *names) for per_seed in runs.values()]
        quotient = f"{values[0] / values[1]:.2f}"
        table.add_row(part, *(f"{value:.2f}" for value in values), quotient)
    console.print(table)
    for side, per_seed in runs.items():
        finals = _finals(per_seed)
        console.print(
            f"{side:8} returns: from {statistics.mean(run.returns[0] for run in per_seed):.0f} to"
            f" {statistics.mean(finals):.0f} (seeds: {', '.join(f'{v:.0f}' for v in finals)})"
        )
    for verdict in verdicts:
        word = "[green]ok[/]    " if verdict.passed else "[red]FAILED[/]"
        console.print(f"{word} {verdict.name}: {verdict.detail}")
    console.print(f"{total:.0f} s at the clock, both actors and all seeds together")


def as_json(
    runs: dict[str, list[Trainer]],
    verdicts: Sequence[Verdict],
    seeds: Sequence[int],
    settings: Settings,
    total: float,
    gaps: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Returns everything that was measured and checked."""
    return {
        "environment": results.environment(),
        "settings": asdict(settings),
        "seeds": list(seeds),
        "total_seconds": round(total, 1),
        "checks": [asdict(verdict) for verdict in verdicts],
        "first_batch_differences": gaps,
        "cpu_seconds_median": {
            side: {part: round(_seconds(per_seed, *names), 3) for part, names in PARTS.items()}
            for side, per_seed in runs.items()
        },
        "runs": {
            side: [
                {
                    "seed": seed,
                    "final_return": round(final_return(run.returns), 1),
                    "returns": [round(value, 1) for value in run.returns],
                    "cpu_seconds": {
                        part: round(value, 3) for part, value in run.clock.seconds.items()
                    },
                }
                for seed, run in zip(seeds, per_seed, strict=True)
            ]
            for side, per_seed in runs.items()
        },
    }
