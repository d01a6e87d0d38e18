"""Compiled calls, upstream beside fastprob under ``torch.compile``, and one compiled ahead of time.

What a compiled graph should hold, an operator or what Inductor makes, is timed by
:mod:`bench.opaque`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch import distributions as D

from bench import results
from bench.implementations import NAMES, Implementation, implementation

# Distribution, safe or not, rows, width, and the goal for upstream ÷ fastprob.
CALLS = (
    ("IndependentNormal", False, 16, 8, 1.6),
    ("IndependentNormal", True, 16, 8, 2.5),
    ("TanhNormal", False, 16, 8, 1.6),
    ("IndependentNormal", False, 65536, 16, 1.2),
    ("TanhNormal", False, 65536, 16, 2.0),
)


def run(args: argparse.Namespace) -> int:
    """Times the calls in turns and prints the ratios; returns the exit status, 0."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    D.Distribution.set_default_validate_args(False)
    libraries = {name: implementation(name) for name in NAMES}
    rows: list[dict[str, Any]] = []

    def add(name: str, slow: float, fast: float, goal: float | None) -> None:
        ratio = slow / fast
        rows.append({"case": name, "us": [slow, fast], "ratio": ratio, "goal": goal})
        wanted = "" if goal is None else f"  goal {goal}" + ("" if ratio >= goal else ", MISSED")
        print(f"{name:58}{slow:12.1f}{fast:12.1f}{ratio:8.2f}{wanted}", flush=True)

    print(f"{'CPU time of a call, us':58}{'upstream':>12}{'fastprob':>12}{'ratio':>8}")
    for family, safe, count, width, goal in CALLS if not args.quick else CALLS[:1]:
        torch._dynamo.reset()
        td = _parameters(count, width)
        with torch.no_grad():
            calls = [
                _bound(torch.compile(_module(lib, family, safe, width)), td.copy())
                for lib in libraries.values()
            ]
            upstream, ours = _in_turns(calls, 50 if count == 16 else 1)
        add(f"{'safe ' * safe}{family} {count}x{width}", upstream, ours, goal)
    if not args.quick:
        torch._dynamo.reset()
        upstream, ours = _in_turns([_ppo_step(lib) for lib in libraries.values()], 10)
        add("score, entropy and clipped ratio 4096x8, both passes", upstream, ours, 1.3)
        compiled, exported = _ahead_of_time(libraries["fastprob"])
        add("safe IndependentNormal 16x8: compiled, ahead of time", compiled, exported, 3.0)
    if args.out is not None or not args.quick:
        payload = {"environment": results.environment(), "rows": rows}
        folder = args.out or results.default_folder()
        print(f"written: {results.shown(results.write(folder / 'compiled.json', payload))}")
    return 0


def _parameters(count: int, width: int) -> TensorDict:
    draw = torch.Generator().manual_seed(1)
    loc = torch.randn(count, width, generator=draw)
    scale = torch.rand(count, width, generator=draw) + 0.1
    return TensorDict(loc=loc, scale=scale, batch_size=[count])


def _module(library: Implementation, family: str, safe: bool, width: int) -> Any:
    config: dict[str, Any] = {
        "distribution_class": getattr(library, family),
        "default_interaction_type": "random",
        "return_log_prob": True,
    }
    if not safe:
        return library.ProbabilisticTensorDictModule(["loc", "scale"], ["action"], **config)
    spec = library.specs.Bounded(-1.0, 1.0, shape=(width,))
    return library.SafeProbabilisticModule(["loc", "scale"], ["action"], spec, safe=True, **config)


def _bound(call: Any, *args: Any) -> Callable[[], Any]:
    return lambda: call(*args)


def _in_turns(calls: list[Callable[[], Any]], number: int) -> list[float]:
    """Medians of the CPU time of a call in us, the calls taking turns.

    Over about a second: nine calls of 65536x16 came out at 4.3 or 6.4 ms from run to run, by
    whether their memory was in fresh pages.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
        call()
    for _ in range(200 if number > 1 else 60):
        for call, found in zip(calls, times, strict=True):
            began = time.process_time_ns()
            for _ in range(number):
                call()
            found.append((time.process_time_ns() - began) / number / 1e3)
    return [statistics.median(found) for found in times]


def _ppo_step(library: Implementation) -> Callable[[], Any]:
    module = _module(library, "IndependentNormal", False, 8)
    draw = torch.Generator().manual_seed(2)
    action = torch.randn(4096, 8, generator=draw)
    old, advantage = torch.randn(2, 4096, generator=draw)
    td = _parameters(4096, 8)
    loc, scale = (td[k].clone().requires_grad_() for k in ("loc", "scale"))

    def loss(loc: Tensor, scale: Tensor) -> Tensor:
        dist = module.get_dist(TensorDict(loc=loc, scale=scale, batch_size=[4096]))
        ratio = (dist.log_prob(action) - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
        return -gain - 0.01 * dist.entropy().mean()

    compiled = torch.compile(loss)

    def step() -> None:
        loc.grad = scale.grad = None
        compiled(loc, scale).backward()

    return step


def _ahead_of_time(library: Implementation) -> list[float]:
    from fastprob import export_policy, load_policy

    torch._dynamo.reset()
    module, td = _module(library, "IndependentNormal", True, 8), _parameters(16, 8)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exported = load_policy(export_policy(module, td, "random", Path(folder) / "policy.pt2"))
        compiled = torch.compile(module)
        return _in_turns([_bound(compiled, td.copy()), _bound(exported, td.copy())], 50)
