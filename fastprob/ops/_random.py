"""Where the noise of a kernel comes from: the stream that a call was given, as the kernels read it.

torch's generators are counter-based on a GPU as well, and their state lies on the host: a seed and
an offset. A draw takes both as two numbers and moves the offset on, which stops nothing and
launches nothing. While a CUDA graph is captured the host's state is of no use, and two integers
are drawn on the device instead, anew at each replay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprob import backend, rng
from fastprob.counter import Counter, CounterStream

# torch's own kernels use the same key with counters of another order. Another key keeps the two
# apart: the first 63 bits of the golden ratio.
_APART = 0x4F1BBCDCBFA53E0B
# torch counts offsets in words, four to a call of Philox.
_WORDS = 4


def device_pair(x: Tensor, generator: Any) -> Tensor:
    """The state of one draw as an int64 `[2]` on the device of `x`, advanced for the next.

    Args:
        x: a parameter.
        generator: a `CounterStream`, a `torch.Generator`, None for torch's default one, or what
            stands for one of them in a graph that is being made.

    Raises:
        TypeError: if it is no generator.
        ValueError: if the stream is on another device.
    """
    if isinstance(generator, Counter):
        _check_device(x, generator)
        return generator.take()
    if torch.compiler.is_compiling():
        return rng.draw_compiled(torch.ops.fastprob.pair, generator, x)
    return _pair(generator, x)


def _pair(generator: torch.Generator | None, x: Tensor) -> Tensor:
    if generator is not None:
        _check_device(x, generator)
    if x.is_cuda and not torch.cuda.is_current_stream_capturing():
        # The same numbers as an eager call of the kernels takes.
        return torch.tensor(host_pair(x, generator), dtype=torch.int64, device=x.device)
    return torch.randint(
        -(2**63), 2**63 - 1, (2,), generator=generator, device=x.device, dtype=torch.int64
    )


rng.register_draw("pair", "Tensor like", _pair, lambda like: like.new_empty(2, dtype=torch.int64))


def host_pair(x: Tensor, generator: torch.Generator | None) -> tuple[int, int]:
    """Seed and number of one draw from a generator of a GPU, which is moved on."""
    if generator is None:
        index = x.device.index
        generator = torch.cuda.default_generators[
            torch.cuda.current_device() if index is None else index
        ]
    else:
        _check_device(x, generator)
    offset = generator.get_offset()
    generator.set_offset(offset + _WORDS)
    seed = (generator.initial_seed() ^ _APART) & (2**64 - 1)
    return (seed - 2**64 if seed >= 2**63 else seed), offset // _WORDS


def state_for(x: Tensor, generator: Any) -> Any:
    """The `State` of one draw of the kernels; arguments as for `device_pair`.

    A `CounterStream` is advanced by the kernel itself.
    """
    State = backend.kernels("_launch").State
    if isinstance(generator, CounterStream):
        _check_device(x, generator)
        return State(generator.state, generator.ticket)
    if isinstance(generator, Counter):
        return State(device_pair(x, generator))
    if x.is_cuda and not torch.cuda.is_current_stream_capturing():
        seed, call = host_pair(x, generator)
        return State(None, None, seed, call)
    return State(device_pair(x, generator))


def given_pair(state: Tensor) -> Any:
    """The `State` of one draw whose seed and number are given."""
    return backend.kernels("_launch").State(state)


def _check_device(x: Tensor, generator: Any) -> None:
    if not hasattr(generator, "device"):
        raise TypeError(
            f"argument 'generator' must be a torch.Generator or a CounterStream, got {generator!r}"
        )
    if generator.device != x.device and not (
        generator.device.type == x.device.type == "cuda" and generator.device.index is None
    ):
        raise ValueError(
            f"the generator is on {generator.device} and the parameters are on {x.device}; make "
            "the generator on the device of the parameters"
        )
