"""The conditions that conftest.py promises hold."""

from __future__ import annotations

import pytest
import torch

MAKERS = {
    "empty": lambda dtype: torch.empty(3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, dtype=dtype)),
    "empty_permuted": lambda dtype: torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((2, 3), (3, 1), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(3, dtype=dtype).new_empty(4),
    "new_empty_strided": lambda dtype: torch.zeros(3, dtype=dtype).new_empty_strided((2,), (1,)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unwritten_floats_are_nan(make, dtype):
    out = make(dtype)
    assert out.dtype == dtype
    assert out.isnan().all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_unwritten_integers_are_the_largest(make):
    assert (make(torch.int64) == torch.iinfo(torch.int64).max).all()


def test_unwritten_leaf_may_require_grad():
    out = torch.empty(3, requires_grad=True)
    assert out.is_leaf and out.requires_grad and out.isnan().all()


def forget_half(x):
    out = torch.empty_like(x)
    out[:2] = x[:2]
    return out


def test_a_forgotten_write_shows():
    assert forget_half(torch.ones(4)).isnan().tolist() == [False, False, True, True]


def test_filling_stays_out_of_the_way_of_a_compiler():
    x = torch.ones(4)
    assert torch.equal(torch.compile(forget_half, fullgraph=True)(x)[:2], x[:2])


def test_filling_stays_out_of_the_way_of_vmap():
    assert torch.equal(torch.vmap(forget_half)(torch.ones(3, 4))[:, :2], torch.ones(3, 2))


@pytest.mark.parametrize("_", [0, 1])
def test_every_test_starts_from_one_seed(_):
    assert torch.initial_seed() == 0
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.randn(3), expected)
