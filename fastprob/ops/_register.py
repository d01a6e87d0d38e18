"""How the families' operators are registered: schema, implementation, fake, gradient and vmap rule.

Eager calls go to the kernels directly, 2 us a call less than through the dispatcher; compiled ones,
exported ones and functorch transforms go through `torch.ops.fastprob`. An operator has a fixed
number of outputs: those that a call does not want are empty tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastprob.ops._random import device_pair

_library = torch.library.Library("fastprob", "FRAGMENT")


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    batched: Sequence[int] = (),
    out_dims: Callable[..., tuple[int | None, ...]] | None = None,
    random: bool | Callable[..., bool] = False,
    vmap: Callable[..., Any] | None = None,
) -> None:
    """Registers `fastprob::name`.

    Args:
        name: of the operator.
        schema: its arguments and results, `"(Tensor x) -> Tensor"`.
        implementation: what computes it, on any device.
        fake: gives outputs of the right shape, dtype and device.
        backward: `backward(ctx, *grads)`, as for `torch.library.register_autograd`.
        setup: `setup(ctx, inputs, output)`, likewise.
        batched: which positional arguments `torch.vmap` may batch. All other tensors must be the
            same for the whole batch.
        out_dims: from the arguments, where each result has the batch dimension; None for a result
            that has none.
        random: whether it draws from torch's generator where it gets no state; a function of the
            arguments where only some calls do.
        vmap: a rule of its own, as for `torch.library.register_vmap`, in place of the three above.
    """
    tags = (torch.Tag.nondeterministic_seeded,) if random else ()
    _library.define(name + schema, tags=tags)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    # As `torch.library.register_fake` but for what that keeps of the caller's source, which it
    # reads anew for each operator: half of its 1 ms.
    _library.impl(name, fake, "Meta")
    qualified = f"fastprob::{name}"
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap, lib=_library)
    elif out_dims is not None:
        operator = getattr(torch.ops.fastprob, name).default
        rule = _vmap_rule(name, operator, tuple(batched), out_dims, random)
        torch.library.register_vmap(qualified, rule, lib=_library)


def _vmap_rule(name, operator, batched, out_dims, random):
    def rule(info, in_dims, *args):
        moved = list(args)
        for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
            if not isinstance(arg, Tensor):
                continue
            if i in batched:
                # Batch dimensions are leading ones of every parameter: one more is one more.
                moved[i] = (
                    arg.expand((info.batch_size, *arg.shape))
                    if dim is None
                    else arg.movedim(dim, 0)
                )
            elif dim is not None:
                raise RuntimeError(
                    f"fastprob::{name} under vmap needs the same {_argument(operator, i)} for the "
                    "whole batch"
                )
        draws = random(*args) if callable(random) else random
        if draws and info.randomness == "error":
            raise RuntimeError(
                "vmap: called random operation while in randomness error mode. Please either use "
                "the 'same' or 'different' randomness flags on vmap or perform the randomness "
                "operation out of vmap"
            )
        if draws and info.randomness == "same":
            names = [a.name for a in operator._schema.arguments]
            at = names.index("state")
            if moved[at] is None:
                moved[at] = device_pair(moved[0], None)
            return _same(info, moved, batched, operator, out_dims)
        return operator(*moved), out_dims(*moved)

    return rule


def lead(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with the dimension that vmap batches in front."""
    return x.expand((size, *x.shape)) if dim is None else x.movedim(dim, 0)


def _same(info, args, batched, operator, out_dims):
    """Each element of the batch from the same noise: one call of each."""
    results = []
    for b in range(info.batch_size):
        one = [a[b] if i in batched and isinstance(a, Tensor) else a for i, a in enumerate(args)]
        results.append(operator(*one))
    dims = out_dims(*args)
    stacked = tuple(
        parts[0] if dim is None else torch.stack(parts, dim)
        for parts, dim in zip(zip(*results, strict=True), dims, strict=True)
    )
    return stacked, dims


def _argument(operator: Any, i: int) -> str:
    return operator._schema.arguments[i].name


def nothing(like: Tensor) -> Tensor:
    """An output that the call did not want."""
    return like.new_empty(0)
