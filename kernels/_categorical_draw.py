"""The kernel that draws categories, scores them and gives entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _categorical_rows as cat
from fastprob.kernels import _categorical_wide as wide
from fastprob.kernels import _math as m
from fastprob.kernels import _random as random

# A running sum that rounding leaves just below 1/2 counts as having reached it.
HALF = tl.constexpr(0.5 - 4 * 2.0**-23)
# Triton 3.6 stops at an assertion where a running sum has one place along an axis of which a thread
# holds several. It compiles one without that axis: 15.6 issue slots an element at A = 256, where
# 3.7 takes 14.5 for the sum as it comes, and 25.3 and 20.7 at A = 257.
NARROW_SCANS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))


@triton.jit
def _first_beyond(running, e, k, t, AXIS: tl.constexpr):
    """The first k of positive e whose running sum exceeds t; the last such k where none does.

    Rounding of a running sum that is put together from parts may let it rise at an e of 0, or end
    below t. Neither gives a category of probability 0. One reduction for both: a k that counts only
    where there is no other is turned around and put behind the others.
    """
    key = tl.where(running > t, k, -k + cat.LATEST)
    key = tl.min(tl.where(e > 0.0, key, cat.LATEST), AXIS, keep_dims=True)
    return tl.minimum(key, -key + cat.LATEST)


@triton.jit
def _uniform_of(seed, call, group, row):
    """One uniform in (0, 1) for each row: word row % 4 of the group."""
    a, b, c, d = random.philox(seed, call, group)
    word = row & 3
    low = tl.where(word == 0, a, b)
    high = tl.where(word == 2, c, d)
    return random.unit(tl.where(word < 2, low, high))


@triton.jit
def _search_pieces(e, u, LANES: tl.constexpr, PIECE: tl.constexpr):
    """Category and sum of each row of a GATHER tile, `[1, ROWS, 1]`.

    A thread's running sum is made term by term: it rises where e is positive and nowhere else.
    """
    running = tl.cumsum(e, 0)
    # The last one, for nothing: -0 is not added when compiled. A maximum takes an instruction each.
    rep = tl.arange(0, e.shape[0])[:, None, None]
    piece = tl.sum(tl.where(rep == PIECE - 1, running, -0.0), 0, keep_dims=True)
    if LANES == 1:
        t = piece * u
        return tl.sum((running <= t).to(tl.int32), 0, keep_dims=True), piece
    else:
        lane = tl.arange(0, LANES)[None, None, :]
        ends = tl.cumsum(piece, 2)
        total = tl.max(ends, 2, keep_dims=True)
        t = total * u
        chosen = _first_beyond(ends, piece, lane, t, 2)
        # Kept inside of the piece, whatever rounding has done.
        left = tl.minimum(tl.maximum(t - (ends - piece), 0.0), piece * 0.99999988)
        place = tl.sum((running <= left).to(tl.int32), 0, keep_dims=True) + lane * PIECE
        return tl.sum(tl.where(lane == chosen, place, 0), 2, keep_dims=True), total


@triton.jit
def _search_segments(e, u, REP: tl.constexpr):
    """The LANES categories that each row's draw lies among.

    Returns:
        their number int32, what is left of the threshold, and the sum of the row, `[1, ROWS, 1]`.
    """
    if REP == 1:
        total = cat.over(e)
        return tl.zeros(total.shape, tl.int32), total * u, total
    else:
        if NARROW_SCANS:
            running = tl.cumsum(tl.sum(e, 2, keep_dims=True), 0)
        else:
            running = tl.expand_dims(tl.cumsum(tl.sum(e, 2), 0), 2)
        rep = tl.arange(0, REP)[:, None, None]
        total = tl.sum(tl.where(rep == REP - 1, running, -0.0), 0, keep_dims=True)
        t = total * u
        below = running <= t
        segment = tl.sum(below.to(tl.int32), 0, keep_dims=True)
        before = tl.max(tl.where(below, running, 0.0), 0, keep_dims=True)
        return tl.minimum(segment, REP - 1), t - before, total


@triton.jit
def _draw_rows(
    given, mask, index, value, score, entropy, seed, call, first, total_rows, rows,
    given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr,
    KIND: tl.constexpr, INDEX: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Values, scores and entropies of the OWN rows of a tile."""
    shift = cat.shifts(first, total_rows, rows, A, ROWS, GIVEN, VECTOR)
    x = cat.load_given(
        given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column, shift,
        A, COUNT, REP, ROWS, LANES, PIECE, OWN, VECTOR, GIVEN, MASK, PROBS,
    )  # fmt: skip
    k, inside = cat.columns(shift, A, REP, LANES, PIECE, VECTOR)
    r = tl.arange(0, ROWS)[None, :, None]
    exists = r < tl.minimum(total_rows - first, OWN).to(tl.int32)
    top = 0.0
    e = x
    d = x
    if not PROBS:
        top = cat.highest(x, FAST)
        d = x - top
        e = m.exp(d, FAST)
    e = cat.padded(e, A, REP, LANES, PIECE, VECTOR)
    if KIND <= cat.MEDIAN:
        u = HALF
        if KIND == cat.RANDOM:
            if SHARED:
                u = tl.reshape(random.uniforms(seed, call, first, ROWS), [1, ROWS, 1])
            else:
                # Few rows: each thread works its own out, and none is handed to another.
                if OWN % 4 == 0:
                    u = _uniform_of(seed, call, first // 4 + (r >> 2), r)
                else:
                    u = _uniform_of(seed, call, (first + r) >> 2, (first + r).to(tl.int32))
        if PIECE > 0:
            chosen, total = _search_pieces(e, u, LANES, PIECE)
        else:
            segment, left, total = _search_segments(e, u, REP)
            near = e
            lane = tl.arange(0, LANES)[None, None, :]
            if REP > 1:
                place = segment * LANES + lane
                real = exists
                if REP * LANES != A:
                    real = exists & (place >= shift) & (place < A + shift)
                near = cat.at_index(
                    given, mask, first, r, place - shift, real, rows,
                    given_row, given_column, mask_row, mask_column, A, GIVEN, MASK,
                )  # fmt: skip
                if not PROBS:
                    near = m.exp(near - top, FAST)
                if REP * LANES != A:
                    near = tl.where(real, near, 0.0)
            chosen = segment * LANES + _first_beyond(tl.cumsum(near, 2), near, lane, left, 2)
    else:
        total = cat.over(e)
        chosen = tl.zeros(total.shape, tl.int32)
        if KIND == cat.MODE:
            hit = (x == cat.highest(x, FAST)) & inside
            chosen = tl.where(hit, k, cat.LATEST)
            chosen = tl.min(tl.min(chosen, 0, keep_dims=True), 2, keep_dims=True)
    chosen -= shift
    # In range whatever the parameters are, for the read below.
    chosen = tl.minimum(tl.maximum(chosen, 0), A - 1)
    if PROBS:
        # The search has passed a NaN over; of logits the largest has it.
        total = cat.over(e)
    inverse = m.reciprocal(total, FAST)
    log_sum = m.log(total, FAST)
    if INDEX:
        tl.store(index + first + r, chosen.to(tl.int64), mask=exists)
    if SCORE:
        picked = cat.at_index(
            given, mask, first, r, chosen, exists, rows, given_row, given_column,
            mask_row, mask_column, A, GIVEN, MASK,
        )  # fmt: skip
        scores = cat.score_of(picked, top, log_sum, inverse, PROBS, EPS, FAST)
        tl.store(score + first + r, scores.to(score.dtype.element_ty), mask=exists)
    if ENTROPY:
        cat.store_entropy(
            entropy, e, d, inverse, log_sum, first, r, rows, inside, OWN, PROBS, EPS, FAST
        )
    FLAT: tl.constexpr = cat.beside(VECTOR, GIVEN, 0)
    if VALUE == cat.ONE_HOT:
        hot = (k == chosen + shift).to(tl.float32)
        cat.store(
            value, hot, first, total_rows, shift,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, FLAT, False,
        )  # fmt: skip
    elif VALUE == cat.PROBS_VALUE:
        cat.store(
            value, e * inverse, first, total_rows, shift,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, FLAT, False,
        )  # fmt: skip
    elif VALUE == cat.MEAN_INDEX:
        mean = cat.over(e * (k - shift).to(tl.float32)) * inverse
        tl.store(value + first + r, mean.to(value.dtype.element_ty), mask=exists)


@triton.jit
def _draw_wide(
    given, mask, index, value, score, entropy, seed, call, row, rows,
    given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr,
    KIND: tl.constexpr, INDEX: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Value, score and entropy of one row that is longer than a tile."""
    shift = wide.shift_of(row, rows, A, GIVEN, VECTOR)
    top, place, total, weighted, moment, sums = wide.sums(
        given, mask, row, shift, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, CHUNKS, GIVEN, MASK, VECTOR, PROBS, ENTROPY, FAST,
    )  # fmt: skip
    chosen = place
    if KIND <= cat.MEDIAN:
        if KIND == cat.MEDIAN:
            u = HALF
        else:
            u = _uniform_of(seed, call, row >> 2, row.to(tl.int32))
        chunk = tl.arange(0, CHUNKS)
        running = tl.cumsum(sums, 0)
        t = tl.max(running, 0) * u
        c = tl.sum(_first_beyond(running, sums, chunk, t, 0), 0)
        left = t - tl.max(tl.where(chunk < c, running, 0.0), 0)
        k = wide.places(c, shift, COUNT)
        e = wide.load(
            given, mask, row, c, shift, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, VECTOR, PROBS,
        )  # fmt: skip
        if not PROBS:
            e = m.exp(e - top, FAST)
        chosen = tl.sum(_first_beyond(tl.cumsum(e, 0), e, k, left, 0), 0)
    chosen = tl.minimum(tl.maximum(chosen, 0), A - 1)
    inverse = m.reciprocal(total, FAST)
    log_sum = m.log(total, FAST)
    if INDEX:
        tl.store(index + row, chosen.to(tl.int64))
    if SCORE:
        picked = cat.at_index(
            given, mask, row, 0, chosen, row >= 0, rows, given_row, given_column,
            mask_row, mask_column, A, GIVEN, MASK,
        )  # fmt: skip
        scores = cat.score_of(picked, top, log_sum, inverse, PROBS, EPS, FAST)
        tl.store(score + row, scores.to(score.dtype.element_ty))
    if VALUE == cat.MEAN_INDEX:
        tl.store(value + row, (moment * inverse).to(value.dtype.element_ty))
    if ENTROPY:
        if PROBS:
            entropies = wide.entropy(
                given, mask, row, shift, rows, given_row, given_column, mask_row, mask_column,
                inverse, A, COUNT, GIVEN, MASK, VECTOR, EPS, FAST,
            )  # fmt: skip
        else:
            entropies = log_sum - weighted * inverse
        tl.store(entropy + row, entropies.to(entropy.dtype.element_ty), mask=row < rows)
    if VALUE >= cat.ONE_HOT:
        for c in range(wide.chunks(shift, A, COUNT, VECTOR)):
            k = wide.places(c, shift, COUNT)
            if VALUE == cat.ONE_HOT:
                y = k == chosen
            else:
                y = wide.load(
                    given, mask, row, c, shift, rows, given_row, given_column,
                    mask_row, mask_column, A, COUNT, GIVEN, MASK, VECTOR, PROBS,
                )  # fmt: skip
                if not PROBS:
                    y = m.exp(y - top, FAST)
                y = y * inverse
            wide.store(value, row, c, shift, y, A, COUNT, cat.beside(VECTOR, GIVEN, 0))


@triton.jit(do_not_specialize=["seed", "call", "total_rows", "rows"])
def draw_kernel(
    given, mask, index, value, score, entropy, state, used, ticket, seed, call, total_rows, rows,
    given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr, CHUNKS: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
    PROBS: tl.constexpr,
    EPS: tl.constexpr, KIND: tl.constexpr, INDEX: tl.constexpr, VALUE: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, HOST: tl.constexpr, ADVANCE: tl.constexpr,
    KEEP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Indices, values, scores and entropies of OWN rows; of one row, chunk by chunk, where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if KIND == cat.RANDOM:
        seed, call = random.open_state(state, seed, call, HOST)
    if CHUNKS > 0:
        _draw_wide(
            given, mask, index, value, score, entropy, seed, call, program, rows,
            given_row, given_column, mask_row, mask_column, A, COUNT, CHUNKS, VECTOR,
            GIVEN, MASK, PROBS, EPS, KIND, INDEX, VALUE, SCORE, ENTROPY, FAST,
        )  # fmt: skip
    else:
        _draw_rows(
            given, mask, index, value, score, entropy, seed, call, program * OWN, total_rows, rows,
            given_row, given_column, mask_row, mask_column,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, VECTOR, SHARED,
            GIVEN, MASK, PROBS, EPS, KIND, INDEX, VALUE, SCORE, ENTROPY, FAST,
        )  # fmt: skip
    if KIND == cat.RANDOM:
        random.close_state(state, used, ticket, seed, call, ADVANCE, KEEP)
