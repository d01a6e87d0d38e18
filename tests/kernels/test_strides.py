"""Parameters whose rows lie apart: which units their strides are told in, and what is read."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from fastprob.kernels import _categorical_rows as rows_
from fastprob.kernels import _tile as tile
from fastprob.kernels import bernoulli, beta, categorical, normal, projection, tanh_normal
from fastprob.kernels import truncated_normal as truncated
from fastprob.kernels._launch import (
    STRIDED,
    STRIDED_REPEATED,
    Mapping,
    State,
    parameter,
    strided_rows,
)
from fastprob.ops._fused import Bounds
from tests.kernels import tanh_formulas as tanh

NONE = torch.Size()
TWO = torch.Size((2,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Row stride beyond a row, and where the first row begins: strides that are multiples of 8, of 4 and
# of neither, and first elements 2, 8 and 16 bytes behind an address of whole vectors.
PLACES = {
    "eights": (8, 0), "fours": (4, 0), "odd": (1, 0), "eights, 16 bytes on": (8, 8),
    "eights, 2 bytes on": (8, 1), "eights, 8 bytes on": (8, 4), "fours, 8 bytes on": (4, 4),
}  # fmt: skip


def apart(values, beyond, begin):
    """The rows of `values` in a tensor of their own, NaN around them."""
    rows, a = values.shape
    stride = -(-a // 8) * 8 + beyond
    held = torch.full((begin + rows * stride,), math.nan).to(values)
    view = held[begin:].view(rows, stride)[:, :a]
    assert held.data_ptr() % 16 == 0
    return view.copy_(values)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units(dtype, repeated, device):
    half = dtype is not torch.float32
    layout = STRIDED_REPEATED if repeated else STRIDED
    values = torch.rand(3, 8, device=device).to(dtype)

    def unit(x):
        read = parameter(x, 1, repeated)
        assert read.tensor is x
        unit = max(1, read.layout - layout)
        assert read.layout == layout + (unit if unit > 1 else 0)
        assert read.row * unit == x.stride(0)
        return unit

    found = {name: unit(apart(values, *place)) for name, place in PLACES.items()}
    assert found == {
        "eights": 8 if half else 4,
        "fours": 4,
        "odd": 1,
        "eights, 16 bytes on": 8 if half else 4,
        "eights, 2 bytes on": 1,
        # Of fp32 that are 4 elements, 16 bytes.
        "eights, 8 bytes on": 1 if half else 4,
        "fours, 8 bytes on": 1 if half else 4,
    }
    assert unit(values[0].expand(3, 8)) == (8 if half else 4)
    # Columns that lie apart have no vectors.
    assert unit(apart(values.repeat(1, 2), 8, 0)[:, ::2]) == 1
    assert unit(values.T.contiguous().T) == 1


def test_units_of_halves():
    for a in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24):
        for dtype in DTYPES:
            row = torch.empty(5, 2 * a, dtype=dtype)
            for half in row.chunk(2, -1):
                read = parameter(half, 1, False)
                layout, stride = strided_rows(2 * a, dtype)
                # What is stored in vectors begins with one, in either half.
                assert stride * max(1, layout - STRIDED) == 2 * a
                assert layout <= read.layout or half.data_ptr() % 16


def state_of(x):
    return State(tanh.pair(x.device))


def made_by_normal(loc, scale):
    value, score, entropy, used = normal.draw(
        loc, scale, TWO, 1, state=state_of(loc), entropy=True, keep=True
    )
    grads = normal.draw_backward(
        value, score, entropy, loc, scale, used, TWO, 1, clamp=Bounds((-0.5, 0.5))
    )
    return value, score, entropy, *grads, *normal.score(loc, scale, scale, 1, entropy=True)


def made_by_tanh_normal(loc, scale):
    bounds = tanh.intervals(loc.shape[-1], loc.dtype, loc.device)[0]
    value, score, used = tanh_normal.draw(
        loc, scale, bounds, TWO, 1, state=state_of(loc), keep=True
    )
    grads = tanh_normal.draw_backward(value, score, loc, scale, bounds, used, TWO, 1)
    return value, score, *grads, tanh_normal.score(loc, scale, value[0], bounds, 1)


def made_by_truncated_normal(loc, scale):
    # Bounds that the batch repeats.
    column = torch.linspace(0.0, 1.0, loc.shape[-1], device=loc.device).to(loc.dtype)
    limits = [x.expand(loc.shape) for x in (-1.0 - column, 1.0 + column)]
    if loc.is_contiguous():
        limits = [x.contiguous() for x in limits]
    value, score, entropy, used = truncated.draw(
        loc, scale, *limits, TWO, 1, state=state_of(loc), entropy=True, keep=True
    )
    grads = truncated.draw_backward(value, score, entropy, loc, scale, *limits, used, TWO, 1)
    return value, score, entropy, *grads


def made_by_beta(loc, scale):
    value, score, entropy, _ = beta.draw(scale, loc, TWO, 1, state=state_of(loc), entropy=True)
    return value, score, entropy, *beta.score(scale, loc, value, 1, entropy=True)


def made_by_bernoulli(loc, scale):
    value, score, entropy, used = bernoulli.draw(
        scale, False, TWO, 1, state=state_of(loc), entropy=True, keep=True
    )
    return (
        value, score, entropy,
        bernoulli.draw_backward(score, entropy, scale, False, used, TWO, 1),
        bernoulli.score(scale, False, loc, 1)[0],
    )  # fmt: skip


def made_by_categorical(loc, scale):
    form = categorical.Form(0, True, 0, torch.int64)
    index, _, score, entropy, _ = categorical.draw(
        scale, None, TWO, form, state=state_of(loc), entropy=True
    )
    return index, score, entropy, categorical.backward(
        None, score, entropy, scale, None, index, TWO
    )  # fmt: skip


def made_by_projection(loc, scale):
    low = torch.linspace(-0.5, 0.0, loc.shape[-1], device=loc.device)
    return (
        projection.elements(loc, 0.0, 0.0, low, low + 0.3, None, loc.dtype, False),
        projection.clamp_backward(scale, loc, 0.0, 0.0, low, low + 0.3),
    )


@pytest.mark.parametrize("place", ["eights", "fours", "odd", "eights, 2 bytes on"])
@pytest.mark.parametrize(
    "made_by",
    [
        made_by_normal, made_by_tanh_normal, made_by_truncated_normal, made_by_beta,
        made_by_bernoulli, made_by_categorical, made_by_projection,
    ],
)  # fmt: skip
def test_rows_that_lie_apart_are_read_where_they_lie(made_by, place, device):
    # Whole vectors of 8, of 4, of 2 and none; more rows than a tile has.
    for a, rows in ((8, 5), (24, 25), (12, 25), (10, 25), (3, 5)):
        loc = torch.rand(rows, a, device=device).bfloat16() + 0.1
        scale = torch.rand(rows, a, device=device).bfloat16() + 0.5
        got = made_by(apart(loc, *PLACES[place]), apart(scale, *PLACES[place]))
        for g, plain in zip(got, made_by(loc, scale), strict=True):
            assert not g.isnan().any() and torch.equal(g, plain)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("a", [3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("family", ["normal", "tanh"])
def test_gradients_of_a_raw_output_are_stored_side_by_side(family, a, dtype, device):
    raw = torch.randn(30, 2 * a, device=device).to(dtype)
    into = torch.full_like(raw, math.nan)
    bounds = tanh.intervals(a, dtype, device)[0]
    grads = torch.rand(30, a, device=device).to(dtype), torch.rand(30, device=device).to(dtype)
    used = tanh.pair(device)

    def backward(loc, scale, **out):
        mapping = Mapping(1, 0.5, 0.01, 1e-4)
        if family == "normal":
            return normal.draw_backward(
                grads[0], grads[1], None, loc, scale, used, NONE, 1, raw=mapping, **out
            )
        return tanh_normal.draw_backward(
            *grads, loc, scale, bounds, used, NONE, 1, raw=mapping, **out
        )

    backward(*raw.chunk(2, -1), into=into)
    apart_of_each = backward(*(x.contiguous() for x in raw.chunk(2, -1)))
    assert not into.isnan().any() and torch.equal(into, torch.cat(apart_of_each, -1))


@triton.jit
def _addresses(
    out, ptr, rows, row_stride, column_stride,
    A: tl.constexpr, COUNT: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    start = tl.program_id(0).to(tl.int64) * COUNT
    at = tile.pointers(ptr, start, i, rows, row_stride, column_stride, A, COUNT, LAYOUT)
    tl.store(out + i, at.to(tl.int64) - ptr.to(tl.int64))
    first = tl.program_id(0).to(tl.int64)
    by_row = rows_.offsets(first, i // A, i % A, rows, row_stride, column_stride, A, LAYOUT)
    tl.store(out + COUNT + i, by_row)


def test_columns_may_lie_more_than_2_to_the_31_elements_apart(device):
    """A parameter of 8 x 2^29 elements, transposed: the last column begins at 7 * 2^29."""
    rows, a, count = 2**29, 8, 64
    out = torch.zeros(2, count, dtype=torch.int64, device=device)
    _addresses[(1,)](
        out, torch.empty(4, device=device), rows, 1, rows, A=a, COUNT=count, LAYOUT=STRIDED
    )
    i = torch.arange(count)
    expected = i // a + (i % a) * rows
    assert expected.max() > 2**31
    assert torch.equal(out.cpu(), torch.stack([4 * expected, expected]))


@pytest.mark.parametrize("unit", [1, 4, 8])
def test_rows_may_lie_more_than_2_to_the_31_elements_apart(unit, device):
    """A stride told in units, which is below 2^31 where the stride itself is not."""
    stride, a, count = 2**31 + 2**30, 8, 64
    out = torch.zeros(2, count, dtype=torch.int64, device=device)
    layout = STRIDED + (unit if unit > 1 else 0)
    _addresses[(1,)](
        out, torch.empty(4, device=device), 8, stride // unit, 1, A=a, COUNT=count, LAYOUT=layout
    )
    i = torch.arange(count)
    expected = i // a * stride + i % a
    assert torch.equal(out.cpu(), torch.stack([4 * expected, expected]))
