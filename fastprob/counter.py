"""CounterStream: random numbers that are a function of a seed and of how many draws were made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprob.reference import philox
from fastprob.reference._reduce import functorch_level


class Counter:
    """What draws from Philox4x32-10 have in common: `take` gives each draw a state of its own."""

    device: torch.device

    def take(self) -> Tensor:
        """The state of one draw, an int64 `[2]` of its own; the stream goes on to the next."""
        raise NotImplementedError

    def standard_normal(
        self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """One draw of standard normals, `shape`."""
        return philox.standard_normal(self.take(), shape, dtype)

    def uniform(
        self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """One draw of uniforms in (0, 1), `shape`."""
        return philox.uniform(self.take(), shape, dtype)


class SeedCounter(Counter):
    """The draws of one call from a seed that a tensordict holds, without looking at the seed.

    On a GPU a look would stop the host until all that was launched is done.

    Args:
        seed: int64, one element.
    """

    def __init__(self, seed: Tensor) -> None:
        self.seed = seed.detach().reshape(()).to(torch.int64)
        self.device = seed.device
        self._calls = 0

    def take(self) -> Tensor:
        taken = torch.stack((self.seed, torch.full_like(self.seed, self._calls)))
        self._calls += 1
        return taken

    def next_seed(self) -> Tensor:
        """The seed of the next call, int64, a scalar."""
        # At a counter that neither a draw nor the folding of an index reaches.
        return philox.fold(self.seed, torch.full_like(self.seed, -1))

    def generator(self) -> torch.Generator:
        """A generator of torch's for one draw, of a distribution that takes no other; looks."""
        seed, call = self.take().unbind()
        return torch.Generator(self.device).manual_seed(int(philox.fold(seed, call)))


class CounterStream(nn.Module, Counter):
    """A stream of Philox4x32-10, whose state is a tensor on the device of the draws.

    Draws are the same from PyTorch and from the kernels within rounding, and the same eager and
    compiled; the kernels advance the state on the device, so that a replayed CUDA graph draws
    afresh. The state moves with `.to` and is saved in `state_dict`, so that a run that was stopped
    continues bit by bit. Pass one as `generator=`.

    Args:
        seed: any int of 64 bits, signed or not.
        device: where the draws are made.

    Attributes:
        state: int64 `[2]`, the seed and the number of the next draw.
        ticket: int32 `[1]`, 0 between draws; the kernels that advance the state count with it.

    Raises:
        TypeError: if `seed` is no int.
        ValueError: if it does not fit 64 bits.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Examples:
        >>> from fastprob.counter import CounterStream
        >>> stream = CounterStream(seed=0)
        >>> stream.standard_normal((2, 3)).shape
        torch.Size([2, 3])
        >>> stream.state.tolist()
        [0, 1]
    """

    state: Tensor
    ticket: Tensor

    def __init__(self, seed: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit 64 bits, got {seed}")
        if seed >= 2**63:
            seed -= 2**64
        self.register_buffer("state", torch.tensor([seed, 0], dtype=torch.int64, device=device))
        self.register_buffer(
            "ticket", torch.zeros(1, dtype=torch.int32, device=device), persistent=False
        )

    def take(self) -> Tensor:
        """The state of one draw, an int64 `[2]` of its own; the stream goes on to the next."""
        if not torch.compiler.is_compiling() and functorch_level() is not None:
            # A transform forbids writing to a tensor from outside; this one is none of its own.
            with torch._C._DisableFuncTorch():  # type: ignore[attr-defined]
                return self._take()
        return self._take()

    def _take(self) -> Tensor:
        with torch.no_grad():
            taken = self.state.clone()
            self.state[1] += 1
        return taken

    def fold_in(self, index: int) -> CounterStream:
        """A stream of its own for a rank or a worker.

        Args:
            index: its number, 0 or more.

        Returns:
            a new stream on the same device, at its first draw. Streams of different numbers have
            different seeds: the words of one seed at different counters.

        Raises:
            ValueError: if `index` is negative.
        """
        if index < 0:
            raise ValueError(f"index must be 0 or more, got {index}")
        new = CounterStream(0, device=self.state.device)
        with torch.no_grad():
            new.state[0] = philox.fold(self.state[0], torch.full_like(self.state[0], index))
        return new

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the draws are made."""
        return self.state.device
