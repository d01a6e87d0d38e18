"""The projections' kernels against the reference: bit for bit, since nothing is rounded twice."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import one_hot as hot_rows

from fastprob import backend, specs
from fastprob.kernels import projection as kernels
from fastprob.ops import projection as ops
from fastprob.specs import projection_for

INF, NAN = math.inf, math.nan
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = (*FLOATS, *INTEGERS)
# Beyond bounds, on them, and what comparisons and roundings get wrong.
ODD = (NAN, INF, -INF, -0.0, 0.5, 1.5, 2.5, -0.5, 1e30)


def values(shape, dtype, device, scale=3.0):
    x = torch.randn(shape, device=device) * scale
    if dtype.is_floating_point and x.numel() > len(ODD):
        x.view(-1)[: len(ODD)] = torch.tensor(ODD, device=device)
    if dtype is torch.bool:
        return x > 0
    return (x.abs() if dtype is torch.uint8 else x).to(dtype)


@pytest.fixture
def launches(monkeypatch):
    """Names of the launches that were made."""
    made = []
    for name in ("elements", "clamp_backward", "one_hot"):
        original = getattr(kernels, name)

        def counted(*args, _original=original, _name=name, **kwargs):
            made.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(kernels, name, counted)
    return made


def by_reference(projection, value):
    with backend.using_backend("reference"):
        return projection(value)


def same(projection, value):
    """Asserts that both backends give the same, of another memory, and the same once more."""
    before = value.clone()
    got, expected = projection(value), by_reference(projection, value)
    assert got.dtype is expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value, before, rtol=0, atol=0, equal_nan=True)
    assert got.data_ptr() != value.data_ptr() or not value.numel()
    torch.testing.assert_close(projection(got), got, rtol=0, atol=0, equal_nan=True)


SHAPES = ((), (3,), (5, 8), (0, 3), (37, 3))


@pytest.mark.parametrize("spec_dtype", [*FLOATS, torch.int64, torch.int8, torch.bool], ids=str)
def test_clamps(spec_dtype, device, launches):
    low, high = (False, True) if spec_dtype is torch.bool else (-1.3, 2.7)
    together = projection_for(specs.Bounded(low, high, (), dtype=spec_dtype, device=device))
    for dtype in DTYPES:
        for shape in SHAPES:
            same(together, values(shape, dtype, device))
        for shape in SHAPES[1:]:
            size = (2, *shape[1:]) if len(shape) > 1 else shape
            if spec_dtype is torch.bool:
                low = torch.rand(size, device=device) < 0.3
                high = low | (torch.rand(size, device=device) < 0.5)
            else:
                low = -torch.rand(size, device=device) * 3
                high = low + 2
            # A 1 in the spec's shape goes with any size.
            each = projection_for(specs.Bounded(low[..., :1], high[..., :1], dtype=spec_dtype))
            same(each, values((4, *size[:-1], shape[-1]), dtype, device))
            each = projection_for(specs.Bounded(low, high, size, dtype=spec_dtype))
            same(each, values((4, *size), dtype, device))
    assert "elements" in launches


def test_a_plain_clamp_is_left_to_torch(device, launches):
    for dtype in (torch.float32, torch.int64):
        value = values((5, 8), dtype, device)
        same(ops.Clamp(-1, 2, dtype), value)
        low = torch.full((8,), -1, dtype=dtype, device=device)
        same(ops.ClampEach(low, low + 2), value)
    assert not launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indices(dtype, device, launches):
    value = values((37, 8), dtype, device, 60.0)
    for n in (1, 2, 4, 101):
        same(projection_for(specs.Categorical(n)), value)
    same(projection_for(specs.Binary(8)), value)
    nvec = torch.tensor([1, 2, 4, 11, 101, 3, 6, 8], device=device)
    for spec_dtype in (torch.int64, torch.int32, torch.int8, torch.float32, torch.float64):
        same(projection_for(specs.MultiCategorical(nvec, dtype=spec_dtype)), value)
    same(projection_for(specs.MultiCategorical(nvec[:1])), value[:, :1])
    # An index of fp64 is not projected once more, nor is a clamp of integers by a kernel.
    assert len(launches) == (21 if dtype.is_floating_point else 11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_valid_indices(dtype, device, launches):
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 1], dtype=torch.bool, device=device)
    value = values((5, 2, 3), dtype, device, 6.0)
    same(projection_for(specs.Categorical(9, mask=mask)), value)
    rows = torch.rand(2, 3, 9, device=device) < 0.4
    rows[..., 2] = True
    same(projection_for(specs.Categorical(9, (2, 3), mask=rows)), value)
    same(projection_for(specs.Categorical(9, (1, 3), mask=rows[:1])), value)
    each = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool, device=device)
    same(projection_for(specs.MultiCategorical((3, 4, 2), mask=each)), value)
    assert len(launches) == 8


WIDTHS = ((1,), (2,), (3,), (8,), (17,), (64,), (257,), (1500,), (3, 2), (4, 4, 4), (4, 1, 9, 2),
          (700, 3), (1200, 1100))  # fmt: skip


def rows_of(widths, batch, dtype, device):
    """One-hot rows, rows of anything, and rows of equals, side by side."""
    value = values((batch, sum(widths)), dtype, device)
    parts = value.split(widths, -1)
    for part in parts:
        part[::3] = hot_rows(torch.arange(len(part[::3]), device=device) % part.shape[1],
                             part.shape[1]).to(dtype)  # fmt: skip
        part[1::5] = 1
        if dtype.is_floating_point and batch > 7:
            part[4], part[7, -1] = -INF, NAN
    return value


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_one_hot_rows(widths, device, launches):
    n = sum(widths)
    for masked in (False, True):
        mask = None
        if masked:
            mask = torch.rand(2, n, device=device) < 0.4
            for part in mask.split(widths, -1):
                part[:, part.shape[1] // 2] = True
        # Each way to lay a row out with a few types, and one of them with all.
        few = (torch.float32, torch.float16, torch.int64)
        for dtype in DTYPES if widths == (4, 1, 9, 2) else few[:: 2 if n > 300 else 1]:
            for spec_dtype in dict.fromkeys((dtype, torch.int64, torch.bool)):
                projection = ops.OneHot(widths, spec_dtype, mask, device)
                value = rows_of(widths, 8 if n > 100 else 38, dtype, device)
                if masked:
                    value = value.view(-1, 2, n)
                same_rows(projection, value)
    assert set(launches) == {"one_hot"}


def same_rows(projection, value):
    got, expected = projection(value), by_reference(projection, value)
    assert got.dtype is expected.dtype
    # A row that holds -inf next to the type's smallest number is no case of these.
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    again = projection(got)
    assert torch.equal(again.double(), got.double())


@pytest.mark.parametrize("widths", [(3,), (2, 1), (1500,)], ids=str)
def test_no_rows(widths, device):
    projection = ops.OneHot(widths, torch.int64, None, device)
    for shape in ((0,), (2, 0), (0, 2)):
        value = torch.zeros(*shape, sum(widths), device=device)
        got = projection(value)
        assert got.shape == value.shape and got.dtype is torch.int64


def test_zeros_of_both_signs_are_equals(device):
    projection = ops.OneHot((3,), torch.int64, None, device)
    value = torch.tensor([[-0.0, 0.0, -1.0], [-1.0, 0.0, -0.0]], device=device)
    assert projection(value).tolist() == [[1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_are_torchs(dtype, device, launches):
    low = torch.tensor([-1.0, -0.5, 0.25], device=device)
    mask = torch.tensor([True, False, True], device=device)
    cases = (
        ops.Clamp(-1.0, 0.5, dtype), ops.Clamp(-1.0, 0.5, torch.float32),
        ops.ClampEach(low.to(dtype), low.to(dtype) + 1), ops.ClampEach(low, low + 1),
        ops.RoundClamp(2), ops.RoundClampEach(torch.tensor([1, 2, 3], device=device), dtype),
        ops.OneHot((3,), dtype, None, device), ops.OneHot((2, 1), dtype, None, device),
        ops.OneHot((3,), dtype, mask, device), ops.OneHot((1, 1, 1), dtype, None, device),
    )  # fmt: skip
    for projection in cases:
        value = torch.cat((values((6, 3), dtype, device), torch.eye(3, dtype=dtype, device=device)))
        # On the bounds the gradient passes.
        value[0] = torch.tensor([-1.0, 0.5, 0.25], device=device)
        results = []
        for name in ("triton", "reference"):
            with backend.using_backend(name):
                leaf = value.clone().requires_grad_()
                out = projection(leaf)
                weight = torch.arange(out.numel(), device=device).view_as(out).to(out.dtype) + 1
                (grad,) = torch.autograd.grad((out * weight).nansum(), leaf)
                results.append(grad)
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert "clamp_backward" in launches


def test_a_row_that_is_no_part_of_the_value_has_no_gradient(device):
    value = torch.randn(4, 3, device=device, requires_grad=True)
    mask = torch.ones(3, dtype=torch.bool, device=device)
    for projection in (ops.OneHot((3,), torch.int64, None, device),
                       ops.OneHot((3,), torch.int64, mask, device)):  # fmt: skip
        assert not projection(value).requires_grad


def test_the_second_gradient_of_a_clamp(device):
    value = torch.randn(6, 3, device=device, dtype=torch.float32, requires_grad=True)
    projection = ops.Clamp(-0.5, 0.5, torch.float32)
    (grad,) = torch.autograd.grad(projection(value * 2).square().sum(), value, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), value)
    inside = (value.detach() * 2).abs() <= 0.5
    torch.testing.assert_close(second, torch.where(inside, 8.0, 0.0))


def test_strided_values(device):
    wide = torch.randn(6, 16, device=device) * 3
    nvec = torch.arange(1, 9, device=device)
    for value in (
        wide[:, ::2],
        wide[:, :8],
        wide[:, :8].T.contiguous().T,
        wide[:1, :8].expand(6, 8),
    ):
        same(projection_for(specs.Categorical(4)), value)
        same(projection_for(specs.MultiCategorical(nvec)), value)
        same(ops.ClampEach(-nvec.double().float(), nvec.float()), value.bfloat16())
        same(ops.OneHot((8,), torch.float32, None, device), value)


def test_fp64_stays_with_the_reference(device, launches):
    value = torch.randn(5, 3, dtype=torch.float64, device=device)
    for spec in (specs.Bounded(-1, 1, (3,)), specs.Categorical(3), specs.OneHot(3),
                 specs.MultiCategorical((2, 3, 4))):  # fmt: skip
        projection = projection_for(spec)
        assert torch.equal(projection(value), by_reference(projection, value))
    assert not launches


def test_a_value_that_does_not_fit(device):
    value = torch.zeros(5, 4, device=device)
    for projection, wrong in (
        (ops.ClampEach(torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)), value),
        (ops.RoundClampEach(torch.ones(3), torch.int64), value),
        (ops.OneHot((3,), torch.int64, None, device), value),
        (ops.OneHot((4,), torch.int64, torch.ones(2, 4, dtype=torch.bool), device), value),
    ):
        with pytest.raises(ValueError, match="cannot project a value of shape"):
            projection(wrong)


def test_operators(device):
    low = torch.tensor([-1.0, -0.5, 0.25], device=device)
    table = torch.tensor([0, 0, 3, 3], device=device)
    last = torch.tensor([1, 2, 3], device=device)
    value = torch.randn(4, 3, device=device, requires_grad=True)
    projection = ops.OneHot((2, 1), torch.float32, None, device)
    tables = projection._tensors[device][1]
    mask = torch.tensor([True, False, True], device=device)
    calls = (
        ("elements", (value, -1.0, 0.5, None, None, None, torch.float32, False)),
        ("elements", (value, 0, 0, low, low + 1, None, torch.float32, False)),
        ("elements", (value, 0, 3, None, None, table, torch.float32, True)),
        ("elements", (value, 0, 0, None, last, None, torch.int64, True)),
        ("elements", (value, 0, 2, None, None, None, torch.float32, True)),
        ("clamp_backward", (value.detach(), value, -1.0, 0.5, None, None)),
        ("clamp_backward", (value.detach(), value, 0, 0, low, low + 1)),
        ("one_hot", (value, None, tables, [2, 1], torch.float32, True)),
        ("one_hot", (value.detach(), mask, tables, [2, 1], torch.float32, False)),
    )
    for name, arguments in calls:
        operator = getattr(torch.ops.fastprob, f"project_{name}").default
        made = {}
        for back in ("triton", "reference"):
            with backend.using_backend(back):
                torch.library.opcheck(operator, arguments)
                made[back] = operator(*arguments)
        torch.testing.assert_close(made["triton"], made["reference"], rtol=0, atol=0)


def test_transforms_and_compile(device):
    low = torch.tensor([-1.0, -0.5, 0.25], device=device)
    mask = torch.tensor([True, False, True], device=device)
    value = torch.randn(5, 4, 3, device=device)
    for projection in (
        ops.Clamp(-1, 1, torch.int64), ops.ClampEach(low.bfloat16(), low.bfloat16() + 1),
        ops.RoundClamp(2), ops.NearestValid(mask, torch.Size(())),
        ops.OneHot((3,), torch.float32, mask, device),
        ops.OneHot((2, 1), torch.int64, None, device),
    ):  # fmt: skip
        expected = projection(value)
        assert torch.equal(torch.vmap(projection, in_dims=1, out_dims=1)(value), expected)
        compiled = torch.compile(projection.__call__, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(value), expected)
    clamp = ops.Clamp(-0.5, 0.5, torch.float32)
    grads = torch.vmap(torch.func.grad(lambda v: clamp(v).sum()))(value)
    assert torch.equal(grads, (value.abs() <= 0.5).float())


def test_operators_under_vmap(device):
    value = torch.randn(4, 5, 3, device=device)
    low = torch.tensor([-1.0, -0.5, 0.25], device=device)
    tables = ops.OneHot((2, 1), torch.int64, None, device)._tensors[device][1]
    names = torch.ops.fastprob
    calls = (
        lambda v: names.project_elements(v, 0, 0, low, low + 1, None, torch.float32, False),
        lambda v: names.project_clamp_backward(v, v, -1.0, 0.5, None, None),
        lambda v: names.project_one_hot(v, None, tables, [2, 1], torch.int64, False)[0],
    )
    for call in calls:
        got = torch.vmap(call, in_dims=1, out_dims=1)(value)
        assert torch.equal(got, call(value))


def test_the_comparison_finds_a_projection_in_place(device):
    with pytest.raises(AssertionError):
        same(lambda v: v.clamp_(-1, 1), torch.randn(5, 3, device=device))
