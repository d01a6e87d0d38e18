"""What the categorical kernels share: how rows lie in a tile, and what is summed over them.

`categorical` tells of the layouts and gives the formulas.
"""

import triton
import triton.language as tl

from fastprob.kernels import _math as m
from fastprob.kernels import _tile as tile

# How a value is chosen.
RANDOM = tl.constexpr(0)
MEDIAN = tl.constexpr(1)
MODE = tl.constexpr(2)
MEAN = tl.constexpr(3)

# What is written as the value, next to the index.
NO_VALUE = tl.constexpr(0)
MEAN_INDEX = tl.constexpr(1)
ONE_HOT = tl.constexpr(2)
PROBS_VALUE = tl.constexpr(3)

# exp(-1e30) is 0, and 0 * -1e30 is no NaN, as 0 * -inf is.
LEAST = tl.constexpr(-1.0e30)
# More than twice the largest place in a chunk or a tile.
LATEST = tl.constexpr(2**30)
# Whether the compiler gives threads to the rows of a tile before it gives them to the reps.
ROWS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))


@triton.constexpr_function
def last_rep(a, lanes, piece, vector):
    """The last rep of a tile that has a category in any row."""
    return piece - 1 if piece else (a - 1 + max(vector - 1, 0)) // lanes


@triton.constexpr_function
def beside(vector, given, layout):
    """`VECTOR` for a tensor of another layout than `given`'s: 1 where its rows begin otherwise."""
    return vector if vector == 0 or (layout < 2 and layout % 2 == given % 2) else 1


