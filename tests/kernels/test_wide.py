"""Rows that programs go over in chunks, against the same rows in whole tiles.

The tests of the families look at rows in tiles, and at Beta's in chunks.
"""

from __future__ import annotations

import pytest
import torch

from fastprob.kernels import bernoulli, normal, tanh_normal, truncated_normal
from fastprob.kernels._launch import FEW, SMALL, Mapping, State, forward_grid
from fastprob.ops import tanh_normal as tanh_ops
from tests.kernels.accesses import filled
from tests.kernels.wide import chunked, tilings

FAMILIES = {
    "normal": normal,
    "tanh_normal": tanh_normal,
    "truncated_normal": truncated_normal,
    "bernoulli": bernoulli,
}
SAMPLE = torch.Size((2,))


def results(family, first, second, device):
    """What the kernels of a family make of two tensors: of several samples, and given values."""
    state = State(torch.tensor([7, 2], device=device))
    if family == "bernoulli":
        drawn = bernoulli.draw(first, False, SAMPLE, 1, state=state, entropy=True)[:3]
        return *drawn, *bernoulli.score(first, False, drawn[0], 1, entropy=True)
    scale = second.abs() + 0.1
    if family == "truncated_normal":
        low, high = first - 0.5, first + 2.0
        drawn = truncated_normal.draw(first, scale, low, high, SAMPLE, 1, state=state, entropy=True)
        given = truncated_normal.score(first, scale, low, high, drawn[0], 1, entropy=True)
        return *drawn[:3], *given
    mapped = torch.empty_like(second, memory_format=torch.contiguous_format)
    raw = {"raw": Mapping(1, 0.5, 0.01, 1e-4), "mapped": mapped}
    if family == "normal":
        drawn = normal.draw(first, second, SAMPLE, 1, state=state, entropy=True, **raw)[:3]
        return *drawn, mapped, *normal.score(first, scale, drawn[0], 1, entropy=True)
    bounds = tanh_ops.Bounds(1.0, 0.0, 0.0, True)
    drawn = tanh_normal.draw(first, second, bounds, SAMPLE, 1, state=state, **raw)[:2]
    return *drawn, mapped, tanh_normal.score(first, scale, drawn[0], bounds, 1)


@pytest.mark.parametrize(
    ("dtype", "apart"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["fp32", "fp32-apart", "bf16"],
)
@pytest.mark.parametrize("family", FAMILIES)
@tilings
def test_rows_in_chunks(a, own, rows, family, dtype, apart, device, monkeypatch):
    """Every element is the same, and sums are up to their rounding."""
    both = torch.randn(rows, 2 * a + 3, device=device).to(dtype)
    first, second = both[:, :a], both[:, a : 2 * a]
    if not apart:
        first, second = first.contiguous(), second.contiguous()
    expected = results(family, first, second, device)
    monkeypatch.setattr(
        FAMILIES[family],
        "forward_grid",
        lambda n, a, vector, most=0: chunked(a, own, n, *SMALL),
    )
    got = results(family, first, second, device)
    for g, e in zip(got, expected, strict=True):
        assert e.isfinite().all()
        if g.shape[-1:] == (a,):
            assert torch.equal(g, e)
        else:
            # Terms of up to 16 are added in two orders, and rounded once to the dtype.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(g, e, rtol=eps, atol=a * 16 * 2.0**-24)


@pytest.mark.parametrize("most", [1024, 2048, 4096])
@pytest.mark.parametrize("vector", [4, 8])
def test_large_batches_leave_few_elements_of_their_tiles_empty(vector, most):
    assert min(filled(forward_grid(1 << 20, a, vector, most)) for a in range(1, 5001)) >= 7 / 8


def test_few_rows_have_programs_of_their_own():
    """A chunk of a program waits for the one before."""
    for rows in (1, 3, FEW // 1025):
        assert forward_grid(rows, 1025, 4).programs == rows
