"""A clamp whose gradient reads the value, not a mask of bools that the forward pass has kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fastprob.lowering._functions import Functions, registered


def offer_clamp(forward: Any, backward: Any) -> None:
    """Has Inductor lower a clamp to numbers and its gradient; called as `offer` is.

    Args:
        forward: the overload `project_elements`.
        backward: the overload `project_clamp_backward`.
    """
    if "clamp" in registered or "torch._inductor.lowering" not in sys.modules:
        return
    registered.add("clamp")
    from torch._inductor import lowering

    for op, make in ((forward, _lower_clamp), (backward, _lower_clamp_backward)):
        lowering.register_lowering(op, type_promotion_kind=None)(make(op))


def _lower_clamp(op: Any) -> Callable[..., Any]:
    from torch._inductor import lowering

    as_it_is = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(value: Any, low: Any, high: Any, *rest: Any) -> Any:
        lows, highs, table, dtype, rounded = rest
        plain = lows is None and highs is None and table is None and not rounded
        if not plain or dtype != value.get_dtype() or value.get_device().type != "cpu":
            return as_it_is(value, low, high, *rest)
        f = Functions()
        return f.minimum(f.maximum(value, low), high)

    return lower


def _lower_clamp_backward(op: Any) -> Callable[..., Any]:
    from torch._inductor import lowering

    as_it_is = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(grad: Any, value: Any, low: Any, high: Any, lows: Any, highs: Any) -> Any:
        same = grad.get_dtype() == value.get_dtype()
        if lows is not None or highs is not None or not same or value.get_device().type != "cpu":
            return as_it_is(grad, value, low, high, lows, highs)
        f = Functions()
        inside = f.logical_and(f.ge(value, low), f.le(value, high))
        return f.where(inside, grad, 0.0)

    return lower