@triton.jit
def shifts(
    first, total_rows, rows,
    A: tl.constexpr, ROWS: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Where in a vector of VECTOR elements each row of a parameter begins, int32 `[1, ROWS, 1]`."""
    if VECTOR == 0:
        return 0
    else:
        # Rows past the end are the last one, as in `split`.
        r = tl.minimum(tl.arange(0, ROWS)[None, :, None], (total_rows - 1 - first).to(tl.int32))
        if LAYOUT % 2 == 0:
            return ((first * A % VECTOR).to(tl.int32) + r * A) % VECTOR
        else:
            return ((first + r) % rows * A % VECTOR).to(tl.int32)


@triton.jit
def columns(
    shift, A: tl.constexpr, REP: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The places of a tile, `[REP, 1, LANES]`, and which of them have a category.

    A place is the category and `shift`.
    """
    rep = tl.arange(0, REP)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    if PIECE > 0:
        k = lane * PIECE + rep
        # Only the last lane may end early: for all but a few rep this is settled when compiled.
        return k, (rep < PIECE) & ((rep < A - (LANES - 1) * PIECE) | (k < A))
    else:
        # Settled when compiled for all but the first rep and the last two.
        k = rep * LANES + lane
        inside = (rep <= last_rep(A, LANES, PIECE, VECTOR)) & ((rep < A // LANES) | (k < A + shift))
        if VECTOR > 0:
            inside &= (rep > 0) | (k >= shift)
        return k, inside


@triton.jit
def spaced(r, stride, k):
    """`r * stride`, where rows `[1, ROWS, 1]` of a tile begin whose places k are contiguous.

    Triton 3.6 gives the threads that the lanes leave to reps first, as neither these nor rows are
    contiguous, and sums of a row go over shared memory: a backward pass at A = 256 takes 51 issue
    slots an element in place of 17. It is told that two rows lie beside one another. Of more places
    than that along the lanes it makes vectors all the same, and of the rows an order.
    """
    at = r * stride
    if not ROWS_FIRST and len(at.shape) == 3 and at.shape[1] > 1 and k.shape[2] > 2:
        at = tl.max_contiguous(at, [1, 2, 1])
    return at


@triton.jit
def offsets(first, r, k, rows, row_stride, column_stride, A: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of categories k of the rows first + r, by the layouts of `_tile.pointers`.

    Args:
        first: int64 scalar, the first row of a tile.
        r: int32, rows from there.
        k: int32.
        rows: number of rows of the parameter, which begins anew after them.
        row_stride: in the units that LAYOUT tells.
        column_stride: in elements.
        A: size of a row.
        LAYOUT: as there.
    """
    if LAYOUT == 0:
        return first * A + (spaced(r, A, k) + k)
    else:
        row = first + r
        if LAYOUT % 2 == 1:
            row = row % rows
        if LAYOUT == 1:
            return spaced(row, A, k) + k
        elif LAYOUT >= 4:
            # Their columns are contiguous.
            return spaced(row * row_stride, LAYOUT // 4 * 4, k) + k
        else:
            return row * row_stride + k.to(tl.int64) * column_stride


@triton.jit
def aligned(first, r, k, rows, A: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of places k of the rows first + r, contiguous: of whole vectors, as is to be seen."""
    if LAYOUT == 0:
        start = first * A
        near = spaced(((start % VECTOR).to(tl.int32) + r * A) // VECTOR, VECTOR, k)
        return start // VECTOR * VECTOR + (near + k)
    else:
        return spaced((first + r) % rows * A // VECTOR, VECTOR, k) + k


@triton.jit
def flat(
    ptr, first, total_rows, rows, row_stride, column_stride,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """COUNT elements from row `first` on, widened; 1 past the end.

    Widened on each side of the branch, as in `split`: bf16 is unpacked once, and a gather of 32
    bits takes no more loads than one of 16. 27.1 slots at A = 18 become 26.4, 24.0 at A = 33 21.2,
    and 32.3 with a mask 30.1.
    """
    i = tl.arange(0, COUNT)
    start = first * A
    end = total_rows.to(tl.int64) * A
    at = tile.pointers(ptr, start, i, rows, row_stride, column_stride, A, COUNT, LAYOUT)
    # A mask stops vectorized access, but for one of a constant multiple of 4 elements. That leaves
    # the rows of the next tile to it, where less than COUNT elements are a tile's own.
    if start + COUNT <= end:
        x = widened(tl.load(at, mask=i < OWN * A))
    else:
        one = tl.full([], 1.0, tl.float32).to(ptr.dtype.element_ty)
        x = widened(tl.load(at, mask=i < (end - start).to(tl.int32), other=one)) + 0
    return x


@triton.jit
def gathered(
    x, A: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    PIECE: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """A flat tile as `[REP, ROWS, LANES]`; anything outside a row."""
    k, _ = columns(0, A, REP, LANES, PIECE, 0)
    r = tl.arange(0, ROWS)[None, :, None]
    # A flat tile has room for what the last lane of the last row reads past its end.
    source = tl.where(k < LANES * PIECE, tl.minimum(r, OWN - 1) * A + k, 0)
    taken = tl.gather(x, tl.reshape(source, [REP * ROWS * LANES]), 0)
    return tl.reshape(taken, [REP, ROWS, LANES])


@triton.jit
def widened(x):
    """Floats in fp32, booleans in int32."""
    if x.dtype.is_floating():
        return x.to(tl.float32)
    else:
        return x.to(tl.int32) if x.dtype.primitive_bitwidth < 32 else x


@triton.jit
def split(
    ptr, first, total_rows, rows, row_stride, column_stride, shift,
    A: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A tile `[REP, ROWS, LANES]`, widened; anything outside a row."""
    k, inside = columns(shift, A, REP, LANES, 0, VECTOR)
    r = tl.arange(0, ROWS)[None, :, None]
    # Rows past the end read the last one again: a mask takes 16 instructions for 32 elements.
    r = tl.minimum(r, (total_rows - 1 - first).to(tl.int32))
    if VECTOR > 1 and LAYOUT < 2:
        at = ptr + aligned(first, r, k, rows, A, LAYOUT, VECTOR)
        # Whole vectors reach into the rows beside, and are to reach no further than the tensor.
        LAST: tl.constexpr = last_rep(A, LANES, 0, VECTOR)
        begin = first
        end = total_rows
        if LAYOUT == 1:
            begin = first % rows
            end = rows
        if (begin + (ROWS - 1)) * A + (LAST + 1) * LANES <= end.to(tl.int64) * A:
            x = widened(tl.load(at, mask=tl.arange(0, REP)[:, None, None] <= LAST))
        else:
            # Two loads that differ in their mask alone the compiler makes one, of single elements,
            # and a conversion that both end with is made behind them: bf16 is unpacked, packed and
            # unpacked. It does not see through the sum: 24.9 and 24.0 slots at A = 257.
            x = widened(tl.load(at, mask=inside, other=0)) + 0
        return x
    elif REP * LANES == A:
        at = ptr + offsets(first, r, k, rows, row_stride, column_stride, A, LAYOUT)
        return widened(tl.load(at))
    else:
        at = ptr + offsets(first, r, k - shift, rows, row_stride, column_stride, A, LAYOUT)
        return widened(tl.load(at, mask=inside))


@triton.jit
def load(
    ptr, first, total_rows, rows, row_stride, column_stride, other, shift,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """A tile `[REP, ROWS, LANES]` of the rows from `first` on, in fp32; `other` outside a row."""
    if PIECE > 0:
        x = flat(ptr, first, total_rows, rows, row_stride, column_stride, A, COUNT, OWN, LAYOUT)
        x = gathered(x, A, REP, ROWS, LANES, PIECE, OWN)
    else:
        x = split(
            ptr, first, total_rows, rows, row_stride, column_stride, shift,
            A, REP, ROWS, LANES, VECTOR, LAYOUT,
        )  # fmt: skip
    _, inside = columns(shift, A, REP, LANES, PIECE, VECTOR)
    return tl.where(inside, x.to(tl.float32), other)


@triton.jit
def store(
    ptr, x, first, total_rows, shift,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    SAME: tl.constexpr,
):  # fmt: skip
    """Stores a tile `[REP, ROWS, LANES]` of the rows from `first` on, contiguous.

    SAME: whether rows past the end hold what the last one does, so that no mask is needed.
    """
    start = first * A
    if PIECE > 0:
        i = tl.arange(0, COUNT)
        row = tl.minimum(i // A, ROWS - 1)
        if LANES == 1:
            source = (i % A) * ROWS + row
        else:
            k = i % A
            source = ((k % PIECE) * ROWS + row) * LANES + k // PIECE
        flat = tl.gather(tl.reshape(x, [REP * ROWS * LANES]), source, 0)
        end = total_rows.to(tl.int64) * A
        left = tl.minimum(end - start, OWN * A).to(tl.int32)
        if start + OWN * A <= end:
            tile.store(ptr, start, flat, i, i < left, COUNT, OWN * A, True)
        else:
            tile.store(ptr, start, flat, i, i < left, COUNT, OWN * A, False)
    else:
        k, inside = columns(shift, A, REP, LANES, PIECE, VECTOR)
        r = tl.arange(0, ROWS)[None, :, None]
        x = tl.broadcast_to(x, [REP, ROWS, LANES]).to(ptr.dtype.element_ty)
        last = (total_rows - 1 - first).to(tl.int32)
        exists = (r <= last) | SAME
        if SAME:
            r = tl.minimum(r, last)
        if VECTOR > 1:
            at = ptr + aligned(first, r, k, total_rows, A, 0, VECTOR)
            # A vector at an end of a row is of two rows: its elements are stored one by one.
            rep = tl.arange(0, REP)[:, None, None]
            middle = (rep > 0) & (rep < A // LANES)
            tl.store(at, x, mask=middle & exists)
            tl.store(at, x, mask=inside & (rep < REP) & ((rep == 0) | (rep >= A // LANES)) & exists)
        else:
            at = ptr + start + (spaced(r, A, k) + (k - shift))
            if REP * LANES == A and SAME:
                tl.store(at, x)
            else:
                tl.store(at, x, mask=inside & exists)


@triton.jit
def over(x):
    """The sum of each row, `[1, ROWS, 1]`.

    Here and below values of rows keep their dimensions: so they stay in the layout of the tile, and
    in registers. As `[ROWS]` they went through shared memory, 28 times in one kernel.
    """
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def highest(x, FAST: tl.constexpr):
    """The largest of each row, NaN where one of it is: `tl.max` passes it over."""
    if FAST:
        return tl.reduce(tl.reduce(x, 0, larger, keep_dims=True), 2, larger, keep_dims=True)
    else:
        # The interpreter goes through a reduction of one's own element by element.
        top = tl.max(tl.max(x, 0, keep_dims=True), 2, keep_dims=True)
        return top + over(tl.where(x != x, x, 0.0))


@triton.jit
def at_least(d):
    """No -inf; a NaN stays one."""
    return tl.maximum(d, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def padded(
    x, A: tl.constexpr, REP: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Terms of a sum, -0 at the places of a tile that have no category.

    A compiler leaves out the addition of -0 and not that of 0: rows of 18 cost no more than that.
    """
    if PIECE > 0:
        _, inside = columns(0, A, REP, LANES, PIECE, 0)
        return tl.where(inside, x, -0.0)
    elif REP * LANES != A:
        # At those of a row's ends stands 0 already.
        rep = tl.arange(0, REP)[:, None, None]
        return tl.where(rep <= last_rep(A, LANES, PIECE, VECTOR), x, -0.0)
    else:
        return x


@triton.jit
def clamped(q, EPS: tl.constexpr):
    return tile.clamp(q, EPS, 1.0 - EPS)


@triton.jit
def score_of(x, top, log_sum, inverse, PROBS: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr):
    """Log-probability of the category with logit or weight x."""
    if PROBS:
        return m.log(clamped(x * inverse, EPS), FAST)
    else:
        return (x - top) - log_sum


@triton.jit
def masked(x, allowed):
    return tl.where(allowed != 0, x, float("-inf"))


@triton.jit
def load_given(
    given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column, shift,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """A tile of logits, -inf where masked, or of weights."""
    other: tl.constexpr = 0.0 if PROBS else float("-inf")
    if MASK < 0:
        x = load(
            given, first, total_rows, rows, given_row, given_column, other, shift,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, VECTOR, GIVEN,
        )  # fmt: skip
    elif PIECE > 0:
        # Masked before the elements change places, so that one of the two does.
        x = flat(given, first, total_rows, rows, given_row, given_column, A, COUNT, OWN, GIVEN)
        allowed = flat(mask, first, total_rows, rows, mask_row, mask_column, A, COUNT, OWN, MASK)
        x = gathered(masked(x.to(tl.float32), allowed), A, REP, ROWS, LANES, PIECE, OWN)
    else:
        x = split(
            given, first, total_rows, rows, given_row, given_column, shift,
            A, REP, ROWS, LANES, VECTOR, GIVEN,
        )  # fmt: skip
        allowed = split(
            mask, first, total_rows, rows, mask_row, mask_column, shift,
            A, REP, ROWS, LANES, beside(VECTOR, GIVEN, MASK), MASK,
        )  # fmt: skip
        x = masked(x.to(tl.float32), allowed)
    _, inside = columns(shift, A, REP, LANES, PIECE, VECTOR)
    return tl.where(inside, x, other)


@triton.jit
def at_index(
    given, mask, first, r, index, exists, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The logit or weight of one category of each row: read again, from a cache."""
    at = given + offsets(first, r, index, rows, given_row, given_column, A, GIVEN)
    x = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    if MASK >= 0:
        at = mask + offsets(first, r, index, rows, mask_row, mask_column, A, MASK)
        x = masked(x, tl.load(at, mask=exists, other=1))
    return x


@triton.jit
def store_entropy(
    entropy, e, d, inverse, log_sum, first, r, rows, inside,
    OWN: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Entropies of a tile; they have no sample dimensions, the rows of the first sample write."""
    if PROBS:
        c = clamped(e * inverse, EPS)
        made = -over(tl.where(inside, c * m.log(c, FAST), -0.0))
    else:
        made = log_sum - over(e * at_least(d)) * inverse
    exists = r < tl.minimum(rows - first, OWN).to(tl.int32)
    tl.store(entropy + first + r, made.to(entropy.dtype.element_ty), mask=exists)
