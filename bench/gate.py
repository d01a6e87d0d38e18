"""The correctness gate: no figure is printed for a provider whose result is wrong.

A provider that draws from torch's generator as eager upstream does is held to the reference's own
draw: same noise, same value, same log-probability. One that draws otherwise (Inductor has its own
normals) is held to the log-probability of the value that it returned, and to the first two moments
of its noise.
"""

from __future__ import annotations

from collections.abc import Callable
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
            their own noise. None where every provider draws as upstream.
        own_score: given a provider's own results, what its log-probability should be; for
            providers that draw as upstream, in place of the score of the reference's draw.
        grad: whether calls run with autograd on.
    """

    makers: dict[str, Callable[[], Provider]]
    expected: Callable[[int], dict[str, Expected]]
    rescore: Callable[[dict[str, Tensor]], dict[str, Expected]] | None = None
    own_score: Callable[[dict[str, Tensor]], dict[str, Expected]] | None = None
    grad: bool = False


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
        if provider.same_draw:
            want = problem.expected(seed)
            if problem.own_score is not None:
                want = {**want, **problem.own_score(got)}
        else:
            if problem.rescore is None:
                raise WrongResult(f"{name} draws its own noise, and the case cannot score it")
            want = problem.rescore(got)
            if first is not None and torch.equal(first["action"], got["action"]):
                raise WrongResult(f"{name}: the same action under two seeds")
        for key, expected in want.items():
            _compare(name, key, got, expected)
        # A provider may write into the same buffer at its next call.
        first = {key: value.clone() for key, value in got.items()}


def _compare(name: str, key: str, got: dict[str, Tensor], expected: Expected) -> None:
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
    if bool(wrong.any()):
        raise WrongResult(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} entries of {key} are wrong; the largest"
            f" error is {float(error.nan_to_num(nan=float('inf')).max()):.3g} where"
            f" {float(torch.as_tensor(expected.tolerance).max()):.3g} is allowed"
        )
