"""The specialisations of TanhNormal's kernels whose machine code is looked at."""

from __future__ import annotations

from typing import Any

import torch

from fastprob.kernels import tanh_normal
from fastprob.kernels._launch import FLAT_TILE, forward_grid
from tests.kernels import codegen_normal
from tests.kernels.accesses import flat, forward, size_of, through, vectors
from tests.kernels.codegen_normal import APART, ROWS, summed, tiling, written
from tests.kernels.machine import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _types(dtype: str, several: bool = False) -> dict[str, str]:
    return {
        **(summed(dtype) if several else codegen_normal.types(dtype)),
        **dict.fromkeys(("halves", "mids"), f"*{dtype}"),
        **dict.fromkeys(("half", "mid", "log_half"), "fp32"),
    }


def _none(kernel: Any, wanted: dict[str, bool]) -> dict[str, None]:
    """The arguments of a kernel that a case leaves out."""
    return {n: None for n, needed in wanted.items() if not needed and n in kernel.arg_names}


def _ranges(span: int, clamp: int) -> dict[str, bool]:
    """Which of the numbers and tensors of an interval and of a clamp are read."""
    return {
        "half": span == 1, "mid": span == 1, "log_half": span == 1, "halves": span == 2,
        "mids": span == 2, "lo": clamp == 1, "hi": clamp == 1, "low": clamp == 2,
        "high": clamp == 2,
    }  # fmt: skip


def _extracted(kernel: Any, dtype: str, wanted: bool, several: bool) -> dict[str, Any]:
    """The constants of a scale that is mapped, from a raw output of loc and scale side by side.

    Of several samples the gradients are to be added up in fp32, with that of the scale itself.
    """
    rows = APART[dtype] + several if wanted else 0
    layout = {"MAP": int(wanted), "LOC": rows, "SCALE": rows}
    if "OUT" in kernel.arg_names:
        layout |= {"MAPPED": 0, "OUT": APART["fp32"]} if several else {"MAPPED": -1, "OUT": rows}
    if wanted:
        # A stride of 1 is a constant to Triton, or no load would be of a vector.
        layout |= {"loc_column": 1, "scale_column": 1}
    numbers = dict.fromkeys(("bias", "least", "floor", "mapped"), wanted)
    return {**layout, **_none(kernel, numbers)}


