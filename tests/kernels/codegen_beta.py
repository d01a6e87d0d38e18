"""The specialisations of Beta's kernels whose machine code is looked at."""

from __future__ import annotations

import torch

from fastprob.kernels import beta
from fastprob.kernels._launch import FLAT_TILE
from tests.kernels.accesses import flat, forward, size_of, through
from tests.kernels.codegen_normal import ROWS, tiling
from tests.kernels.machine import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {beta.RANDOM: "draw", beta.MEAN: "mean", beta.MODE: "mode", beta.GIVEN: "score"}


def types(dtype: str) -> dict[str, str]:
    floats = [
        "conc1", "conc0", "value", "score", "entropy", "grad_value", "grad_score", "grad_entropy",
        "grad_conc1", "grad_conc0", "grad_scored", "drawn_value", "low", "high",
    ]  # fmt: skip
    integers = [
        "seed", "call", "total_rows", "total", "rows", "conc1_row", "conc1_column", "conc0_row",
        "conc0_column", "value_row", "value_column", "upstream_row", "upstream_column",
    ]  # fmt: skip
    return {
        **dict.fromkeys(floats, f"*{dtype}"),
        **dict.fromkeys(integers, "i64"),
        **dict.fromkeys(("by_conc1", "by_conc0"), "*fp32"),
        **dict.fromkeys(("lo", "hi"), "fp32"),
        "state": "*i64",
        "ticket": "*i32",
    }


