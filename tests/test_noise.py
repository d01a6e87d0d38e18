"""Exponential noise from uniform numbers is the noise that torch draws."""

from __future__ import annotations

import pytest
import torch

from fastprob.reference import _noise

SIZES = [(), (0,), (7,), (_noise.LEAST - 1,), (_noise.LEAST,), (257, 129), (3 * 32_768 + 17,)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["default", "generator"])
def test_the_noise_is_torchs(size, dtype, given):
    results = []
    for fill in (torch.Tensor.exponential_, _noise.exponential_):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(5) if given else None
        buffer = torch.full(size, float("nan"), dtype=dtype)
        assert fill(buffer, generator=generator) is buffer
        # The number after it shows where the stream stands.
        results.append((buffer, torch.rand(3, generator=generator)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("size", [(60, 30), (800, 100)], ids=str)
def test_the_noise_comes_in_the_order_of_the_memory(size):
    results = []
    for fill in (torch.Tensor.exponential_, _noise.exponential_):
        torch.manual_seed(5)
        results.append(fill(torch.empty(size[::-1]).t()))
    assert torch.equal(*results)


def test_where_torch_draws_other_noise_it_draws_it(monkeypatch):
    # As MKL does on some CPUs: here a uniform number that is not torch's stands for it.
    monkeypatch.setattr(_noise, "_same", None)
    plain = torch.Tensor.log1p
    monkeypatch.setattr(torch.Tensor, "log1p", lambda x: plain(x) * (1 + 1e-6))
    drawn = []
    monkeypatch.setattr(_noise, "_fill", lambda *args: drawn.append(args))
    torch.manual_seed(5)
    found = _noise.exponential_(torch.empty(2000))
    torch.manual_seed(5)
    assert torch.equal(found, torch.empty(2000).exponential_())
    assert not drawn
    monkeypatch.undo()
    monkeypatch.setattr(_noise, "_same", None)
    monkeypatch.setattr(_noise, "_fill", lambda *args: drawn.append(args))
    _noise.exponential_(torch.empty(2000))
    assert bool(drawn) == _noise._as_torch()


def test_the_look_at_torchs_noise_leaves_the_stream_alone(monkeypatch):
    monkeypatch.setattr(_noise, "_same", None)
    before = torch.get_rng_state()
    with torch.inference_mode():
        _noise._as_torch()
    assert torch.equal(torch.get_rng_state(), before)


def test_vmap_batches_the_noise():
    def draw(x):
        return _noise.exponential_(torch.empty_like(x))

    rows = torch.zeros(3, 2000)
    different = torch.vmap(draw, randomness="different")(rows)
    assert not torch.equal(different[0], different[1])
    same = torch.vmap(draw, randomness="same")(rows)
    assert torch.equal(same[0], same[1])
