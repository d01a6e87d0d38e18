"""Categorical and OneHotCategorical: sample by inverse CDF, score and entropy in one pass.

With logits x, d_k = x_k - max(x), e_k = exp(d_k) and S = sum(e), over a row of A categories:

    log p(k) = d_k - log(S)            H = log(S) - sum(e d) / S

A draw is the first k whose running sum of e exceeds u S, with u uniform in (0, 1): one uniform for
a row, where a Gumbel or exponential race takes one for each category. Rows of weights are drawn the
same way from q = w / S, and scored by log(c) with c = clamp(q, EPS, 1 - EPS), as torch does it.

With the gradients gl of the score, gh of the entropy and g of the value's probabilities:

    logits:   dx_k = p_k (g_k - sum(p g) - gl - gh (d_k - sum(p d))) + gl [k drawn]
    weights:  dw_k = (r_k - sum(q r)) / S,   r_k = g_k - gh (log(c_k) + 1) + gl [k drawn] / q_k,
              the last two where q_k was not clamped

Rows lie in one of three ways, chosen at launch:

- SPLIT, A a power of two or long, up to 2560 or 8192: `[REP, ROWS, LANES]` with category
  rep LANES + lane, so that loads are vectors of neighbours and sums go over REP within a thread.
  Where A is no multiple of a vector of 16 bytes, each row is shifted to its place within one:
  vectors are read whole, of the rows beside as well, and what lies at the two ends of a row is
  written element by element. As GATHER gradients take 61 slots at A = 1001, so 23.
- GATHER, any other A, up to 96 and for gradients up to 32: loaded flat and gathered to
  `[REP, ROWS, LANES]` with category lane PIECE + rep: a thread has a piece of a row, in order, in
  its registers, and for A <= 32 a whole row, so that sums and the search need no exchange.
- WIDE: a program goes over one row chunk by chunk, shifted likewise, in one pass with a running
  maximum; a table of the chunks' sums says which one the draw is in, and only that is read again.

Source: Devroye 1986, "Non-Uniform Random Variate Generation", section III.2, for the inverse CDF;
Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, for the running maximum.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastprob.kernels import _categorical_rows as cat
from fastprob.kernels._categorical_backward import backward_kernel
from fastprob.kernels._categorical_draw import draw_kernel
from fastprob.kernels._categorical_score import score_kernel
from fastprob.kernels._launch import (
    NO_STATE,
    State,
    fast,
    launching,
    limited,
    parameter,
    tail,
)


class Tile(NamedTuple):
    """The rows of a program; see the head of this file.

    Attributes:
        programs: number of programs.
        count: elements of a flat tile (GATHER) or of a chunk (WIDE).
        rep: places of a row in a thread, or in front of one another.
        rows: rows of a tile, a power of two.
        lanes: places of a row beside one another.
        piece: categories of a lane for GATHER, else 0.
        own: rows of a tile that are its own.
        vector: elements of 16 bytes, where a row may begin within them; else 0.
        shared: whether the uniforms of a tile are drawn four rows at a time.
        chunks: chunks of a row for WIDE, to the next power of two; else 0.
        warps: warps of a program.
    """

    programs: int
    count: int
    rep: int
    rows: int
    lanes: int
    piece: int
    own: int
    vector: int
    shared: bool
    chunks: int
    warps: int


# Longest rows of a tile: of kernels that read a row twice where it does not stay in registers, and
# of others, whose programs of one warp each take fewer issue slots than a tile of longer rows: a
# draw in fp32 26.5 at A = 2049 where a tile takes 23.3, at 4097 18.1 and 24.7, at 8191 14.0 and
# 23.8. And where rows are few, or of scores of one-hot vectors: 27.9 at A = 2049, in a tile 38.4.
SPLIT_MOST = 8192
SPLIT_MOST_OF_ONCE = 2560
SPLIT_MOST_OF_FEW = 2048
GATHER_MOST = 96
GATHER_MOST_BACKWARD = 32
# Elements of a row in the registers of a thread, for a backward pass, and for a score of one-hot
# vectors whose size is no power of two, which has 8 bytes more of each: with 64 it had a stack of
# 2584 bytes at A = 257.
HELD_BACKWARD = 32
HELD_OF_HOT = 24
# Chunks of a longer row and the warps of its program: 32 elements of a thread, or 16. One warp
# sums up without an exchange: a turn of the draw's loop takes 9.7 issue slots an element in place
# of 10.9 at A = 32767. A table of more sums than these would fill its registers. Where rows are
# read twice they have the largest chunks of which little is empty: by registers, an H200 then has
# 35 MB of rows at a time at A = 8193 in fp32, with one warp each 73, and 50 in its second cache.
CHUNKS = ((4096, 4), (2048, 2), (1024, 1))
MOST_CHUNKS = 64
# Fewer rows than these get more warps each: the more, the fewer rows there are.
FEW_CHUNKED = 2112
FEW_WIDE = 528
WARPS_OF_FEW = 16
# 65,536 of a multiprocessor for 16 warps.
REGISTERS_OF_FEW = 128


@functools.lru_cache(maxsize=4096)
def tiling(
    rows: int, a: int, itemsize: int, held: int = 64, tight: bool = False, once: bool = False
) -> Tile:
    """The tiles for `rows` rows of `a` categories of `itemsize` bytes.

    Args:
        rows: number of rows.
        a: categories.
        itemsize: bytes of one.
        held: elements of a row in the registers of a thread, at the most: 64 are 80 registers for a
            draw and 255 for a backward pass, which spills some, as does a score of one-hot vectors.
        tight: whether a GATHER tile is to be full rather than its threads busy. Without a store of
            a tile's elements busy threads take fewer issue slots: 25.0 and 31.1 at A = 18; with
            one, full tiles do.
        once: whether a kernel reads rows in chunks no second time.
    """
    power = a & (a - 1) == 0
    vector = 16 // itemsize
    # Rows begin at whole vectors, or wherever they do.
    begin = vector if a % vector else 0
    need = a + max(begin - 1, 0)
    most = SPLIT_MOST
    if rows < FEW_WIDE or held == HELD_OF_HOT:
        most = SPLIT_MOST_OF_FEW
    elif once and rows >= FEW_CHUNKED:
        most = SPLIT_MOST_OF_ONCE
    if a > most:
        count, warps = _chunk(rows, a, need, 1 if held > HELD_BACKWARD else 2, once)
        chunks = triton.next_power_of_2(-(-need // count))
        return Tile(rows, count, 1, 1, 1, 0, 1, begin, False, chunks, warps)
    piece = reps = 0
    if power:
        # A thread of its own for each row of up to 64 bytes, 64 elements of a row at the most.
        beside = 1 if a * itemsize <= 64 else 2
        held = triton.next_power_of_2(held)
        least = triton.next_power_of_2(-(-a * vector // held))
        lanes = min(a, max(vector * beside, least))
        threads = max(1, lanes // vector)
        begin = 0
    elif a > (GATHER_MOST if held > HELD_BACKWARD else GATHER_MOST_BACKWARD):
        threads = 2
        while -(-need // (threads * vector)) * vector > held * 5 // 4:
            threads *= 2
        lanes = threads * vector
        reps = -(-need // lanes)
    else:
        begin = 0
        # Odd, so that threads read different banks of shared memory.
        threads = lanes = triton.next_power_of_2(-(-a * 4 // (held * 3)))
        piece = -(-a // lanes) if lanes == 1 else -(-a // lanes) | 1
    rep = triton.next_power_of_2(piece or reps or a // lanes)
    # Rows of a warp: one for each thread, and of short rows several.
    many = max(1, min(4, 32 * threads // a)) if a < 32 else 1
    in_warp = max(1, 32 // threads) * triton.next_power_of_2(many)
    warps = 4 if rows > 264 * 4 * in_warp else 1
    if threads > 32 * warps:
        warps = threads // 32
    tile_rows = max(1, in_warp * warps // max(1, threads // 32))
    shared = tile_rows > 32 * warps
    count, own = 0, tile_rows
    if piece:
        # Elements that are loaded flat: room for all rows, or half of it.
        over = lanes * piece - a
        count = triton.next_power_of_2(tile_rows * a + over)
        fitting = (count // 2 - over) // a
        fitting = fitting // 4 * 4 if tile_rows % 4 == 0 else fitting
        if tight and fitting * 8 >= tile_rows * 7:
            count, own = count // 2, fitting
    return Tile(-(-rows // own), count, rep, tile_rows, lanes, piece, own, begin, shared, 0, warps)


def _chunk(rows: int, a: int, need: int, halves: int, once: bool) -> tuple[int, int]:
    """The chunks of a long row and the warps of its program, see CHUNKS.

    Args:
        rows: number of rows.
        a: categories.
        need: places of a row, those in front of it in a vector among them.
        halves: 2 for chunks of half the size.
        once: as of `tiling`.
    """
    if rows < FEW_WIDE:
        # 16 elements of a thread at most: 32 took 24 bytes of stack more than the registers.
        return (4096 if need <= 4096 else 8192) // halves, WARPS_OF_FEW
    choices = [(count // halves, warps) for count, warps in CHUNKS]
    if rows < FEW_CHUNKED:
        return choices[0]
    if once:
        return next((c for c in choices[::-1] if need <= MOST_CHUNKS * c[0]), choices[0])
    full = (c for c in choices if a * 8 >= -(-need // c[0]) * c[0] * 7)
    return next(full, choices[-1])


def draw_tiling(rows: int, a: int, itemsize: int, value: int, twice: bool) -> Tile:
    """The tiles of a draw with a `value` of `Form`, as of `tiling`.

    Of probabilities a chunk is half as large: those of masked weights in bf16 had 80 bytes of stack
    at A = 16383. They are read again, as are weights whose entropy is wanted, where `twice`.
    """
    values = value == cat.PROBS_VALUE.value
    once = not (twice or values)
    tiles = tiling(rows, a, itemsize, tight=value >= cat.ONE_HOT.value, once=once)
    return tiling(rows, a, itemsize, HELD_BACKWARD) if tiles.chunks and values else tiles


def most_registers_of_draw(tiles: Tile, value: int) -> int | None:
    """The most registers of a draw on NVIDIA's GPUs, None for the assembler's own choice.

    That is 72 for the probabilities of masked weights in fp32 at A = 16383 on sm_100, and 16 bytes
    of stack. Of those in bf16 with index, score and entropy, at A = 8193, 128 leave as many bytes
    of stack, 168 none. And 168 for one-hot vectors of masked logits at A = 8191, and 16 bytes.
    """
    if value == cat.ONE_HOT.value and tiles.chunks:
        return REGISTERS_OF_FEW if tiles.warps == WARPS_OF_FEW else 255
    return _most_of_probs(tiles) if value == cat.PROBS_VALUE.value else None


def most_registers_of_backward(tiles: Tile) -> int | None:
    """The same of a gradient: of weights at A = 8193 on sm_100 it takes 96, and 8 bytes of stack.

    128 leave 40 bytes in bf16, 168 none.
    """
    return _most_of_probs(tiles)


def _most_of_probs(tiles: Tile) -> int | None:
    if not tiles.chunks:
        return None
    return REGISTERS_OF_FEW if tiles.warps == WARPS_OF_FEW else 168


def score_tiling(rows: int, a: int, itemsize: int, hot: bool, twice: bool) -> Tile:
    """The tiles of a score of given values, as of `tiling`.

    Args:
        rows: number of rows.
        a: categories.
        itemsize: bytes of one.
        hot: whether values are one-hot.
        twice: whether the entropy of weights is wanted, which reads them again.
    """
    if not hot:
        return tiling(rows, a, itemsize, once=not twice)
    return tiling(rows, a, itemsize, HELD_OF_HOT, once=not twice)


def most_registers(tiles: Tile, hot: bool) -> int | None:
    """The most registers of a score on NVIDIA's GPUs, None for the assembler's own choice.

    Of one-hot vectors in chunks it chooses 80 on sm_100 at A = 8191 in bf16, with 8 bytes of stack,
    and under masked weights 128 are too few for A = 2561. Of indices under weights it chooses 96 on
    sm_90 at A = 16383 in bf16, with 8 bytes too; told 255, none.
    """
    if not hot and tiles.chunks and tiles.warps != WARPS_OF_FEW:
        return 255
    return _most_of_probs(tiles)


class Form(NamedTuple):
    """What is asked of a draw.

    Attributes:
        kind: RANDOM, MODE, MEDIAN or MEAN, as numbers.
        index: whether the index is wanted.
        value: NO_VALUE, ONE_HOT, PROBS_VALUE or MEAN_INDEX, as numbers.
        dtype: of the value.
    """

    kind: int
    index: bool
    value: int
    dtype: torch.dtype


def _mask_parameter(mask: Tensor | None, given: Tensor, repeated: bool):
    """The mask as the kernels read it, and its layout, -1 for none."""
    if mask is None:
        return None, -1, 0, 0
    read = parameter(mask.expand(given.shape).view(torch.uint8), 1, repeated)
    return read.tensor, read.layout, read.row, read.column


def _of_weights(given: Tensor) -> float:
    return torch.finfo(given.dtype).eps


def draw(
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,  # bool, broadcastable to [*batch, K]
    shape: torch.Size,
    form: Form,
    *,
    state: State | None = None,
    probs: bool = False,
    score: bool = True,
    entropy: bool = False,
    keep: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Index, value, score, entropy and the state that was used, in one launch.

    Args:
        given: logits, or weights where `probs`.
        mask: True where a category may be drawn; None for everywhere. Logits only.
        shape: sample dimensions in front of the value.
        form: how the value is chosen, and what is written.
        state: where the noise comes from, for a random kind.
        probs: whether `given` holds weights.
        score: whether the log-probability is wanted.
        entropy: whether the entropy is wanted.
        keep: whether the state that was used is wanted.

    Returns:
        index int64 `[*sample, *batch]`; value `[*sample, *batch, K]`, or for MEAN_INDEX
        `[*sample, *batch]`; log-probability `[*sample, *batch]`; entropy `[*batch]`; an int64
        pair. None for what was not wanted.
    """
    batch = given.shape[:-1]
    a = given.shape[-1]
    device, dtype = given.device, given.dtype
    size = shape + batch
    index = torch.empty(size, dtype=torch.int64, device=device) if form.index else None
    value = None
    if form.value != cat.NO_VALUE.value:
        full = size if form.value == cat.MEAN_INDEX.value else (*size, a)
        value = torch.empty(full, dtype=form.dtype, device=device)
    scores = torch.empty(size, dtype=dtype, device=device) if score else None
    entropies = torch.empty(batch, dtype=dtype, device=device) if entropy else None
    used = torch.empty(2, dtype=torch.int64, device=device) if keep and state else None
    total_rows = size.numel()
    if total_rows == 0 or a == 0:
        return index, value, scores, entropies, used if used is None else used.zero_()
    read = parameter(given, 1, bool(shape))
    allowed, layout, mask_row, mask_column = _mask_parameter(mask, given, bool(shape))
    source = state or NO_STATE
    tiles = draw_tiling(total_rows, a, given.element_size(), form.value, probs and entropy)
    registers = most_registers_of_draw(tiles, form.value)
    with launching(given):
        draw_kernel[(tiles.programs,)](
            read.tensor, allowed, index, value, scores, entropies,
            source.pair, used, source.ticket, source.seed, source.call,
            total_rows, batch.numel(), read.row, read.column, mask_row, mask_column,
            A=a, COUNT=tiles.count, REP=tiles.rep, ROWS=tiles.rows, LANES=tiles.lanes,
            PIECE=tiles.piece, OWN=tiles.own, VECTOR=tiles.vector, SHARED=tiles.shared,
            CHUNKS=tiles.chunks,
            GIVEN=read.layout, MASK=layout, PROBS=probs, EPS=_of_weights(given),
            KIND=form.kind, INDEX=form.index, VALUE=form.value, SCORE=score, ENTROPY=entropy,
            HOST=source.pair is None, ADVANCE=source.ticket is not None, KEEP=used is not None,
            FAST=fast(given), num_warps=tiles.warps,
            **limited(given, registers),
        )  # fmt: skip
    return index, value, scores, entropies, used


