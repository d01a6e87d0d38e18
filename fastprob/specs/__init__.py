"""Small specs, the reading of TorchRL's, and the projection plan of a spec.

A spec says which values a key may take. fastprob's have the names, constructor arguments and
meaning of TorchRL's where both have them, so that swapping the import works; they exist so that
``SafeProbabilisticModule`` works without TorchRL, which is never imported here. A TorchRL spec is
recognised by TorchRL's own module, which is loaded where such a spec exists.

What a spec does to a value is worked out once, by :func:`projection_for` and
:func:`projection_plan`; the callables they return never look at the data to decide what to do.

A projection gives the nearest member, ties to the lowest index. Where that differs from TorchRL's
``project``:

- TorchRL draws at random for one-hot rows that sum to something else than 1, and for choices that
  a mask forbids. Here the largest (valid) entry stays, and the nearest valid index is taken.
- Indices are rounded in every case; TorchRL, outside ``torch.compile``, leaves fractions of a
  floating-point spec alone where all values of the batch lie in the range.
- A masked one-hot row with several entries set becomes one-hot; TorchRL leaves it as it is.
- The input is never changed; TorchRL clamps categorical indices in place.
"""

from __future__ import annotations

from fastprob.specs.base import Spec, fits
from fastprob.specs.composite import Composite
from fastprob.specs.leaves import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)
from fastprob.specs.plan import as_composite, projection_for, projection_plan

__all__ = [
    "Binary",
    "Bounded",
    "Categorical",
    "Composite",
    "MultiCategorical",
    "MultiOneHot",
    "OneHot",
    "Spec",
    "Unbounded",
    "as_composite",
    "fits",
    "projection_for",
    "projection_plan",
]
