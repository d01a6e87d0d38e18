"""Tiles in halves and quarters: what is cut and joined again is as it was."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastprob.kernels import _halves as halves

COUNT = 64


@triton.jit
def _halves_kernel(x, turns, y, COUNT: tl.constexpr, CUT: tl.constexpr):
    i = tl.arange(0, COUNT)
    SIZE: tl.constexpr = COUNT // 2 if CUT else COUNT
    TURNS: tl.constexpr = 2 if CUT else 1
    x0, x1 = halves.cut(tl.load(x + i), COUNT, CUT)
    y0, y1 = x0, x1
    turn0, turn1 = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    number = 0.0
    for _ in range(TURNS):
        half = halves.widened(x0, x, COUNT, CUT)
        y0, y1 = y1, halves.packed(half * 2.0, y, COUNT, CUT)
        number += 1.0
        turn0, turn1 = turn1, tl.zeros([SIZE], tl.float32) + number
        x0 = x1
    tl.store(y + i, halves.joined(y0, y1, y, COUNT, CUT))
    tl.store(turns + i, halves.joined_terms(turn0, turn1, COUNT, CUT))


@pytest.mark.parametrize("cut", [halves.WHOLE, halves.EIGHTS, halves.BLOCKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_halves_come_one_after_the_other_and_go_back_to_their_places(dtype, cut, device):
    x = torch.randn(COUNT, device=device).to(dtype)
    y, turns = torch.empty_like(x), torch.empty(COUNT, device=device)
    _halves_kernel[(1,)](x, turns, y, COUNT=COUNT, CUT=cut, num_warps=1)
    assert torch.equal(y, x * 2)
    place = torch.arange(COUNT, device=device)
    last = {
        halves.WHOLE: place < 0,
        halves.EIGHTS: place % 8 >= 4,
        halves.BLOCKS: place >= COUNT // 2,
    }[cut]
    assert torch.equal(turns, 1.0 + last)


@triton.jit
def _quarters_kernel(x, y, z, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    first, second, third, fourth = halves.quarters(tl.load(x + i), COUNT)
    tl.store(y + i, halves.joined_quarters(first, second, third, fourth, COUNT))
    tl.store(z + i, halves.joined_quarters(fourth, third, second, first, COUNT))


def test_quarters_are_every_fourth_element(device):
    x = torch.randn(COUNT, device=device)
    y, z = torch.empty_like(x), torch.empty_like(x)
    _quarters_kernel[(1,)](x, y, z, COUNT=COUNT, num_warps=1)
    assert torch.equal(y, x)
    assert torch.equal(z, x.view(-1, 4).flip(-1).flatten())
