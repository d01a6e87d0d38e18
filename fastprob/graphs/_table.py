"""What the classes of this package share: captured graphs by key, and how one is captured."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import is_tensor_collection
from torch import Tensor
from torch import distributions as D

from fastprob import backend as _kernels
from fastprob.graphs._backend import Backend, CudaBackend, Graph, Result
from fastprob.graphs._errors import GraphError
from fastprob.graphs._probe import AsOnADevice, Probe
from fastprob.interaction import current_type
from fastprob.io import skips_existing
from fastprob.keys import aggregate_mode

_Distribution = D.Distribution
_foreach_copy_ = torch._foreach_copy_  # type: ignore[reportPrivateImportUsage]
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
_is_autocast = torch.is_autocast_enabled

# One capture at a time in a process, which is torch's own restriction, and one change at a time of
# what torch has once for all threads.
_capture_lock = threading.RLock()


class _Nesting(threading.local):
    depth = 0


# Above 0 in a thread that runs or captures a function for a graph: a graph within it is not used.
nesting = _Nesting()


def surroundings(device_type: str) -> tuple[Any, ...]:
    """What decides a call besides its inputs and the modules: the part of a key that is global."""
    return (
        current_type(),
        skips_existing(),
        aggregate_mode(),
        _Distribution._validate_args,
        _kernels.mode,
        _is_grad_enabled(),
        _is_inference(),
        torch.get_autocast_dtype(device_type) if _is_autocast(device_type) else None,
    )


def layout(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a buffer for a tensor, None for contiguous ones.

    A slice of a larger tensor takes a contiguous buffer, so that its strides do not matter; a
    permuted or channels-last one takes a buffer of the same order of dimensions, since operations
    choose their algorithm and the layout of their results by it.
    """
    if tensor.is_contiguous():
        return None
    shape, strides = tensor.shape, tensor.stride()
    known = _layouts.get((shape, strides), False)
    if known is False:
        dense = torch.empty_strided(shape, strides, device="meta")
        buffer = torch.empty_like(dense)
        known = None if buffer.is_contiguous() else buffer.stride()
        if len(_layouts) >= 1024:
            _layouts.clear()
        _layouts[shape, strides] = known
    return known


_layouts: dict[tuple[torch.Size, tuple[int, ...]], Any] = {}


def buffer_like(tensor: Tensor) -> Tensor:
    """Memory for copies of an input."""
    strides = layout(tensor)
    options: Any = {"dtype": tensor.dtype, "device": tensor.device}
    if strides is None:
        return torch.empty(tensor.shape, **options)
    return torch.empty_strided(tensor.shape, strides, **options)


def _is_leaf(kind: type) -> bool:
    return getattr(kind, "_is_non_tensor", False) or not is_tensor_collection(kind)


