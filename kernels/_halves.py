"""A tile in two halves, one behind the other, where all of it would take too many registers.

Compilers interleave two halves that stand in a row, and then hold what both compute on the way. A
loop of two turns keeps them apart: while one half is computed, the other's inputs or results alone
are held, in half precision as words of 32 bits with two elements each. It is written as

    x0, x1 = cut(x, ...)
    y0, y1 = x0, x1
    for _ in range(TURNS):
        y = f(widened(x0, ...))
        x0 = x1
        y0, y1 = y1, packed(y, ...)
    y = joined(y0, y1, ...)

where y0 and y1 are two values before the loop: Triton takes a variable that gets the value it had
for one that the loop leaves alone.

A thread has a part of each half, so that nothing is exchanged. A tile is cut in one of these ways:

- WHOLE: not at all; the loop has one turn, which compilers take out.
- EIGHTS: of each 8 elements, which are 128 bits in half precision, the first and the last 4.
- BLOCKS: in the middle, for elements of 32 bits, of which 4 are 128 bits.
"""

import triton
import triton.language as tl

WHOLE, EIGHTS, BLOCKS = range(3)
_WHOLE, _EIGHTS, _BLOCKS = (tl.constexpr(cut) for cut in range(3))


@triton.jit
def _words(x, COUNT: tl.constexpr):
    """`[COUNT]` elements of 16 bits as `[COUNT / 2]` words."""
    even, odd = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True).to(tl.uint32), [COUNT // 2, 2]))
    return even | (odd << 16)


@triton.jit
def _of_words(x, COUNT: tl.constexpr, TYPE: tl.constexpr):
    """`[COUNT]` elements of a type of 16 bits, from their words."""
    even, odd = (x & 0xFFFF).to(tl.uint16), (x >> 16).to(tl.uint16)
    return tl.reshape(tl.join(even, odd), [COUNT]).to(TYPE, bitcast=True)


@triton.jit
def _cut(x, COUNT: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr):
    if CUT == _EIGHTS:
        groups = tl.reshape(x, [COUNT // GROUP, 2, GROUP // 2])
        first, last = tl.split(tl.permute(groups, (0, 2, 1)))
        return tl.reshape(first, [COUNT // 2]), tl.reshape(last, [COUNT // 2])
    else:
        return tl.split(tl.permute(tl.reshape(x, [2, COUNT // 2]), (1, 0)))


@triton.jit
def _join(first, last, COUNT: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr):
    if CUT == _EIGHTS:
        first = tl.reshape(first, [COUNT // GROUP, GROUP // 2])
        last = tl.reshape(last, [COUNT // GROUP, GROUP // 2])
        return tl.reshape(tl.permute(tl.join(first, last), (0, 2, 1)), [COUNT])
    else:
        return tl.reshape(tl.permute(tl.join(first, last), (1, 0)), [COUNT])


@triton.jit
def cut(x, COUNT: tl.constexpr, CUT: tl.constexpr, ASKED: tl.constexpr = True):
    """Two halves of a tile, as they wait; both x where it is WHOLE, or where nothing asks for it.

    Args:
        x: `[COUNT]`, in the type that it was loaded in.
        COUNT: size of the tile.
        CUT: how it is cut.
        ASKED: whether x is a tile, and not a number that stands for nothing.
    """
    if CUT == _WHOLE or not ASKED:
        return x, x
    elif CUT == _EIGHTS and x.dtype.primitive_bitwidth == 16:
        return _cut(_words(x, COUNT), COUNT // 2, 4, CUT)
    else:
        return _cut(x, COUNT, 8, CUT)


@triton.jit
def widened(x, like, COUNT: tl.constexpr, CUT: tl.constexpr, ASKED: tl.constexpr = True):
    """A half in fp32, of a tile that was loaded from a pointer such as `like`."""
    if not ASKED:
        return x
    elif CUT == _EIGHTS and like.dtype.element_ty.primitive_bitwidth == 16:
        return _of_words(x, COUNT // 2, like.dtype.element_ty).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def packed(x, like, COUNT: tl.constexpr, CUT: tl.constexpr):
    """A half of a result as it waits to be stored through a pointer such as `like`."""
    x = x.to(like.dtype.element_ty)
    if CUT == _EIGHTS and like.dtype.element_ty.primitive_bitwidth == 16:
        return _words(x, COUNT // 2)
    else:
        return x


@triton.jit
def joined(first, last, like, COUNT: tl.constexpr, CUT: tl.constexpr):
    """The tile of two halves from `packed`."""
    if CUT == _WHOLE:
        return last
    elif CUT == _EIGHTS and like.dtype.element_ty.primitive_bitwidth == 16:
        return _of_words(_join(first, last, COUNT // 2, 4, CUT), COUNT, like.dtype.element_ty)
    else:
        return _join(first, last, COUNT, 8, CUT)


@triton.jit
def joined_terms(first, last, COUNT: tl.constexpr, CUT: tl.constexpr):
    """The tile of two halves in fp32."""
    if CUT == _WHOLE:
        return last
    else:
        return _join(first, last, COUNT, 8, CUT)


@triton.jit
def quarters(x, COUNT: tl.constexpr, ASKED: tl.constexpr = True):
    """Four parts of a tile: of each 4 elements, which a thread has, one each.

    All four are x where nothing asks for it, as with `cut`.
    """
    if ASKED:
        even, odd = tl.split(tl.reshape(x, [COUNT // 4, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth
    else:
        return x, x, x, x


@triton.jit
def joined_quarters(first, second, third, fourth, COUNT: tl.constexpr):
    """The tile of four parts from `quarters`."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [COUNT])
