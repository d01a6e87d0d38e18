"""The metric of the parity tests tells near from far."""

from __future__ import annotations

import pytest
import torch

from tests._ulp import assert_within_ulps, ulps

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("start", [1.0, 1.5, 3.0, 1000.0, 0.1, -0.7])
def test_a_neighbour_is_one_unit_away(dtype, start):
    x = torch.tensor(start, dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    away = (x.view(bits) + 1).view(dtype)
    assert ulps(away, x).item() == 1


def test_what_is_not_finite_is_equal_or_infinitely_far():
    a = torch.tensor([INF, NAN, INF, 1.0, NAN])
    b = torch.tensor([INF, NAN, -INF, INF, 1.0])
    assert ulps(a, b).tolist() == [0, 0, INF, INF, INF]


def test_a_difference_is_measured_at_its_terms():
    a, b = torch.tensor(1e-6), torch.tensor(1e-6 + 2**-23)
    assert ulps(b, a).item() > 1e5
    assert ulps(b, a, magnitude=torch.tensor(1.5)).item() == pytest.approx(1, rel=1e-3)


def test_too_far_fails():
    x = torch.ones(3)
    assert_within_ulps(x + 2 * 2**-23, x, 2)
    with pytest.raises(AssertionError, match=r"3\.0 units"):
        assert_within_ulps(x + 3 * 2**-23, x, 2)