def draw(
    a: int,
    dtype: str,
    slots: float | None = None,
    *,
    span: int = 0,
    clamp: int = 0,
    kind: int = tanh_normal.RANDOM,
    extracted: bool = False,
    several: bool = False,
    everywhere: bool = False,
    nvidia: bool = False,
) -> Case:
    grid = forward_grid(ROWS, a, 16 // size_of(dtype))
    kernel = tanh_normal.draw_kernel
    random = kind == tanh_normal.RANDOM
    constants = {
        **tiling(grid, a), "LOC": 0, "SCALE": 0, "KIND": kind, "SCORE": True, "SPAN": span,
        "LIMIT": tanh_normal.LIMITS[DTYPES[dtype]], "CLAMP": clamp, "HOST": not random,
        "ADVANCE": random, "KEEP": False, "FAST": True, "seed": None, "call": None, "used": None,
        **_none(kernel, {**_ranges(span, clamp), "state": random, "ticket": random}),
        **_extracted(kernel, dtype, extracted, several),
    }  # fmt: skip
    name = f"tanh-normal-draw-{a}-{dtype}-span={span}-clamp={clamp}-kind={kind}"
    name += "-extracted" * extracted + "-several" * several
    # A scale that is mapped is written once, by tiles of the first sample alone.
    writes = extracted > several
    # Raw rows that are no whole vectors have none.
    scattered = 2 * (extracted and a * size_of(dtype) % 16 > 0)
    anywhere = several and not (grid.wide and scattered)
    return Case(
        name, kernel, _types(dtype), constants, grid.warps, grid.tile,
        (3 + writes + 1 / a) * size_of(dtype), slots, everywhere=everywhere,
        nvidia=nvidia, registers=tanh_normal.most_registers(grid, a, kind, extracted, span == 2),
        through=through(
            grid, a, dtype, 2, stores=written(writes, several, scattered), sums=1, random=random
        ),
        **forward(
            grid, a, dtype, 2 - scattered, 1 + writes, sums=1, random=random, scattered=scattered,
            repeated=2 * (span == 2) + 2 * (clamp == 2),
        ),
        # In a tile and the last one: the value, and the scale of the first sample or its end.
        anywhere=(0, 6 * vectors(size_of(dtype), grid.count, grid.warps)) if anywhere else None,
    )  # fmt: skip


def draw_backward(
    a: int,
    dtype: str,
    slots: float | None = None,
    *,
    span: int = 0,
    clamp: int = 0,
    kind: int = tanh_normal.RANDOM,
    extracted: bool = False,
    several: bool = False,
    everywhere: bool = False,
    nvidia: bool = False,
) -> Case:
    count, warps = FLAT_TILE
    times = tanh_normal.threads(kind, span, size_of(dtype))
    kernel = tanh_normal.draw_backward_kernel
    constants = {
        "A": a, "COUNT": count, "VALUE": 0, "LOC": 0, "SCALE": 0, "KIND": kind,
        "BY_VALUE": True, "BY_SCORE": True, "SPAN": span,
        "LIMIT": tanh_normal.LIMITS[DTYPES[dtype]], "CLAMP": clamp, "FAST": True,
        **_none(kernel, {**_ranges(span, clamp), "used": kind == tanh_normal.RANDOM}),
        **_extracted(kernel, dtype, extracted, several),
    }  # fmt: skip
    name = f"tanh-normal-draw-backward-{a}-{dtype}-span={span}-clamp={clamp}-kind={kind}"
    name += "-extracted" * extracted + "-several" * several
    each, out = vectors(size_of(dtype), count, warps), "fp32" if several else dtype
    return Case(
        name, kernel, _types(dtype, several), constants, times * warps, count,
        (3 + 1 / a) * size_of(dtype) + 2 * size_of(out), slots, everywhere=everywhere,
        nvidia=nvidia,
        **flat(
            a, dtype, 3, 2, random=kind == tanh_normal.RANDOM, out=out, warps=times,
            repeated=2 * (span == 2) + 2 * (clamp == 2),
        ),
        # Those of the scale's gradient too, in a tile of the first sample or its end.
        anywhere=(5 * each, 0) if several else None,
    )  # fmt: skip


def score(
    a: int, dtype: str, slots: float | None = None, *, span: int = 0, everywhere: bool = False
) -> Case:
    grid = forward_grid(ROWS, a, 16 // size_of(dtype))
    kernel = tanh_normal.score_kernel
    constants = {
        **tiling(grid, a), "LOC": 0, "SCALE": 0, "VALUE": 0, "SPAN": span,
        "LIMIT": tanh_normal.LIMITS[DTYPES[dtype]], "FAST": True, **_none(kernel, _ranges(span, 0)),
    }  # fmt: skip
    return Case(
        f"tanh-normal-score-{a}-{dtype}-span={span}", kernel, _types(dtype), constants, grid.warps,
        grid.tile, (3 + 1 / a) * size_of(dtype), slots, everywhere=everywhere,
        through=through(grid, a, dtype, 3, sums=1),
        **forward(grid, a, dtype, 3, 0, sums=1),
    )  # fmt: skip


def score_backward(
    a: int,
    dtype: str,
    slots: float | None = None,
    *,
    to_value: bool = False,
    everywhere: bool = False,
) -> Case:
    count, warps = FLAT_TILE
    kernel = tanh_normal.score_backward_kernel
    constants = {
        "A": a, "COUNT": count, "LOC": 0, "SCALE": 0, "VALUE": 0, "TO_VALUE": to_value, "SPAN": 0,
        "LIMIT": tanh_normal.LIMITS[DTYPES[dtype]], "FAST": True,
        **_none(kernel, {**_ranges(0, 0), "grad_value": to_value}),
    }  # fmt: skip
    return Case(
        f"tanh-normal-score-backward-{a}-{dtype}-value={to_value}", kernel, _types(dtype),
        constants, warps, count, (5 + to_value + 1 / a) * size_of(dtype), slots,
        everywhere=everywhere, **flat(a, dtype, 3, 2 + to_value),
    )  # fmt: skip


# KERNELS.md's limits: 48 for a draw, 47 and 15% for sizes that are no powers of two, and 48
# backward, of which 48.4 are taken. The others are what the kernels take, and a tenth.
CASES = [
    draw(8, "fp32", 48, everywhere=True),
    draw(8, "bf16", 55),
    draw(8, "fp32", 58, span=1, clamp=1),
    draw(8, "fp32", 58, span=2, clamp=2),
    draw(8, "fp32", 27, kind=tanh_normal.MEDIAN),
    draw(8, "fp32", 157, kind=tanh_normal.MODE, everywhere=True),
    draw(8, "bf16", 160, kind=tanh_normal.MODE),
    draw(17, "fp32", 158, kind=tanh_normal.MODE),
    draw(8, "fp32", 187, kind=tanh_normal.MEAN, everywhere=True),
    draw(8, "bf16", 190, kind=tanh_normal.MEAN),
    draw(257, "fp32", 204, kind=tanh_normal.MEAN),
    draw(17, "fp32", 190, kind=tanh_normal.MEAN, nvidia=True),
    draw(1025, "bf16", extracted=True, several=True, nvidia=True),
    draw(1025, "fp32", extracted=True, nvidia=True),
    draw(8, "bf16", 166, span=2, clamp=2, kind=tanh_normal.MODE, nvidia=True),
    draw_backward(8, "fp32", 170, kind=tanh_normal.MODE, everywhere=True),
    draw_backward(8, "bf16", 176, span=1, clamp=1, kind=tanh_normal.MODE),
    draw_backward(8, "fp32", 278, kind=tanh_normal.MEAN, everywhere=True),
    draw_backward(17, "bf16", 292, span=1, clamp=1, kind=tanh_normal.MEAN),
    draw_backward(17, "fp32", 317, span=2, clamp=2, kind=tanh_normal.MEAN, nvidia=True),
    draw(17, "fp32", 52),
    draw(257, "fp32", 54, everywhere=True),
    draw(257, "bf16", 63.5),
    # Rows in chunks.
    draw(1025, "fp32", 64, nvidia=True),
    draw(1025, "bf16", 68),
    draw(1500, "fp32", 56),
    draw(8, "fp32", 79, extracted=True, everywhere=True),
    draw(8, "bf16", 77, extracted=True, everywhere=True),
    draw(8, "fp32", 78, extracted=True, several=True, everywhere=True),
    draw(8, "bf16", 78, extracted=True, several=True, everywhere=True),
    draw(8, "fp32", 51, kind=tanh_normal.MEDIAN, extracted=True, everywhere=True),
    draw(8, "fp32", 182, kind=tanh_normal.MODE, extracted=True, everywhere=True),
    draw(8, "fp32", 212, kind=tanh_normal.MEAN, extracted=True, everywhere=True),
    draw_backward(8, "fp32", 50, everywhere=True),
    draw_backward(8, "fp32", 93, extracted=True, everywhere=True),
    draw_backward(8, "bf16", 93, extracted=True, everywhere=True),
    draw_backward(8, "fp32", 97, extracted=True, several=True, everywhere=True),
    draw_backward(8, "bf16", 105, extracted=True, several=True, everywhere=True),
    draw_backward(8, "fp32", 67, kind=tanh_normal.MEDIAN, extracted=True, everywhere=True),
    draw_backward(8, "fp32", 209, kind=tanh_normal.MODE, extracted=True, everywhere=True),
    draw_backward(8, "fp32", 320, kind=tanh_normal.MEAN, extracted=True, everywhere=True),
    draw_backward(8, "bf16", 70, span=1, clamp=1),
    draw_backward(17, "fp32", 54),
    draw_backward(257, "fp32", 54, everywhere=True),
    draw_backward(257, "bf16", 66),
    score(8, "fp32", 36, everywhere=True),
    score(17, "bf16", 51, span=1),
    score(13, "bf16", 45.5),
    score_backward(8, "fp32", 45, to_value=True, everywhere=True),
]