def score(
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,  # bool, broadcastable to [*batch, K]
    value: Tensor | None,  # [*sample, *batch], or [*sample, *batch, K] where hot
    *,
    hot: bool = False,
    probs: bool = False,
    neg_inf: float = float("-inf"),
    entropy: bool = False,
    keep: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The log-probability of given indices or one-hot vectors, and the entropy, in one launch.

    Args:
        given: as in `draw`.
        mask: as in `draw`.
        value: what is scored, of any dtype; None for the entropy alone. An index that names no
            category scores NaN.
        hot: whether `value` holds vectors, whose largest element counts.
        probs: as in `draw`.
        neg_inf: log-probability of masked categories.
        entropy: whether the entropy is wanted.
        keep: whether the indices of one-hot vectors are wanted.

    Returns:
        log-probability `[*sample, *batch]`, entropy `[*batch]`, index int64 `[*sample, *batch]`;
        None for what was not wanted.
    """
    batch = given.shape[:-1]
    a = given.shape[-1]
    size = batch if value is None else (value.shape[:-1] if hot else value.shape)
    scores = index = entropies = None
    if value is not None:
        scores = torch.empty(size, dtype=given.dtype, device=given.device)
        if hot and keep:
            index = torch.empty(size, dtype=torch.int64, device=given.device)
    if entropy:
        entropies = torch.empty(batch, dtype=given.dtype, device=given.device)
    total_rows = size.numel()
    if total_rows == 0 or a == 0:
        return scores, entropies, index
    repeated = len(size) > len(batch)
    read = parameter(given, 1, repeated)
    allowed, layout, mask_row, mask_column = _mask_parameter(mask, given, repeated)
    if hot and value is not None:
        asked = parameter(value, 1, False)
    else:
        asked = read if value is None else parameter(value.contiguous(), 0, False)
    hot = hot and value is not None
    tiles = score_tiling(total_rows, a, given.element_size(), hot, probs and entropy)
    registers = most_registers(tiles, hot)
    with launching(given):
        score_kernel[(tiles.programs,)](
            read.tensor, allowed, asked.tensor, index, scores, entropies, neg_inf,
            total_rows, batch.numel(), read.row, read.column, mask_row, mask_column,
            asked.row, asked.column,
            A=a, COUNT=tiles.count, REP=tiles.rep, ROWS=tiles.rows, LANES=tiles.lanes,
            PIECE=tiles.piece, OWN=tiles.own, VECTOR=tiles.vector, CHUNKS=tiles.chunks,
            GIVEN=read.layout, MASK=layout, VALUE=asked.layout, PROBS=probs,
            EPS=_of_weights(given), HOT=hot, INDEX=index is not None, SCORE=value is not None,
            ENTROPY=entropy, FAST=fast(given), num_warps=tiles.warps,
            **limited(given, registers),
        )  # fmt: skip
    return scores, entropies, index


def backward(
    grad_value: Tensor | None,  # [*sample, *batch, K], or [*sample, *batch] for a mean index
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,  # bool, broadcastable to [*batch, K]
    index: Tensor | None,  # int64 [*sample, *batch]
    shape: torch.Size,
    *,
    probs: bool = False,
    mean_index: bool = False,
) -> Tensor:
    """The gradient of `draw` and `score` by what is given, `[*sample, *batch, K]`.

    Args:
        grad_value: gradient of the probabilities that the value carries, None for none.
        grad_score: gradient of the log-probability, None for none.
        grad_entropy: gradient of the entropy, None for none.
        given: as in `draw`.
        mask: as in `draw`.
        index: the categories that were scored; needed along with `grad_score`.
        shape: sample dimensions.
        probs: as in `draw`.
        mean_index: whether the value is the mean of the index.
    """
    a = given.shape[-1]
    batch = given.shape[:-1]
    grad = torch.empty(shape + given.shape, dtype=given.dtype, device=given.device)
    total_rows = (shape + batch).numel()
    if grad.numel() == 0:
        return grad
    read = parameter(given, 1, bool(shape))
    allowed, layout, mask_row, mask_column = _mask_parameter(mask, given, bool(shape))
    by_value = cat.NO_VALUE.value
    upstream = read
    if grad_value is not None:
        by_value = cat.MEAN_INDEX.value if mean_index else cat.PROBS_VALUE.value
        upstream = parameter(
            grad_value.contiguous() if mean_index else grad_value, 0 if mean_index else 1, False
        )
    tiles = tiling(total_rows, a, given.element_size(), HELD_BACKWARD, True)
    registers = most_registers_of_backward(tiles)
    with launching(given):
        backward_kernel[(tiles.programs,)](
            upstream.tensor, tail(grad_score), tail(grad_entropy), read.tensor, allowed, index,
            grad, total_rows, batch.numel(), read.row, read.column, mask_row, mask_column,
            upstream.row, upstream.column,
            A=a, COUNT=tiles.count, REP=tiles.rep, ROWS=tiles.rows, LANES=tiles.lanes,
            PIECE=tiles.piece, OWN=tiles.own, VECTOR=tiles.vector, CHUNKS=tiles.chunks,
            GIVEN=read.layout, MASK=layout, VALUE=upstream.layout, PROBS=probs,
            EPS=_of_weights(given), BY_VALUE=by_value, BY_SCORE=grad_score is not None,
            BY_ENTROPY=grad_entropy is not None, FAST=fast(given), num_warps=tiles.warps,
            **limited(given, registers),
        )  # fmt: skip
    return grad
