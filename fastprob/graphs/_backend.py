"""How operations are captured and replayed: one small interface, and CUDA's implementation of it.

`RecordingBackend` is the other implementation, for tests without a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Graph:
    """One captured run.

    Args:
        replay: runs the captured operations again, on the caller's stream.
        memory: bytes that the capture took.
        keep: what has to live as long as the graph.
    """

    __slots__ = ("_keep", "memory", "replay")

    def __init__(self, replay: Callable[[], None], memory: int, keep: Any = None) -> None:
        self.replay, self.memory, self._keep = replay, memory, keep


class Backend(Protocol):
    """What a graph is captured with.

    Attributes:
        device: whose operations are captured.
        capturable: whether an optimizer must have been built with `capturable=True`.
    """

    device: torch.device
    capturable: bool

    def busy(self) -> bool:
        """Whether somebody else is capturing the caller's stream."""
        ...

    def order(self) -> None:
        """Orders what follows on the caller's stream after all earlier use of the graphs."""
        ...

    def aside(self, run: Callable[[], Result]) -> Result:
        """Runs a function eagerly where captures are made."""
        ...

    def capture(
        self, run: Callable[[], Result], generators: Sequence[torch.Generator]
    ) -> tuple[Graph, Result]:
        """Captures what a function does on the device; nothing of it is executed.

        Args:
            run: the function, called once.
            generators: those that it draws from, besides torch's default ones.

        Returns:
            the graph, and what the function returned: tensors that a replay fills.
        """
        ...

    def release(self, tensors: Sequence[Tensor]) -> None:
        """Lets go of a graph's input buffers, which a pending replay may still read."""
        ...

    def default_generators(self) -> list[torch.Generator]:
        """Torch's default generators that a run may draw from."""
        ...


class _Pool:
    """The handle of a memory pool, valid as long as a graph was captured in it and lives."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


class CudaBackend:
    """CUDA graphs on one device, all in one memory pool.

    Graphs that share a pool must not run at the same time: `order` sees to that across streams, and
    the lock of whoever holds the backend across threads.

    Args:
        device: a CUDA device, with its index.
    """

    capturable = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Graphs that share a pool are to be captured on one stream.
        self._side = torch.cuda.Stream(self.device)
        self._pool: weakref.ref[_Pool] | None = None
        self._last: Any = None
        self._last_handle: int | None = None

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def order(self) -> None:
        # The handle is an int: a Stream is made only where it is another one than last time.
        handle = torch._C._cuda_getCurrentRawStream(self.device.index)
        if handle == self._last_handle:
            return
        current = torch.cuda.current_stream(self.device)
        if self._last is not None:
            current.wait_stream(self._last)
        self._last, self._last_handle = current, handle

    def aside(self, run: Callable[[], Result]) -> Result:
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            result = run()
        current.wait_stream(self._side)
        return result

    def capture(
        self, run: Callable[[], Result], generators: Sequence[torch.Generator]
    ) -> tuple[Graph, Result]:
        # The allocator gives a pool back, and refuses its handle, once its last graph is gone.
        pool = self._pool and self._pool()
        if pool is None:
            pool = _Pool()
            self._pool = weakref.ref(pool)
        graph = _registered(generators)
        current = torch.cuda.current_stream(self.device)
        before = torch.cuda.memory_reserved(self.device)
        self._side.wait_stream(current)
        # Not `with torch.cuda.graph(...)`: that waits for the device and empties its caches.
        with torch.cuda.stream(self._side):
            # thread_local: whatever other threads do meanwhile is no error of this capture.
            graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                result = run()
                graph.capture_end()
            except BaseException:
                self._pool = None
                self._abandon(graph, pool, generators)
                raise
        current.wait_stream(self._side)
        grown = max(0, torch.cuda.memory_reserved(self.device) - before)
        return Graph(graph.replay, grown, pool), result

    def _abandon(self, graph: Any, pool: _Pool, generators: Sequence[torch.Generator]) -> None:
        """Ends a capture that failed, so that eager calls and other graphs go on.

        `capture_end` of an invalidated capture raises before it has told the allocator, which then
        refuses to free memory when it runs out, and, up to torch 2.11, before it has told the
        generators, whose next eager draw is then refused. The allocator is told here; the
        generators are by a capture that ends properly.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an empty graph
                graph.capture_end()
        except Exception:
            for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                tell = getattr(torch._C, name, None)
                if tell is not None:
                    with contextlib.suppress(Exception):  # it knew already
                        tell(self.device.index, pool.handle)
            with contextlib.suppress(Exception):
                scratch = torch.zeros(1, device=self.device)
                proper = _registered(generators)
                proper.capture_begin(capture_error_mode="thread_local")
                scratch.add_(1)
                proper.capture_end()
        graph.reset()

    def release(self, tensors: Sequence[Tensor]) -> None:
        if self._last is not None:
            for tensor in tensors:
                tensor.record_stream(self._last)

    def default_generators(self) -> list[torch.Generator]:
        return [torch.default_generator, torch.cuda.default_generators[self.device.index]]


def _registered(generators: Sequence[torch.Generator]) -> Any:
    """A new graph that knows the generators; it knows torch's default one by itself."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        if generator.device.type == "cuda":
            graph.register_generator_state(generator)
    return graph
