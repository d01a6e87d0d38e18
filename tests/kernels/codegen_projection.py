"""The specialisations of the projections' kernels whose machine code is looked at."""

from __future__ import annotations

import triton.language as tl

from fastprob.kernels import projection
from fastprob.kernels._launch import FLAT_TILE
from tests.kernels.accesses import Accesses, vectors
from tests.kernels.codegen_normal import ROWS
from tests.kernels.machine import Case

SIZES = {"fp32": 4, "bf16": 2, "i64": 8, "i32": 4, "i8": 1, "i1": 1}
FLOATS = ("fp32", "bf16", "fp16")


def _work(dtype: str) -> tl.dtype:
    if dtype in FLOATS:
        return tl.float32
    return tl.int64 if SIZES[dtype] > 2 else tl.int32


def elements(
    name: str, value: str, out: str, slots: float, *, a: int = 1, each: bool = False,
    rounded: bool = False, table: int = 0, everywhere: bool = False,
) -> Case:  # fmt: skip
    count, warps = FLAT_TILE
    work = _work(value if rounded else out)
    number = "fp32" if work == tl.float32 else "i64"
    types = {
        "value": f"*{value}", "out": f"*{out}", "low": f"*{out}", "high": f"*{out}",
        "table": "*i64", "lo": number, "hi": number, "n": "i64", "total": "i64",
        "value_row": "i64", "value_column": "i64",
    }  # fmt: skip
    constants = {
        "A": a, "COUNT": count, "VALUE": 0, "EACH": each, "LAST": a, "ROUND": rounded,
        "TABLE": table, "WORK": work,
    }  # fmt: skip
    absent = {"low": not each, "high": not each, "table": not table, "lo": each, "hi": each,
              "n": table != 2}  # fmt: skip
    constants.update(dict.fromkeys((n for n, gone in absent.items() if gone), None))
    # Bounds of a row of vectors are two loads, of others one for each element.
    alike = a * SIZES[out] % 16 == 0
    return Case(
        f"projection-{name}-{value}-{out}", projection.elements_kernel, types, constants, warps,
        count, SIZES[value] + SIZES[out], slots, everywhere=everywhere,
        **_one_for_one(
            count, warps, [value], out, more=2 * (each and alike),
            single=2 * (each and not alike) + bool(table),
        ),
    )  # fmt: skip


def _one_for_one(
    count: int, warps: int, read: list[str], out: str, *, single: int, more: int = 0
) -> Accesses:
    """What is demanded of tensors that are read and written one for one.

    Args:
        count: elements of a program.
        warps: of a program.
        read: types of the tensors that are read.
        out: that of the one that is written.
        single: others that a thread reads one element at a time: bounds, a table, a mask.
        more: 128-bit loads besides.
    """
    loads = sum(vectors(SIZES[name], count, warps) for name in read) + more
    stores = vectors(SIZES[out], count, warps)
    return {"accesses": (loads, stores), "narrow": (single * count // (32 * warps), 0)}


def clamp_backward(dtype: str, slots: float, a: int = 1, everywhere: bool = False) -> Case:
    count, warps = FLAT_TILE
    each = a > 1
    types = {
        **dict.fromkeys(("grad", "value", "out", "low", "high"), f"*{dtype}"),
        **dict.fromkeys(("lo", "hi"), "fp32"),
        **dict.fromkeys(
            ("total", "grad_row", "grad_column", "value_row", "value_column"), "i64"
        ),
    }  # fmt: skip
    constants = {"A": a, "COUNT": count, "GRAD": 0, "VALUE": 0, "EACH": each}
    constants.update(dict.fromkeys(("lo", "hi") if each else ("low", "high"), None))
    return Case(
        f"projection-clamp-backward-{a}-{dtype}", projection.clamp_backward_kernel, types,
        constants, warps, count, 3 * SIZES[dtype], slots, everywhere=everywhere,
        **_one_for_one(count, warps, [dtype] * 2, dtype, single=2 * each),
    )  # fmt: skip


def one_hot(
    widths: tuple[int, ...], value: str, out: str, slots: float, *, masked: bool = False,
    everywhere: bool = False,
) -> Case:  # fmt: skip
    a, parts = sum(widths), len(widths)
    size = min(SIZES[value], SIZES[out])
    begins = projection.begins(widths)
    segments = (1, a) if begins else (parts, max(widths))
    grid = projection.one_hot_grid(ROWS, a, *segments, size)
    work = _work(value)
    member = value == out
    types = {
        "value": f"*{value}", "out": f"*{out}", "members": "*i8", "mask": "*i1", "tables": "*i32",
        "rows": "i64",
    }  # fmt: skip
    constants = {
        "A": a, "PARTS": parts, "PERIOD": a, "MASKED": masked, "MEMBER": member, "KEEP": False,
        "WORK": work, "LEAST": -(2**63) if work == tl.int64 else -(2**31), "members": None,
    }  # fmt: skip
    if not masked:
        constants["mask"] = None
    if parts == 1:
        constants["tables"] = None
    kernel = projection.one_hot_kernel
    if grid.count:
        constants |= {
            "COUNT": grid.count, "TILE": grid.tile, "WIDTH": grid.width, "ROWS": grid.rows,
            "OWN": grid.own, "GATHER": grid.gather, "BEGINS": begins,
        }  # fmt: skip
    else:
        kernel = projection.wide_one_hot_kernel
        del types["rows"]
        constants["COUNT"] = grid.tile
    name = "x".join(map(str, widths)) + ("-mask" if masked else "")
    return Case(
        f"projection-one-hot-{name}-{value}-{out}", kernel, types, constants, grid.warps,
        grid.tile, SIZES[value] + SIZES[out], slots,
        everywhere=everywhere,
        # Of a wide segment what one whole chunk takes.
        **_one_for_one(grid.count or grid.tile, grid.warps, [value], out, single=masked),
    )  # fmt: skip


# What was measured and 15%. All are bound by memory, whose limit is 62 slots at 8 bytes, but for a
# mask over segments of several widths in bf16: 39 slots at 4 bytes, where memory allows 31.
CASES = [
    elements("clamp", "fp32", "fp32", 5.8, everywhere=True),
    elements("clamp", "bf16", "bf16", 7.9),
    elements("clamp", "i64", "i64", 15),
    elements("clamp-each-8", "fp32", "fp32", 6.7, a=8, each=True),
    elements("clamp-each-17", "fp32", "fp32", 23, a=17, each=True),
    elements("index", "fp32", "fp32", 9.3, rounded=True),
    elements("nearest", "i64", "i64", 17, rounded=True, table=1),
    clamp_backward("fp32", 8.9, everywhere=True),
    clamp_backward("fp32", 27, a=17),
    one_hot((8,), "fp32", "i64", 20.8, everywhere=True),
    one_hot((8,), "fp32", "fp32", 18.6),
    one_hot((8,), "i64", "i64", 33),
    one_hot((8,), "bf16", "bf16", 24.7, masked=True),
    one_hot((64,), "fp32", "i1", 16.5),
    one_hot((17,), "fp32", "i64", 33, everywhere=True),
    one_hot((17,), "fp32", "fp32", 51, masked=True),
    one_hot((4, 1, 9, 2), "fp32", "i64", 19.5, everywhere=True),
    one_hot((4, 3, 4), "bf16", "bf16", 44, masked=True),
    one_hot((10, 12, 8), "fp32", "i64", 41),
    one_hot((40, 3, 30), "fp32", "i64", 38),
    one_hot((3000,), "fp32", "i64", 34, everywhere=True),
]
