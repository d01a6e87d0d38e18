"""``python -m bench kernels``: the Triton kernels against the copy roof; without a GPU, their code.

On a GPU, the device time of each kernel, by way of the public distributions with the backend set to
Triton, beside a copy of as many bytes. Without one, the figures of the machine code compiled ahead
of time for an H200: registers, issue slots for each element, and the part of the copy's speed that
a model of the chip predicts.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import families, providers, results
from bench.cases import FAMILIES
from bench.console import make_console, make_progress, make_table
from bench.families import EPS, Expected, Family
from bench.gate import WrongResult, check_noise, compare, ends
from bench.problems import Shape, score_of
from bench.timing import CudaMeter, Quantiles, interleave

SHAPES: tuple[Shape, ...] = ((1 << 20, 8), (1 << 20, 64), (1 << 20, 17))
DTYPES = (torch.float32, torch.bfloat16)
BUDGET_S = 0.15
# The families whose draws are kernels; of the one-hot and ordinal ones they are the same.
KERNELS = (
    "normal",
    "tanh_normal",
    "truncated_normal",
    "categorical",
    "masked_categorical",
    "bernoulli",
)

# From a drawn value to the normal number behind it, and back. With it the noise is known, and the
# gradient through the draw.
LATENT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "IndependentNormal": (lambda x: x, lambda x: x),
    "TanhNormal": (torch.atanh, torch.tanh),
}


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where a kernel's result was wrong, else 0."""
    if torch.cuda.is_available():
        folder = args.out or (None if args.quick else results.default_folder("cuda"))
        return report(args.quick, folder)
    folder = args.out or (None if args.quick else results.default_folder("cpu"))
    return report_code(args.quick, folder)


# ---------------------------------------------------------------------------------- without a GPU


