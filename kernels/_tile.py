"""What the kernels of all families share: which elements a program handles, and sums of their rows.

A program handles `COUNT` elements in their flat order, so that noise is drawn for whole groups of
four whatever the size A of a row is. Three layouts, chosen at launch:

- A a power of two: COUNT / A whole rows, summed as a 2-D tile.
- GATHER, any other A up to COUNT / 4: as many whole rows as fit, of a number that makes whole
  vectors of 128 bits, with which a tile begins; where that leaves an eighth of the tile empty, as
  many as fit with part of a vector in front of them, see `begin`. Their sums come from a gather:
  31 to 40 issue slots an element for the Normal, where a tile padded to a power of two takes 116 at
  A = 17 and 128 at A = 33.
- WIDE, of long rows: a program goes over one chunk by chunk, or over several, one behind the other,
  where their chunks would be empty for a good part. Chunks begin with a vector whatever A is, see
  `wide_rows`.

Within a tile elements are counted in int32 from the tile's start, which is an int64 scalar: more
than 2^31 elements at the cost of none of the 64-bit arithmetic.
"""

import math

import triton
import triton.language as tl


@triton.jit
def begin(program, TILE: tl.constexpr, UNIT: tl.constexpr):
    """Where a tile of whole rows begins: with a vector of UNIT elements, and a group of the noise.

    Where rows end within a vector, that is up to UNIT - 1 elements before the first row.

    Returns:
        int64 flat index of the first element, a multiple of UNIT, and int32 that of the first row
        in the tile.
    """
    first = program * TILE
    if TILE % UNIT == 0:
        return first, 0
    else:
        return first // UNIT * UNIT, (first % UNIT).to(tl.int32)


@triton.jit
def kept(lead, TILE: tl.constexpr, COUNT: tl.constexpr, UNIT: tl.constexpr):
    """How many elements a tile of which all exist stores: all that its first vectors have.

    A vector that two tiles share is stored by the later one.
    """
    if TILE % UNIT == 0:
        return COUNT
    else:
        return (lead + TILE) // UNIT * UNIT


