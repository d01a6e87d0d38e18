"""The specialisations of TruncatedNormal's kernels whose machine code is looked at.

The shortest way is that of a tile without outer elements.
"""

from __future__ import annotations

from typing import Any

from fastprob.kernels import truncated_normal
from fastprob.kernels._launch import FLAT_TILE, forward_grid
from fastprob.kernels.truncated_normal import HALF_WARPS, WARPS
from tests.kernels import codegen_normal
from tests.kernels.codegen_normal import ROWS, tiling
from tests.kernels.machine import Case


def _types(dtype: str) -> dict[str, str]:
    return {
        **codegen_normal.types(dtype),
        **dict.fromkeys(("low", "high"), f"*{dtype}"),
        **dict.fromkeys(("clamp_low", "clamp_high"), "*fp32"),
        **dict.fromkeys(("clamp_lo", "clamp_hi"), "fp32"),
        **dict.fromkeys(("low_row", "low_column", "high_row", "high_column"), "i64"),
    }


def _size(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def _limits(kernel: Any, tensors: bool, clamp: int, **wanted: bool) -> dict[str, Any]:
    """The bounds, numbers or tensors `[A]` that the batch repeats, and what a case leaves out."""
    layout = {"LOW": -1, "HIGH": -1}
    if tensors:
        # A stride of 1 is a constant to Triton, or no load would be of a vector.
        layout = {"LOW": 6, "HIGH": 6, "low_column": 1, "high_column": 1}
    wanted = {
        **wanted, "low": tensors, "high": tensors, "lo": not tensors, "hi": not tensors,
        "clamp_lo": clamp == 1, "clamp_hi": clamp == 1, "clamp_low": False, "clamp_high": False,
    }  # fmt: skip
    none = {n: None for n, needed in wanted.items() if not needed and n in kernel.arg_names}
    return {**layout, **none}


def draw(
    a: int,
    dtype: str,
    slots: float | None = None,
    *,
    tensors: bool = False,
    clamp: int = 0,
    entropy: bool = False,
    kind: int = truncated_normal.RANDOM,
    everywhere: bool = False,
) -> Case:
    grid = forward_grid(ROWS, a, True)
    kernel = truncated_normal.draw_kernel
    random = kind == truncated_normal.RANDOM
    limits = _limits(kernel, tensors, clamp, entropy=entropy, state=random, ticket=random)
    constants = {
        **tiling(grid, a), "LOC": 0, "SCALE": 0, "KIND": kind, "SCORE": True, "ENTROPY": entropy,
        "CLAMP": clamp, "HOST": not random, "ADVANCE": random, "KEEP": False, "FAST": True,
        "seed": None, "call": None, "used": None, **limits,
    }  # fmt: skip
    name = (
        f"truncated-normal-draw-{a}-{dtype}-tensors={tensors}-clamp={clamp}-entropy={entropy}-"
        f"kind={kind}"
    )
    # A wide row is one program, chunk by chunk.
    return Case(
        name, kernel, _types(dtype), constants, WARPS * grid.warps,
        grid.count if grid.wide else grid.tile,
        (3 + (1 + entropy) / a) * _size(dtype), slots, vectors=not grid.wide,
        everywhere=everywhere,
    )  # fmt: skip


def draw_backward(
    a: int,
    dtype: str,
    slots: float | None = None,
    *,
    tensors: bool = False,
    clamp: int = 0,
    entropy: bool = False,
    kind: int = truncated_normal.RANDOM,
    everywhere: bool = False,
) -> Case:
    count, warps = FLAT_TILE
    halves = dtype != "fp32" and not entropy
    kernel = truncated_normal.draw_backward_kernel
    random = kind == truncated_normal.RANDOM
    constants = {
        "A": a, "COUNT": count, "VALUE": 0, "LOC": 0, "SCALE": 0, "KIND": kind,
        "PATHWISE": True, "BY_VALUE": True, "BY_SCORE": True, "BY_ENTROPY": entropy,
        "CLAMP": clamp, "HALVES": halves, "FAST": True,
        **_limits(kernel, tensors, clamp, grad_entropy=entropy, used=random),
    }  # fmt: skip
    name = (
        f"truncated-normal-draw-backward-{a}-{dtype}-tensors={tensors}-clamp={clamp}-"
        f"entropy={entropy}-kind={kind}"
    )
    return Case(
        name, kernel, _types(dtype), constants, warps * (HALF_WARPS if halves else WARPS), count,
        (5 + (1 + entropy) / a) * _size(dtype), slots, everywhere=everywhere,
    )  # fmt: skip


def score(
    a: int, dtype: str, slots: float | None = None, *, entropy: bool, everywhere: bool = False
) -> Case:
    grid = forward_grid(ROWS, a, True)
    kernel = truncated_normal.score_kernel
    constants = {
        **tiling(grid, a), "LOC": 0, "SCALE": 0, "VALUE": 0, "SCORE": True, "ENTROPY": entropy,
        "FAST": True, **_limits(kernel, False, 0, entropy=entropy),
    }  # fmt: skip
    return Case(
        f"truncated-normal-score-{a}-{dtype}-entropy={entropy}", kernel, _types(dtype), constants,
        WARPS * grid.warps, grid.tile, (3 + (1 + entropy) / a) * _size(dtype), slots,
        everywhere=everywhere,
        # Three loads of a tile, and sums of its rows alone to store.
        accesses=(3 * grid.count * _size(dtype) // (32 * WARPS * grid.warps) // 16, 0),
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
    warps *= WARPS if dtype == "fp32" else HALF_WARPS
    kernel = truncated_normal.score_backward_kernel
    constants = {
        "A": a, "COUNT": count, "LOC": 0, "SCALE": 0, "VALUE": 0, "BY_SCORE": True,
        "BY_ENTROPY": True, "TO_VALUE": to_value, "FAST": True,
        **_limits(kernel, False, 0, grad_value=to_value),
    }  # fmt: skip
    return Case(
        f"truncated-normal-score-backward-{a}-{dtype}-value={to_value}", kernel, _types(dtype),
        constants, warps, count, (5 + to_value + 3 / a) * _size(dtype), slots,
        everywhere=everywhere,
    )  # fmt: skip


# What the kernels take, and a tenth. With 97 slots memory would be the limit in fp32.
CASES = [
    draw(8, "fp32", 138, everywhere=True),
    draw(8, "bf16", 158, tensors=True, clamp=1),
    draw(17, "fp32", 160, entropy=True),
    draw(8, "fp32", 89, kind=truncated_normal.MEAN),
    draw_backward(8, "fp32", 183, everywhere=True),
    draw_backward(8, "bf16", 175),
    draw_backward(17, "bf16", 232, tensors=True, clamp=1),
    score(8, "fp32", 100, entropy=True, everywhere=True),
    score_backward(8, "fp32", 123, everywhere=True),
    score_backward(17, "bf16", 143),
    score_backward(8, "bf16", 143, to_value=True),
]
