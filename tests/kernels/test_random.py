"""The kernels' Philox against the reference: equal integers, and draws within rounding."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastprob.kernels import _random as random
from fastprob.kernels import bernoulli
from fastprob.kernels._launch import fast
from fastprob.reference import philox

COUNT = 512
# Zeros, ones, and words whose upper half is the one that counts.
NUMBERS = (0, 1, -1, 2**31 - 1, 2**32, 0x13198A2E03707344, -(2**63))


@triton.jit
def words_kernel(seed, call, first, w0, w1, w2, w3, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    words = random.philox(tl.load(seed), tl.load(call), tl.load(first) + i)
    tl.store(w0 + i, words[0].to(tl.int64))
    tl.store(w1 + i, words[1].to(tl.int64))
    tl.store(w2 + i, words[2].to(tl.int64))
    tl.store(w3 + i, words[3].to(tl.int64))


@triton.jit
def draws_kernel(seed, call, first, u, to_one, z, COUNT: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, COUNT)
    seed = tl.load(seed)
    call = tl.load(call)
    first = tl.load(first)
    tl.store(u + i, random.uniforms(seed, call, first, COUNT))
    tl.store(to_one + i, bernoulli.uniforms_to_one(seed, call, first, COUNT))
    tl.store(z + i, random.normals(seed, call, first, COUNT, FAST))


@pytest.mark.parametrize("seed", NUMBERS)
def test_words_are_the_references(seed, device):
    key = torch.tensor([seed], device=device)
    for call in NUMBERS:
        for first in (0, 2**32 - 100, 2**62):
            counter = torch.tensor([call], device=device), torch.tensor([first], device=device)
            made = [torch.empty(COUNT, dtype=torch.int64, device=device) for _ in range(4)]
            words_kernel[(1,)](key, *counter, *made, COUNT=COUNT)
            group = first + torch.arange(COUNT, device=device)
            for got, expected in zip(made, philox.words(key, counter[0], group), strict=True):
                assert torch.equal(got, expected)
                assert got.unique().numel() > COUNT - 4


def test_draws_are_the_references(device):
    for call in range(3):
        state = torch.tensor([12345, call], device=device)
        first = torch.zeros(1, dtype=torch.int64, device=device)
        u, to_one, z = (torch.empty(COUNT, device=device) for _ in range(3))
        draws_kernel[(1,)](state[:1], state[1:], first, u, to_one, z, COUNT=COUNT, FAST=fast(u))
        assert torch.equal(u, philox.uniform(state, (COUNT,), torch.float32))
        group = torch.arange(COUNT // 4, device=device)
        words = torch.stack(philox.words(state[0], state[1], group), -1)
        exact = (words.flatten().double() + 1) * 2.0**-32
        torch.testing.assert_close(to_one.double(), exact, rtol=2.0**-23, atol=0)
        assert to_one.min() > 0 and to_one.max() <= 1
        expected = philox.standard_normal(state, (COUNT,), torch.float64)
        torch.testing.assert_close(z.double(), expected, rtol=1e-6, atol=2e-6)