@triton.constexpr_function
def lanes(count, rows):
    """Threads that add up a row of a gather, side by side in a warp.

    As many as there are for each of `rows`, of the 16 elements that a thread has of `count`: the
    last additions stay within a warp. TanhNormal at A = 257 takes 56.8 issue slots where a row goes
    over all warps, 55.6 so.
    """
    return min(32, max(1, count // 16 // rows))


@triton.jit
def sum_rows(
    x, A: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr,
    GATHER: tl.constexpr, lead=0,
):  # fmt: skip
    """Sums the rows of a flat tile.

    Args:
        x: `[COUNT]`.
        A: size of a row.
        COUNT: size of the tile.
        ROWS: number of rows in it; for the gather, the next power of two.
        OWN: that number.
        GATHER: whether A is no power of two.
        lead: where the first row begins, for the gather.

    Returns:
        `[ROWS]`.
    """
    if GATHER:
        # Rows and columns that the tile does not have take the last ones, which spares masks: 58.1
        # issue slots for TanhNormal at A = 257 become 56.8. Those rows are not stored.
        LANES: tl.constexpr = lanes(COUNT, ROWS)
        STEPS: tl.constexpr = triton.next_power_of_2(A) // LANES
        step = tl.arange(0, STEPS)[:, None, None]
        row = tl.minimum(tl.arange(0, ROWS), OWN - 1)[None, :, None]
        column = tl.arange(0, LANES)[None, None, :] + step * LANES
        source = row * A + lead + tl.minimum(column, A - 1)
        taken = tl.gather(x, tl.reshape(source, [STEPS * ROWS * LANES]), 0)
        taken = tl.where(column < A, tl.reshape(taken, [STEPS, ROWS, LANES]), 0.0)
        return tl.sum(tl.sum(taken, 0), 1)
    elif ROWS == COUNT:
        return x
    else:
        return tl.sum(tl.reshape(x, [ROWS, COUNT // ROWS]), 1)


@triton.constexpr_function
def unit(a):
    """The vector of at most 8 elements that rows of `a` consist of, and tiles begin with."""
    return math.gcd(a, 8)


@triton.jit
def place(start, i, A: tl.constexpr, COUNT: tl.constexpr, UNIT: tl.constexpr = 1):
    """Row and column of the elements of a tile.

    Args:
        start: int64, flat index of the tile's first element.
        i: int32 `[COUNT]`.
        A: size of a row.
        COUNT: size of the tile.
        UNIT: what `start` and A are multiples of, by which the compiler sees a row's vectors:
            without it, strided rows of A = 24 took 16 loads of a thread, of which 2 are left.

    Returns:
        int64 rows, int32 columns.
    """
    if COUNT % A == 0:
        return start // A + i // A, i % A
    else:
        i += (start // UNIT % (A // UNIT)).to(tl.int32) * UNIT
        return start // A + i // A, i % A


@triton.jit
def pointers(
    ptr, start, i, rows, row_stride, column_stride,
    A: tl.constexpr, COUNT: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Where the elements of a tile lie in a parameter.

    Args:
        ptr: the parameter.
        start: int64, flat index of the tile's first element, a multiple of `unit(A)`: it begins
            with a row, or is a multiple of COUNT or, for other A than multiples of 4, of 4.
        i: int32 `[COUNT]`.
        rows: number of rows of the parameter, which begins anew after them.
        row_stride: in units of 4 elements where LAYOUT has 4 added and of 8 where it has 8 added,
            so that the compiler knows a factor of it and loads whole vectors; in elements
            otherwise.
        column_stride: in elements.
        A: size of a row.
        COUNT: size of the tile.
        LAYOUT: 0 like the output; 1 like it, but begun anew for each sample; 2 strided; 3 strided
            and begun anew; plus 4 where the row stride is a multiple of 4, or 8 where it is one of
            8 and elements have 16 bits.
    """
    if LAYOUT == 0:
        return ptr + start + i
    else:
        row, column = place(start, i, A, COUNT, unit(A))
        if LAYOUT % 2 == 1:
            row = row % rows
        if LAYOUT == 1:
            return ptr + row * A + column
        elif LAYOUT >= 4:
            # Not row_stride times its unit first, which is in 32 bits where the stride is.
            begin = row * row_stride * (LAYOUT // 4 * 4)
            return ptr + begin + column.to(tl.int64) * column_stride
        else:
            return ptr + row * row_stride + column.to(tl.int64) * column_stride


@triton.jit
def load(
    ptr, start, i, inside, other, rows, row_stride, column_stride,
    A: tl.constexpr, COUNT: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Loads a tile of a parameter, in fp32; arguments as for `pointers`.

    A mask stops vectorized access, so that a tile whose elements all exist (WHOLE) has none.
    """
    at = pointers(ptr, start, i, rows, row_stride, column_stride, A, COUNT, LAYOUT)
    if WHOLE:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=inside, other=other).to(tl.float32)


@triton.jit
def load_first(
    ptr, start, i, inside, rows, row_stride, column_stride,
    A: tl.constexpr, COUNT: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr,
    REPEATED: tl.constexpr,
):  # fmt: skip
    """Loads a tile of a tensor that has the first `rows` rows alone, where REPEATED; 0 behind them.

    By a branch: a mask of all tiles left 8 loads of one element at A = 17, and took 126 registers
    for the Normal's gradient there, now 116; 80 at A = 8, now 63.
    """
    if REPEATED:
        x = tl.zeros([COUNT], tl.float32)
        ahead = rows.to(tl.int64) * A - start
        if ahead >= COUNT:
            x = load(
                ptr, start, i, inside, 0.0, rows, row_stride, column_stride, A, COUNT, LAYOUT, WHOLE
            )
        elif ahead > 0:
            x = load(
                ptr, start, i, inside & (i < ahead.to(tl.int32)), 0.0, rows, row_stride,
                column_stride, A, COUNT, LAYOUT, False,
            )  # fmt: skip
        return x
    else:
        return load(
            ptr, start, i, inside, 0.0, rows, row_stride, column_stride, A, COUNT, LAYOUT, WHOLE
        )


@triton.jit
def of_rows(ptr, start, i, inside, A: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """One value of each row, at each of its elements, in fp32; 0 at those that do not exist."""
    if WHOLE and COUNT % A == 0:
        ROWS: tl.constexpr = COUNT // A
        x = tl.load(ptr + start // A + tl.arange(0, ROWS)).to(tl.float32)
        return tl.reshape(tl.broadcast_to(x[:, None], [ROWS, A]), [COUNT])
    elif WHOLE and A * ptr.dtype.element_ty.primitive_bitwidth > 128:
        # A vector of 128 bits has elements of two rows at most: two loads for each, where one for
        # each element made 55.8 issue slots of TanhNormal's gradient at A = 257, now 53.6.
        VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        first = tl.arange(0, COUNT // VECTOR) * VECTOR + (start % A).to(tl.int32)
        row = first // A
        left = A - (first - row * A)
        at = ptr + start // A + row
        near = tl.load(at).to(tl.float32)
        far = tl.load(at + 1, mask=left < VECTOR, other=0.0).to(tl.float32)
        near = tl.where(tl.arange(0, VECTOR)[None, :] < left[:, None], near[:, None], far[:, None])
        return tl.reshape(near, [COUNT])
    else:
        row, _ = place(start, i, A, COUNT)
        return tl.load(ptr + row, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def of_first_rows(
    ptr, start, i, inside, rows, A: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr
):
    """The same for a tensor of the first `rows` rows alone; 0 at the elements of others."""
    if WHOLE and COUNT % A == 0:
        ROWS: tl.constexpr = COUNT // A
        row = start // A + tl.arange(0, ROWS)
        x = tl.load(ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        return tl.reshape(tl.broadcast_to(x[:, None], [ROWS, A]), [COUNT])
    else:
        row, _ = place(start, i, A, COUNT)
        return tl.load(ptr + row, mask=inside & (row < rows), other=0.0).to(tl.float32)


@triton.jit
def store(ptr, start, x, i, inside, COUNT: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Stores in the output's type: the first `TILE` elements of a whole tile, or those inside."""
    x = x.to(ptr.dtype.element_ty)
    if not WHOLE:
        tl.store(ptr + start + i, x, mask=inside)
    elif TILE == COUNT:
        tl.store(ptr + start + i, x)
    else:
        # TILE is a multiple of a vector.
        tl.store(ptr + start + i, x, mask=i < TILE)


@triton.jit
def store_first(
    ptr, start, x, i, inside, rows,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
    REPEATED: tl.constexpr,
):  # fmt: skip
    """`store` to a tensor that has the first `rows` rows alone, where REPEATED.

    By a branch, as `load_first`: a mask of all tiles made four stores of 128 bits 16 of one element
    at A = 17.
    """
    if REPEATED:
        ahead = rows.to(tl.int64) * A - start
        if ahead >= COUNT:
            store(ptr, start, x, i, inside, COUNT, TILE, WHOLE)
        elif ahead > 0:
            store(ptr, start, x, i, inside & (i < ahead.to(tl.int32)), COUNT, TILE, False)
    else:
        store(ptr, start, x, i, inside, COUNT, TILE, WHOLE)


@triton.jit
def store_at(
    ptr, start, x, i, inside, rows, row_stride,
    A: tl.constexpr, COUNT: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores a tile where `pointers` says, in columns side by side."""
    at = pointers(ptr, start, i, rows, row_stride, 1, A, COUNT, LAYOUT)
    x = x.to(ptr.dtype.element_ty)
    if WHOLE:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=inside)


@triton.jit
def store_rows(
    ptr, first, x, total_rows, ROWS: tl.constexpr, OWN: tl.constexpr, WHOLE: tl.constexpr
):
    """Stores `[ROWS]` values of the rows from `first` on, of which the tile owns OWN."""
    i = tl.arange(0, ROWS)
    x = x.to(ptr.dtype.element_ty)
    if not WHOLE:
        tl.store(ptr + first + i, x, mask=(i < OWN) & (first + i < total_rows))
    elif ROWS == OWN:
        tl.store(ptr + first + i, x)
    else:
        tl.store(ptr + first + i, x, mask=i < OWN)


@triton.jit
def bounds(low, high, lo, hi, start, i, A: tl.constexpr, COUNT: tl.constexpr, CLAMP: tl.constexpr):
    """Bounds of the elements: two numbers where CLAMP is 1, those of a row's elements where 2.

    Zeros where it is 0: Triton 3.6 returns no None from a function.
    """
    if CLAMP == 2:
        _, column = place(start, i, A, COUNT, unit(A))
        return tl.load(low + column).to(tl.float32), tl.load(high + column).to(tl.float32)
    elif CLAMP == 1:
        return lo, hi
    else:
        return 0.0, 0.0


@triton.jit
def clamp(x, lo, hi):
    """`torch.clamp`, a NaN stays: one instruction for each bound where a comparison takes two."""
    x = tl.maximum(x, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.constexpr_function
def vector(bits, others=64):
    """Elements in 128 bits of the smaller of two sizes, 8 at most."""
    return min(8, 128 // min(bits, others))


@triton.jit
def wide_rows(
    program, total_rows, A: tl.constexpr, OWN: tl.constexpr, UNIT: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """The vectors of UNIT elements that a program's OWN wide rows lie in.

    A vector that two programs share is stored by the later one, which makes the elements of both.
    Not so the end of the last row of all, behind which nothing may be read: a mask that ends there
    is no whole vector's, so that the last program takes code of its own, an element at a time.
    Beta's draw at A = 257 took 16 loads and 8 stores of a thread that way, 4 and 2 in vectors. A
    branch around loads and stores alone is no help: the compiler makes one load of two, with a mask
    of both.

    Args:
        program: int64.
        total_rows: number of rows of all programs.
        A: size of a row.
        OWN: rows of a program.
        UNIT: elements in 128 bits.
        LAST: whether the program is the last one, where A is no multiple of UNIT.

    Returns:
        int64 flat index of the first vector; from there on, in int32, the first row's first
        element, the end of the last row, that of the last vector that it has a part of, and of the
        last one that is the program's own to store.
    """
    first = program * OWN
    begin = first * A
    if A % UNIT == 0:
        end = tl.minimum(total_rows - first, OWN).to(tl.int32) * A
        return begin, 0, end, end, end
    else:
        start = begin // UNIT * UNIT
        skip = (begin - start).to(tl.int32)
        if LAST:
            end = skip + (total_rows - first).to(tl.int32) * A
            return start, skip, end, end, end
        else:
            end = skip + OWN * A
            return start, skip, end, (end + (UNIT - 1)) // UNIT * UNIT, end // UNIT * UNIT


@triton.jit
def of_threads(x, COUNT: tl.constexpr, THREADS: tl.constexpr, UNIT: tl.constexpr):
    """The sums of each thread's elements of a chunk: 8 registers become one at 8 a thread.

    Args:
        x: `[COUNT]`.
        COUNT: size of the chunk.
        THREADS: threads of the program; with another number sums take an exchange.
        UNIT: elements of a vector.

    Returns:
        `[THREADS]`.
    """
    parts = tl.reshape(x, [COUNT // (THREADS * UNIT), THREADS, UNIT])
    return tl.sum(tl.sum(parts, 2), 0)


@triton.jit
def ended(
    sums, x, i, end, COUNT: tl.constexpr, THREADS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """What a row has that ends at `end` of a chunk, and the chunk's terms without it.

    Args:
        sums: what chunks before have of it, as of `of_threads`.
        x: the chunk's terms, `[COUNT]`.
        i: int32 `[COUNT]`.
        end: the row's end.
        COUNT: size of the chunk.
        THREADS: as of `of_threads`.
        UNIT: likewise.
    """
    its = i < end
    sums += of_threads(tl.where(its, x, 0.0), COUNT, THREADS, UNIT)
    return sums, tl.where(its, 0.0, x)
