"""Rollouts whose policy and environment step are one CUDA graph."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from fastprob.graphs._backend import Backend
from fastprob.graphs._table import GraphInfo
from fastprob.graphs.step import CudaGraphStep

EnvStep = Callable[[TensorDictBase], tuple[TensorDictBase, TensorDictBase]]


class _Memory:
    """Where a rollout of one kind lives on the device.

    Attributes:
        root: what the next step starts from.
        steps: the transitions, `[steps, *batch]`; None until the first one has shown its entries.
        clock: int64 `[1]`, the step that is next.
    """

    def __init__(self, root: TensorDictBase, device: torch.device) -> None:
        self.root = root.clone()
        self.steps: TensorDict | None = None
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)


class Rollout:
    """Steps a policy in a batched environment; see `rollout`, which makes one.

    Attributes:
        steps: how many steps a call makes.
    """

    def __init__(
        self,
        env_step: EnvStep,
        policy: Callable[[Any], Any],
        steps: int,
        *,
        watch: Iterable[nn.Module] = (),
        max_graphs: int = 4,
        clone_outputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if not callable(env_step) or not callable(policy):
            raise TypeError(
                "env_step and policy must be callable, got "
                f"{type(env_step).__name__} and {type(policy).__name__}"
            )
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps must be an int of 1 or more, got {steps!r}")
        self.steps = steps
        self._clone = clone_outputs
        self._max = max_graphs
        self._memories: OrderedDict[Any, _Memory] = OrderedDict()
        self._lock = threading.RLock()
        modules = [m for m in (policy, env_step, *watch) if isinstance(m, nn.Module)]
        # Not a bound method: it would tie this object and the step into a reference cycle.
        advance = functools.partial(_rollout_step, env_step, policy, steps)
        self._step = CudaGraphStep(advance, watch=modules, max_graphs=max_graphs, **kwargs)

    @property
    def graphs(self) -> list[GraphInfo]:
        """The graphs that are held, the least recently used first."""
        return self._step.graphs

    def reset(self) -> None:
        """Frees all graphs and buffers."""
        with self._lock:
            self._memories.clear()
            self._step.reset()

    def __call__(self, tensordict: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        """Makes the steps.

        Args:
            tensordict: where the environments are, `[*batch]`; left as it is.

        Returns:
            the transitions, `[*batch, steps]`, and where the environments are now, `[*batch]`.

        Raises:
            KeyError: if `env_step` does not return every entry of `tensordict` for the next step.
            TypeError: if `env_step` returns something else than two tensordicts.
            GraphError: if the steps cannot be captured; see `CudaGraphStep`.
        """
        with self._lock, torch.no_grad():
            memory = self._memory(tensordict)
            for key, value in memory.root.items(True, True):
                if isinstance(value, Tensor):
                    value.copy_(tensordict.get(key))
            memory.clock.zero_()
            self._step.repeat(self.steps, memory)
            assert memory.steps is not None
            batch = memory.root.batch_size
            data = memory.steps.permute(*range(1, len(batch) + 1), 0)
            if not self._clone:
                return data, memory.root.copy()
            return data.contiguous().clone(), memory.root.clone()

    def _memory(self, tensordict: TensorDictBase) -> _Memory:
        """The memory for rollouts that start as this one does."""
        leaves = sorted(tensordict.items(True, True), key=lambda item: str(item[0]))
        key: tuple[Any, ...] = (type(tensordict), tensordict.batch_size)
        device = tensordict.device
        for name, value in leaves:
            if isinstance(value, Tensor):
                key += (name, value.shape, value.dtype, value.device)
                device = value.device
        if device is None:
            raise ValueError(
                "a rollout starts from a tensordict with at least one tensor, got the entries "
                f"{[name for name, _ in leaves]}"
            )
        found = self._memories.pop(key, None)
        if found is None:
            found = _Memory(tensordict, device)
        self._memories[key] = found
        while len(self._memories) > self._max:
            self._memories.popitem(last=False)
        return found


def _rollout_step(
    env_step: EnvStep, policy: Callable[[Any], Any], steps: int, memory: _Memory
) -> None:
    """One step, all of it in place: this is what is captured."""
    result = env_step(policy(memory.root.copy()))
    if not isinstance(result, tuple) or not all(map(is_tensor_collection, result)):
        raise TypeError(
            "env_step must return two tensordicts, the transition and where the environments are "
            f"next, got {type(result).__name__}"
        )
    transition, root = result
    if memory.steps is None:
        memory.steps = transition.expand(steps, *transition.batch_size).clone()
    recorded = memory.steps
    assert recorded is not None
    for key, values in recorded.items(True, True):
        if isinstance(values, Tensor):
            values.index_copy_(0, memory.clock, transition.get(key).unsqueeze(0))
    memory.clock.add_(1)
    olds = {k: v for k, v in memory.root.items(True, True) if isinstance(v, Tensor)}
    places = {v.untyped_storage().data_ptr(): k for k, v in olds.items()}
    news = []
    for key in olds:
        new = root.get(key, None)
        if new is None:
            raise KeyError(
                f"env_step must return {key!r} for the next step, since the rollout started with "
                f"it; it returned {sorted(map(str, root.keys(True, True)))}"
            )
        # An entry that has moved to another key is read before it is overwritten.
        moved = places.get(new.untyped_storage().data_ptr(), key) != key
        news.append(new.clone() if moved else new)
    for old, new in zip(olds.values(), news, strict=True):
        old.copy_(new)


def rollout(
    env_step: EnvStep,
    policy: Callable[[Any], Any],
    steps: int,
    *,
    watch: Iterable[nn.Module] = (),
    generators: Iterable[torch.Generator] = (),
    warmup: int = 3,
    max_graphs: int = 4,
    clone_outputs: bool = True,
    device: torch.device | str | int | None = None,
    enabled: bool = True,
    backend: Backend | None = None,
) -> Rollout:
    """Makes a function that steps a policy in a batched environment, as CUDA graphs.

    One graph holds the policy, the environment's step, the recording of the transition and the
    carrying over of the state: a step is one replay, and nothing else happens on the host. The
    first steps of each kind run as they are, one by one; the graph is captured then. Batch sizes
    and interaction types have graphs of their own. Draws are those of eager steps.

    Args:
        env_step: takes the policy's result and returns the transition, to be recorded, and where
            the environments are next, with every entry that the rollout starts with; the signature
            of TorchRL's `step_and_maybe_reset`. Operations on the device only; resets are
            `torch.where`.
        policy: writes the action to the tensordict that it is given.
        steps: how many steps a call makes.
        watch: further modules that `env_step` uses.
        generators: generators that `env_step` draws from, besides torch's default ones.
        warmup: eager steps before a capture.
        max_graphs: graphs and buffers that are held.
        clone_outputs: False returns the rollout's own buffers, which the next call overwrites.
        device: the CUDA device; by default that of the policy, or of the first tensor.
        enabled: False makes all steps eagerly.
        backend: what captures, CUDA graphs by default.

    Returns:
        a `Rollout`: called with a tensordict `[*batch]` it returns the transitions
        `[*batch, steps]` and the tensordict `[*batch]` from which the next call goes on.

    Raises:
        TypeError: if `env_step` or `policy` is not callable.
        ValueError: if `steps`, `warmup` or `max_graphs` is not positive.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> import fastprob
        >>> def walk(td):
        ...     position = td["position"] + td["action"]
        ...     td["next", "position"] = position
        ...     return td, td.select("position").set("position", position)
        >>> def policy(td):
        ...     return td.set("action", torch.ones_like(td["position"]))
        >>> collect = fastprob.rollout(walk, policy, steps=3)
        >>> data, last = collect(TensorDict(position=torch.zeros(2), batch_size=[2]))
        >>> data["next", "position"]
        tensor([[1., 2., 3.],
                [1., 2., 3.]])
    """
    return Rollout(
        env_step,
        policy,
        steps,
        watch=watch,
        generators=generators,
        warmup=warmup,
        max_graphs=max_graphs,
        clone_outputs=clone_outputs,
        device=device,
        enabled=enabled,
        backend=backend,
    )
