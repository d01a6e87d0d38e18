"""The specialisations of TruncatedNormal's kernels whose machine code is looked at.

The shortest way is that of a tile without outer elements.
"""

from __future__ import annotations

from typing import Any

from fastprob.kernels import truncated_normal
from fastprob.kernels._launch import FLAT_TILE
from fastprob.kernels.truncated_normal import Form, backward_form, forward_form
from tests.kernels import codegen_normal
from tests.kernels.accesses import flat, forward, size_of, through
from tests.kernels.codegen_normal import APART, ROWS, tiling
from tests.kernels.machine import Case


def _types(dtype: str) -> dict[str, str]:
    return {
        **codegen_normal.types(dtype),
        **dict.fromkeys(("low", "high"), f"*{dtype}"),
        **dict.fromkeys(("clamp_low", "clamp_high"), "*fp32"),
        **dict.fromkeys(("clamp_lo", "clamp_hi"), "fp32"),
        **dict.fromkeys(("low_row", "low_column", "high_row", "high_column"), "i64"),
    }


def _limits(kernel: Any, dtype: str, tensors: bool, clamp: int, **wanted: bool) -> dict[str, Any]:
    """The bounds, numbers or tensors `[A]` that the batch repeats, and what a case leaves out."""
    layout = {"LOW": -1, "HIGH": -1}
    if tensors:
        # A stride of 1 is a constant to Triton, or no load would be of a vector.
        rows = APART[dtype]
        layout = {"LOW": rows, "HIGH": rows, "low_column": 1, "high_column": 1}
    wanted = {
        **wanted, "low": tensors, "high": tensors, "lo": not tensors, "hi": not tensors,
        **dict.fromkeys(("clamp_lo", "clamp_hi"), clamp == 1),
        **dict.fromkeys(("clamp_low", "clamp_high"), clamp == 2),
    }  # fmt: skip
    none = {n: None for n, needed in wanted.items() if not needed and n in kernel.arg_names}
    return {**layout, **none}


def _read(a: int, dtype: str, tensors: bool, clamp: int, others: int) -> dict[str, int]:
    """How many tensors are read one for one, and how many `[A]`.

    Bounds that the batch repeats are of the first kind where a row is one or more vectors: the
    compiler does not see that a thread's vectors are the same ones.
    """
    whole = tensors and a * size_of(dtype) % 16 == 0
    return {"loads": others + 2 * whole, "repeated": 2 * (tensors and not whole) + 2 * (clamp == 2)}


def _form(form: Form, amd: Form, warps: int) -> dict[str, Any]:
    """What a case says of the form of its kernel."""
    return {
        "turns": 2 if form.cut else 1,
        "registers": form.registers,
        "amd": {"warps": amd.warps * warps, "CUT": amd.cut},
    }


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
    nvidia: bool = False,
) -> Case:
    how = size_of(dtype), 16 // size_of(dtype), tensors, entropy, ROWS, a
    grid, form = forward_form(*how)
    kernel = truncated_normal.draw_kernel
    random = kind == truncated_normal.RANDOM
    limits = _limits(kernel, dtype, tensors, clamp, entropy=entropy, state=random, ticket=random)
    constants = {
        **tiling(grid, a), "LOC": 0, "SCALE": 0, "KIND": kind, "SCORE": True, "ENTROPY": entropy,
        "CLAMP": clamp, "HOST": not random, "ADVANCE": random, "KEEP": False, "FAST": True,
        "CUT": form.cut, "seed": None, "call": None, "used": None, **limits,
    }  # fmt: skip
    name = (
        f"truncated-normal-draw-{a}-{dtype}-tensors={tensors}-clamp={clamp}-entropy={entropy}-"
        f"kind={kind}"
    )
    return Case(
        name, kernel, _types(dtype), constants, form.warps * grid.warps,
        grid.tile,
        (3 + (1 + entropy) / a) * size_of(dtype), slots,
        everywhere=everywhere, nvidia=nvidia,
        through=through(
            grid, a, dtype, 2, stores=1, sums=1 + entropy, random=random,
            warps=form.warps * grid.warps,
        ),
        **_form(form, forward_form(*how, amd=True)[1], grid.warps),
        **forward(
            grid, a, dtype, **_read(a, dtype, tensors, clamp, 2), stores=1, sums=1 + entropy,
            warps=form.warps * grid.warps, random=random,
        ),
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
    nvidia: bool = False,
) -> Case:
    count, warps = FLAT_TILE
    form = backward_form(size_of(dtype))
    kernel = truncated_normal.draw_backward_kernel
    random = kind == truncated_normal.RANDOM
    constants = {
        "A": a, "COUNT": count, "VALUE": 0, "LOC": 0, "SCALE": 0, "KIND": kind,
        "PATHWISE": True, "BY_VALUE": True, "BY_SCORE": True, "BY_ENTROPY": entropy,
        "CLAMP": clamp, "FAST": True, "CUT": form.cut,
        **_limits(kernel, dtype, tensors, clamp, grad_entropy=entropy, used=random),
    }  # fmt: skip
    name = (
        f"truncated-normal-draw-backward-{a}-{dtype}-tensors={tensors}-clamp={clamp}-"
        f"entropy={entropy}-kind={kind}"
    )
    return Case(
        name, kernel, _types(dtype), constants, form.warps * warps, count,
        (5 + (1 + entropy) / a) * size_of(dtype), slots, everywhere=everywhere, nvidia=nvidia,
        **_form(form, backward_form(size_of(dtype), amd=True), warps),
        **flat(
            a, dtype, **_read(a, dtype, tensors, clamp, 3), stores=2, warps=form.warps,
            by_first=entropy, random=random,
        ),
    )  # fmt: skip


