"""The specialisations of the categorical kernels whose machine code is looked at."""

from __future__ import annotations

from fastprob.kernels import _categorical_rows as rows
from fastprob.kernels import categorical as kernels
from tests.kernels.machine import Case

ROWS = 1 << 22
RANDOM, MEDIAN = rows.RANDOM.value, rows.MEDIAN.value
MODE, MEAN = rows.MODE.value, rows.MEAN.value
# Targets a case is compiled for.
EVERYWHERE, NVIDIA = "every target", "all of NVIDIA's"
ONE_HOT, PROBS_VALUE = rows.ONE_HOT.value, rows.PROBS_VALUE.value


def _types(dtype: str, value: str = "i64") -> dict[str, str]:
    floats = "given", "score", "entropy", "grad", "grad_value", "grad_score", "grad_entropy"
    integers = (
        "seed", "call", "total_rows", "rows", "given_row", "given_column", "mask_row",
        "mask_column", "value_row", "value_column",
    )  # fmt: skip
    return {
        **dict.fromkeys(floats, f"*{dtype}"),
        **dict.fromkeys(integers, "i64"),
        **dict.fromkeys(("index", "state", "used"), "*i64"),
        "value": f"*{value}",
        "mask": "*u8",
        "ticket": "*i32",
        "neg_inf": "fp32",
    }