def draw(
    a: int, dtype: str, slots: float | None = None, everywhere: bool = False,
    kind: int = beta.RANDOM, score: bool = True, entropy: bool = False, clamp: int = 0,
    keep: bool = False, nvidia: bool = False,
) -> Case:  # fmt: skip
    grid = beta.tiling(ROWS, a, 16 // size_of(dtype))
    least, most = beta.limits(DTYPES[dtype])
    random = kind == beta.RANDOM
    constants = {
        **tiling(grid, a), "CONC1": 0, "CONC0": 0, "KIND": kind, "LEAST": least, "MOST": most,
        "SCORE": score, "ENTROPY": entropy, "CLAMP": clamp, "KEEP": keep, "HOST": not random,
        "ADVANCE": random, "FAST": True, "seed": None, "call": None, "used": None,
        "CUT": beta.form_of(grid, size_of(dtype), entropy),
    }  # fmt: skip
    wanted = {
        "score": score, "entropy": entropy, "state": random, "ticket": random, "drawn_value": keep,
        **_bounds(clamp),
    }  # fmt: skip
    constants.update(dict.fromkeys((n for n, needed in wanted.items() if not needed), None))
    name = f"beta-{KINDS[kind]}-{a}-{dtype}" + ("" if score else "-alone")
    name += "-entropy" if entropy else ""
    name += (f"-clamp={clamp}" if clamp else "") + ("-kept" if keep else "")
    return Case(
        name, beta.draw_kernel, types(dtype), constants, grid.warps,
        grid.tile,
        (3 + keep + (score + entropy) / a) * size_of(dtype), slots,
        everywhere=everywhere, nvidia=nvidia,
        registers=beta.most_registers(grid, size_of(dtype), kind),
        turns=2 if constants["CUT"] else 1,
        through=through(
            grid, a, dtype, 2, stores=1 + keep, sums=score + entropy, random=random
        ),
        **forward(
            grid, a, dtype, 2, 1 + keep, sums=score + entropy, random=random,
            repeated=2 * (clamp == 2),
        ),
    )  # fmt: skip


def score(
    a: int, dtype: str, slots: float, everywhere: bool = False, entropy: bool = True,
    nvidia: bool = False,
) -> Case:  # fmt: skip
    grid = beta.tiling(ROWS, a, 16 // size_of(dtype))
    constants = {
        **tiling(grid, a), "CONC1": 0, "CONC0": 0, "VALUE": 0, "SCORE": True, "ENTROPY": entropy,
        "FAST": True, **({} if entropy else {"entropy": None}),
    }  # fmt: skip
    name = f"beta-score{'-entropy' if entropy else ''}-{a}-{dtype}"
    return Case(
        name, beta.score_kernel, types(dtype), constants, grid.warps,
        grid.tile, (3 + (1 + entropy) / a) * size_of(dtype), slots,
        everywhere=everywhere, nvidia=nvidia, through=through(grid, a, dtype, 3, sums=1 + entropy),
        **forward(grid, a, dtype, 3, 0, sums=1 + entropy),
    )  # fmt: skip


def backward(
    a: int, dtype: str, kind: int, slots: float, everywhere: bool = False, clamp: int = 0,
    nvidia: bool = False,
) -> Case:  # fmt: skip
    count, warps = FLAT_TILE
    given = kind == beta.GIVEN
    constants = {
        "A": a, "COUNT": count, "CONC1": 0, "CONC0": 0, "VALUE": 0, "UPSTREAM": 0, "KIND": kind,
        "BY_VALUE": not given, "BY_SCORE": True, "BY_ENTROPY": given, "TO_VALUE": False,
        "CLAMP": clamp, "FAST": True, "grad_scored": None,
        **({"grad_value": None} if given else {"grad_entropy": None}),
        **({} if kind == beta.RANDOM else {"by_conc1": None, "by_conc0": None}),
        **{n: None for n, needed in _bounds(clamp).items() if not needed},
    }  # fmt: skip
    moved = (5 + 2 / a if given else 6 + 1 / a) * size_of(dtype) + (8 if kind == beta.RANDOM else 0)
    return Case(
        f"beta-{KINDS[kind]}-backward-{a}-{dtype}" + (f"-clamp={clamp}" if clamp else ""),
        beta.backward_kernel, types(dtype), constants, warps, count, moved, slots,
        everywhere=everywhere, nvidia=nvidia,
        registers=beta.most_registers_of_backward(kind, clamp),
        **flat(
            a, dtype, 3 if given else 4, 2, slopes=2 * (kind == beta.RANDOM),
            by_first=given, repeated=2 * (clamp == 2),
        ),
    )  # fmt: skip


def _bounds(clamp: int) -> dict[str, bool]:
    return {"lo": clamp == 1, "hi": clamp == 1, "low": clamp == 2, "high": clamp == 2}


# What was measured and at most 15%. The shortest way makes one try of 119 slots, and a tile makes
# two or three; a branch for concentrations below 1 is left out. fp32 is bound by memory below 97.
# AMD's compiler keeps two scalars of a draw at A = 8 in lanes of a vector register, which counts as
# a spill there: A = 1 and 17 are compiled for it. Of rows in chunks it keeps 48.
CASES = [
    draw(8, "fp32", 310),
    draw(8, "bf16", 310),
    draw(8, "fp32", 208, score=False),
    draw(8, "fp32", 352, entropy=True),
    draw(8, "fp32", 126, kind=beta.MEAN),
    draw(8, "fp32", 138, kind=beta.MODE),
    draw(1, "fp32", 305, everywhere=True),
    draw(17, "fp32", 346, everywhere=True),
    draw(64, "fp32", 317),
    draw(13, "bf16", 335),
    # Rows in chunks, with up to 4, 2 and 1 ends of rows.
    draw(65, "fp32", 375),
    draw(171, "fp32", 350, nvidia=True),
    draw(257, "fp32", 345, nvidia=True),
    draw(257, "bf16", 350),
    draw(257, "fp32", 410, entropy=True, nvidia=True),
    draw(257, "fp32", 412, entropy=True, clamp=2, nvidia=True),
    draw(257, "bf16", 410, entropy=True, nvidia=True),
    draw(65, "bf16", 455, entropy=True, clamp=2, keep=True, nvidia=True),
    draw(257, "bf16", 240, kind=beta.MODE, entropy=True, clamp=2, keep=True, nvidia=True),
    draw(257, "bf16", 425, entropy=True, clamp=2, keep=True, nvidia=True),
    draw(260, "bf16", 355, clamp=2, keep=True, nvidia=True),
    draw(513, "fp32", 345),
    draw(1500, "fp32", 315),
    draw(1500, "bf16", 318, nvidia=True),
    draw(1500, "bf16", 375, entropy=True, clamp=2, nvidia=True),
    draw(8, "fp32", 310, clamp=1, keep=True),
    draw(8, "fp32", 310, clamp=2),
    draw(8, "bf16", 310, clamp=1),
    draw(17, "fp32", 346, everywhere=True, clamp=1, keep=True),
    draw(8, "fp32", 126, kind=beta.MEAN, clamp=1, everywhere=True),
    draw(17, "fp32", 180, kind=beta.MODE, clamp=2, keep=True, everywhere=True),
    score(8, "fp32", 160, everywhere=True),
    score(8, "fp32", 122, entropy=False),
    score(17, "fp32", 199),
    score(65, "fp32", 240),
    score(257, "fp32", 205, nvidia=True),
    score(257, "bf16", 203, nvidia=True),
    score(8, "bf16", 160),
    backward(8, "fp32", beta.RANDOM, 140, everywhere=True),
    backward(8, "fp32", beta.RANDOM, 145, everywhere=True, clamp=1),
    backward(8, "fp32", beta.RANDOM, 145, clamp=2),
    backward(8, "fp32", beta.MEAN, 146, clamp=2, nvidia=True),
    backward(17, "bf16", beta.MODE, 190, clamp=2),
    backward(8, "fp32", beta.GIVEN, 168, everywhere=True),
    backward(17, "fp32", beta.GIVEN, 184),
    backward(8, "bf16", beta.GIVEN, 163),
]
