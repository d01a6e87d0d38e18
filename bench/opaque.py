"""What a compiled graph should hold for a family: an operator of its own, or what Inductor makes.

The same call is compiled and timed in turns: with the family's computation as an operator that
Inductor does not look into, with the formula left to Inductor to fuse, and as fastprob's graphs
have it. On a CPU the operator runs what eager mode runs, forward and backward; on a GPU, where the
kernels serve, it is the kernel's, and that is what graphs have. The decision is the operator where
Inductor takes more than 1.1 times as long.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributions as D

from bench import results

LIMIT = 1.1
# Smaller calls cost what dynamo's frame costs, with an operator inside or without.
SHAPES = ((4096, 8),)
# By the number of categories another way is faster.
MORE_SHAPES = {"Categorical": ((8192, 4), (1820, 18), (512, 64))}
CALLS = ("draw and score", "score and entropy", "mode")
Function = Callable[..., "tuple[Tensor, ...]"]


def _loc_scale(draw: Any, *size: int) -> dict[str, Tensor]:
    loc = torch.randn(*size, generator=draw)
    return {"loc": loc, "scale": torch.rand(*size, generator=draw) + 0.3}


def _one(name: str) -> Callable[..., dict[str, Tensor]]:
    return lambda draw, *size: {name: torch.randn(*size, generator=draw)}


def _masked(draw: Any, *size: int) -> dict[str, Tensor]:
    mask = torch.rand(*size, generator=draw) < 0.6
    mask[:, 1] = True
    return {"logits": torch.randn(*size, generator=draw), "mask": mask}


def _concentrations(draw: Any, *size: int) -> dict[str, Tensor]:
    names = ("concentration1", "concentration0")
    return {name: torch.rand(*size, generator=draw) + 1.0 for name in names}


# Parameters and keywords of each family.
FAMILIES: dict[str, tuple[Callable[..., dict[str, Tensor]], dict[str, Any]]] = {
    "IndependentNormal": (_loc_scale, {}),
    "TanhNormal": (_loc_scale, {}),
    "TruncatedNormal": (_loc_scale, {"low": -1.0, "high": 1.0}),
    "Delta": (_one("param"), {}),
    "TanhDelta": (_one("param"), {}),
    "Categorical": (_one("logits"), {}),
    "OneHotCategorical": (_one("logits"), {}),
    "MaskedCategorical": (_masked, {}),
    "MaskedOneHotCategorical": (_masked, {}),
    "Ordinal": (_one("scores"), {}),
    "OneHotOrdinal": (_one("scores"), {}),
    "Bernoulli": (_one("logits"), {}),
    "Beta": (_concentrations, {}),
}


def function(family: str, call: str, params: dict[str, Tensor]) -> Function:
    """The call of a family as a function of its parameters, in the order of `params`.

    Args:
        family: one of `FAMILIES`.
        call: one of `CALLS`. A score is that of a value drawn beforehand, `[rows, ...]`.
        params: the parameters, `[rows, width]`.
    """
    from fastprob import distributions

    names, kwargs = list(params), FAMILIES[family][1]

    def build(given: Sequence[Tensor]) -> Any:
        return getattr(distributions, family)(**dict(zip(names, given, strict=True)), **kwargs)

    with torch.no_grad():
        value = build(list(params.values())).sample()
    # A TanhNormal has no entropy in closed form.
    entropy = family != "TanhNormal"

    def draw(*given: Tensor) -> tuple[Tensor, ...]:
        dist = build(given)
        return dist.rsample_and_log_prob() if dist.has_rsample else dist.sample_and_log_prob()

    def score(*given: Tensor) -> tuple[Tensor, ...]:
        dist = build(given)
        found = dist.log_prob(value)
        return (found, dist.entropy()) if entropy else (found,)

    return {CALLS[0]: draw, CALLS[1]: score, CALLS[2]: lambda *given: (build(given).mode,)}[call]


_library = torch.library.Library("fastprob_bench", "FRAGMENT")


def as_operator(name: str, run: Function, given: Sequence[Tensor]) -> Function:
    """A function of tensors as an operator whose passes both run as eager mode runs them.

    The graph of the last forward pass is kept for the backward pass that follows it.

    Args:
        name: of the operator.
        run: the function; each of its results has a gradient, or gradients are off.
        given: arguments like those of the calls.
    """
    # The operator's results are contiguous; those of a Beta come as columns of a stack.
    with torch.no_grad():
        like = [x.contiguous() for x in run(*given)]
    kept: list[Any] = []
    # Inside an operator autograd is switched off below what `enable_grad` reaches.
    outside = torch._C._dispatch_tls_local_exclude_set()

    def forward(inputs: list[Tensor], keep: bool) -> list[Tensor]:
        included = torch._C._dispatch_tls_local_include_set()
        with torch.set_grad_enabled(keep), torch._C._ForceDispatchKeyGuard(included, outside):
            leaves = [x.detach().requires_grad_(keep and x.is_floating_point()) for x in inputs]
            made = run(*leaves)
        kept[:] = [[x for x in leaves if x.requires_grad], made]
        # No output of an operator may be an input, as the mode of a Delta is.
        held = {x.untyped_storage().data_ptr() for x in inputs}
        return [
            x.detach().clone()
            if x.untyped_storage().data_ptr() in held
            else x.detach().contiguous()
            for x in made
        ]

    def backward(grads: list[Tensor]) -> list[Tensor]:
        leaves, made = kept
        with torch.enable_grad():
            return list(torch.autograd.grad(made, leaves, grads, materialize_grads=True))

    _library.define(
        f"{name}(Tensor[] inputs, bool keep) -> Tensor[]",
        tags=(torch.Tag.nondeterministic_seeded,),
    )
    _library.define(f"{name}_backward(Tensor[] grads) -> Tensor[]")
    for end, body in (("", forward), ("_backward", backward)):
        _library.impl(name + end, body, "CompositeExplicitAutograd")
    floats = [x for x in given if x.is_floating_point()]
    _library.impl(
        name, lambda inputs, keep: [torch.empty_like(x, device="meta") for x in like], "Meta"
    )
    _library.impl(
        f"{name}_backward",
        lambda grads: [torch.empty_like(x, device="meta") for x in floats],
        "Meta",
    )
    operators = torch.ops.fastprob_bench
    first, second = (getattr(operators, name + end) for end in ("", "_backward"))

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
            ctx.which = [x.is_floating_point() for x in inputs]
            return tuple(first(list(inputs), True))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            made = iter(second(list(grads)))
            return tuple(next(made) if which else None for which in ctx.which)

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            return Opaque.apply(*inputs)
        return tuple(first(list(inputs), False))

    return call


def compare(family: str, call: str, rows: int, width: int, device: str) -> list[dict[str, Any]]:
    """Times both ways of one call, forward and with the backward pass; a row of each.

    Returns:
        rows with CPU or GPU times in us, the ratio Inductor ÷ operator, and the time of fastprob's
        graph by that of the faster of the two; none for a pass that has no gradient.
    """
    generator = torch.Generator().manual_seed(1)
    params = FAMILIES[family][0](generator, rows, width)
    params = {k: v.to(device) for k, v in params.items()}
    run = function(family, call, params)
    found = []
    for both in (False, True):
        given = [v.detach().requires_grad_(both and v.is_floating_point()) for v in params.values()]
        with torch.set_grad_enabled(both):
            which = [i for i, x in enumerate(run(*given)) if x.requires_grad or not both]
        if not which:
            continue
        calls = [_step(f, given, both) for f in _all_ways(_only(run, which), family, given, device)]
        with torch.set_grad_enabled(both):
            opaque, fused, graph = _in_turns(calls, device)
        row = {
            "family": family,
            "call": call,
            "pass": "forward and backward" if both else "forward",
            "shape": [rows, width],
            "us": {"operator": opaque, "Inductor": fused, "fastprob": graph},
            "ratio": fused / opaque,
            "of_best": graph / min(opaque, fused),
            "decision": "operator" if fused / opaque > LIMIT else "Inductor",
        }
        found.append(row)
    return found


def _only(run: Function, which: Sequence[int]) -> Function:
    def some(*given: Tensor) -> tuple[Tensor, ...]:
        made = run(*given)
        return tuple(made[i] for i in which)

    return some


def _all_ways(
    run: Function, family: str, given: Sequence[Tensor], device: str
) -> tuple[Function, Function, Function]:
    """The function compiled with an operator inside, left to Inductor, and as fastprob has it."""
    torch._dynamo.reset()
    if device == "cpu":
        global _count
        _count += 1
        inside = as_operator(f"{family}_{_count}", run, given)
        return torch.compile(inside, fullgraph=True), _formula(run), _fresh(run, "as_it_is")
    # On a GPU the families' own operators run the kernels; the backend is asked for while tracing.
    return _under(run, "auto"), _under(run, "reference"), _under(run, "auto")


_count = 0


def _fresh(run: Function, name: str) -> Function:
    """The function compiled under a code object of its own: all would be one to the compiler."""

    def traced(*given: Tensor) -> tuple[Tensor, ...]:
        return run(*given)

    traced.__code__ = traced.__code__.replace(co_name=f"traced_{name}")
    return torch.compile(traced, fullgraph=True)


def _formula(run: Function) -> Function:
    """The function compiled without the operators that fastprob puts into graphs."""
    from fastprob import lowering

    compiled = _fresh(run, "formula")

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        lowering.enabled = False
        try:
            return compiled(*given)
        finally:
            lowering.enabled = True

    return call


def _under(run: Function, backend: str) -> Function:
    from fastprob.backend import using_backend

    compiled = _fresh(run, backend)

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        with using_backend(backend):
            return compiled(*given)

    return call


def _step(run: Function, given: Sequence[Tensor], both: bool) -> Callable[[], Any]:
    if not both:
        return lambda: run(*given)
    with torch.no_grad():
        grads = [torch.randn_like(x) for x in run(*given)]

    def step() -> None:
        for x in given:
            x.grad = None
        torch.autograd.backward(run(*given), grads)

    return step


def _in_turns(calls: Sequence[Callable[[], Any]], device: str) -> list[float]:
    """Medians of a call's time in us, the calls taking turns: CPU time, or the GPU's."""
    for call in calls:
        for _ in range(3):
            call()
    cpu = device == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(21):
        for call, found in zip(calls, times, strict=True):
            if not cpu:
                torch.cuda.synchronize()
            began = clock()
            for _ in range(20):
                call()
            if not cpu:
                torch.cuda.synchronize()
            found.append((clock() - began) / 20 * 1e6)
    return [statistics.median(found) for found in times]


def run(args: argparse.Namespace) -> int:
    """Times all families, prints and writes the decisions; returns the exit status, 0."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    D.Distribution.set_default_validate_args(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    print(f"{'us':72}{'operator':>10}{'Inductor':>10}{'fastprob':>10}{'ratio':>7}")
    for family in FAMILIES if not args.quick else ("TanhNormal",):
        shapes = (*SHAPES, *MORE_SHAPES.get(family, ())) if not args.quick else ((16, 8),)
        for shape in shapes:
            for call in CALLS:
                for row in compare(family, call, *shape, device):
                    rows.append(row)
                    name = f"{family} {shape[0]}x{shape[1]}, {call}, {row['pass']}"
                    us = "".join(f"{x:10.1f}" for x in row["us"].values())
                    mark = "  operator" if row["decision"] == "operator" else ""
                    print(f"{name:72}{us}{row['ratio']:7.2f}{mark}", flush=True)
    if args.out is not None or not args.quick:
        folder = args.out or results.default_folder(device)
        payload = {"environment": results.environment(device), "limit": LIMIT, "rows": rows}
        print(f"written: {results.shown(results.write(folder / 'opaque.json', payload))}")
    return 0