def score(
    a: int,
    dtype: str,
    slots: float | None = None,
    *,
    tensors: bool = False,
    entropy: bool = False,
    everywhere: bool = False,
    nvidia: bool = False,
) -> Case:
    how = size_of(dtype), 16 // size_of(dtype), tensors, entropy, ROWS, a
    grid, form = forward_form(*how)
    kernel = truncated_normal.score_kernel
    constants = {
        **tiling(grid, a), "LOC": 0, "SCALE": 0, "VALUE": 0, "SCORE": True, "ENTROPY": entropy,
        "FAST": True, "CUT": form.cut, **_limits(kernel, dtype, tensors, 0, entropy=entropy),
    }  # fmt: skip
    return Case(
        f"truncated-normal-score-{a}-{dtype}-tensors={tensors}-entropy={entropy}", kernel,
        _types(dtype), constants, form.warps * grid.warps, grid.tile,
        (3 + (1 + entropy) / a) * size_of(dtype), slots, everywhere=everywhere, nvidia=nvidia,
        through=through(
            grid, a, dtype, _read(a, dtype, tensors, 0, 3)["loads"], sums=1 + entropy,
            warps=form.warps * grid.warps,
        ),
        **_form(form, forward_form(*how, amd=True)[1], grid.warps),
        **forward(
            grid, a, dtype, **_read(a, dtype, tensors, 0, 3), stores=0, sums=1 + entropy,
            warps=form.warps * grid.warps,
        ),
    )  # fmt: skip


def score_backward(
    a: int,
    dtype: str,
    slots: float | None = None,
    *,
    tensors: bool = False,
    to_value: bool = False,
    everywhere: bool = False,
) -> Case:
    count, warps = FLAT_TILE
    form = backward_form(size_of(dtype))
    kernel = truncated_normal.score_backward_kernel
    constants = {
        "A": a, "COUNT": count, "LOC": 0, "SCALE": 0, "VALUE": 0, "BY_SCORE": True,
        "BY_ENTROPY": True, "TO_VALUE": to_value, "FAST": True, "CUT": form.cut,
        **_limits(kernel, dtype, tensors, 0, grad_value=to_value),
    }  # fmt: skip
    amd = backward_form(size_of(dtype), amd=True)
    return Case(
        f"truncated-normal-score-backward-{a}-{dtype}-tensors={tensors}-value={to_value}", kernel,
        _types(dtype), constants, form.warps * warps, count,
        (5 + to_value + 3 / a) * size_of(dtype), slots, everywhere=everywhere,
        **_form(form, amd, warps),
        **flat(
            a, dtype, **_read(a, dtype, tensors, 0, 3), stores=2 + to_value, warps=form.warps,
            by_row=2, by_first=True,
        ),
    )  # fmt: skip


# All that can be asked of a kernel at once.
ALL: dict[str, Any] = {"tensors": True, "clamp": 2, "entropy": True}
# What the kernels take, and a tenth. With 97 slots memory would be the limit in fp32.
CASES = [
    draw(8, "fp32", 142, everywhere=True),
    draw(8, "bf16", 147),
    draw(8, "bf16", 166, tensors=True, everywhere=True),
    draw(8, "bf16", 168, tensors=True, clamp=1),
    draw(17, "fp32", 175, entropy=True),
    draw(8, "fp32", 89, kind=truncated_normal.MEAN),
    # A tile of 16 warps, whose threads can have 128 registers.
    draw(600, "bf16", nvidia=True, **ALL),
    draw(600, "fp32", 241, nvidia=True, **ALL),
    # Tiles that begin in front of their rows.
    draw(257, "bf16", nvidia=True, **ALL),
    draw(103, "bf16", 173),
    # Rows in chunks.
    draw(1025, "fp32", 168, nvidia=True),
    draw(1025, "fp32", 253, nvidia=True, **ALL),
    draw(1025, "fp32", 220, nvidia=True, tensors=True, clamp=2),
    draw(1025, "bf16", 264, nvidia=True, **ALL),
    draw(1500, "bf16", 163, nvidia=True),
    draw(1500, "fp32", 217, nvidia=True, **ALL),
    draw(1500, "bf16", nvidia=True, **ALL),
    draw(1504, "bf16", 199, nvidia=True, **ALL),
    draw(4096, "bf16", 192, nvidia=True, **ALL),
    draw_backward(8, "fp32", 181, everywhere=True),
    draw_backward(8, "bf16", 184, everywhere=True),
    draw_backward(8, "bf16", 198, tensors=True, everywhere=True),
    draw_backward(8, "bf16", 222, nvidia=True, **ALL),
    draw_backward(17, "fp32", nvidia=True, **ALL),
    draw_backward(17, "bf16", 241, tensors=True, clamp=1),
    draw_backward(8, "bf16", entropy=True, everywhere=True),
    draw_backward(8, "bf16", entropy=True, kind=truncated_normal.MEDIAN),
    score(8, "fp32", 108, entropy=True, everywhere=True),
    score(8, "bf16", tensors=True, entropy=True),
    score(600, "fp32", 164, nvidia=True, tensors=True, entropy=True),
    score(1025, "fp32", 170, nvidia=True, tensors=True, entropy=True),
    score(1500, "bf16", nvidia=True, tensors=True, entropy=True),
    score(1504, "bf16", 134, nvidia=True, tensors=True, entropy=True),
    score(4096, "bf16", 119, nvidia=True, tensors=True, entropy=True),
    score_backward(8, "fp32", 122, everywhere=True),
    score_backward(17, "bf16", 154),
    score_backward(8, "bf16", 131, to_value=True, everywhere=True),
]
