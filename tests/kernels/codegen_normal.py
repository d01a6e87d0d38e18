"""The specialisations of the Normal's kernels whose machine code is looked at."""

from __future__ import annotations

from dataclasses import replace

from fastprob.kernels import normal
from fastprob.kernels._launch import FLAT_TILE, Grid, forward_grid
from tests.kernels.accesses import flat, forward, size_of, through, vectors
from tests.kernels.machine import Case

ROWS = 1 << 20


def types(dtype: str) -> dict[str, str]:
    """Types of the arguments of location-scale kernels whose floats are of `dtype`."""
    floats = [
        "loc", "scale", "value", "score", "entropy",
        "grad_value", "grad_score", "grad_entropy", "grad_loc", "grad_scale", "grad_mapped",
        "mapped",
    ]  # fmt: skip
    integers = [
        "seed", "call", "total_rows", "total", "rows", "loc_row", "loc_column", "scale_row",
        "scale_column", "value_row", "value_column", "mapped_row", "mapped_column", "out_row",
    ]  # fmt: skip
    return {
        **dict.fromkeys(floats, f"*{dtype}"),
        **dict.fromkeys(integers, "i64"),
        **dict.fromkeys(("state", "used"), "*i64"),
        **dict.fromkeys(("low", "high"), "*fp32"),
        **dict.fromkeys(("lo", "hi", "bias", "least", "floor"), "fp32"),
        "ticket": "*i32",
    }


def tiling(grid: Grid, a: int) -> dict[str, int | bool]:
    """The constants of a forward pass over rows of `a`."""
    return {
        "A": a, "COUNT": grid.count, "TILE": grid.tile, "ROWS": grid.rows, "OWN": grid.own,
        "GATHER": grid.gather, "WIDE": grid.wide,
    }  # fmt: skip


# Layouts of rows that lie apart, by strides that are multiples of 128 bits: those of a raw output
# of loc and scale side by side, of chunks, and of a row that the batch repeats. One more where they
# begin anew for each sample.
APART = {"fp32": 6, "bf16": 10, "fp16": 10}


def written(writes: bool, several: bool, scattered: int) -> int:
    """What `through` is told of stores: none of several samples, which its loads tell apart.

    Where those are no vectors either, the way is that of the first sample, which writes the scale.
    """
    if several:
        return 2 if scattered else 0
    return 1 + writes


def summed(dtype: str) -> dict[str, str]:
    """Types of the arguments, where the gradients of several samples are to be added up in fp32."""
    return {**types(dtype), **dict.fromkeys(("grad_loc", "grad_scale"), "*fp32")}


def columns(flags: dict[str, int]) -> dict[str, int]:
    """The column strides of strided parameters: 1 is a constant to Triton, or no vector is read."""
    return {"loc_column": 1, "scale_column": 1} if flags.get("LOC", 0) >= 6 else {}


