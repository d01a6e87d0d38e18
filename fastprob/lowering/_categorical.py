"""The largest of a row and a categorical's draw: eager mode's operations or formulas, by the size.

Inductor finds the largest of a row of 8 in a vector of which half is masked off, and takes the
exponentials of masked logits one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Set
from typing import Any

import torch

from fastprob.lowering._functions import Functions, numel, registered

# Elements from which they are taken, and for rows of how many categories: elsewhere Inductor's code
# is faster. With AVX-512, times of Inductor's code by theirs (`python -m bench opaque` has four):
# - the largest: 0.9 at 4,096 elements of 8 or 18 categories, 1.1 at 8,192; at 32,768 elements 0.3
#   to 0.7 of 2 to 7 categories, 1.9 of 8, 1.5 to 1.05 of 9 to 15, 1.6 of 17, 1.2 of 31 and 33, 1.0
#   of 40, and 0.7 to 1.0 of more or of multiples of 16, which fill its vectors;
# - the draw: 0.9 at 8,192 elements of 4 or 8 categories, 1.13 at 32,768, and there 0.8 to 1.0 of 16
#   to 64 categories; 9 to 15 were not measured.
LEAST_LARGEST, WIDTHS_LARGEST = 8192, frozenset(range(8, 40)) - {16, 32}
LEAST_RACE, WIDTHS_RACE = 32_768, frozenset(range(16))


def offer_categorical(largest: Any, race: Any) -> None:
    """Has Inductor lower both; called as `offer` is.

    Args:
        largest: the overload `largest`.
        race: the overload `categorical_race`.
    """
    if "largest" in registered or "torch._inductor.lowering" not in sys.modules:
        return
    registered.add("largest")
    from torch._inductor import lowering

    lowering.register_lowering(largest, type_promotion_kind=None)(_lower_largest())
    lowering.register_lowering(race, type_promotion_kind=None)(_lower_race(race))


def _lower_largest() -> Callable[..., Any]:
    from torch._inductor import lowering

    # 38 us for 4096 x 8, where ATen's argmax takes 49 and Inductor's code 115.
    by_aten = lowering.fallback_handler(torch.ops.aten.max.dim, add_to_fallback_set=False)

    def lower(x: Any) -> Any:
        if x.get_device().type == "cpu" and _large(x, LEAST_LARGEST, WIDTHS_LARGEST):
            return by_aten(x, -1, False)[1]
        return Functions().argmax(x, -1, False)

    return lower


def _lower_race(op: Any) -> Callable[..., Any]:
    from torch._inductor import lowering

    as_it_is = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(given: Any, noise: Any, from_probs: bool) -> Any:
        if given.get_device().type != "cpu" or _large(given, LEAST_RACE, WIDTHS_RACE):
            return as_it_is(given, noise, from_probs)
        f = Functions()
        shares = given
        if not from_probs:
            shares = f.exp(f.sub(given, f.amax(given, [-1], True)))
        probs = f.div(shares, f.sum(shares, [-1], True))
        index = f.argmax(f.div(probs, noise), -1, False)
        low = torch.finfo(given.get_dtype()).eps if from_probs else None
        return index, f.log_score(probs, index, low)

    return lower


def _large(x: Any, least: int, widths: Set[int]) -> bool:
    """Whether a tensor has so many elements, or may have, in rows of one of the widths."""
    from torch._inductor.virtualized import V

    size = x.get_size()
    count = numel(size)
    return (
        not V.graph.cpp_wrapper
        and numel(size[-1:]) in widths
        and (not isinstance(count, int) or count >= least)
    )