def report_code(quick: bool, folder: Path | None) -> int:
    """Prints what the kernels' machine code is made of; writes ``kernels.json``."""
    console = make_console()
    try:
        machine: Any = importlib.import_module("tests.kernels.machine")
        cases: Any = importlib.import_module("tests.test_codegen").CASES
    except ImportError as error:
        console.print(f"no GPU, and no checkout with its tests to read machine code by: {error}")
        return 0
    console.print("no GPU: machine code compiled ahead of time for sm_90; predictions, not timings")
    if quick:
        first = {case.name.partition("-")[0]: case for case in reversed(cases)}
        cases = list(first.values())[:2]
    columns = ("bytes/elem", "slots/elem", "limit", "registers", "stack", "of copy speed")
    table = make_table("Kernels", ("kernel",), columns)
    rows = []
    with make_progress(console) as progress:
        task = progress.add_task("kernels", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            code = machine.looked_at(case, "sm_90")
            slots, roof = machine.slots_per_element(case, code), machine.roof(case, code)
            row = {
                "kernel": case.name,
                "bytes_per_element": round(case.bytes, 2),
                "slots_per_element": None if slots is None else round(slots, 1),
                "limit": case.slots,
                "registers": code.registers,
                "stack": code.stack,
                "predicted_part_of_copy_speed": None if roof is None else round(roof, 3),
            }
            rows.append(row)
            table.add_row(
                case.name,
                f"{row['bytes_per_element']:.2f}",
                "" if slots is None else f"{slots:.1f}",
                "" if case.slots is None else f"{case.slots:g}",
                str(row["registers"]),
                str(row["stack"]),
                "" if roof is None else f"{roof:.0%}",
            )
            progress.advance(task)
    console.print(table)
    if folder is not None:
        payload = {
            "environment": results.environment("cpu"),
            "what": "machine code for sm_90, compiled ahead of time; nothing was run",
            "kernels": rows,
        }
        console.print(f"written: {results.shown(results.write(folder / 'kernels.json', payload))}")
    return 0


# -------------------------------------------------------------------------------------- on a GPU


@dataclass(frozen=True)
class Pass:
    """One pass of a family's kernels.

    Attributes:
        name: draw, score, or the backward of one.
        call: makes it, on the next of several equal inputs.
        check: raises ``WrongResult`` where the result is wrong.
        moved: bytes that must be read and written.
    """

    name: str
    call: Callable[[], Any]
    check: Callable[[], None]
    moved: int


def report(quick: bool, folder: Path | None, device: str = "cuda") -> int:
    """Times each pass against a copy; writes ``kernels.json``."""
    from fastprob.backend import using_backend

    console = make_console()
    table = make_table(
        "Device time of a pass", ("pass", "shape", "dtype"), ("µs", "copy, µs", "of copy speed")
    )
    todo = [
        (name, shape, dtype)
        for shape in SHAPES[: 1 if quick else None]
        for dtype in DTYPES[: 1 if quick else None]
        for name in KERNELS
    ]
    rows, refused = [], []
    # Not "auto", which would time the reference where a kernel cannot serve.
    with (
        using_backend("triton" if device == "cuda" else "reference"),
        make_progress(console) as progress,
    ):
        task = progress.add_task("kernels", total=len(todo))
        for name, shape, dtype in todo:
            progress.update(task, description=f"{name} {shape[0]}x{shape[1]}", advance=1)
            for item in passes(FAMILIES[name], shape, dtype, device):
                row: dict[str, Any] = {
                    "pass": f"{name}, {item.name}",
                    "shape": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "bytes": item.moved,
                }
                try:
                    item.check()
                except (WrongResult, RuntimeError, NotImplementedError) as error:
                    refused.append({**row, "why": f"{type(error).__name__}: {error}"[:300]})
                    continue
                row |= _time(item, device)
                rows.append(row)
                at = f"{shape[0]}x{shape[1]}"
                figures = (f"{row['us']['p50']:.1f}", f"{row['copy_us']['p50']:.1f}")
                part = f"{row['part_of_copy_speed']:.0%}"
                table.add_row(row["pass"], at, row["dtype"], *figures, part)
    console.print(table)
    for row in refused:
        at = f"{row['pass']} {row['shape']} {row['dtype']}"
        console.print(f"[red]not timed:[/] {at}: {row['why']}")
    if folder is not None:
        payload = {"environment": results.environment(device), "kernels": rows, "refused": refused}
        console.print(f"written: {results.shown(results.write(folder / 'kernels.json', payload))}")
    return 1 if refused else 0


def passes(family: Family, shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Pass]:
    """Yields the passes of a family: draw, score, and the backward of both where they have one."""
    from fastprob import distributions

    build = getattr(distributions, family.distribution)
    params = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in family.params(*shape).items()
    }
    batches = [
        {key: value.clone() for key, value in params.items()}
        for _ in range(providers.copies(_bytes(params)))
    ]
    eps = torch.finfo(dtype).eps
    double = {k: v.double() if v.is_floating_point() else v for k, v in params.items()}

    def close(name: str, got: Tensor, want: Tensor, slack: Tensor | float = 0.0) -> None:
        # The kernels compute in fp32 and round once.
        tolerance = families.log_prob_tolerance(want) + 2 * eps * want.abs() + slack
        compare(name, name, {name: got}, Expected(want, tolerance))

    with torch.no_grad():
        value, score = build(**params).sample_and_log_prob()
    few = {key: ends(item).float() if item.is_floating_point() else ends(item)
           for key, item in params.items()}  # fmt: skip

    squashed = family.distribution == "TanhNormal"
    far = 0.98

    def check_draw() -> None:
        # A draw is scored before it is rounded; near a bound, the rounded value tells little of it.
        free = (value.abs() < far).all(-1) if squashed else None
        want = score_of(lambda x: family.score(double, x), value, free, eps)
        close("score of a draw", score, want.value, torch.as_tensor(want.tolerance))
        drawn = {"action": value, "log_prob": score}
        check_noise("draw", drawn, lambda: {k: e.value for k, e in family.draw(few).items()})

    draw = providers.in_turn(lambda batch: build(**batch).sample_and_log_prob(), batches)
    yield Pass("draw", _no_grad(draw), check_draw, _bytes(params) + _bytes([value, score]))

    # Given values are exact, and those at a bound of a TanhNormal have an infinite score.
    given_value = value.clamp(-far, far) if squashed else value
    exact = given_value if family.spec is not None else given_value.double()

    def check_score() -> None:
        with torch.no_grad():
            close("score", build(**params).log_prob(given_value), family.score(double, exact))

    given = [(batch, given_value.clone()) for batch in batches]
    scored = providers.in_turn(lambda pair: build(**pair[0]).log_prob(pair[1]), given)
    yield Pass("score", _no_grad(scored), check_score, _bytes(params) + _bytes([value, score]))

    wanted = [key for key, item in params.items() if item.is_floating_point()]
    if not build.has_rsample and family.spec is None:
        return
    weight = torch.randn(score.shape, generator=torch.Generator().manual_seed(2)).to(score)
    graphs = []
    for batch, stored in given:
        leaves = {k: v.requires_grad_() if k in wanted else v for k, v in batch.items()}
        graphs.append((build(**leaves).log_prob(stored), [leaves[key] for key in wanted]))
    back = providers.in_turn(
        lambda graph: torch.autograd.grad(graph[0], graph[1], weight, retain_graph=True), graphs
    )

    def check_back() -> None:
        leaves = {
            k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in double.items()
        }
        scored = family.score(leaves, exact)
        want = torch.autograd.grad(scored, [leaves[key] for key in wanted], weight.double())
        for key, mine, theirs in zip(wanted, back(), want, strict=True):
            # z reaches 5 and 1 / scale 10: a gradient loses 1e2 EPS with z, and again with z^2.
            close(f"d_{key} of a score", mine, theirs, 1e3 * EPS * (1 + theirs.abs()))

    # Read: parameters, value, the gradient of the score; written: those of the parameters.
    moved = 2 * _bytes([params[key] for key in wanted]) + _bytes([value, weight])
    yield Pass("score, backward", back, check_back, moved)
    if family.distribution not in LATENT or dtype is not torch.float32:
        # The noise is not to be had from a value that was rounded to 8 bits.
        return
    pull = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).to(value)
    drawn = []
    for batch in batches:
        leaves = [batch["loc"], batch["scale"]]
        drawn.append((build(*leaves).rsample_and_log_prob(), leaves))
    through = providers.in_turn(
        lambda made: torch.autograd.grad(made[0], made[1], (pull, weight), retain_graph=True), drawn
    )

    def check_through() -> None:
        value = drawn[0][0][0].detach()
        invert, squash = LATENT[family.distribution]
        noise = (invert(value.double()) - double["loc"]) / double["scale"]
        leaves = {k: v.clone().requires_grad_() for k, v in double.items()}
        again = squash(leaves["loc"] + noise * leaves["scale"])
        want = torch.autograd.grad(
            (again, family.score(leaves, again)),
            list(leaves.values()),
            (pull.double(), weight.double()),
        )
        for key, mine, theirs in zip(leaves, through(), want, strict=True):
            # The noise is found to EPS / scale, with tanh to 1 / (1 - tanh^2) as much.
            loss = 2e3 * EPS * (1 + theirs.abs())
            if squashed:
                loss = torch.where(value.abs() < 0.9, loss, torch.inf)
            close(f"d_{key} of a draw", mine, theirs, loss)

    yield Pass("draw, backward", through, check_through, moved)


def _no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _bytes(tensors: Any) -> int:
    held = tensors.values() if isinstance(tensors, dict) else tensors
    return sum(value.numel() * value.element_size() for value in held)


def _time(item: Pass, device: str) -> dict[str, Any]:
    item.call()
    timings = interleave(
        {"pass": item.call, "copy": providers.copy_roof(item.moved, device)},
        budget_s=BUDGET_S,
        min_rounds=5,
        meter=CudaMeter() if device == "cuda" else None,
    )
    spent = {name: Quantiles.of(timing.device_us or timing.us) for name, timing in timings.items()}
    return {
        "us": spent["pass"].as_dict(),
        "copy_us": spent["copy"].as_dict(),
        "part_of_copy_speed": round(spent["copy"].p50 / spent["pass"].p50, 3),
    }
