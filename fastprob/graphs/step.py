"""CudaGraphStep: a function with effects, a training step for instance, replayed as CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, is_tensor_collection
from tensordict.tensorclass import is_non_tensor
from torch import Tensor, nn

from fastprob.graphs._backend import Backend
from fastprob.graphs._errors import GraphError
from fastprob.graphs._table import (
    Entry,
    GraphInfo,
    Table,
    backend_for,
    buffer_like,
    capture,
    examined,
    layout,
    leaf_keys,
    nesting,
    surroundings,
    versions,
    warm_up,
)
from fastprob.graphs._watch import Settings, Watch
from fastprob.interaction import current_type
from fastprob.reference._reduce import plain_tensors_only

# nn.Buffer is a Tensor with an attribute, and of type Tensor.
_PLAIN = frozenset({Tensor, nn.Parameter})


class CudaGraphStep:
    """A function with effects, replayed as CUDA graphs: a whole update of PPO or SAC, say.

    What the function does on the device is captured: forward, backward, clipping, the optimizer's
    step, target networks. The first `warmup` calls of each kind run it as it is, and are real
    steps; the next one is captured and replayed, and so are all after it. Nothing is run that would
    not have been run without graphs, so that losses, parameters and random draws are the same.

    What the function must keep to:
        - Effects are in place. Gradients belong to the graph: `optimizer.zero_grad()` stands
          inside the function, and `.grad` is not touched outside.
        - `torch.optim` optimizers are built with `capturable=True`. A learning rate that changes is
          a tensor, `lr=torch.tensor(3e-4, device="cuda")`, and is changed in place (`fill_`). A
          hyperparameter that is a number is part of the graph; a change of it is noticed, and the
          graph captured anew.
        - No `.item()`, no `if loss > ...`, no shapes that depend on values: nothing that makes the
          host wait. `torch.nn.utils.clip_grad_norm_` is fine.
        - Results are detached.
        - Modules and optimizers that it uses are named in `watch`. Updates in place are seen in any
          case; of those named here, moved parameters, loaded optimizer states, replaced modules and
          changed settings are noticed as well.

    Args:
        function: takes tensors, tensordicts, and lists, tuples and dictionaries of them; what is no
            tensor is part of the key and must be hashable. Returns the same, or None.
        watch: modules and optimizers that the function uses.
        generators: generators that the function draws from, besides torch's default ones and those
            of the modules.
        warmup: eager calls before a capture.
        max_graphs: graphs that are held; beyond that the least recently used one goes.
        clone_outputs: False hands over the graph's output buffers, which the next call overwrites.
        device: the CUDA device; by default that of the first parameter of `watch`, or of the first
            tensor given.
        enabled: False runs the function directly; an attribute, to be set at any time.
        backend: what captures, CUDA graphs by default; `RecordingBackend()` for tests on a CPU.

    Raises:
        TypeError: if `function` is not callable, `watch` has something else, or an argument has no
            hash.
        ValueError: if `warmup` or `max_graphs` is not positive.
        GraphError: in a call, for an argument that needs a gradient or lies on another device, a
            result that needs one, an optimizer without `capturable=True`, and whatever cannot be
            captured. The message says which.

    Examples:
        One update of a policy gradient, on whatever device there is:

        >>> import torch
        >>> from fastprob import CudaGraphStep
        >>> device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        >>> net = torch.nn.Linear(3, 1, device=device)
        >>> optimizer = torch.optim.Adam(net.parameters(), capturable=device.type == "cuda")
        >>> def update(observation, advantage):
        ...     optimizer.zero_grad()
        ...     loss = -(net(observation)[:, 0] * advantage).mean()
        ...     loss.backward()
        ...     torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        ...     optimizer.step()
        ...     return loss.detach()
        >>> step = CudaGraphStep(update, watch=[net, optimizer])
        >>> for _ in range(8):
        ...     batch = torch.randn(32, 3, device=device), torch.randn(32, device=device)
        ...     loss = step(*batch)
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        watch: Iterable[nn.Module | torch.optim.Optimizer] = (),
        generators: Iterable[torch.Generator] = (),
        warmup: int = 3,
        max_graphs: int = 4,
        clone_outputs: bool = True,
        device: torch.device | str | int | None = None,
        enabled: bool = True,
        backend: Backend | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}")
        if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 1:
            raise ValueError(f"warmup must be an int of 1 or more, got {warmup!r}")
        if isinstance(watch, (nn.Module, torch.optim.Optimizer)):
            watch = (watch,)
        self._watched = tuple(watch)
        for each in self._watched:
            if not isinstance(each, (nn.Module, torch.optim.Optimizer)):
                raise TypeError(f"watch takes modules and optimizers, got a {type(each).__name__}")
        self.function = function
        self.warmup = warmup
        self.clone_outputs = clone_outputs
        self.device = None if device is None else torch.device(device)
        self.enabled = enabled
        self._generators = tuple(generators)
        self._given_backend = backend
        self._table = Table(max_graphs)
        self._backend: Backend | None = None
        self._watch: Watch | None = None
        self._settings: Settings = {}
        self._device_type = "cpu"

    @property
    def graphs(self) -> list[GraphInfo]:
        """What is held, the least recently used first."""
        with self._table.lock:
            return [entry.info() for entry in self._table.entries.values()]

    def reset(self) -> None:
        """Frees all graphs and their buffers; the next calls warm up again."""
        with self._table.lock:
            self._forget()
            self._watch = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function, by a graph where one of its kind is there."""
        return self.repeat(1, *args, **kwargs)

    def repeat(self, times: int, /, *args: Any, **kwargs: Any) -> Any:
        """Calls several times with the same arguments, looking the graph up only once.

        Args:
            times: how often, 1 or more.
            *args: the function's arguments.
            **kwargs: likewise.

        Returns:
            the result of the last call.

        Raises:
            ValueError: if `times` is not positive.
        """
        if times < 1:
            raise ValueError(f"times must be 1 or more, got {times}")
        given = (args, kwargs)
        if not plain_tensors_only() or nesting.depth:
            return self._direct(times, given)
        with self._table.lock:
            backend = self._backend
            if backend is None or not backend.busy():
                try:
                    entry, values = self._entry(given)
                except TypeError:
                    if self._backend is not None and self.enabled:
                        raise
                    # What cannot be part of a key is no matter where there is no graph.
                    return self._direct(times, given)
                backend = self._backend
                if backend is not None and self.enabled and not backend.busy():
                    while entry.graph is None:
                        if entry.calls == self.warmup:
                            self._capture(entry, given, values)
                            break
                        result = self._eager(entry, given)
                        entry.calls += 1
                        times -= 1
                        if times == 0:
                            return result
                    if entry.places != self._watch.places():  # type: ignore[union-attr]
                        self._capture(entry, given, values)
                    backend.order()
                    entry.run(values)
                    for _ in range(times - 1):
                        entry.replay()
                    if entry.mutated:
                        entry.write_back(values)
                    return self._deliver(entry)
        return self._direct(times, given)

    def _direct(self, times: int, given: tuple[tuple, dict]) -> Any:
        args, kwargs = given
        for _ in range(times - 1):
            self.function(*args, **kwargs)
        return self.function(*args, **kwargs)

    # its graph ------------------------------------------------------------------------------

    def _entry(self, given: Any) -> tuple[Entry, list[Tensor]]:
        """The entry of a call and its tensors; a new entry where there is none yet."""
        watch = self._watch
        settings = None if watch is None else watch.configuration()
        if watch is None or settings is None:
            self._forget()
            watch = self._new_watch(given)
            settings = watch.configuration()
        parts: list[Any] = [settings, *surroundings(self._device_type)]
        values: list[Tensor] = []
        _flatten(given, parts, values)
        entry = self._table.find(parts)
        if entry is None:
            self._new_watch(given)
            self._table.make_room(parts, self._backend)
            entry = Entry(current_type(), list(enumerate(values)))
            self._table.add(parts, entry)
        return entry, values

    def _new_watch(self, given: Any) -> Watch:
        """Looks anew at what is watched, and on which device it is."""
        before, watch = self._watch, Watch(self._watched, self._settings)
        device = self.device or watch.device()
        if device is None:
            tensors: list[Tensor] = []
            _flatten(given, [], tensors)
            device = next((t.device for t in tensors), None)
        backend = backend_for(device, self._given_backend, self._backend)
        if backend is not self._backend or (before is not None and before.modules != watch.modules):
            self._forget()
            self._backend = backend
        self._watch = watch
        self._device_type = "cpu" if device is None else device.type
        if self._backend is not None:
            watch.settle_streams(self._backend.device)
        return watch

    def _forget(self) -> None:
        self._table.clear(self._backend)
        self._settings.clear()

    def _name(self) -> str:
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return getattr(function, "__name__", None) or type(function).__name__

    def _eager(self, entry: Entry, given: Any) -> Any:
        """One of the first calls: the function itself, where and how it will be captured."""
        backend, watch = self._backend, self._watch
        assert backend is not None and watch is not None

        def run() -> Any:
            return self._direct(1, given)

        if entry.calls < self.warmup - 1 or watch.compiled() or _is_compiled(self.function):
            return warm_up(backend, run)
        result, entry.problem = examined(backend, run)
        return result

    def _capture(self, entry: Entry, given: Any, values: list[Tensor]) -> None:
        watch = self._new_watch(given)
        backend, name = self._backend, self._name()
        assert backend is not None
        self._table.count_capture(entry)
        if entry.problem is not None:
            raise GraphError(f"{name} cannot be captured: {entry.problem}")
        self._check(watch, values)
        static = entry.static = [buffer_like(v) for v in values]
        with torch.no_grad():
            for buffer, value in zip(static, values, strict=True):
                buffer.copy_(value)
        arguments = _rebuild(given, iter(static))
        generators = [*watch.generators(), *self._generators]
        entry.places, entry.held = watch.places(), watch.held()
        before = versions(static)
        entry.graph, result = capture(backend, lambda: self._direct(1, arguments), generators, name)
        entry.mutated = [i for i, v in enumerate(versions(static)) if v != before[i]]
        entry.outputs = []
        _flatten(result, [], entry.outputs)
        if any(t.requires_grad for t in entry.outputs):
            entry.graph = None
            raise GraphError(
                f"a result of {name} requires a gradient, which a replayed graph cannot give; "
                "return it detached"
            )
        entry.plan = _rebuild(result, iter([t.detach() for t in entry.outputs]))

    def _check(self, watch: Watch, values: Sequence[Tensor]) -> None:
        backend = self._backend
        assert backend is not None
        for i, value in enumerate(values):
            if value.device != backend.device:
                raise GraphError(
                    f"{self._name()} is captured on {backend.device}, but its tensor argument {i} "
                    f"(of shape {tuple(value.shape)}) is on {value.device}"
                )
            if value.requires_grad and torch.is_grad_enabled():
                raise GraphError(
                    f"the tensor argument {i} of {self._name()} (of shape {tuple(value.shape)}) "
                    "requires a gradient; detach it. Parameters are used by the function without "
                    "being passed to it."
                )
        if backend.capturable:
            for optimizer in watch.optimizers:
                if any(group.get("capturable") is False for group in optimizer.param_groups):
                    raise GraphError(
                        f"{self._name()} uses an optimizer {type(optimizer).__name__} that was "
                        "built without capturable=True, so that its step waits for the device"
                    )

    def _deliver(self, entry: Entry) -> Any:
        if not entry.outputs:
            return entry.plan
        if self.clone_outputs:
            outputs = entry.copies()
        else:
            outputs = [t.detach() for t in entry.outputs]
        return _rebuild(entry.plan, iter(outputs))


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def _flatten(value: Any, parts: list[Any], tensors: list[Tensor]) -> None:
    """Notes the structure of a value as a part of a key, and its tensors.

    Raises:
        TypeError: for what is no plain tensor and has no hash.
    """
    kind = type(value)
    if kind in _PLAIN:
        tensors.append(value)
        parts += (value.shape, value.dtype, value.device, layout(value), value.requires_grad)
    elif isinstance(value, (list, tuple)):
        parts += (kind, len(value))
        for item in value:
            _flatten(item, parts, tensors)
    elif kind is dict:
        parts += (kind, *value)
        for item in value.values():
            _flatten(item, parts, tensors)
    elif kind is TensorDict or is_tensor_collection(value):
        parts += (kind, value.batch_size)
        for key in leaf_keys(value):
            parts.append(key)
            _flatten(_entry_of(value, key), parts, tensors)
    else:
        if isinstance(value, Tensor):
            raise TypeError(f"a graph takes plain tensors, got a {kind.__name__}")
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"an argument of type {kind.__name__} cannot be part of a graph's key since it has "
                "no hash; pass tensors, tensordicts, or something hashable"
            ) from None
        # The type as well: 1, 1.0 and True are equal.
        parts += (kind, value)


def _entry_of(tensordict: Any, key: Any) -> Any:
    """An entry, unwrapped where it is no tensor."""
    value = tensordict.get(key)
    return value.data if is_non_tensor(value) else value


def _rebuild(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, taken in the order of `_flatten`."""
    kind = type(value)
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        items = [_rebuild(item, tensors) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if kind is dict:
        return {key: _rebuild(item, tensors) for key, item in value.items()}
    if is_tensor_collection(value) and not is_non_tensor(value):
        # A shallow copy: nested tensordicts are its own, tensors are not.
        new = value.copy()
        for key in leaf_keys(value):
            if isinstance(_entry_of(value, key), Tensor):
                new.set(key, next(tensors))
        return new
    return value