def draw(
    a: int, dtype: str, slots: float | None = None, everywhere: bool = False,
    nvidia: bool = False, **flags,
) -> Case:  # fmt: skip
    grid = forward_grid(ROWS, a, 16 // size_of(dtype))
    given = {
        "RANDOM": True, "SCORE": True, "ENTROPY": False, "CLAMP": 0, "KEEP": False, "MAP": 0,
        **flags,
    }  # fmt: skip
    constants = {
        **tiling(grid, a), "LOC": 0, "SCALE": 0, **given, "HOST": not given["RANDOM"],
        "ADVANCE": given["RANDOM"], "FAST": True, "seed": None, "call": None, **columns(flags),
    }  # fmt: skip
    wanted = {
        "score": given["SCORE"], "entropy": given["ENTROPY"], "used": given["KEEP"],
        "state": given["RANDOM"], "ticket": given["RANDOM"], "lo": given["CLAMP"] == 1,
        "mapped": given["MAP"], "bias": given["MAP"], "least": given["MAP"],
        "floor": given["MAP"], "hi": given["CLAMP"] == 1, "low": given["CLAMP"] == 2,
        "high": given["CLAMP"] == 2,
    }  # fmt: skip
    constants.update(dict.fromkeys((n for n, needed in wanted.items() if not needed), None))
    name = "-".join([f"draw-{a}-{dtype}", *(f"{k}={v}" for k, v in flags.items())])
    # A scale that is mapped is written once, by tiles of the first sample alone.
    several = bool(given["MAP"] and constants["SCALE"] % 2)
    writes = given["MAP"] > several
    moved = (3 + writes + given["SCORE"] / a) * size_of(dtype)
    elements = grid.tile
    # Of those begun anew for each sample from rows apart no stride is known; from others no vector
    # that a sample may begin within.
    apart = (1, 3) if a * size_of(dtype) % 16 else (3,)
    scattered = (given.get("LOC") in apart) + (given.get("SCALE") in apart)
    each = vectors(
        size_of(dtype), min(grid.count, grid.tile) if grid.wide else grid.count, grid.warps
    )
    # In a tile, and the last one where it has code of its own: the value, and the scale of the
    # first sample or its end.
    stores = (3 if grid.wide else 6 if a % 4 == 0 else 2) * each
    return Case(
        f"normal-{name}", normal.draw_kernel, types(dtype), constants, grid.warps, elements,
        moved, slots, everywhere=everywhere, nvidia=nvidia,
        registers=normal.most_registers(grid, (constants["LOC"], constants["SCALE"]) != (0, 0)),
        through=through(
            grid, a, dtype, 2, stores=written(writes, several, scattered),
            sums=given["SCORE"] + given["ENTROPY"], random=given["RANDOM"],
        ),
        **forward(
            grid, a, dtype, 2 - scattered, 1 + writes, sums=given["SCORE"] + given["ENTROPY"],
            random=given["RANDOM"], keep=given["KEEP"], repeated=2 * (given["CLAMP"] == 2),
            scattered=scattered,
        ),
        anywhere=(0, stores) if several else None,
    )  # fmt: skip


def draw_backward(
    a: int, dtype: str, slots: float | None = None, everywhere: bool = False, **flags
) -> Case:
    count, warps = FLAT_TILE
    mapping = flags.get("MAP", 0)
    constants = {
        "A": a, "COUNT": count, "VALUE": 0, "LOC": 0, "SCALE": 0, "RANDOM": True, "PATHWISE": True,
        "BY_VALUE": True, "BY_SCORE": True, "BY_ENTROPY": False, "CLAMP": 1, "FAST": True,
        "grad_entropy": None, "low": None, "high": None, "MAP": 0, "MAPPED": -1, "OUT": 0,
        **({} if mapping else dict.fromkeys(("bias", "least", "floor"), None)), **flags,
        **columns(flags),
    }  # fmt: skip
    name = "-".join([f"draw-backward-{a}-{dtype}", *(f"{k}={v}" for k, v in flags.items())])
    several = bool(mapping and constants["SCALE"] % 2)
    out = "fp32" if several else dtype
    each = vectors(size_of(dtype), count, warps)
    # Of loc and scale side by side in rows of no multiple of 128 bits none has vectors.
    apart = 2 if several and a % 4 else 0
    return Case(
        f"normal-{name}", normal.draw_backward_kernel, summed(dtype) if several else types(dtype),
        constants, warps, count, (3 + 1 / a) * size_of(dtype) + 2 * size_of(out), slots,
        everywhere=everywhere,
        **flat(
            a, dtype, 3 - apart, 2 - apart, random=True, out=out, scattered=(apart, apart)
        ),
        # Those of the scale's gradient too, in a tile of the first sample or its end.
        anywhere=((5 if a % 4 == 0 else 2) * each, 0) if several else None,
    )  # fmt: skip


def score(
    a: int, dtype: str, slots: float | None = None, everywhere: bool = False, entropy: bool = False
) -> Case:
    grid = forward_grid(ROWS, a, 16 // size_of(dtype))
    constants = {
        **tiling(grid, a), "LOC": 0, "SCALE": 0, "VALUE": 0, "SCORE": True, "ENTROPY": entropy,
        "FAST": True, **({} if entropy else {"entropy": None}),
    }  # fmt: skip
    name = f"normal-score{'-entropy' if entropy else ''}-{a}-{dtype}"
    return Case(
        name, normal.score_kernel, types(dtype), constants, grid.warps, grid.tile,
        (3 + (1 + entropy) / a) * size_of(dtype), slots, everywhere=everywhere,
        through=through(grid, a, dtype, 3, sums=1 + entropy),
        **forward(grid, a, dtype, 3, 0, sums=1 + entropy),
    )  # fmt: skip


def score_backward(
    a: int, dtype: str, slots: float | None = None, everywhere: bool = False
) -> Case:
    count, warps = FLAT_TILE
    constants = {
        "A": a, "COUNT": count, "LOC": 0, "SCALE": 0, "VALUE": 0, "BY_SCORE": True,
        "BY_ENTROPY": True, "TO_VALUE": False, "FAST": True, "grad_value": None,
    }  # fmt: skip
    return Case(
        f"normal-score-backward-{a}-{dtype}", normal.score_backward_kernel, types(dtype),
        constants, warps, count, (5 + 2 / a) * size_of(dtype), slots, everywhere=everywhere,
        **flat(a, dtype, 3, 2, by_first=True),
    )  # fmt: skip


def from_host(case: Case) -> Case:
    """A draw whose seed and number are two numbers of the host, as torch's generators give them."""
    changed = {"HOST": True, "ADVANCE": False, "state": None, "ticket": None}
    constants = {k: v for k, v in case.constants.items() if k not in ("seed", "call")}
    return replace(case, name=f"{case.name}-host", constants={**constants, **changed})


# KERNELS.md's limits: 35 for a draw, 47 where A is no power of two, 17 for a score, 37 backward.
CASES = [
    draw(8, "fp32", 35, everywhere=True),
    draw(8, "bf16", 40),
    from_host(draw(8, "fp32", 35)),
    # Parameters that begin anew for each sample, of rows that lie apart.
    draw(8, "fp32", 47, LOC=1, SCALE=3),
    draw(8, "fp32", 40, CLAMP=1, KEEP=True),
    draw(8, "fp32", 40, CLAMP=2),
    draw(8, "fp32", 9, RANDOM=False),
    draw(64, "fp32", 35),
    draw(1, "fp32", 35),
    draw(17, "fp32", 47, everywhere=True),
    draw(17, "bf16", 47),
    draw(3, "fp32", 47),
    draw(257, "fp32", 42),
    # Tiles that hold whole vectors of 8, and that begin in front of their rows.
    draw(13, "bf16", 45),
    draw(257, "bf16", 46),
    # Rows in chunks: whole ones, of programs with several rows, and with one.
    draw(4096, "fp32", 35),
    draw(819, "fp32", 41),
    draw(1025, "fp32", 45, nvidia=True),
    draw(1025, "bf16", 48),
    draw(1500, "fp32", 38),
    draw(1500, "bf16", 44),
    draw(1025, "fp32", nvidia=True, LOC=1, SCALE=1, CLAMP=1, KEEP=True),
    # From a raw output.
    draw(8, "fp32", 65, MAP=1, LOC=6, SCALE=6),
    draw(8, "bf16", 62, MAP=1, LOC=10, SCALE=10, everywhere=True),
    # Several samples from one.
    draw(8, "fp32", 61, MAP=1, LOC=7, SCALE=7, everywhere=True),
    draw(8, "bf16", 63, MAP=1, LOC=11, SCALE=11, everywhere=True),
    draw(8, "fp32", 60, MAP=1, LOC=1, SCALE=1),
    draw(17, "fp32", 104, MAP=1, LOC=3, SCALE=3),
    draw(64, "fp32", 63, MAP=1, LOC=7, SCALE=7),
    draw(1500, "fp32", MAP=1, LOC=7, SCALE=7),
    draw(4096, "fp32", MAP=1, LOC=7, SCALE=7),
    # Chunks of a tensor.
    draw(8, "bf16", 42, LOC=10, SCALE=10, everywhere=True),
    draw(24, "bf16", 44, LOC=10, SCALE=10, everywhere=True),
    draw(12, "fp32", 42, LOC=6, SCALE=6),
    draw_backward(8, "fp32", 37, everywhere=True),
    draw_backward(8, "fp32", 88, MAP=1, LOC=6, SCALE=6, OUT=6),
    draw_backward(8, "bf16", 78, MAP=1, LOC=10, SCALE=10, OUT=10, everywhere=True),
    draw_backward(8, "fp32", 83, MAP=1, LOC=7, SCALE=7, MAPPED=0, OUT=6, everywhere=True),
    draw_backward(8, "bf16", 90, MAP=1, LOC=11, SCALE=11, MAPPED=0, OUT=6, everywhere=True),
    draw_backward(17, "fp32", 157, MAP=1, LOC=3, SCALE=3, MAPPED=0, OUT=2),
    draw_backward(8, "bf16", 48, LOC=10, SCALE=10, everywhere=True),
    draw_backward(24, "fp32", 56, LOC=6, SCALE=6),
    draw_backward(8, "bf16", 46),
    draw_backward(17, "fp32", 47),
    score(8, "fp32", 17, everywhere=True),
    score(8, "fp32", 17, entropy=True),
    score(17, "fp32", 25, entropy=True),
    score(1025, "fp32", 26, everywhere=True, entropy=True),
    score(8, "bf16", 19, entropy=True),
    score(103, "bf16", 21.5),
    score_backward(8, "fp32", 25, everywhere=True),
    score_backward(17, "fp32", 35),
]
