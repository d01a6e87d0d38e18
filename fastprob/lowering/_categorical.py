"""The largest of a row and a categorical's draw: eager mode's operations or formulas, by the size.

Inductor finds the largest of a row of 8 in a vector of which half is masked off, and takes the
exponentials of masked logits one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from fastprob.lowering._functions import Functions, numel, registered

# Elements from which they are taken; they were compared at 4096 x 8. An operator in Python costs
# 7 us, a call of ATen's less.
LEAST_LARGEST = 4096
LEAST_RACE = 8192


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
        if x.get_device().type == "cpu" and _large(x, LEAST_LARGEST):
            return by_aten(x, -1, False)[1]
        return Functions().argmax(x, -1, False)

    return lower


def _lower_race(op: Any) -> Callable[..., Any]:
    from torch._inductor import lowering

    as_it_is = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(given: Any, noise: Any, from_probs: bool) -> Any:
        if given.get_device().type != "cpu" or _large(given, LEAST_RACE):
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


def _large(x: Any, least: int) -> bool:
    """Whether a tensor has so many elements, or may have, where the size is open."""
    from torch._inductor.virtualized import V

    count = numel(x.get_size())
    return not V.graph.cpp_wrapper and (not isinstance(count, int) or count >= least)
