"""The specialisations of Bernoulli's kernels whose machine code is looked at."""

from __future__ import annotations

import dataclasses

from fastprob.kernels import bernoulli
from fastprob.kernels._launch import FLAT_TILE, forward_grid
from tests.kernels.accesses import flat, forward, size_of, through
from tests.kernels.codegen_normal import ROWS, tiling
from tests.kernels.machine import Case

EPS = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}


def types(dtype: str) -> dict[str, str]:
    floats = [
        "given", "value", "score", "entropy", "grad_score", "grad_entropy", "grad_given",
        "grad_scored",
    ]  # fmt: skip
    integers = [
        "seed", "call", "total_rows", "total", "rows", "given_row", "given_column", "value_row",
        "value_column",
    ]  # fmt: skip
    return {
        **dict.fromkeys(floats, f"*{dtype}"),
        **dict.fromkeys(integers, "i64"),
        **dict.fromkeys(("state", "used"), "*i64"),
        "ticket": "*i32",
    }


def draw(
    a: int, dtype: str, probs: bool, slots: float | None = None, everywhere: bool = False,
    nvidia: bool = False, **flags,
) -> Case:  # fmt: skip
    grid = forward_grid(ROWS, a, 16 // size_of(dtype))
    given = {"RANDOM": True, "SCORE": True, "ENTROPY": False, "KEEP": False, **flags}
    constants = {
        **tiling(grid, a), **given, "GIVEN": 0, "FROM_PROBS": probs, "EPS": EPS[dtype],
        "HOST": not given["RANDOM"], "ADVANCE": given["RANDOM"], "FAST": True, "seed": None,
        "call": None,
    }  # fmt: skip
    wanted = {
        "score": given["SCORE"], "entropy": given["ENTROPY"], "used": given["KEEP"],
        "state": given["RANDOM"], "ticket": given["RANDOM"],
    }  # fmt: skip
    constants.update(dict.fromkeys((n for n, needed in wanted.items() if not needed), None))
    kind = "probs" if probs else "logits"
    name = "-".join([f"draw-{kind}-{a}-{dtype}", *(f"{k}={v}" for k, v in flags.items())])
    sums = given["SCORE"] + given["ENTROPY"]
    return Case(
        f"bernoulli-{name}", bernoulli.draw_kernel, types(dtype), constants, grid.warps,
        grid.tile, (2 + sums / a) * size_of(dtype), slots,
        everywhere=everywhere, nvidia=nvidia,
        registers=bernoulli.most_registers(grid, given["ENTROPY"], given["KEEP"]),
        through=through(grid, a, dtype, 1, stores=1, sums=sums, random=given["RANDOM"]),
        **forward(
            grid, a, dtype, 1, 1, sums=sums, random=given["RANDOM"], keep=given["KEEP"]
        ),
    )  # fmt: skip


def score(a: int, dtype: str, probs: bool, slots: float, everywhere: bool = False) -> Case:
    grid = forward_grid(ROWS, a, 16 // size_of(dtype))
    constants = {
        **tiling(grid, a), "GIVEN": 0, "VALUE": 0, "FROM_PROBS": probs, "EPS": EPS[dtype],
        "SCORE": True, "ENTROPY": True, "FAST": True,
    }  # fmt: skip
    name = f"bernoulli-score-entropy-{'probs' if probs else 'logits'}-{a}-{dtype}"
    return Case(
        name, bernoulli.score_kernel, types(dtype), constants, grid.warps, grid.tile,
        (2 + 2 / a) * size_of(dtype), slots, everywhere=everywhere,
        through=through(grid, a, dtype, 2, sums=2),
        **forward(grid, a, dtype, 2, 0, sums=2),
    )  # fmt: skip


def backward(
    a: int, dtype: str, probs: bool, slots: float, stored: bool, everywhere: bool = False
) -> Case:
    count, warps = FLAT_TILE
    constants = {
        "A": a, "COUNT": count, "GIVEN": 0, "VALUE": 0, "FROM_PROBS": probs, "EPS": EPS[dtype],
        "RANDOM": not stored, "STORED": stored, "BY_SCORE": True, "BY_ENTROPY": stored,
        "TO_VALUE": False, "FAST": True, "grad_scored": None,
        **({"used": None} if stored else {"grad_entropy": None}),
    }  # fmt: skip
    kind = "score" if stored else "draw"
    name = f"bernoulli-{kind}-backward-{'probs' if probs else 'logits'}-{a}-{dtype}"
    moved = (3 + 2 / a if stored else 2 + 1 / a) * size_of(dtype)
    return Case(
        name, bernoulli.backward_kernel, types(dtype), constants, warps, count, moved, slots,
        everywhere=everywhere,
        **flat(a, dtype, 1 + stored, 1, by_first=stored, random=not stored),
    )  # fmt: skip


# What was measured and at most 15%. fp32 is bound by memory below 66 slots at A = 8 (8.5 bytes),
# bf16 below 33, which a draw exceeds: from probabilities and without a score it takes 25.
CASES = [
    draw(8, "fp32", False, 49, everywhere=True),
    draw(8, "fp32", True, 45),
    draw(8, "bf16", False, 43),
    draw(8, "bf16", True, 42),
    draw(8, "fp32", False, 31, SCORE=False),
    draw(8, "fp32", False, 20, RANDOM=False),
    draw(8, "fp32", False, 55, ENTROPY=True, KEEP=True),
    draw(8, "bf16", False, 51, nvidia=True, ENTROPY=True, KEEP=True),
    draw(1, "fp32", False, 46),
    draw(17, "fp32", False, 49, everywhere=True),
    draw(64, "fp32", False, 50),
    draw(257, "fp32", False, 57),
    draw(257, "bf16", False, 53),
    # The shortest way passes by a store of a thread's last vector, which may lie behind the rows.
    dataclasses.replace(draw(257, "fp32", False, 36, nvidia=True, SCORE=False), accesses=(4, 3)),
    # Rows in chunks.
    draw(1025, "fp32", False, 59, nvidia=True),
    draw(1025, "bf16", False, 58),
    draw(1500, "fp32", False, 55),
    score(8, "fp32", False, 31, everywhere=True),
    score(17, "fp32", True, 38),
    score(1025, "fp32", False, 45),
    score(8, "bf16", False, 28),
    score(13, "bf16", False, 35.5),
    backward(8, "fp32", False, 40, stored=False, everywhere=True),
    backward(8, "fp32", True, 35, stored=False),
    backward(17, "fp32", False, 49, stored=False),
    backward(8, "fp32", False, 23, stored=True),
    backward(8, "bf16", False, 24, stored=True),
]
