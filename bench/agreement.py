"""When do two actors agree? Rules for the first batch and for the final returns.

First batch. On CPU in eager mode both actors draw the same noise, and differ by rounding only:
upstream rounds ``eps * scale`` and then the sum, ``addcmul`` rounds once. The first step, where
both see the same observations, is held to 2 units in the last place of the largest term. From
there on the pendulum itself amplifies the difference (it is pushed about an unstable equilibrium,
which parts two neighbours at up to sqrt(3 g / 2 l) = 3.9 per second, over 10 seconds), and no fixed
tolerance follows from the arithmetic. It is measured instead: upstream is rolled out again with
each action nudged by one unit in the last place at random (the rounding twin). The actors agree
where fastprob's batch stays within 10 times the twin's distance. Other noise would differ by the
size of an action, about 1, at the first step already.

Final returns. Two runs that part by rounding end as differently as two seeds do, so the means over
the seeds may differ by the spread of the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
TWIN_FACTOR = 10.0
# The mean of 96 episodes whose returns deviate by 100 each has a standard error of 10; the
# difference of two one of 14. Three seeds may, by luck, spread less than that.
FLOOR = 14.0


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check, with the sentence that is printed and stored."""

    name: str
    passed: bool
    detail: str


def rounding_twin(seed: int) -> Callable[[TensorDictBase], None]:
    """Returns a nudge of one unit in the last place, up or down by a generator of its own."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(tensordict: TensorDictBase) -> None:
        action = tensordict.get("action")
        up = torch.rand(action.shape, generator=generator) < 0.5
        target = torch.where(up, math.inf, -math.inf).to(action.dtype)
        tensordict.set("action", torch.nextafter(action, target))

    return nudge


def distance(a: TensorDictBase, b: TensorDictBase) -> dict[str, float]:
    """The largest absolute difference of each entry that both actors' batches carry."""
    keys = ("action", "action_log_prob", "observation", ("next", "reward"))
    return {
        key if isinstance(key, str) else ".".join(key): _gap(a.get(key), b.get(key)) for key in keys
    }


def _gap(a: Tensor, b: Tensor) -> float:
    gap = (a.double() - b.double()).abs().max().item()
    return math.inf if math.isnan(gap) else gap


def check_first_step(upstream: TensorDictBase, other: TensorDictBase) -> Verdict:
    """Holds the actions of the first step, [envs, action], to 2 units in the last place."""
    mine, theirs = upstream[:, 0], other[:, 0]
    same_input = torch.equal(mine.get("observation"), theirs.get("observation"))
    a, b, loc = (x.double() for x in (mine["action"], theirs["action"], mine["loc"]))
    # The terms of the sum are loc and eps * scale; the second is action - loc.
    size = torch.stack([a.abs(), loc.abs(), (a - loc).abs()]).amax(0)
    ulps = ((a - b).abs() / (EPS * size)).max().item()
    return Verdict(
        "first step",
        same_input and ulps <= 2,
        f"actions within {ulps:.2f} units in the last place (allowed 2)"
        + ("" if same_input else "; the observations differ"),
    )


def check_first_batch(
    upstream: TensorDictBase, other: TensorDictBase, twin: TensorDictBase
) -> Verdict:
    """Holds the whole first batch to ``TWIN_FACTOR`` times the rounding twin's distance."""
    gaps, allowed = distance(upstream, other), distance(upstream, twin)
    # The twin's log-probability is computed as upstream's, from (x - loc) / scale; fastprob's
    # from the noise. That alone is a few EPS of its size.
    sizes = distance(upstream, upstream.apply(torch.zeros_like))
    passed = all(
        gaps[key] <= max(TWIN_FACTOR * allowed[key], 16 * EPS * max(1.0, sizes[key]))
        for key in gaps
    )
    parts = [f"{key} {gaps[key]:.1e} (twin {allowed[key]:.1e})" for key in gaps]
    return Verdict("first batch", passed, "largest differences: " + ", ".join(parts))


def check_returns(upstream: Sequence[float], other: Sequence[float]) -> Verdict:
    """Compares the mean final returns with the spread of the seeds.

    The rule: the means differ by at most twice the pooled standard deviation of single runs
    over seeds, or twice ``FLOOR`` where that is larger.
    """
    difference = statistics.mean(other) - statistics.mean(upstream)
    pooled = math.sqrt((statistics.variance(upstream) + statistics.variance(other)) / 2)
    allowed = 2 * max(pooled, FLOOR)
    return Verdict(
        "final returns",
        abs(difference) <= allowed,
        f"means differ by {difference:+.1f}; allowed ±{allowed:.1f}: twice the spread of seeds"
        f" ({pooled:.1f}), or twice what chance does to 96 episodes ({FLOOR:g})",
    )


def check_learning(returns: Sequence[Sequence[float]], gain: float = 700.0) -> Verdict:
    """Demands that every run ends far above where it began.

    A policy that does nothing stays near -1200; the spread of an iteration's mean is about 60.
    """
    gains = [final_return(run) - run[0] for run in returns]
    return Verdict(
        "learning",
        min(gains) >= gain,
        f"every run gained at least {min(gains):.0f} (demanded {gain:.0f})",
    )


def final_return(returns: Sequence[float]) -> float:
    """The mean of the last quarter of the iterations."""
    last = max(1, len(returns) // 4)
    return statistics.mean(returns[-last:])
