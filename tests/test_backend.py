"""Which implementation serves a call."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import fastprob
from fastprob import backend
from fastprob.distributions.normal import IndependentNormal


@pytest.fixture(autouse=True)
def _as_it_was():
    before = backend.mode
    yield
    backend.mode = before


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("FASTPROB_BACKEND", "TRITON_INTERPRET")
    }
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_auto_is_what_counts_at_first():
    assert fastprob.get_backend() == "auto"
    assert not backend.serves(torch.zeros(1))


@pytest.mark.parametrize("name", ["Triton", "cuda", "", None])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match="must be one of auto, reference, triton"):
        fastprob.set_backend(name)
    assert fastprob.get_backend() == "auto"


def test_a_block_is_left_as_it_was_entered():
    with pytest.raises(KeyError), fastprob.using_backend("reference"):
        assert fastprob.get_backend() == "reference"
        raise KeyError
    assert fastprob.get_backend() == "auto"


def test_triton_where_it_cannot_run_says_why():
    fastprob.set_backend("triton")
    dist = IndependentNormal(torch.zeros(2, 3), torch.ones(2, 3))
    calls = (dist.rsample, dist.entropy, lambda: dist.log_prob(torch.zeros(2, 3)))
    for call in calls:
        with pytest.raises(RuntimeError, match=r"on a CPU.*TRITON_INTERPRET=1"):
            call()


def test_fp64_is_left_to_the_reference():
    fastprob.set_backend("triton")
    dist = IndependentNormal(torch.zeros(3, dtype=torch.float64), torch.ones(3).double())
    with pytest.raises(RuntimeError, match="compute in fp32, and the parameters are"):
        dist.rsample()


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backend, "_MISSING", "triton is not installed; install triton 3.6 or later")
    with pytest.raises(RuntimeError, match="'triton' cannot be used: triton is not installed"):
        fastprob.set_backend("triton")
    assert fastprob.get_backend() == "auto"
    assert not backend.serves(torch.zeros(1))


def test_auto_falls_back_and_says_so_once(caplog):
    backend._note.cache_clear()
    x = torch.zeros(3, device="meta")
    with caplog.at_level(logging.WARNING, logger="fastprob"):
        assert not backend.serves(x)
        assert not backend.serves(x)
        assert not backend.serves(x.double())
    assert [r.getMessage() for r in caplog.records] == [
        "fastprob's kernels are not used: the parameters are on meta, and they need a CUDA or ROCm "
        "device",
        "fastprob's kernels are not used: they compute in fp32, and the parameters are "
        "torch.float64",
    ]


def test_the_environment_chooses():
    code = "import fastprob; print(fastprob.get_backend())"
    assert run(code, FASTPROB_BACKEND="reference").stdout.split() == ["reference"]
    assert run(code).stdout.split() == ["auto"]
    refused = run(code, FASTPROB_BACKEND="cuda")
    assert refused.returncode == 1
    assert "ValueError: FASTPROB_BACKEND=cuda: the backend must be one of" in refused.stderr


def test_the_import_loads_no_kernels_and_asks_no_gpu():
    code = (
        "import sys, torch, fastprob\n"
        "print([m for m in sys.modules if m.startswith('fastprob.kernels')])\n"
        "print(torch.cuda.is_initialized())"
    )
    assert run(code).stdout.splitlines() == ["[]", "False"]
