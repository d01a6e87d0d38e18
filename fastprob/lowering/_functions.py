"""What the lowerings share: Inductor's own lowerings of ATen's functions, by name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch

# Names of what has a lowering by now.
registered: set[str] = set()


class Functions:
    """Inductor's lowerings of a few of ATen's functions, by name."""

    _OVERLOADS: ClassVar[dict[str, str]] = {
        "add": "Tensor", "sub": "Tensor", "mul": "Tensor", "div": "Tensor",
        "exp": "default", "log": "default", "sum": "dim_IntList", "amax": "default",
        "argmax": "default", "gather": "default", "maximum": "default", "minimum": "default",
        "squeeze": "dim", "unsqueeze": "default", "ge": "Scalar", "le": "Scalar",
        "logical_and": "default", "where": "self",
    }  # fmt: skip

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from torch._inductor import lowering

        return lowering.lowerings[getattr(getattr(torch.ops.aten, name), self._OVERLOADS[name])]

    def log_score(self, probs: Any, index: Any, low: float | None) -> Any:
        """The logarithm of a row's element at an index, kept `low` away from 0 and 1."""
        p = self.squeeze(self.gather(probs, -1, self.unsqueeze(index, -1)), -1)
        return self.log(p if low is None else self.minimum(self.maximum(p, low), 1 - low))

    def over_event(self, x: Any, ndims: int) -> Any:
        for _ in range(ndims):
            x = self.unsqueeze(x, -1)
        return x


def offer_kept(op: Any) -> None:
    """Has Inductor lower `kept`, called as `offer` is: a tensor that both passes of a graph share.

    Args:
        op: the overload; an operator's result is not computed again in the backward pass.
    """
    if "kept" in registered or "torch._inductor.lowering" not in sys.modules:
        return
    registered.add("kept")
    from torch._inductor import lowering

    lowering.register_lowering(op, type_promotion_kind=None)(lambda x: x)


def numel(size: Any) -> Any:
    """The product of sizes, an int where all are known."""
    product = math.prod(size)
    try:
        return int(product)
    except TypeError:
        return product


def take(pair: Any, i: int) -> Any:
    from torch._inductor import lowering

    return lowering.lowerings[torch.ops.aten.select.int](pair, 0, i)
