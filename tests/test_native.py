"""The noise kernel in C++: ATen's numbers, and ATen's generator afterwards, bit by bit."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from fastprob import native, rng
from fastprob.distributions import IndependentNormal, TanhNormal

SIZES = (1024, 1025, 1039, 1040, 4096, 4097, 5000, 65_537, 300_000)


@pytest.fixture
def built(monkeypatch):
    """The kernel, for this test alone."""
    monkeypatch.setattr(native, "kernel", None)
    native.build()
    assert native.kernel is not None
    return native.kernel


@pytest.fixture
def counted(built, monkeypatch):
    """The kernel, which counts its calls."""
    calls = []

    def fill(*args):
        calls.append(args[-1])
        built(*args)

    monkeypatch.setattr(native, "kernel", fill)
    return calls


def twins(seed, spent):
    """Two generators in one state, a part of whose words is used up."""
    pair = [torch.Generator().manual_seed(seed) for _ in range(2)]
    for generator in pair:
        torch.rand(spent, generator=generator)
    return pair


@pytest.mark.parametrize("size", SIZES)
def test_numbers_and_generator_are_those_of_aten(counted, size):
    for spent in (0, 1, 7, 623, 624, 1000):
        ours, theirs = twins(size + spent, spent)
        for _ in range(2):
            found = native.normal_(torch.full((size,), torch.nan), ours)
            assert torch.equal(found, torch.empty(size).normal_(generator=theirs))
        assert torch.equal(ours.get_state(), theirs.get_state())
    assert counted == [size] * 12


def test_odd_normals_drawn_one_by_one_are_kept(built):
    # Draws of fewer than 16 come in pairs, the second of which the generator remembers.
    ours, theirs = twins(3, 0)
    for generator in (ours, theirs):
        torch.randn(5, generator=generator)
    native.normal_(torch.empty(2000), ours)
    torch.empty(2000).normal_(generator=theirs)
    assert torch.equal(torch.randn(5, generator=ours), torch.randn(5, generator=theirs))


@pytest.mark.parametrize(
    "buffer",
    [
        torch.empty(1023),
        torch.empty(0),
        torch.empty(4096, dtype=torch.float64),
        torch.empty(4096, dtype=torch.bfloat16),
        torch.empty(64, 64).t(),
        torch.empty(64, 64)[:, ::2],
    ],
)
def test_other_buffers_are_left_to_aten(counted, buffer):
    ours, theirs = twins(8, 2)
    found = native.normal_(buffer, ours).clone()
    assert torch.equal(found, buffer.normal_(generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert counted == []


def test_eager_draws_use_it_and_stay_what_they_were(counted):
    like = torch.zeros(64, 32)
    loc, scale = torch.zeros(70_000, 8), torch.ones(70_000, 8)

    def draws():
        torch.manual_seed(2)
        generator = torch.Generator().manual_seed(4)
        made = [
            rng.standard_normal_like(like),
            rng.standard_normal((3, 64, 32), like),
            rng.standard_normal((2, 64, 32), like, generator),
            *IndependentNormal(loc, scale).sample_and_log_prob(),
            *TanhNormal(loc, scale).sample_and_log_prob(generator=generator),
        ]
        return [*made, torch.get_rng_state(), generator.get_state()]

    found = draws()
    assert sum(counted) == 6 * 2048 + 2 * 560_000
    with pytest.MonkeyPatch.context() as without:
        without.setattr(native, "kernel", None)
        expected = draws()
    assert sum(counted) == 6 * 2048 + 2 * 560_000
    assert all(map(torch.equal, found, expected))


def test_vmap_draws_as_without_it(counted):
    def draw(like):
        torch.manual_seed(1)
        return torch.vmap(rng.standard_normal_like, randomness="different")(like)

    like = torch.zeros(3, 2048)
    found = draw(like)
    assert counted == []
    assert found.shape == (3, 2048)
    assert not torch.equal(found[0], found[1])


def test_compiled_graph_calls_it(counted):
    torch._dynamo.reset()

    def function(x):
        return rng.standard_normal(x.shape, x) + x

    like = torch.ones(100, 20)
    torch.manual_seed(6)
    expected = torch.randn(100, 20) + 1.0
    with config.patch(fx_graph_cache=False):
        compiled = torch.compile(function, fullgraph=True)
        torch.manual_seed(6)
        found, code = run_and_get_code(compiled, like)
    assert torch.equal(found, expected)
    assert any("fastprob.native.normal_in_graph(" in text for text in code)
    assert counted == [2000]
    torch._dynamo.reset()


def test_compiled_code_builds_it_in_a_new_process(monkeypatch):
    monkeypatch.setattr(native, "kernel", None)
    native.available.cache_clear()
    buffer = torch.empty(4096)
    torch.manual_seed(1)
    native.normal_in_graph(buffer)
    torch.manual_seed(1)
    assert torch.equal(buffer, torch.randn(4096))
    assert native.kernel is not None


def test_threads_with_generators_of_their_own(built):
    expected = [torch.randn(100_000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = [torch.empty(100_000) for _ in range(4)]

    def work(i):
        native.normal_(found[i], torch.Generator().manual_seed(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))


def test_machine_without_avx2_is_told_why(monkeypatch):
    monkeypatch.setattr(native, "kernel", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    native._build.cache_clear()
    native.available.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="it needs AVX2, and torch runs with DEFAULT"):
            native.build()
        assert not native.available()
        buffer = torch.empty(4096)
        torch.manual_seed(1)
        native.normal_in_graph(buffer)
        torch.manual_seed(1)
        assert torch.equal(buffer, torch.randn(4096))
    finally:
        native._build.cache_clear()
        native.available.cache_clear()


def test_missing_compiler_is_told(monkeypatch):
    from torch._inductor.codecache import CppCodeCache

    def load(*args, **kwargs):
        raise FileNotFoundError("no compiler\nhere")

    monkeypatch.setattr(native, "kernel", None)
    monkeypatch.setattr(CppCodeCache, "load", load)
    native._build.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"FileNotFoundError: no compiler$"):
            native.build()
    finally:
        native._build.cache_clear()


@pytest.mark.parametrize("fault", ["a number", "the generator"])
def test_kernel_that_differs_from_aten_is_not_used(built, fault):
    def wrong(state, out, n):
        built(state, out, n)
        if fault == "a number" and n == 9001:
            (torch.frombuffer((ctypes.c_char * 4).from_address(out), dtype=torch.float32)).mul_(
                1.0000002
            )
        if fault == "the generator":
            (ctypes.c_int.from_address(state + 8)).value -= 1

    assert native._equal(built)
    assert not native._equal(wrong)
