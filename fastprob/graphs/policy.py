"""CudaGraphPolicy: a policy replayed as CUDA graphs, one for each way of calling it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection, unravel_key
from tensordict.nn import InteractionType, TensorDictModuleBase, dispatch
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
    put_back,
    surroundings,
    versions,
    warm_up,
)
from fastprob.graphs._watch import Settings, Watch
from fastprob.interaction import current_type, in_this_thread, read_type
from fastprob.io import skips_existing
from fastprob.reference._reduce import plain_tensors_only

# nn.Buffer is a Tensor with an attribute, and of type Tensor.
_PLAIN = frozenset({Tensor, nn.Parameter})
# Private to torch, and so looked for: only `debug=True` needs it.
_use_count = getattr(torch._C, "_storage_Use_Count", None)


class _Plan:
    """How the outputs of a graph become what the policy returns."""

    __slots__ = (
        "constants",
        "deleted",
        "into_out",
        "keys",
        "mutated",
        "passed",
        "skeleton",
        "uses",
    )

    def __init__(self) -> None:
        self.into_out = False  # the result is the tensordict_out that was given
        self.skeleton: TensorDict | None = None  # of a result that is neither it nor the input
        self.keys: list[Any] = []  # of the outputs
        self.constants: list[tuple[Any, Any]] = []  # entries that are no tensors
        self.passed: list[tuple[Any, int]] = []  # entries of such a result that are inputs
        self.deleted: list[Any] = []
        self.uses: list[int] = []  # of each output's memory, by nobody else


class CudaGraphPolicy(TensorDictModuleBase):
    """A policy replayed as CUDA graphs: one for each interaction type and input signature.

    Called like the policy, in its place. The first call of a kind warms the policy up, captures it
    and replays it; later calls of that kind copy their inputs into the graph's buffers, replay, and
    write the results to the tensordict. Nothing waits for the device. Neither the warm-up nor the
    capture advances a generator or changes a buffer, so that the draws are those of eager calls.

    A graph of its own serves each combination of
        - the interaction type in force, and tensordict's and fastprob's other global switches;
        - the inputs: presence, shape, dtype, device, order of dimensions in memory; value, where
          an input is no tensor; and the batch size and device of the tensordict;
        - grad mode, inference mode and autocast;
        - the configuration of probabilistic modules: keys, log-probability, spec, distribution,
          generator; and every module's training flag.

    Parameters and buffers may be updated in place at any time. Where their memory has moved (`.to`,
    `load_state_dict(assign=True)`, `TensorDict.to_module`) the graph is captured anew. Tensors that
    a module keeps elsewhere, in a list for instance, must only change in place. Forward hooks and
    other Python code run at the capture and not in a replay.

    Without a CUDA device, or where the policy is not on one, calls run the policy directly.

    Args:
        policy: a tensordict module, network and head together, or a callable from tensordict to
            tensordict. What it reads are the entries under its `in_keys`; all entries where it has
            none, or draws several samples.
        warmup: eager runs before a capture.
        max_graphs: graphs that are held; beyond that the least recently used one goes.
        clone_outputs: True gives every call results in memory of their own. False hands over the
            graph's output buffers: they are valid until the next call that replays the same graph,
            which overwrites them.
        device: the CUDA device; by default that of the policy's parameters, or of the inputs.
        enabled: False runs the policy directly; an attribute, to be set at any time.
        debug: whether a replay first checks that no output it handed over is still in use,
            for `clone_outputs=False`. Takes 1.6 us for each output.
        backend: what captures, CUDA graphs by default; `RecordingBackend()` for tests on a CPU.

    Attributes:
        policy: the policy.

    Raises:
        TypeError: if `policy` is not callable.
        ValueError: if `warmup` or `max_graphs` is not positive.
        RuntimeError: for `debug=True`, where torch cannot count the users of memory.
        GraphError: in a call, for an input that needs a gradient or lies on another device, an
            output that needs one, and whatever cannot be captured. The message says which. The
            policy itself can go on being called; so can this object after `enabled = False`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule, TensorDictSequential
        >>> import fastprob
        >>> net = TensorDictModule(torch.nn.Linear(3, 2), in_keys=["obs"], out_keys=["loc"])
        >>> head = fastprob.ProbabilisticTensorDictModule(
        ...     in_keys={"param": "loc"}, out_keys=["action"]
        ... )
        >>> policy = fastprob.CudaGraphPolicy(TensorDictSequential(net, head))
        >>> with torch.no_grad():
        ...     td = policy(TensorDict(obs=torch.zeros(4, 3), batch_size=[4]))
        >>> td["action"].shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        policy: Callable[..., Any],
        *,
        warmup: int = 3,
        max_graphs: int = 16,
        clone_outputs: bool = True,
        device: torch.device | str | int | None = None,
        enabled: bool = True,
        debug: bool = False,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        if not callable(policy):
            raise TypeError(
                "policy must be a module or a function of a tensordict, got "
                f"{type(policy).__name__}"
            )
        if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 1:
            raise ValueError(f"warmup must be an int of 1 or more, got {warmup!r}")
        if debug and _use_count is None:
            raise RuntimeError("debug=True needs torch._C._storage_Use_Count, which is not there")
        self.policy = policy
        self.warmup = warmup
        self.clone_outputs = clone_outputs
        self.device = None if device is None else torch.device(device)
        self.enabled = enabled
        self.debug = debug
        self._given_backend = backend
        self._table = Table(max_graphs)
        self._backend: Backend | None = None
        self._watch: Watch | None = None
        self._settings: Settings = {}
        self._names: tuple[Any, ...] | None = None  # what the policy reads; None for everything
        self._device_type = "cpu"

    @property
    def in_keys(self) -> list[Any]:
        """The policy's in-keys."""
        return getattr(self.policy, "in_keys", [])

    @property
    def out_keys(self) -> list[Any]:
        """The policy's out-keys."""
        return getattr(self.policy, "out_keys", [])

    # public ---------------------------------------------------------------------------------

    @property
    def graphs(self) -> list[GraphInfo]:
        """What is held, the least recently used first."""
        with self._table.lock:
            return [entry.info() for entry in self._table.entries.values()]

    def reset(self) -> None:
        """Frees all graphs and their buffers."""
        with self._table.lock:
            self._forget()
            self._watch = None

    def capture(
        self,
        tensordict: TensorDictBase,
        interaction_types: Iterable[InteractionType | str | None] | None = None,
    ) -> None:
        """Captures ahead of the first call; no generator advances, and nothing is written.

        Args:
            tensordict: an input such as the calls will have; its values do not matter.
            interaction_types: one graph for each; by default for the one in force.

        Raises:
            GraphError: as in a call.
        """
        kinds = [current_type()] if interaction_types is None else list(interaction_types)
        for kind in kinds:
            with (
                in_this_thread(None if kind is None else read_type(kind, "interaction_types")),
                self._table.lock,
            ):
                self._make(tensordict, None, {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the policy.

        Signature: `forward(tensordict, tensordict_out=None, **kwargs)`. Also callable with the
        inputs themselves, as keywords or in the order of `in_keys`.

        Returns:
            what the policy returns.

        Raises:
            GraphError: see the class.
        """
        if len(args) == 1 and type(args[0]) is TensorDict and not kwargs:
            return self._call(args[0])
        if args:
            if is_tensor_collection(args[0]):
                return self._call(*args, **kwargs)
        elif is_tensor_collection(kwargs.get("tensordict")):
            return self._call(**kwargs)
        return self._dispatched(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy captures its own graphs.
        state = self.__dict__.copy()
        state["_table"] = self._table.max_graphs
        state["_backend"] = state["_watch"] = None
        state["_settings"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._table = Table(state["_table"])

    def _forget(self) -> None:
        self._table.clear(self._backend)
        self._settings.clear()

    # a call ---------------------------------------------------------------------------------

    def _call(self, tensordict: Any, tensordict_out: Any = None, **kwargs: Any) -> Any:
        if not plain_tensors_only() or nesting.depth:
            # Being compiled, batched, differentiated forwards, or part of a larger graph.
            return self._direct(tensordict, tensordict_out, kwargs)
        table = self._table
        with table.lock:
            backend = self._backend
            if backend is None or not backend.busy():
                try:
                    parts, values, watch = self._look(tensordict, tensordict_out, kwargs)
                except TypeError:
                    if self._backend is not None and self.enabled:
                        raise
                    # What cannot be part of a key is no matter where there is no graph.
                    return self._direct(tensordict, tensordict_out, kwargs)
                entry = table.find(parts)
                captures = self._captures(tensordict)
                if (
                    entry is None
                    or (entry.graph is None and captures)
                    or (entry.graph is not None and entry.places != watch.places())
                ):
                    entry = self._make(tensordict, tensordict_out, kwargs)
                    backend, captures = self._backend, self._captures(tensordict)
                if entry.graph is not None and captures:
                    backend.order()  # type: ignore[union-attr]
                    if self.debug and not self.clone_outputs:
                        self._check_unused(entry, tensordict)
                    entry.run(values)
                    return self._deliver(entry, values, tensordict, tensordict_out)
        return self._direct(tensordict, tensordict_out, kwargs)

    _dispatched = dispatch(auto_batch_size=False)(_call)

    def _direct(self, tensordict: Any, tensordict_out: Any, kwargs: dict[str, Any]) -> Any:
        if tensordict_out is not None:
            kwargs = {**kwargs, "tensordict_out": tensordict_out}
        return self.policy(tensordict, **kwargs)

    def _captures(self, tensordict: Any) -> bool:
        """Whether a call is for a graph; what happens to a locked tensordict the policy decides."""
        return self._backend is not None and self.enabled and not tensordict.is_locked

    # its key --------------------------------------------------------------------------------

    def _look(
        self, tensordict: Any, tensordict_out: Any, kwargs: dict[str, Any]
    ) -> tuple[list[Any], list[Tensor], Watch]:
        """The parts of a call's key, its input tensors, and what watches the modules."""
        watch = self._watch
        settings = None if watch is None else watch.configuration()
        if watch is None or settings is None:
            # A module was replaced: no graph holds any more.
            self._forget()
            watch = self._new_watch(tensordict)
            settings = watch.configuration()
        entries: Any = None
        if type(tensordict) is TensorDict:
            entries = tensordict._tensordict
            parts: list[Any] = [settings, tensordict._batch_size, tensordict._device]
        else:
            parts = [settings, tensordict.batch_size, tensordict.device]
        parts += surroundings(self._device_type)
        names = self._names
        if names is None or skips_existing():
            names = self._all_names(tensordict)
            parts.append(names)
        values: list[Tensor] = []
        for name in names:
            if entries is not None and type(name) is str:
                value = entries.get(name)
            else:
                value = tensordict.get(name, None)
            if type(value) in _PLAIN:
                values.append(value)
                parts += (
                    value.shape,
                    value.dtype,
                    value.device,
                    None if value.is_contiguous() else layout(value),
                    value.requires_grad,
                )
            elif value is None:
                parts.append(None)
            else:
                for inner, leaf in _leaves(name, value):
                    if type(leaf) in _PLAIN:
                        values.append(leaf)
                        parts += (inner, leaf.shape, leaf.dtype, leaf.device, layout(leaf))
                        parts.append(leaf.requires_grad)
                    else:
                        parts += (inner, *_constant(inner, leaf))
        if tensordict_out is not None:
            parts += ("tensordict_out", tensordict_out.batch_size, tensordict_out.device)
        for name, value in kwargs.items():
            parts += (name, *_constant(name, value))
        return parts, values, watch

    def _all_names(self, tensordict: Any) -> tuple[Any, ...]:
        """The entries that the policy may look at."""
        present = tuple(leaf_keys(tensordict))
        if self._names is None:
            return present
        # Where a sample that is there already is kept, its presence and value count.
        written = map(unravel_key, self.out_keys)
        return tuple(dict.fromkeys((*self._names, *(k for k in written if k in present))))

    def _new_watch(self, tensordict: Any) -> Watch:
        """Looks at the policy anew: its modules, what it reads, and on which device it is."""
        policy = self.policy
        roots = [policy] if isinstance(policy, nn.Module) else []
        before, watch = self._watch, Watch(roots, self._settings)
        device = self.device or watch.device()
        if device is None:
            tensors = (v for v in tensordict.values(True, True) if isinstance(v, Tensor))
            device = next((t.device for t in tensors), None)
        backend = backend_for(device, self._given_backend, self._backend)
        if backend is not self._backend or (before is not None and before.modules != watch.modules):
            self._forget()
            self._backend = backend
        self._watch = watch
        self._device_type = "cpu" if device is None else device.type
        if self._backend is not None:
            watch.settle_streams(self._backend.device)
        names = [unravel_key(k) for k in getattr(policy, "in_keys", ())]
        if not names or any(vars(m).get("num_samples") is not None for m in watch.modules):
            # Several samples expand the whole tensordict.
            self._names = None
        else:
            self._names = tuple(dict.fromkeys([*names, *watch.stream_keys()]))
        return watch

    # its graph ------------------------------------------------------------------------------

    def _make(self, tensordict: Any, tensordict_out: Any, kwargs: dict[str, Any]) -> Entry:
        """The entry for a call that has none yet, captured where it can be."""
        self._new_watch(tensordict)
        # Again: the streams have their generators now.
        parts, _, watch = self._look(tensordict, tensordict_out, kwargs)
        known = self._table.find(parts)
        captures = self._captures(tensordict)
        if known is not None:
            unmoved = known.graph is not None and known.places == watch.places()
            if unmoved or (known.graph is None and not captures):
                return known
        inputs, constants = self._inputs(tensordict)
        entry = Entry(current_type(), inputs)
        backend = self._backend
        # Somebody else's capture may be under way where this is the very first call.
        if captures and not backend.busy():  # type: ignore[union-attr]
            assert backend is not None
            self._check_inputs(inputs, backend.device)
            self._table.make_room(parts, backend)
            self._capture(entry, inputs, constants, tensordict, tensordict_out, kwargs)
        else:
            self._table.make_room(parts, backend)
        self._table.add(parts, entry)
        return entry

    def _inputs(self, tensordict: Any) -> tuple[list[tuple[Any, Tensor]], list[tuple[Any, Any]]]:
        """Entries of the input that are tensors, in the order of `_look`, and the others."""
        names = self._names
        if names is None or skips_existing():
            names = self._all_names(tensordict)
        found = ((n, v) for n in names if (v := tensordict.get(n, None)) is not None)
        leaves = [leaf for name, value in found for leaf in _leaves(name, value)]
        return (
            [(k, v) for k, v in leaves if type(v) in _PLAIN],
            [(k, v) for k, v in leaves if type(v) not in _PLAIN],
        )

    def _check_inputs(self, inputs: Sequence[tuple[Any, Tensor]], device: torch.device) -> None:
        name = self._policy_name()
        for key, value in inputs:
            if value.device != device:
                raise GraphError(
                    f"{name} is captured on {device}, but its input {key!r} is on {value.device}; "
                    f"move the tensordict with .to({str(device)!r})"
                )
            if value.requires_grad and torch.is_grad_enabled():
                raise GraphError(
                    f"the input {key!r} of {name} requires a gradient, which a replayed graph "
                    "cannot give; detach it, or call under torch.no_grad(). To train through the "
                    "policy, call it without a graph or capture the whole step (CudaGraphStep)."
                )

    def _capture(
        self,
        entry: Entry,
        inputs: Sequence[tuple[Any, Tensor]],
        constants: Sequence[tuple[Any, Any]],
        tensordict: Any,
        tensordict_out: Any,
        kwargs: dict[str, Any],
    ) -> None:
        backend, watch = self._backend, self._watch
        assert backend is not None and watch is not None
        name = self._policy_name()
        keys, values = [k for k, _ in inputs], [v for _, v in inputs]
        static = entry.static = [buffer_like(v) for v in values]
        skeleton = _skeleton(tensordict, [*keys, *(k for k, _ in constants)])
        room = None if tensordict_out is None else _skeleton(tensordict_out, [])

        def run() -> tuple[Any, Any, Any]:
            given = skeleton.copy()
            for key, value in zip(keys, static, strict=True):
                given.set(key, value)
            for key, value in constants:
                given.set_non_tensor(key, value)
            out = None if room is None else room.copy()
            return given, out, self._direct(given, out, kwargs)

        def fill() -> None:
            with torch.no_grad():
                for buffer, value in zip(static, values, strict=True):
                    buffer.copy_(value)

        generators = watch.generators()
        generators += [v for _, v in constants if isinstance(v, torch.Generator)]
        with put_back([*backend.default_generators(), *generators], watch.buffers()):
            for _ in range(self.warmup):
                fill()
                warm_up(backend, run)
            if not watch.compiled():
                fill()
                _, problem = examined(backend, run)
                if problem is not None:
                    raise GraphError(f"{name} cannot be captured: {problem}")
            entry.places, entry.held = watch.places(), watch.held()
            before = versions(static)
            entry.graph, (given, out, result) = capture(backend, run, generators, name)
        entry.plan = self._new_plan(entry, keys, given, out, result)
        entry.mutated = [i for i, v in enumerate(versions(static)) if v != before[i]]

    def _new_plan(self, entry: Entry, keys: list[Any], given: Any, out: Any, result: Any) -> _Plan:
        name = self._policy_name()
        if not is_tensor_collection(result):
            raise GraphError(
                f"{name} returned a {type(result).__name__}; a graph is for policies that return a "
                "tensordict"
            )
        plan = _Plan()
        plan.into_out = result is out
        if result is not given and result is not out:
            plan.skeleton = _skeleton(result, [])
        buffers = {id(t): i for i, t in enumerate(entry.static)}
        present = leaf_keys(result)
        for key in present:
            value = result.get(key)
            if not isinstance(value, Tensor):
                plan.constants.append((key, value.data if is_non_tensor(value) else value))
                continue
            index = buffers.get(id(value))
            if index is not None and (result is not given or keys[index] == key):
                if result is not given:
                    plan.passed.append((key, index))
                continue
            if value.requires_grad:
                raise GraphError(
                    f"the output {key!r} of {name} requires a gradient, which a replayed graph "
                    "cannot give; call under torch.no_grad(). To train through the policy, call it "
                    "without a graph or capture the whole step (CudaGraphStep)."
                )
            plan.keys.append(key)
            entry.outputs.append(value)
        if result is given:
            plan.constants = [(k, v) for k, v in plan.constants if k in self.out_keys]
            plan.deleted = [key for key in keys if key not in present]
        return plan

    def _policy_name(self) -> str:
        return getattr(self.policy, "__name__", None) or type(self.policy).__name__

    # its results ----------------------------------------------------------------------------

    def _deliver(
        self, entry: Entry, values: list[Tensor], tensordict: Any, tensordict_out: Any
    ) -> Any:
        """Writes what a replay has left in the output buffers."""
        plan: _Plan = entry.plan
        if self.clone_outputs:
            outputs = entry.copies()
        else:
            if not plan.uses:
                plan.uses = [_uses(t) for t in entry.outputs]
            # An alias, so that nobody can resize the buffer, and that its use can be counted.
            outputs = [t.detach() for t in entry.outputs]
        if entry.mutated:
            entry.write_back(values)
        target = tensordict
        if plan.skeleton is not None:
            target = plan.skeleton.copy()
        elif plan.into_out:
            target = tensordict_out
        if type(target) is TensorDict:
            entries = target._tensordict
            for key, value in zip(plan.keys, outputs, strict=True):
                if type(key) is str:
                    # What set() does with a checked entry; the capture has checked it.
                    entries[key] = value
                else:
                    target.set(key, value)
        else:
            for key, value in zip(plan.keys, outputs, strict=True):
                target.set(key, value)
        for key, i in plan.passed:
            target.set(key, values[i])
        for key, value in plan.constants:
            target.set_non_tensor(key, value)
        for key in plan.deleted:
            target.del_(key)
        return target

    def _check_unused(self, entry: Entry, tensordict: Any) -> None:
        """Raises where an output that was handed over is still in use.

        What the tensordict of this very call holds is about to be replaced by this call.
        """
        plan: _Plan = entry.plan
        if not plan.uses:
            return
        present = [tensordict.get(key, None) for key in plan.keys]
        held = [_memory(t) for t in present if isinstance(t, Tensor)]
        for key, output, before in zip(plan.keys, entry.outputs, plan.uses, strict=True):
            if _uses(output) > before + held.count(_memory(output)):
                raise GraphError(
                    f"the output {key!r} that an earlier call handed over is still in use, and "
                    "this call would overwrite it; with clone_outputs=False results are valid "
                    "until the next call of the same kind. Clone what has to last."
                )


def _uses(tensor: Tensor) -> int:
    """How many tensors and views share the memory of one."""
    assert _use_count is not None
    return _use_count(_memory(tensor))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _skeleton(tensordict: Any, keys: Sequence[Any]) -> TensorDict:
    """A tensordict without entries, but with the nested tensordicts that the keys lead through."""
    if type(tensordict) is TensorDict:
        return tensordict.select(*keys, strict=False).empty(recurse=True)
    return TensorDict({}, batch_size=tensordict.batch_size, device=tensordict.device)


def _leaves(name: Any, value: Any) -> list[tuple[Any, Any]]:
    """The leaves under an entry, by their full keys; those that are no tensors as they are."""
    if is_non_tensor(value):
        return [(name, value.data)]
    if not is_tensor_collection(value):
        return [(name, value)]
    path = (name,) if isinstance(name, str) else name
    inner = [(k, value.get(k)) for k in leaf_keys(value)]
    return [
        ((*path, *((k,) if isinstance(k, str) else k)), v.data if is_non_tensor(v) else v)
        for k, v in inner
    ]


def _constant(name: Any, value: Any) -> tuple[Any, Any]:
    """The part of a key for an input that is no plain tensor.

    Raises:
        TypeError: if it is a tensor after all, or has no hash.
    """
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name!r} is a {type(value).__name__}; a graph takes plain tensors, as entries of the "
            "tensordict"
        )
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{name!r} is a {type(value).__name__}, which cannot be part of a graph's key since it "
            "has no hash; pass a tensor, or something hashable such as a tuple"
        ) from None
    # The type as well: 1, 1.0 and True are equal.
    return type(value), value
