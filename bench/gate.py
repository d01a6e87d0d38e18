"""The correctness gate: no figure is printed for a provider whose result is wrong.

A provider that draws from torch's generator as eager upstream does is held to the reference's own
draw: same noise, same value, same log-probability. One that draws otherwise (Inductor has its own
normals, a kernel its own stream) is held to the log-probability of the value that it returned, and
its draws to the mean, the mean square and the products of neighbours of the reference's draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.families import Expected

SEEDS = (1, 2)


class WrongResult(AssertionError):
    """A provider's result is not the reference's; its time means nothing."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        call: what is timed; no arguments.
        read: the named results in what ``call`` returned.
        same_draw: whether it consumes torch's generator as eager upstream does.
    """

    call: Callable[[], Any]
    read: Callable[[Any], dict[str, Tensor]]
    same_draw: bool = True


@dataclass(frozen=True)
class Problem:
    """A case at one shape.

    Attributes:
        makers: builds each provider, by name. Building is separate since a compiled provider
            takes seconds.
        expected: the float64 results for a seed.
        rescore: given a provider's own results, what they should be; for providers that draw
            their own noise. None where every provider draws as upstream, or nothing is drawn.
        draw: draws once more from the reference, the rows of both ends only; see ``check_noise``.
        own_score: given a provider's own results, what its log-probability should be; for
            providers that draw as upstream, in place of the score of the reference's draw.
        either_score: given a provider's own results, the exact scores of the values returned. An
            entry that is one of them is as right as the score of the reference's draw.
        grad: whether calls run with autograd on.
        moved: bytes that a call must read at least; what it writes comes on top.
    """

    makers: dict[str, Callable[[], Provider]]
    expected: Callable[[int], dict[str, Expected]]
    rescore: Callable[[dict[str, Tensor]], dict[str, Expected]] | None = None
    own_score: Callable[[dict[str, Tensor]], dict[str, Expected]] | None = None
    either_score: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    draw: Callable[[], Mapping[str, Tensor]] | None = None
    grad: bool = False
    moved: int = 0


def verify(problem: Problem, provider: Provider, name: str) -> None:
    """Runs a provider with two seeds and compares its results with the reference.

    Raises:
        WrongResult: names the provider, the entry, the largest error and the tolerance.
    """
    first: dict[str, Tensor] | None = None
    for seed in SEEDS:
        torch.manual_seed(seed)
        with torch.set_grad_enabled(problem.grad):
            got = {key: value.detach() for key, value in provider.read(provider.call()).items()}
        if provider.same_draw or problem.rescore is None:
            want = problem.expected(seed)
            if problem.own_score is not None:
                want = {**want, **problem.own_score(got)}
        else:
            want = problem.rescore(got)
            if problem.draw is not None:
                random = check_noise(name, got, problem.draw)
                for key in random:
                    if first is not None and torch.equal(first[key], got[key]):
                        raise WrongResult(f"{name}: the same {key} under two seeds")
        for key, expected in want.items():
            compare(name, key, got, expected, problem.either_score)
        # A provider may write into the same buffer at its next call.
        first = {key: value.clone() for key, value in got.items()}


# Draws of the reference that a provider's own are compared with, and the rows of both ends that
# they are taken from: a kernel that goes wrong at its tail does so in the last ones.
DRAWS, END_ROWS = 32, 4096
# The spread of the reference's statistics is known from 32 draws, to 13%; a right provider is
# beyond eight times of it less than once in 1e8.
SPREADS = 8.0


def statistics(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean, mean square, and mean product of neighbouring rows, of each finite entry."""
    found = {}
    for key, value in values.items():
        # An entry of infinite scores (a Delta's) has no moments.
        x = value.double()
        x = torch.where(x.isfinite(), x, torch.zeros_like(x))
        found[f"mean of {key}"] = x.mean().item()
        found[f"mean square of {key}"] = x.square().mean().item()
        if x.shape[0] > 1:
            found[f"products of neighbours of {key}"] = (x[1:] * x[:-1]).mean().item()
    return found


def ends(value: Tensor) -> Tensor:
    """The first and the last rows, ``[<= 2 END_ROWS, ...]``."""
    if value.shape[0] <= 2 * END_ROWS:
        return value
    return torch.cat([value[:END_ROWS], value[-END_ROWS:]])


def check_noise(
    name: str, got: Mapping[str, Tensor], draw: Callable[[], Mapping[str, Tensor]]
) -> list[str]:
    """Compares a provider's draw with 32 of the reference's.

    Args:
        name: of the provider.
        got: its results, rows first.
        draw: draws once more from the reference, for the rows of both ends.

    Returns:
        the names of the entries that differ from draw to draw.

    Raises:
        WrongResult: names the statistic that is out.
    """
    draws = [draw() for _ in range(DRAWS)]
    keys = list(draws[0])
    drawn = [statistics(one) for one in draws]
    mine = statistics({key: ends(got[key]) for key in keys})
    random = []
    for key, value in mine.items():
        sample = [one[key] for one in drawn]
        mean = math.fsum(sample) / DRAWS
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in sample) / (DRAWS - 1))
        if spread:
            random.append(key.rpartition(" ")[2])
        allowed = SPREADS * spread + 1e-5 * (1 + abs(mean))
        if not abs(value - mean) <= allowed:
            raise WrongResult(
                f"{name}: {key} is {value:.6g}; of the reference's draws {mean:.6g} ± {allowed:.2g}"
            )
    return list(dict.fromkeys(random))


def compare(
    name: str,
    key: str,
    got: Mapping[str, Tensor],
    expected: Expected,
    either: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Compares one entry of a provider's results with the reference's.

    Args:
        name: of the provider.
        key: of the entry.
        got: the results.
        expected: the reference's, and how far they may be apart.
        either: from the results, other values that are as right; asked for only where some entries
            are not the reference's.

    Raises:
        WrongResult: if it is missing, of another shape, NaN, or off by more than the tolerance.
    """
    if key not in got:
        raise WrongResult(f"{name} returned {sorted(got)}; {key!r} is missing")
    value = got[key].double()
    if value.shape != expected.value.shape:
        raise WrongResult(
            f"{name}: {key} has shape {tuple(value.shape)}, not {tuple(expected.value.shape)}"
        )
    error = (value - expected.value).abs()
    # Equal infinities subtract to NaN, and count as equal.
    error = torch.where(value == expected.value, torch.zeros_like(error), error)
    # Written so that a NaN fails.
    wrong = ~(error <= expected.tolerance)
    if either is not None and bool(wrong.any()):
        others = either(dict(got))
        if key in others:
            error = torch.where(wrong, (value - others[key]).abs(), error)
            wrong = ~(error <= expected.tolerance)
    if bool(wrong.any()):
        raise WrongResult(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} entries of {key} are wrong; the largest"
            f" error is {float(error.nan_to_num(nan=float('inf')).max()):.3g} where"
            f" {float(torch.as_tensor(expected.tolerance).max()):.3g} is allowed"
        )
