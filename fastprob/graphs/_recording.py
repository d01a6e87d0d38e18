"""A stand-in for CUDA graphs on a CPU: a tape of operations, replayed on the same memory.

What makes a graph a graph is kept: the branch that Python took is frozen, memory is fixed, inputs
are read from and outputs are written to it, parameters are those of the capture, capturing executes
nothing, and random draws are fresh at each replay. Tests of the rules need no GPU, and nor does a
look at whether a program can be captured.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastprob.graphs._backend import Graph, Result
from fastprob.graphs._probe import AsOnADevice, refuse, waits

_FACTORIES_OF_NOTHING = ("aten::empty", "aten::new_empty")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        found.extend(_tensors(value))
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _without_compiler() -> Any:
    """Runs compiled functions eagerly.

    Under a dispatch mode the compiler gives a function up for good: it would run eagerly ever
    after, outside the block too.
    """
    # Importing the compiler takes seconds; where nobody has, nothing is compiled.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


class _Tape(TorchDispatchMode):
    """Runs operations and notes them down, with what is needed to undo them."""

    def __init__(self, default_generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._fresh: set[int] = set()
        self._alias: dict[int, tuple[Tensor, Tensor]] = {}
        self._generators = {id(g): (g, g.get_state()) for g in default_generators}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("profiler::"):
            return func(*args, **kwargs)
        if waits(func, args, kwargs, "cpu"):
            raise refuse(func)
        generator = kwargs.get("generator")
        if generator is not None and id(generator) not in self._generators:
            self._generators[id(generator)] = (generator, generator.get_state())
        written = _written(func, args, kwargs)
        for tensor in written:
            if _storage(tensor) not in self._fresh:
                alias = self._fixed(tensor)
                self._before.append((alias, alias.clone()))
        fixed_args, fixed_kwargs = tree_map(self._fixed, (args, kwargs))
        out = func(*args, **kwargs)
        made = []
        if not any(r.alias_info is not None for r in func._schema.returns):
            # Some views do not declare themselves as such, _unsafe_view for one.
            given = {_storage(t) for t in _tensors((args, kwargs))}
            made = [self._own(t) for t in _tensors(out) if _storage(t) not in given]
        if written or (made and not name.startswith(_FACTORIES_OF_NOTHING)):
            self.operations.append((func, fixed_args, fixed_kwargs, made))
        return out

    def _own(self, tensor: Tensor) -> Tensor:
        self._fresh.add(_storage(tensor))
        return self._fixed(tensor)

    def _fixed(self, value: Any) -> Any:
        """The memory behind a tensor, whatever becomes of the tensor; other values as they are."""
        if not isinstance(value, Tensor):
            return value
        known = self._alias.get(id(value))
        if known is None:
            # The tensor is kept as well, so that no other one gets its id.
            known = self._alias[id(value)] = (value, value.detach())
        return known[1]

    def undo(self) -> None:
        """Puts back what was there before; what was made is filled with what shows up in results.

        A capture executes nothing, so that nobody must find anything in its outputs before the
        first replay.
        """
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        for generator, state in self._generators.values():
            generator.set_state(state)
        for _, _, _, made in self.operations:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))

    def memory(self) -> int:
        """Bytes of what was made."""
        sizes = {
            _storage(tensor): tensor.untyped_storage().nbytes()
            for _, _, _, made in self.operations
            for tensor in made
        }
        return sum(sizes.values())


def _replay(operations: list[Any], inference: bool) -> None:
    # Casts were noted down as operations.
    with (
        torch.inference_mode(inference),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        for func, args, kwargs, made in operations:
            out = func(*args, **kwargs)
            if made:
                for tensor, new in zip(made, _tensors(out), strict=True):
                    tensor.copy_(new)


class RecordingBackend:
    """Captures operations on CPU tensors on a tape, and replays them.

    Slower than calling the function, and only for tests. Operations of a `torch.compile`d function
    are noted down as eager ones. What looks at values on a CPU alone can be captured on a GPU but
    not here: the argument checks of `torch.distributions`, which
    `Distribution.set_default_validate_args(False)` switches off, and a short cut of fastprob's
    TruncatedNormal.

    Attributes:
        captures: how many captures were made.
    """

    capturable = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.captures = 0

    def busy(self) -> bool:
        return False

    def order(self) -> None:
        pass

    def aside(self, run: Callable[[], Result]) -> Result:
        return run()

    def capture(
        self, run: Callable[[], Result], generators: Sequence[torch.Generator]
    ) -> tuple[Graph, Result]:
        tape = _Tape([*self.default_generators(), *generators])
        try:
            with _without_compiler(), AsOnADevice(), tape:
                result = run()
        finally:
            with torch.no_grad():
                tape.undo()
        self.captures += 1
        inference = torch.is_inference_mode_enabled()
        replay = functools.partial(_replay, tape.operations, inference)
        return Graph(replay, tape.memory()), result

    def release(self, tensors: Sequence[Tensor]) -> None:
        pass

    def default_generators(self) -> list[torch.Generator]:
        return [torch.default_generator]
