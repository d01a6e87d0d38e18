"""Float64 mathematics of the deterministic values: mode, mean, median, and what stands in for them.

One entry for each family and interaction type that has a value with a log-probability. The mean of
an index, or of a Bernoulli, lies between the possible values and has none; the median of a Beta
has no closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from tensordict.nn import InteractionType
from torch import Tensor

from bench import families
from bench.families import EPS, Expected, Family, Params

MODE, MEAN = InteractionType.MODE, InteractionType.MEAN
MEDIAN, DETERMINISTIC = InteractionType.MEDIAN, InteractionType.DETERMINISTIC
Point = Callable[[Params], Expected]


def _exact(name: str) -> Point:
    return lambda params: Expected(params[name].double(), 0.0)


def _rounded(value: Tensor) -> Expected:
    return Expected(value, 8 * EPS * value.abs().clamp(min=1.0))


def _tanh(name: str) -> Point:
    return lambda params: _rounded(params[name].double().tanh())


def _tanh_mode(params: Params) -> Expected:
    """Where (x - loc) / scale^2 = 2 tanh(x), by iteration; unique for scale^2 < 1/2."""
    loc, scale = params["loc"].double(), params["scale"].double()
    x = loc
    for _ in range(200):
        x = loc + 2 * scale**2 * x.tanh()
    # Where the density is flat, an error in x does not show in it: a root of EPS is as good.
    return Expected(x.tanh(), 1e-4)


def _tanh_mean(params: Params) -> Expected:
    """Quadrature of Gauss and Hermite, 64 points: exact to 1e-9 for deviations below 0.6."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    loc, scale = params["loc"].double(), params["scale"].double()
    value = torch.zeros_like(loc)
    # Node by node: all at once would be 64 times the parameters.
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        value += float(weight) * torch.tanh(loc + float(node) * scale)
    return Expected(value, 1e-5)


def _truncated(params: Params) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loc, scale, and the standardised bounds -1 and 1."""
    loc, scale = params["loc"].double(), params["scale"].double()
    return loc, scale, (-1 - loc) / scale, (1 - loc) / scale


def _truncated_mean(params: Params) -> Expected:
    """As loc + scale (phi(a) - phi(b)) / (Phi(b) - Phi(a)), Johnson et al., 1994, section 10.1."""
    loc, scale, a, b = _truncated(params)
    pdf = [torch.exp(-0.5 * z * z) * 0.3989422804014327 for z in (a, b)]
    mass = torch.special.ndtr(b) - torch.special.ndtr(a)
    return Expected(loc + scale * (pdf[0] - pdf[1]) / mass, 1e-5)


def _truncated_median(params: Params) -> Expected:
    loc, scale, a, b = _truncated(params)
    half = 0.5 * (torch.special.ndtr(a) + torch.special.ndtr(b))
    return Expected(loc + scale * torch.special.ndtri(half), 1e-5)


def _beta_mode(params: Params) -> Expected:
    a, b = params["concentration1"].double(), params["concentration0"].double()
    return _rounded((a - 1) / (a + b - 2))


def _beta_mean(params: Params) -> Expected:
    a, b = params["concentration1"].double(), params["concentration0"].double()
    return _rounded(a / (a + b))


def _argmax(family: Family, one_hot: bool = False) -> Point:
    """The most probable of all indices, found by scoring each with the family of indices."""

    def point(params: Params) -> Expected:
        like = next(iter(params.values()))
        rows, width = like.shape
        scores = []
        for index in range(width):
            scores.append(family.score(params, torch.full((rows,), index, device=like.device)))
        best = torch.stack(scores, -1).argmax(-1)
        value = F.one_hot(best, width) if one_hot else best
        return Expected(value.double(), 0.0)

    return point


def _bernoulli(params: Params) -> Expected:
    return Expected((params["logits"] > 0).double(), 0.0)


_LOC = dict.fromkeys((MODE, MEAN, MEDIAN, DETERMINISTIC), _exact("loc"))


def _best(family: Family, one_hot: bool = False) -> dict[InteractionType, Point]:
    return dict.fromkeys((MODE, DETERMINISTIC), _argmax(family, one_hot))


POINTS: dict[str, dict[InteractionType, Point]] = {
    "IndependentNormal": _LOC,
    "Normal": _LOC,
    "TanhNormal": {
        MODE: _tanh_mode,
        MEAN: _tanh_mean,
        MEDIAN: _tanh("loc"),
        DETERMINISTIC: _tanh("loc"),
    },
    "TruncatedNormal": {
        MODE: _exact("loc"),
        MEAN: _truncated_mean,
        MEDIAN: _truncated_median,
        DETERMINISTIC: _truncated_mean,
    },
    "Beta": {MODE: _beta_mode, MEAN: _beta_mean, DETERMINISTIC: _beta_mean},
    "Delta": dict.fromkeys((MODE, MEAN, MEDIAN, DETERMINISTIC), _exact("param")),
    "TanhDelta": dict.fromkeys((MODE, MEAN, MEDIAN, DETERMINISTIC), _tanh("param")),
    "Categorical": _best(families.CATEGORICAL),
    "OneHotCategorical": _best(families.CATEGORICAL, one_hot=True),
    "MaskedCategorical": _best(families.MASKED_CATEGORICAL),
    "MaskedOneHotCategorical": _best(families.MASKED_CATEGORICAL, one_hot=True),
    "Ordinal": _best(families.ORDINAL),
    "OneHotOrdinal": _best(families.ORDINAL, one_hot=True),
    "Bernoulli": dict.fromkeys((MODE, MEDIAN, DETERMINISTIC), _bernoulli),
}
