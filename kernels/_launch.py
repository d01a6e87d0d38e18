"""Launch sizes, and how the parameters of a call lie in memory."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
AMD = torch.version.hip is not None

FLAT, REPEATED, STRIDED, STRIDED_REPEATED = range(4)

# Elements of a tile and its warps: 16 elements a thread, which is 48 registers for the Normal. 8 a
# thread take 38 issue slots an element in place of 33, 32 a thread 124 registers.
LARGE = (2048, 4)
LARGER = (4096, 8)
# Of kernels whose programs should be of 4 warps, with 8 elements a thread.
MEDIUM = (1024, 2)
# Fewer than 264 large tiles would leave multiprocessors of an H200 (132) with one or none.
SMALL = (512, 1)
FEW = 264 * 2048
# Most chunks of several rows of a program: a row of more leaves a ninth of them empty at most. And
# the fewest warps to have, one for each of the four parts of an H200's multiprocessors.
FULL = 16
BUSY = 528
# Fewer wide rows have a program of 4 warps each: a chunk of a program waits for the one before.
ALONE = 4 * BUSY
# Backward passes hold more values: 8 elements a thread.
FLAT_TILE = (1024, 4)
FLAT_SMALL = (256, 1)


class Grid(NamedTuple):
    """The tiles of a forward pass. See `_tile` for the three layouts.

    Attributes:
        programs: number of programs.
        count: elements that a program handles at a time.
        tile: elements of whole rows among them.
        rows: rows of a tile, for the gather the next power of two.
        own: rows of a tile that are its own; where `wide`, of a program.
        gather: whether A is no power of two.
        wide: whether a program goes over its rows in chunks of `count`.
        warps: warps of a program.
    """

    programs: int
    count: int
    tile: int
    rows: int
    own: int
    gather: bool
    wide: bool
    warps: int


@functools.lru_cache(maxsize=4096)
def forward_grid(rows: int, a: int, vector: int, most: int = LARGER[0]) -> Grid:
    """The tiles for `rows` rows of `a` elements, whose rows are summed.

    Args:
        rows: how many there are.
        a: their size.
        vector: elements of 128 bits, 4 or 8.
        most: elements of the largest tile: 1024, 2048 or 4096.
    """
    few = rows * a < FEW
    sizes = [size for size in (LARGE, LARGER) if size[0] <= most] or [MEDIUM]
    large = sizes[0]
    if a & (a - 1) == 0 and a <= large[0]:
        count, warps = SMALL if few and a <= SMALL[0] else large
        own = count // a
        return Grid(-(-rows // own), count, count, own, own, False, False, warps)
    if a * 4 <= LARGER[0]:
        sizes = [SMALL, *sizes] if few else sizes
        # Whole rows that are whole vectors. The smallest tile that is at least seven eighths full;
        # of few rows rather a small one. Else as many as fit, with part of a vector in front of
        # them, see `_tile.begin`: the Normal's draw takes 38 issue slots an element that way at
        # A = 257, 47 without.
        even = vector // math.gcd(a, vector)
        fitting = [(count // a // even * even, count, warps) for count, warps in sizes]
        fitting = [s for s in fitting if s[0] * a * 8 >= s[1] * (6 if few else 7)]
        if not fitting:
            fitting = [((count - vector + 1) // a, count, warps) for count, warps in sizes]
            fitting = [max(fitting, key=lambda s: (s[0] > 1, s[0] * a / s[1]))]
        own, count, warps = fitting[0]
        if own * a * 8 >= count * 7 or (rows < ALONE and own > 1):
            padded = triton.next_power_of_2(own)
            return Grid(-(-rows // own), count, own * a, padded, own, True, False, warps)
    if rows < ALONE or a % large[0] == 0:
        return Grid(rows, large[0], a, 1, 1, False, True, large[1])
    return wide_grid(rows, a, *SMALL)


def wide_grid(rows: int, a: int, count: int, warps: int) -> Grid:
    """Tiles for rows that programs go over in chunks of `count` elements, whatever `a` is.

    A program has the fewest rows that leave a tenth of its chunks empty at most, one row behind the
    other: one of a row by itself has two chunks of 256 at A = 257, and the second has one element.
    Where few rows would leave a GPU idle that way, a program has one.
    """
    # A power of 2: each number of rows is a kernel to compile.
    most = min(FULL * count // a, 1 << (rows * warps // BUSY).bit_length() >> 1)
    choices = range(1, max(most, 1) + 1)
    filled = {own: _filled(own, a, count) for own in choices}
    own = next((own for own in choices if filled[own] >= 0.9), max(choices, key=filled.__getitem__))
    return Grid(-(-rows // own), count, own * a, 1, own, False, True, warps)


def _filled(own: int, a: int, count: int) -> float:
    """The part of the chunks of `own` rows that exists, where they begin least well."""
    tile = own * a
    # They begin with a vector, of 8 elements at most.
    return tile / (-(-(tile + 8 - math.gcd(tile, 8)) // count) * count)


def flat_grid(total: int) -> tuple[int, int, int]:
    """Programs, elements of each and its warps, where nothing is summed."""
    count, warps = FLAT_SMALL if total < FEW else FLAT_TILE
    return -(-total // count), count, warps


class Parameter(NamedTuple):
    """A tensor that a kernel reads as `[rows, A]`.

    Attributes:
        tensor: where it lies.
        layout: how, in the terms of `_tile.pointers`.
        row: row stride, in units of 4 elements where 4 was added to `layout`, of 8 where 8 was.
        column: column stride.
    """

    tensor: Tensor
    layout: int
    row: int
    column: int


def _collapse(sizes: Any, strides: Any) -> int | None:
    """The one stride of several dimensions, None where they have none."""
    stride = None
    expected = 0
    for size, step in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return 0 if stride is None else stride


def parameter(x: Tensor, ndims: int, repeated: bool) -> Parameter:
    """How a kernel reads a tensor of shape `[*batch, *event]`.

    A tensor whose batch and event dimensions each have one stride is read where it lies: slices of
    columns, chunks, transposed and expanded ones. Any other is copied.

    Args:
        x: the tensor.
        ndims: number of event dimensions.
        repeated: whether the output has sample dimensions in front of those of `x`.
    """
    if x.is_contiguous():
        return Parameter(x, REPEATED if repeated else FLAT, 0, 0)
    batch = x.dim() - ndims
    shape, strides = x.shape, x.stride()
    row = _collapse(shape[:batch], strides[:batch])
    column = _collapse(shape[batch:], strides[batch:])
    if row is None or column is None:
        return Parameter(x.contiguous(), REPEATED if repeated else FLAT, 0, 0)
    layout = STRIDED_REPEATED if repeated else STRIDED
    # Vectors need the address of the first as well.
    if column == 1 and x.data_ptr() % 16 == 0:
        unit = _unit(row, x.dtype)
        return Parameter(x, layout + unit // 4 * 4, row // unit, column)
    return Parameter(x, layout, row, column)


def _unit(stride: int, dtype: torch.dtype) -> int:
    """Elements that a stride is told in: 8, 128 bits of a half precision, 4, or 1."""
    if stride % 8 == 0 and dtype.itemsize == 2:
        return 8
    return 4 if stride % 4 == 0 else 1


def strided_rows(stride: int, dtype: torch.dtype) -> tuple[int, int]:
    """Layout and row stride of each half of rows that lie `stride` apart, without gaps."""
    unit = _unit(stride // 2, dtype)
    return STRIDED + unit // 4 * 4, stride // unit


def event_numel(shape: torch.Size, ndims: int) -> int:
    """Number of elements of the last `ndims` dimensions of `shape`."""
    n = 1
    for size in shape[len(shape) - ndims :]:
        n *= size
    return n


class State(NamedTuple):
    """Where the noise of a draw comes from: an int64 pair on the device, or two numbers.

    Attributes:
        pair: (seed, number of the draw), int64 `[2]`; None where the numbers count.
        ticket: int32 `[1]`, 0 between draws; None where the pair is not to be advanced.
        seed: the key.
        call: number of the draw.
    """

    pair: Tensor | None
    ticket: Tensor | None = None
    seed: int = 0
    call: int = 0


NO_STATE = State(None)


class Mapping(NamedTuple):
    """How a raw value becomes a scale, see `_scale`.

    Attributes:
        kind: 0 for not at all, 1 for softplus, 2 for exp.
        bias: added to the raw value of a softplus.
        least: added to a softplus.
        floor: lower bound of the scale.
    """

    kind: int = 0
    bias: float = 0.0
    least: float = 0.0
    floor: float = 0.0

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """The last three as a kernel reads them; None where it does not."""
        return (self.bias, self.least, self.floor) if self.kind else (None, None, None)


NO_MAPPING = Mapping()


def bounds_of(clamp: Any) -> tuple[int, float | None, float | None, Any, Any]:
    """How a kernel clamps, two numbers and two tensors, of which it reads what it needs.

    Args:
        clamp: the operators' `Bounds`, or None.
    """
    if clamp is None or clamp.kind == 0:
        return 0, None, None, None, None
    if clamp.kind == 1:
        return 1, float(clamp.limits[0]), float(clamp.limits[1]), None, None
    return 2, None, None, clamp.low, clamp.high


def vector_of(*dtypes: torch.dtype) -> int:
    """Elements that the vectors of all of them are whole multiples of, as of `_tile.vector`."""
    return 8 if min(dtype.itemsize for dtype in dtypes) <= 2 else 4


def fast(x: Tensor) -> bool:
    """Whether the approximate instructions of NVIDIA's GPUs are there for kernels on `x`."""
    return x.is_cuda and not AMD and not INTERPRETED


def limited(x: Tensor, registers: int | None) -> dict[str, int]:
    """The option of a launch for the most registers of a thread, which NVIDIA's GPUs have."""
    return {"maxnreg": registers} if registers is not None and fast(x) else {}


def launching(x: Tensor) -> Any:
    """What a launch for tensors on the device of `x` runs under."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def tail(grad: Tensor | None) -> Tensor | None:
    """A gradient of rows as the kernels read it; sums hand on expanded ones, which are copied."""
    return None if grad is None else grad.contiguous()


def gradients(shape: torch.Size, parameter: Tensor) -> Tensor:
    """Memory for the gradient of a parameter at each of the samples, `[*shape, *parameter]`.

    In fp32 where samples are to be summed: half precisions would be rounded twice.
    """
    dtype = torch.float32 if shape else parameter.dtype
    return torch.empty(shape + parameter.shape, dtype=dtype, device=parameter.device)


def fold(grad: Tensor, parameter: Tensor) -> Tensor:
    """The sum over the samples, in the parameter's shape and dtype."""
    samples = grad.dim() - parameter.dim()
    return grad.sum(tuple(range(samples))).to(parameter.dtype) if samples else grad