def leaf_keys(tensordict: Any) -> list[Any]:
    """The keys of all entries, nested ones in full, those that are no tensors included."""
    return list(tensordict.keys(True, True, is_leaf=_is_leaf))


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often tensors were written to; inference tensors do not count it."""
    return [0 if t.is_inference() else t._version for t in tensors]


@dataclass(frozen=True)
class GraphInfo:
    """One graph that is held.

    Attributes:
        interaction_type: the one it was captured under, None where none was set.
        inputs: key or position, shape and dtype of each input tensor.
        captured: whether there is a graph; False where calls run directly.
        memory: bytes: its input buffers, and what the memory pool grew by at its capture.
        replays: how many times it has run.
    """

    interaction_type: Any
    inputs: tuple[tuple[Any, tuple[int, ...], torch.dtype], ...]
    captured: bool
    memory: int
    replays: int


class Entry:
    """A captured graph, its buffers, and what it depends on."""

    __slots__ = (
        "calls",
        "graph",
        "held",
        "interaction_type",
        "mutated",
        "outputs",
        "places",
        "plan",
        "problem",
        "replays",
        "sources",
        "static",
    )

    def __init__(self, interaction_type: Any, sources: Sequence[tuple[Any, Tensor]]) -> None:
        self.interaction_type = interaction_type
        self.sources = tuple((name, tuple(t.shape), t.dtype) for name, t in sources)
        self.static: list[Tensor] = []  # what the graph reads its inputs from
        self.outputs: list[Tensor] = []  # what it writes
        self.mutated: list[int] = []  # inputs that the captured function writes to in place
        self.graph: Graph | None = None
        self.plan: Any = None  # how outputs become a result
        self.places: list[Any] = []
        self.held: list[Tensor] = []
        self.replays = 0
        self.calls = 0  # eager ones so far
        self.problem: GraphError | None = None  # what an eager run has shown to be in the way

    def run(self, values: list[Tensor]) -> None:
        """Copies the inputs, and replays."""
        static = self.static
        if len(static) == 1:
            static[0].copy_(values[0], non_blocking=True)
        elif static:
            _foreach_copy_(static, values, non_blocking=True)
        self.replay()

    def replay(self) -> None:
        """Runs the graph on the inputs that its buffers hold."""
        self.graph.replay()  # type: ignore[union-attr]
        self.replays += 1

    def write_back(self, values: list[Tensor]) -> None:
        """Gives the caller's tensors what the captured function writes to its inputs."""
        with torch.no_grad():
            for i in self.mutated:
                values[i].copy_(self.static[i])

    def copies(self) -> list[Tensor]:
        """The outputs, each in memory of its own."""
        outputs = self.outputs
        if len(outputs) < 2:
            return [t.clone() for t in outputs]
        copies = [torch.empty_like(t) for t in outputs]
        _foreach_copy_(copies, outputs)
        return copies

    def info(self) -> GraphInfo:
        memory = sum(t.untyped_storage().nbytes() for t in self.static)
        if self.graph is not None:
            memory += self.graph.memory
        captured = self.graph is not None
        return GraphInfo(self.interaction_type, self.sources, captured, memory, self.replays)


class Table:
    """Entries by key, the least recently used first.

    Args:
        max_graphs: how many are kept.

    Raises:
        ValueError: if that is not positive.
    """

    def __init__(self, max_graphs: int) -> None:
        if not isinstance(max_graphs, int) or isinstance(max_graphs, bool) or max_graphs < 1:
            raise ValueError(f"max_graphs must be an int of 1 or more, got {max_graphs!r}")
        self.max_graphs = max_graphs
        self.entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self.lock = threading.RLock()
        self._moves = 0
        self._recent_parts: list[Any] | None = None
        self._recent: Entry | None = None

    def find(self, parts: list[Any]) -> Entry | None:
        """The entry of a key."""
        # Most calls are like the one before, and to compare two lists takes 0.05 us, where to hash
        # one, look it up and put it last takes 0.5.
        if parts == self._recent_parts:
            entry = self._recent
        else:
            key = tuple(parts)
            entry = self.entries.get(key)
            if entry is not None:
                self.entries.move_to_end(key)
                self._recent_parts, self._recent = parts, entry
        return entry

    def add(self, parts: list[Any], entry: Entry) -> None:
        """Keeps an entry, for which there is room."""
        self.entries[tuple(parts)] = entry

    def make_room(self, parts: list[Any], backend: Backend | None) -> None:
        """Drops what a new entry of a key will replace, before its memory is taken."""
        self._recent_parts = self._recent = None
        replaced = self.entries.pop(tuple(parts), None)
        if replaced is not None:
            self.count_capture(replaced)
            self._drop(replaced, backend)
        while len(self.entries) >= self.max_graphs:
            self._drop(self.entries.popitem(last=False)[1], backend)

    def clear(self, backend: Backend | None) -> None:
        """Drops all entries."""
        self._recent_parts = self._recent = None
        while self.entries:
            self._drop(self.entries.popitem()[1], backend)

    def _drop(self, entry: Entry, backend: Backend | None) -> None:
        if backend is not None and entry.graph is not None:
            backend.release(entry.static)

    def count_capture(self, entry: Entry) -> None:
        """Warns where graphs are captured anew time and again before they have been of use."""
        if entry.graph is None:
            return
        self._moves = self._moves + 1 if entry.replays <= 1 else 0
        entry.replays = 0
        if self._moves == 5:
            warnings.warn(
                "in each of the last calls a parameter had moved or a number among the "
                "hyperparameters had changed, so that a graph was captured anew, which takes "
                "longer than a call without graphs; change them in place (copy_, update_, a "
                "learning rate that is a tensor)",
                UserWarning,
                stacklevel=6,
            )