def _size(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def _case(
    name, kernel, tile, a, dtype, types, flags, wanted, moved, slots, where, stored, registers=None,
    once=True,
):  # fmt: skip
    """A case; slots of rows in chunks are counted where a kernel goes over them `once`."""
    constants = {
        "A": a, "COUNT": tile.count, "REP": tile.rep, "ROWS": tile.rows, "LANES": tile.lanes,
        "PIECE": tile.piece, "OWN": tile.own, "VECTOR": tile.vector, "CHUNKS": tile.chunks,
        "GIVEN": 0, "EPS": 2.0**-23, "FAST": True, **flags,
        **dict.fromkeys((n for n, needed in wanted.items() if not needed), None),
    }  # fmt: skip
    wide = tile.chunks > 0
    elements = a if wide else tile.own * a
    # Rows of less than 16 bytes are read whole.
    whole = wide or bool(tile.piece) or a * _size(dtype) >= 16
    held = tile.count if wide else elements
    vectors = held * _size(dtype) // (32 * tile.warps) // 16 if whole else 0
    need = a + max(tile.vector - 1, 0)
    if tile.vector:
        # What lies at the ends of a row is written one element at a time.
        stored = stored * max(0, a // tile.lanes - 1) * tile.lanes // a if not wide else stored
    return Case(
        f"categorical-{name}", kernel, types, constants, tile.warps, elements, moved,
        slots, everywhere=where == EVERYWHERE, nvidia=where == NVIDIA, registers=registers,
        counted=once or not wide, turns=-(-need // tile.count) if wide else 1,
        through=("LDG.128",) if wide else (),
        accesses=(vectors, vectors * stored // _size(dtype)),
    )  # fmt: skip


def _name(start, a, dtype, flags):
    return "-".join([f"{start}-{a}-{dtype}", *(f"{k}={v}" for k, v in flags.items())])


def draw(a: int, dtype: str, slots: float | None = None, where: str = "sm_90", **flags) -> Case:
    """Index, score and entropy; with a VALUE also one-hot vectors, or probabilities."""
    flags = {**flags}
    name = _name("draw", a, dtype, flags)
    value = flags.get("VALUE", 0)
    given = {
        "MASK": -1, "PROBS": False, "KIND": RANDOM, "INDEX": True, "VALUE": 0, "SCORE": True,
        "ENTROPY": True, "KEEP": False, **flags,
    }  # fmt: skip
    twice = given["PROBS"] and given["ENTROPY"]
    tile = kernels.draw_tiling(ROWS, a, _size(dtype), value, twice)
    given["SHARED"] = tile.shared
    random = given["KIND"] == RANDOM
    given.update(HOST=not random, ADVANCE=random)
    if given.get("GIVEN", 0) >= 4:
        # Of rows that lie apart; a stride of 1 is a constant to Triton.
        given["given_column"] = 1
    wanted = {
        "mask": given["MASK"] >= 0, "index": given["INDEX"], "value": value,
        "score": given["SCORE"], "entropy": given["ENTROPY"], "used": given["KEEP"],
        "state": random, "ticket": random, "seed": False, "call": False,
    }  # fmt: skip
    of_row = 8 * given["INDEX"] + _size(dtype) * (given["SCORE"] + given["ENTROPY"])
    stored = {0: 0, ONE_HOT: 8, PROBS_VALUE: _size(dtype)}[value]
    moved = _size(dtype) + (given["MASK"] >= 0) + stored + of_row / a
    return _case(
        name, kernels.draw_kernel, tile, a, dtype,
        _types(dtype, "i64" if value == ONE_HOT else dtype), given, wanted, moved, slots,
        where, stored, kernels.most_registers_of_draw(tile, value), not (twice or value),
    )  # fmt: skip


def score(a: int, dtype: str, slots: float | None = None, where: str = "sm_90", **flags) -> Case:
    """Score and entropy of stored indices; of int64 one-hot vectors where HOT."""
    name = _name("score", a, dtype, flags)
    hot = flags.get("HOT", False)
    given = {
        "MASK": -1, "PROBS": False, "VALUE": 0, "HOT": False, "INDEX": False, "SCORE": True,
        "ENTROPY": True, **flags,
    }  # fmt: skip
    twice = given["PROBS"] and given["ENTROPY"]
    tile = kernels.score_tiling(ROWS, a, _size(dtype), hot, twice)
    wanted = {"mask": given["MASK"] >= 0, "index": given["INDEX"]}
    moved = _size(dtype) + 8 * given["HOT"] + (8 * (not given["HOT"]) + 2 * _size(dtype)) / a
    return _case(
        name, kernels.score_kernel, tile, a, dtype, _types(dtype), given, wanted, moved, slots,
        where, 0, kernels.most_registers(tile, hot), not (twice or hot),
    )  # fmt: skip


def backward(a: int, dtype: str, slots: float | None = None, where: str = "sm_90", **flags) -> Case:
    """The gradient of score and entropy; with BY_VALUE that of probabilities as well."""
    name = _name("backward", a, dtype, flags)
    tile = kernels.tiling(ROWS, a, _size(dtype), kernels.HELD_BACKWARD, True)
    given = {
        "MASK": -1, "PROBS": False, "VALUE": 0, "BY_VALUE": 0, "BY_SCORE": True,
        "BY_ENTROPY": True, **flags,
    }  # fmt: skip
    wanted = {"mask": given["MASK"] >= 0, "grad_value": given["BY_VALUE"]}
    read = 2 + bool(given["BY_VALUE"])
    moved = read * _size(dtype) + (8 + 2 * _size(dtype)) / a
    return _case(
        name, kernels.backward_kernel, tile, a, dtype, _types(dtype), given, wanted, moved, slots,
        where, _size(dtype), kernels.most_registers_of_backward(tile), False,
    )  # fmt: skip


# What a mean of one-hot vectors asks for.
PROBABILITIES = {
    "KIND": MEAN, "VALUE": PROBS_VALUE, "INDEX": False, "SCORE": False, "ENTROPY": False,
}  # fmt: skip

# KERNELS.md's limits: 33 for a draw at A = 18, 17 at A = 256. The others are what was measured and
# up to 15% more; memory allows 7.8 slots for each byte.
CASES = [
    draw(18, "fp32", 29, where=EVERYWHERE),
    draw(18, "bf16", 29),
    draw(256, "fp32", 17, where=EVERYWHERE),
    draw(256, "bf16", 17),
    # Chunks of a tensor: 19 slots where strides are told in units of 4.
    draw(256, "bf16", 17, GIVEN=10),
    draw(3, "fp32", 53),
    draw(8, "fp32", 28),
    draw(64, "fp32", 21),
    draw(33, "fp32", 22),
    draw(33, "bf16", 24),
    draw(257, "fp32", 23.5, where=EVERYWHERE),
    draw(257, "bf16", 27.5),
    draw(257, "fp32", 30, VALUE=ONE_HOT),
    draw(1000, "fp32", 19),
    draw(1000, "bf16", 20),
    draw(1001, "fp32", 22),
    draw(1001, "bf16", 26.5),
    draw(2048, "fp32", 19),
    draw(2049, "fp32", 26.5, where=NVIDIA),
    draw(8191, "bf16", 17.5),
    draw(4097, "fp32", VALUE=ONE_HOT, where=NVIDIA),
    draw(4097, "bf16", 22),
    draw(8193, "fp32", 15.5),
    draw(8193, "bf16", 17, where=NVIDIA),
    draw(8193, "bf16", where=NVIDIA, MASK=0, PROBS=True),
    draw(8193, "bf16", where=NVIDIA, MASK=0, PROBS=True, KIND=MODE, VALUE=PROBS_VALUE),
    draw(8191, "fp32", where=NVIDIA, MASK=0, VALUE=ONE_HOT),
    draw(8191, "fp32", 44, MASK=0, PROBS=True),
    draw(32768, "fp32", where=EVERYWHERE),
    draw(32767, "fp32", where=EVERYWHERE),
    draw(32767, "bf16"),
    draw(50257, "bf16"),
    draw(18, "fp32", 18.5, KIND=MODE),
    draw(256, "fp32", 14, KIND=MEDIAN),
    draw(18, "fp32", 52, VALUE=ONE_HOT),
    draw(256, "fp32", 24, VALUE=ONE_HOT),
    draw(18, "fp32", 34, MASK=0),
    draw(18, "fp32", 28, PROBS=True),
    draw(16383, "bf16", MASK=0, PROBS=True, where=NVIDIA, **PROBABILITIES),
    draw(16383, "fp32", MASK=0, PROBS=True, where=NVIDIA, **PROBABILITIES),
    score(18, "fp32", 16.5),
    score(256, "fp32", 10, where=EVERYWHERE),
    score(256, "fp32", 20, HOT=True),
    score(257, "fp32", 39.5, HOT=True, where=NVIDIA),
    score(257, "fp32", 47, HOT=True, MASK=0, PROBS=True, where=NVIDIA),
    score(1001, "bf16", 45, HOT=True, where=NVIDIA),
    score(4095, "bf16", HOT=True, MASK=0, where=NVIDIA),
    score(2561, "bf16", HOT=True, MASK=0, PROBS=True, where=NVIDIA),
    score(8192, "bf16", HOT=True, where=NVIDIA),
    score(8191, "bf16", HOT=True, where=NVIDIA),
    score(8191, "fp32", HOT=True, MASK=0),
    score(32768, "fp32", MASK=0),
    score(16383, "bf16", PROBS=True, where=NVIDIA),
    backward(18, "fp32", 40),
    backward(256, "fp32", 21, where=EVERYWHERE),
    backward(256, "fp32", 24.5, BY_VALUE=PROBS_VALUE),
    backward(18, "fp32", 50, PROBS=True, BY_VALUE=PROBS_VALUE),
    backward(33, "fp32", 34),
    backward(257, "bf16", 38),
    backward(1000, "fp32", 21),
    backward(1001, "fp32", 25.5, where=EVERYWHERE),
    backward(1001, "bf16", 33),
    backward(8191, "fp32", 32, where=NVIDIA),
    backward(8193, "bf16", where=NVIDIA, MASK=0, PROBS=True, BY_VALUE=PROBS_VALUE),
    backward(32767, "fp32"),
    backward(32768, "fp32", where=EVERYWHERE, BY_VALUE=PROBS_VALUE),
]