def backend_for(
    device: torch.device | None, given: Backend | None, now: Backend | None
) -> Backend | None:
    """What captures on a device; None where functions run directly.

    Args:
        device: of the parameters, or of the inputs.
        given: what the user wants.
        now: what captures so far, to be kept where it will do.
    """
    if given is not None:
        return given
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if now is not None and now.device == torch.device("cuda", index):
        return now
    return CudaBackend(torch.device("cuda", index))


@contextlib.contextmanager
def within() -> Iterator[None]:
    """Marks this thread as running a function for a graph."""
    nesting.depth += 1
    try:
        yield
    finally:
        nesting.depth -= 1


@contextlib.contextmanager
def _collection_held_off() -> Iterator[None]:
    """No garbage collection: it could free a graph or wait for the device inside a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _fresh_casts(device_type: str) -> Iterator[None]:
    """Casts of parameters are made in the graph.

    Autocast otherwise keeps those of an earlier run, and a replay would not see an update.
    """
    if not _is_autocast(device_type):
        # The switch is one of the things that a compiled function is compiled for.
        yield
        return
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextlib.contextmanager
def _compilation_refused() -> Iterator[list[str]]:
    """Raises where this thread would compile; other threads go on.

    Yields:
        a list that is no longer empty once that has happened: the compiler raises an error of its
        own, without saying from which one it came.
    """
    refused: list[str] = []
    if "torch._dynamo" not in sys.modules:
        yield refused
        return
    try:
        from torch._dynamo.callback import callback_handler
    except ImportError:  # private to torch; without it a compilation fails as it may
        yield refused
        return
    thread = threading.get_ident()

    def refuse(*_: Any) -> None:
        if threading.get_ident() == thread:
            refused.append(
                "torch.compile would compile during the capture, although the same call ran before "
                "it. Raise warmup, and see TORCH_LOGS=recompiles for what is compiled each time."
            )
            raise RuntimeError(refused[0])

    callback_handler.register_start_callback(refuse)
    try:
        yield refused
    finally:
        callback_handler.remove_start_callback(refuse)


@contextlib.contextmanager
def put_back(generators: Sequence[torch.Generator], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Has a block leave generators and tensors as it found them."""
    states = [g.get_state() for g in generators]
    before = [t.clone() for t in tensors]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def probed(run: Callable[[], Result], device_type: str) -> tuple[Result, GraphError | None]:
    """Runs a function once, eagerly.

    Returns:
        its result, and an error that names the first operation which makes the host wait.
    """
    # A compiler gives a function up for good that it meets under a dispatch mode. The stance is one
    # for all threads, so that two of them must not take it and give it back crosswise: callers
    # hold the lock.
    eager: Any = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:
        eager = torch.compiler.set_stance("force_eager")
    with eager, AsOnADevice(), Probe(device_type) as probe:
        result = run()
    return result, probe.found


def capture(
    backend: Backend,
    run: Callable[[], Result],
    generators: Sequence[torch.Generator],
    name: str,
) -> tuple[Graph, Result]:
    """Captures a function that has been warmed up.

    Args:
        backend: what captures.
        run: the function.
        generators: those that it may draw from.
        name: what is captured, for messages.

    Raises:
        GraphError: if it cannot be captured.
    """
    refused: list[str] = []
    with _capture_lock, within(), _fresh_casts(backend.device.type):
        try:
            with _collection_held_off(), _compilation_refused() as refused:
                return backend.capture(run, generators)
        except GraphError as err:
            raise GraphError(f"{name} cannot be captured: {err}") from None
        except Exception as err:
            reason = f"the captured operations raised {type(err).__name__}: {err}"
            raise GraphError(
                f"{name} cannot be captured: {refused[0] if refused else reason}"
            ) from err


def warm_up(backend: Backend, run: Callable[[], Result]) -> Result:
    """Runs a function eagerly, where and how it will be captured.

    Kernels are compiled and workspaces allocated at first use, which cannot be captured.
    """
    with within(), _fresh_casts(backend.device.type):
        return backend.aside(run)


def examined(backend: Backend, run: Callable[[], Result]) -> tuple[Result, GraphError | None]:
    """As `warm_up`, and what `probed` finds."""
    with _capture_lock:
        return warm_up(backend, lambda: probed(run, backend.device.type))
